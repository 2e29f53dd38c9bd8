"""Brings journal lines to MLflow, each once. Importing this takes seconds: see mlflow_mirror.py.

Every call may be cut off before or after the store has done it, and is then made again. That is
harmless because each is idempotent: MLflow's SQL store takes (run, key, time, step, value) as a
point's identity and drops a second one; params, tags, status and dataset inputs overwrite; pictures
and artifacts have fixed names; the run itself carries a tag by which it is looked up first.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from cvae.errors import UserError
from cvae.run import journal
from cvae.sampling.export_format import CONFIG
from cvae.tracking import mlflow_model, mlflow_state, mlflow_tags
from cvae.tracking.mlflow_state import JOURNAL_FILE
from cvae.tracking.mlflow_store import create_store, experiment_id

_POINTS_PER_BATCH = 1000  # limits of MLflow's log_batch
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 500  # of servers before 2.8; newer ones take 6000
_DIGEST_LENGTH = 36
_THUMBNAIL = 256  # pixels, as in MLflow's own log_image
_RUN_DIR_TAG = "cvae.run_dir_id"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS"}
_MOST_ATTEMPTS = 10

_log = logging.getLogger(__name__)


class BadLine(Exception):
    """A journal line that MLflow can never take."""


class Pusher:
    """One run on its way from journal to MLflow; nobody else may push the same run meanwhile.

    Methods raise what MLflow raises while it is away, then can be called again at any time.
    Raises UserError where the run can never be in MLflow at all.
    """

    def __init__(self, run_dir: Path, tags: Mapping[str, str] | None = None) -> None:
        """tags: further ones of the run, as its parent's id."""
        self.run_dir = run_dir
        self._tags = dict(tags or {})
        self.state = mlflow_state.load(run_dir)
        self.uri = mlflow_state.tracking_uri(self.state)
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._failures = 0
        self._actions: dict[str, Callable[[dict[str, Any]], None]] = {
            "start": self._start,
            "end": self._end,
            "picture": self._picture,
            "artifact": self._artifact,
        }

    def push(self, acknowledged: Callable[[int], object] = lambda lines: None) -> None:
        """Pushes the lines that are new; `acknowledged` hears how many more have arrived."""
        file = self.run_dir / JOURNAL_FILE
        size = file.stat().st_size if file.exists() else 0
        if size == self.state.offset:
            return
        if size < self.state.offset:
            _log.warning("%s has become shorter: all of it goes again", file)
            self.state.offset = 0
        # MLflow must never know what a crash of this host could still take out of the journal.
        with open(file, "rb") as journal_file:
            os.fsync(journal_file.fileno())
        self._open()
        points: list[Metric] = []
        upto, lines = self.state.offset, 0
        for record, end in journal.read_each(file, self.state.offset):
            new = _points(record)
            action = self._actions.get(record["kind"]) if record else None
            if lines and (action or len(points) + len(new) > _POINTS_PER_BATCH):
                self._log_points(points)
                self._acknowledge(upto)
                acknowledged(lines)
                points, lines = [], 0
            if action and record:
                self._deliver(record, action)
            points += new
            upto, lines = end, lines + 1
        self._log_points(points)
        self._acknowledge(upto)
        acknowledged(lines)

    def end_unless_ended(self) -> None:
        """Ends a run whose process is gone without a word; `push` must have been through."""
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
            started = next((r["time"] for r, _ in self._records() if r), None)
            run = client.create_run(
                experiment_id(client, self._experiment()["name"], self.uri),
                start_time=_milliseconds(started) if started else None,
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
            _log.warning("run %s was deleted in MLflow: all of it goes anew", self.state.run_id)
            self.state.run_dir_id, self.state.run_id = uuid.uuid4().hex, None
            mlflow_state.save(self.run_dir, self.state)
        experiment = client.get_experiment_by_name(self._experiment()["name"])
        if experiment is None:
            return None
        found = client.search_runs(
            [experiment.experiment_id], f"tags.`{_RUN_DIR_TAG}` = '{self.state.run_dir_id}'"
        )
        return found[0] if found else None

    def _log_params(self, there: dict[str, str]) -> None:
        params = dict(_flatten(self._experiment()))
        for name in params.keys() & there.keys():
            if params[name] != there[name]:
                _log.warning("param %s was %s at first: kept", name, there[name])
        missing = [Param(name, value) for name, value in params.items() if name not in there]
        for start in range(0, len(missing), _PARAMS_PER_BATCH):
            self._api.log_batch(self._run_id, params=missing[start : start + _PARAMS_PER_BATCH])

    def _log_points(self, points: list[Metric]) -> None:
        if not points:
            return
        try:
            for start in range(0, len(points), _POINTS_PER_BATCH):
                self._api.log_batch(self._run_id, points[start : start + _POINTS_PER_BATCH])
            self._failures = 0
        except Exception as error:
            if not self._is_refusal(error):
                raise
            if len(points) == 1:
                _log.error("MLflow refuses %s at step %d: %s", points[0].key, points[0].step, error)
                return
            # One point that is refused takes its whole batch along: find it.
            self._log_points(points[: len(points) // 2])
            self._log_points(points[len(points) // 2 :])

    def _deliver(self, record: dict[str, Any], action: Callable[[dict[str, Any]], None]) -> None:
        try:
            action(record)
            self._failures = 0
        except Exception as error:
            if not self._is_refusal(error):
                raise
            _log.error("going on without this line: %s: %s: %s", record, type(error), error)

    def _is_refusal(self, error: Exception) -> bool:
        """Whether it is of no use to try the same again: not while MLflow is away.

        A request is refused if MLflow says that it is wrong, or fails time and again, and takes
        another one right then. (A server that is down, stuck, or short of disk takes none.)
        """
        if isinstance(error, (BadLine, KeyError)):
            return True
        try:
            self._api.set_tag(self._run_id, "cvae.probed", uuid.uuid4().hex)
        except Exception:
            return False
        self._failures += 1
        refused = getattr(error, "error_code", None) in _REFUSALS
        if refused or self._failures >= _MOST_ATTEMPTS:
            self._failures = 0
            return True
        return False

    def _start(self, record: dict[str, Any]) -> None:
        told = mlflow_tags.of_start(self.run_dir, record, self._get_run().data.tags)
        entities = [RunTag(name, value) for name, value in told.items()]
        self._api.log_batch(self._run_id, tags=entities)
        self._api.update_run(self._run_id, status="RUNNING")
        if record.get("data_name") and record.get("data_digest"):
            source = json.dumps({"uri": record.get("data_manifest")})
            digest = record["data_digest"][:_DIGEST_LENGTH]
            dataset = Dataset(record["data_name"], digest, "local", source)
            context = InputTag("mlflow.data.context", "training")
            self._api.log_inputs(self._run_id, [DatasetInput(dataset, [context])])

    def _end(self, record: dict[str, Any]) -> None:
        status = _STATUS.get(record["status"], "FAILED")
        self._api.set_tag(self._run_id, "end_reason", record.get("reason") or record["status"])
        self._api.set_terminated(self._run_id, status, _milliseconds(record["time"]))

    def _picture(self, record: dict[str, Any]) -> None:
        """What MlflowClient.log_image does, under a name that is the same at every attempt."""
        key, step, source = record["key"], record["step"], self.run_dir / record["path"]
        if not re.fullmatch(r"[a-zA-Z0-9_\-./ ]+", key):
            raise BadLine(f"{key!r} is no name for an image in MLflow")
        unique = uuid.uuid5(uuid.UUID(self._run_id), f"{key} {step}")
        time = _milliseconds(record["time"])
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{time}+{unique}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                with Image.open(source) as image:
                    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
                    image.save(Path(folder, f"{name}+compressed.webp"))
                shutil.copyfile(source, Path(folder, f"{name}.png"))
            except OSError as error:
                raise BadLine(f"{source}: {error}") from error
            self._api.log_artifacts(self._run_id, folder, "images")
        self._api.set_tag(self._run_id, "mlflow.loggedImages", "True")

    def _artifact(self, record: dict[str, Any]) -> None:
        source, folder = self.run_dir / record["path"], record.get("artifact_path")
        if not source.exists():
            raise BadLine(f"{source} is not there")
        # A run of before there were logged models has weights alone in its model/.
        if folder == mlflow_model.NAME and (source / CONFIG).is_file():
            _log.info("logging the model")
            try:
                mlflow_model.log_model(self._api, self._run_id, source)
            except (ValueError, UserError) as error:
                raise BadLine(f"{source}: {error}") from error
            return
        log = self._api.log_artifacts if source.is_dir() else self._api.log_artifact
        log(self._run_id, str(source), folder)

    @property
    def _api(self) -> MlflowClient:
        assert self._client is not None
        return self._client

    def _get_run(self) -> Run:
        return self._api.get_run(self._run_id)

    def _acknowledge(self, offset: int) -> None:
        if offset != self.state.offset:
            self.state.offset = offset
            mlflow_state.save(self.run_dir, self.state)

    def _records(self) -> Iterator[tuple[dict[str, Any] | None, int]]:
        return journal.read_each(self.run_dir / JOURNAL_FILE)

    def _experiment(self) -> dict[str, Any]:
        experiment: dict[str, Any] = yaml.safe_load((self.run_dir / "experiment.yaml").read_text())
        return experiment


def _points(record: dict[str, Any] | None) -> list[Metric]:
    if record is None or "metrics" not in record:
        return []
    time, step = _milliseconds(record["time"]), record["step"]
    return [Metric(name, value, time, step) for name, value in record["metrics"].items()]


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as in YAML) for every leaf; lists are leaves."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flatten(below, f"{name}.{key}" if name else str(key))
        return
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    yield name, text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - 1] + "…"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
