"""What a run tells about itself: the journal and its mirror in MLflow. Rank 0 writes, the others are silent."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image

from cvae.distributed.ranks import Ranks
from cvae.preflight.inspection import Report
from cvae.run import checkpoint, journal
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.sampling import pictures
from cvae.sampling.export import write_model
from cvae.tracking import mlflow_mirror
from cvae.training.checkpoint_writer import Saver
from cvae.training.system_metrics import SystemMetrics

# At the end the mirror may be behind, or MLflow away. The run waits so long and no longer: what is missing
# by then is in the journal, and `runs.py sync` brings it to MLflow at any later time.
_MIRROR_PATIENCE_S = 30.0

_log = logging.getLogger(__name__)


class Record:
    def __init__(self, run: RunDirectory, writer: Journal | None, device: torch.device):
        self.run, self.writer = run, writer
        self.saver = Saver(run.checkpoints, self._written)
        self.step = 0
        self._system = SystemMetrics(device)
        starts = [line for line in journal.read(run.journal_file)[0] if line["kind"] == "start"]
        self.data_digest: str | None = starts[-1].get("data_digest") if starts else None
        """Of the data that the run was trained on so far."""
        self.begun = bool(starts)
        self._code: str | None = starts[-1].get("code") if starts else None

    def start(self, step: int, **facts: Any) -> None:
        self.step = step
        self._append("start", step=step, **facts)
        if self._code not in (None, facts["code"]):
            before, now = str(self._code)[:12], facts["code"][:12]
            self.notice(f"from step {step} with other code: {now}, until then {before}")
        _log.info("training from step %d on %d ranks", step, facts["world_size"])

    def preflight(self, report: Report) -> None:
        self._append("preflight", **report.line())
        for warning in report.texts("warning"):
            self.notice(warning)

    def step_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = step
        self._append("step", step=step, metrics=_prefixed("train", metrics))
        system = None if self.writer is None else self._system.measure()
        if system is not None:
            self._append("system", step=step, metrics=system)

    def epoch(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        self.step = step
        self._append("epoch", step=step, epoch=epoch, metrics=_prefixed("val", metrics))

    def pictures(self, step: int, images: Mapping[str, Image]) -> None:
        for key, image in images.items():
            path = self.run.pictures / f"{key}-{step:08d}.png"
            try:
                pictures.write_png(image, path)
            except OSError as error:
                self.notice(
                    f"the picture {path.name} could not be written: {error}; training goes on"
                )
                continue
            self._append("picture", step=step, key=key, path=str(path.relative_to(self.run.path)))

    def checkpoint(self, snapshot: checkpoint.TrainingState, keep: int, best: bool) -> None:
        """Returns when the snapshot has been copied; it is written while training goes on."""
        if self.writer is None:
            return
        # A host that crashes now must not come back with a checkpoint that is ahead of its journal.
        self.writer.sync()
        self.saver.save(snapshot, keep, best)

    def _written(self, said: dict[str, Any]) -> None:
        if "error" in said:
            self.notice(
                f"the checkpoint of step {said['step']} could not be written: {said['error']};"
                " training goes on and tries again when the next one is due"
            )
            return
        path = str(said.pop("path").relative_to(self.run.path))
        self._append("checkpoint", path=path, **said)

    def notice(self, message: str) -> None:
        _log.warning(message)
        self._append("notice", message=message)

    def final_model(self) -> None:
        """Puts the best weights and the experiment into model/, and the curves among the pictures."""
        if self.writer is None:
            return
        self.saver.finish()
        write_model(self.run, self.run.path / "model")
        self._append("artifact", path="model", artifact_path="model")
        try:
            curves = pictures.write_learning_curves(self.run)
        except OSError as error:
            self.notice(f"the learning curves could not be drawn: {error}")
            return
        self._append(
            "artifact", path=str(curves.relative_to(self.run.path)), artifact_path="figures"
        )

    def end(self, status: str, step: int, reason: str) -> None:
        """The last line of this stretch of the run."""
        self.saver.wait()
        _log.info("%s at step %d %s", status, step, reason)
        self._append("end", status=status, step=step, reason=reason)

    def _append(self, kind: str, **fields: Any) -> None:
        if self.writer is not None:
            self.writer.append(kind, **fields)


@contextmanager
def open_record(run: RunDirectory, ranks: Ranks, mirrored: bool) -> Iterator[Record]:
    """The record of a run, mirrored to MLflow by a process of its own for as long as the context lasts."""
    if not ranks.is_first:
        yield Record(run, None, ranks.device)
        return
    writer = Journal(run.journal_file)
    mirror = mlflow_mirror.start_mirror(run.path) if mirrored else None
    try:
        yield Record(run, writer, ranks.device)
    finally:
        writer.close()
        if mirror is not None and (behind := mirror.finish(_MIRROR_PATIENCE_S)):
            _log.warning("MLflow lacks %d journal lines; `runs.py sync %s`", behind, run.name)


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
