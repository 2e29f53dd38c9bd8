"""Logs a run to its journal, which another process mirrors to MLflow. Rank 0 writes; the others are silent."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image

from cvae.distributed.ranks import Ranks
from cvae.preflight.inspection import Report
from cvae.run import journal
from cvae.run.checkpoint import TrainingState
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.sampling import pictures
from cvae.sampling.export import write_model
from cvae.tracking import mlflow_mirror
from cvae.training.checkpoint_writer import CheckpointWriter
from cvae.training.record_failure import MIRROR_PATIENCE_S
from cvae.training.system_metrics import SystemMetrics

_log = logging.getLogger(__name__)


class RunLogger:
    def __init__(self, run: RunDirectory, writer: Journal | None, device: torch.device):
        """writer: None on every rank but the first."""
        self.run, self.writer = run, writer
        self.checkpoints = CheckpointWriter(run.checkpoints, self._checkpoint_ended)
        self.step = 0
        self._system = SystemMetrics(device)
        starts = [line for line in journal.read(run.journal_file)[0] if line["kind"] == "start"]
        self.begun = bool(starts)
        self.data_digest: str | None = starts[-1].get("data_digest") if starts else None
        """The digest of the data that the run was trained on so far."""
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

    def checkpoint(self, state: TrainingState, keep: int, best: bool) -> None:
        """Returns when the state has been copied; it is written while training goes on."""
        if self.writer is not None:
            # A host that crashes now must not come back with a checkpoint that is ahead of its journal.
            self.writer.sync()
            self.checkpoints.save(state, keep, best)

    def notice(self, message: str) -> None:
        _log.warning(message)
        self._append("notice", message=message)

    def final_model(self) -> None:
        """Writes the best weights and the experiment into model/, and draws the learning curves."""
        if self.writer is None:
            return
        self.checkpoints.finish()
        write_model(self.run, self.run.path / "model")
        self._append("artifact", path="model", artifact_path="model")
        try:
            curves = pictures.write_learning_curves(self.run)
        except OSError as error:
            self.notice(f"the learning curves could not be drawn: {error}")
            return
        path = str(curves.relative_to(self.run.path))
        self._append("artifact", path=path, artifact_path="figures")

    def end(self, status: str, step: int, reason: str) -> None:
        """Writes the last line of this attempt."""
        self.checkpoints.wait()
        _log.info("%s at step %d %s", status, step, reason)
        self._append("end", status=status, step=step, reason=reason)

    def _checkpoint_ended(self, fields: dict[str, Any]) -> None:
        if "error" in fields:
            self.notice(
                f"the checkpoint of step {fields['step']} could not be written: {fields['error']};"
                " training goes on and tries again when the next one is due"
            )
            return
        path = str(fields["path"].relative_to(self.run.path))
        self._append("checkpoint", **{**fields, "path": path})

    def _append(self, kind: str, **fields: Any) -> None:
        if self.writer is not None:
            self.writer.append(kind, **fields)


@contextmanager
def open_logger(run: RunDirectory, ranks: Ranks, mirrored: bool) -> Iterator[RunLogger]:
    """Yields the run's logger; with `mirrored`, MLflow follows for as long as the context lasts."""
    if not ranks.is_first:
        yield RunLogger(run, None, ranks.device)
        return
    writer = Journal(run.journal_file)
    mirror = mlflow_mirror.start_mirror(run.path) if mirrored else None
    try:
        yield RunLogger(run, writer, ranks.device)
    finally:
        writer.close()
        if mirror is not None and (behind := mirror.finish(MIRROR_PATIENCE_S)):
            _log.warning("MLflow lacks %d journal lines: sync the run %s later", behind, run.name)


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
