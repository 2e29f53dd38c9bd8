"""Brings journal lines to MLflow, each once. Importing this takes seconds: see mlflow_mirror.py.

A call may be cut off before or after the store has done it, and is then repeated. That is harmless
because each call is idempotent: MLflow's SQL store identifies a point by (run, key, time, step, value)
and drops a second one; params, tags, status and dataset inputs overwrite; pictures and artifacts have
fixed names; the run itself has a tag by which it is looked up before it is created.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from cvae.config import yaml_model
from cvae.errors import UserError
from cvae.run import journal
from cvae.run.journal_lines import Line
from cvae.sampling.export_format import CONFIG
from cvae.tracking import mlflow_model, mlflow_state
from cvae.tracking.mlflow_store import create_store, experiment_id, start_tags

_POINTS_PER_BATCH = 1000  # limits of MLflow's log_batch
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 500  # of servers before 2.8; newer ones take 6000
_DIGEST_LENGTH = 36
_THUMBNAIL = 256  # pixels, as in MLflow's own log_image
_RUN_DIR_TAG = "cvae.run_dir_id"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS"}
_MOST_FAILURES = 10

_log = logging.getLogger(__name__)


class UnusableFile(Exception):
    """A file that a journal line names is missing or damaged: MLflow can never have it."""


class Pusher:
    """Brings one run's journal to MLflow; no other process may push the same run meanwhile.

    Methods raise MLflow's exceptions while it is away, and can then be called again at any time. They
    raise UserError if the run can never be in MLflow at all.
    """

    def __init__(self, run_dir: Path, tags: Mapping[str, str] | None = None) -> None:
        """tags: additional tags of the run, for example its parent's id."""
        self.run_dir = run_dir
        self.state = mlflow_state.load(run_dir)
        self.uri = mlflow_state.tracking_uri(self.state)
        self._tags = dict(tags or {})
        self._journal = run_dir / mlflow_state.JOURNAL_FILE
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._failures: Counter[str] = Counter()
        self._actions: dict[str, Callable[[Line], None]] = {
            "start": self._start,
            "end": self._end,
            "picture": self._picture,
            "artifact": self._artifact,
        }

    def push(self, acknowledged: Callable[[int], object] = lambda lines: None) -> None:
        """Pushes the new lines; `acknowledged` is called with the number of lines that have arrived since."""
        size = self._journal.stat().st_size if self._journal.exists() else 0
        if size == self.state.offset:
            return
        if size < self.state.offset:
            _log.warning("%s has become shorter; sending all of it again", self._journal)
            self.state.offset = 0
        # MLflow must never have what a crash of this host could still remove from the journal.
        with open(self._journal, "rb") as file:
            os.fsync(file.fileno())
        self._open()
        points: list[Metric] = []
        end, lines = self.state.offset, 0

        def flush() -> None:
            self._log_points(points)
            self._save_offset(end)
            acknowledged(lines)

        for line, next_end in journal.read_each(self._journal, self.state.offset):
            new = _points(line) if line else []
            action = self._actions.get(line["kind"]) if line else None
            if lines and (action or len(points) + len(new) > _POINTS_PER_BATCH):
                flush()
                points, lines = [], 0
            if action and line:
                self._attempt(partial(action, line), str(line))
            points += new
            end, lines = next_end, lines + 1
        flush()

    def end_unless_ended(self) -> None:
        """Ends a run whose process has vanished; call it when `push` has succeeded."""
        if self._client is not None and self._get_run().info.status == "RUNNING":
            self._client.set_terminated(self._run_id, "KILLED")

    def _open(self) -> None:
        if self._client is not None:
            return
        create_store(self.uri)
        client = MlflowClient(tracking_uri=self.uri)
        run = self._find_run(client)
        if run is None:
            self.state.offset = 0
            times = (line["time"] for line, _ in journal.read_each(self._journal) if line)
            run = client.create_run(
                experiment_id(client, self._experiment()["name"], self.uri),
                start_time=next(map(_milliseconds, times), None),
                run_name=self.run_dir.name,
                tags={
                    _RUN_DIR_TAG: self.state.run_dir_id,
                    "mlflow.user": os.environ.get("USER") or f"uid {os.getuid()}",
                    "mlflow.source.type": "JOB",
                    "mlflow.source.name": "workflows/launch.py",
                    "run_dir": str(self.run_dir),
                    **self._tags,
                },
            )
        self._run_id = self.state.run_id = run.info.run_id
        mlflow_state.save(self.run_dir, self.state)
        self._client = client
        self._log_params(run.data.params)

    def _find_run(self, client: MlflowClient) -> Run | None:
        if self.state.run_id is not None:
            try:
                run = client.get_run(self.state.run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            _log.warning("run %s was deleted in MLflow; sending all of it again", self.state.run_id)
            self.state.run_dir_id, self.state.run_id = uuid.uuid4().hex, None
            mlflow_state.save(self.run_dir, self.state)
        experiment = client.get_experiment_by_name(self._experiment()["name"])
        if experiment is None:
            return None
        mark = f"tags.`{_RUN_DIR_TAG}` = '{self.state.run_dir_id}'"
        return next(iter(client.search_runs([experiment.experiment_id], mark)), None)

    def _log_params(self, logged: dict[str, str]) -> None:
        flat = yaml_model.flatten(self._experiment())
        params = {key: _text(value) for key, value in flat.items()}
        for name in params.keys() & logged.keys():
            if params[name] != logged[name]:
                _log.warning("param %s was %s at first; MLflow keeps that", name, logged[name])
        new = [Param(name, value) for name, value in params.items() if name not in logged]
        for start in range(0, len(new), _PARAMS_PER_BATCH):
            self._api.log_batch(self._run_id, params=new[start : start + _PARAMS_PER_BATCH])

    def _log_points(self, points: list[Metric]) -> None:
        """Logs points in batches; those of a batch that MLflow refuses one by one."""
        log = partial(self._api.log_batch, self._run_id)
        for start in range(0, len(points), _POINTS_PER_BATCH):
            batch = points[start : start + _POINTS_PER_BATCH]
            if not self._attempt(partial(log, batch), f"the points from {_name(batch[0])} on"):
                for point in batch:
                    self._attempt(partial(log, [point]), _name(point), most_failures=1)

    def _attempt(
        self, call: Callable[[], object], subject: str, most_failures: int = _MOST_FAILURES
    ) -> bool:
        """Returns whether the call succeeded; if not, MLflow refuses it, and the log names its subject.

        Raises the call's exception if it may succeed later, as while MLflow is away. A refusal is an
        answer that the request is wrong, or that many failures of the call while MLflow takes another
        request. (A server that is down, stuck or out of disk takes none.)
        """
        try:
            call()
        except Exception as error:
            if not isinstance(error, UnusableFile):
                try:
                    self._api.set_tag(self._run_id, "cvae.probed", uuid.uuid4().hex)
                except Exception:
                    raise error from None
                self._failures[subject] += 1
                code = getattr(error, "error_code", None)
                if code not in _REFUSALS and self._failures[subject] < most_failures:
                    raise
            _log.error("MLflow refuses %s: %s: %s", subject, type(error).__name__, error)
            return False
        del self._failures[subject]
        return True

    def _start(self, line: Line) -> None:
        tags = start_tags(self.run_dir, line, self._get_run().data.tags)
        self._api.log_batch(self._run_id, tags=[RunTag(*tag) for tag in tags.items()])
        self._api.update_run(self._run_id, status="RUNNING")
        if line.get("data_name") and line.get("data_digest"):
            source = json.dumps({"uri": line.get("data_manifest")})
            digest = line["data_digest"][:_DIGEST_LENGTH]
            dataset = Dataset(line["data_name"], digest, "local", source)
            context = InputTag("mlflow.data.context", "training")
            self._api.log_inputs(self._run_id, [DatasetInput(dataset, [context])])

    def _end(self, line: Line) -> None:
        self._api.set_tag(self._run_id, "end_reason", line["reason"] or line["status"])
        self._api.set_terminated(self._run_id, _STATUS[line["status"]], _milliseconds(line["time"]))

    def _picture(self, line: Line) -> None:
        """Does what MlflowClient.log_image does, with a name that is the same at every attempt."""
        key, step, source = line["key"], line["step"], self.run_dir / line["path"]
        if not re.fullmatch(r"[a-zA-Z0-9_\-./ ]+", key):
            raise UnusableFile(f"{key!r} is no name for an image in MLflow")
        unique = uuid.uuid5(uuid.UUID(self._run_id), f"{key} {step}")
        time = _milliseconds(line["time"])
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{time}+{unique}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                with Image.open(source) as image:
                    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
                    image.save(Path(folder, f"{name}+compressed.webp"))
                shutil.copyfile(source, Path(folder, f"{name}.png"))
            except OSError as error:
                raise UnusableFile(f"{source}: {error}") from error
            self._api.log_artifacts(self._run_id, folder, "images")
        self._api.set_tag(self._run_id, "mlflow.loggedImages", "True")

    def _artifact(self, line: Line) -> None:
        source, folder = self.run_dir / line["path"], line.get("artifact_path")
        if not source.exists():
            raise UnusableFile(f"{source} does not exist")
        # Runs from before there were logged models have nothing but weights in model/.
        if folder == mlflow_model.NAME and (source / CONFIG).is_file():
            _log.info("logging the model")
            try:
                mlflow_model.log_model(self._api, self._run_id, source)
            except (ValueError, UserError) as error:
                raise UnusableFile(f"{source}: {error}") from error
            return
        log = self._api.log_artifacts if source.is_dir() else self._api.log_artifact
        log(self._run_id, str(source), folder)

    @property
    def _api(self) -> MlflowClient:
        assert self._client is not None
        return self._client

    def _get_run(self) -> Run:
        return self._api.get_run(self._run_id)

    def _save_offset(self, offset: int) -> None:
        if offset != self.state.offset:
            self.state.offset = offset
            mlflow_state.save(self.run_dir, self.state)

    def _experiment(self) -> dict[str, Any]:
        experiment: dict[str, Any] = yaml.safe_load((self.run_dir / "experiment.yaml").read_text())
        return experiment


def _points(line: Line) -> list[Metric]:
    time, metrics = _milliseconds(line["time"]), line.get("metrics", {})
    return [Metric(name, value, time, line["step"]) for name, value in metrics.items()]


def _name(point: Metric) -> str:
    return f"{point.key} at step {point.step}"


def _text(value: Any) -> str:
    """Returns a value as in YAML, cut to the longest that MLflow takes."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - 1] + "…"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
