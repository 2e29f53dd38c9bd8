"""Checkpoints in the background: what was handed over is saved, in order, and errors are reported."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cvae.errors import UserError
from cvae.run import checkpoint
from cvae.run.checkpoint import TrainingState
from cvae.training.checkpoint_writer import CheckpointWriter


def snapshot(step: int, weights: torch.Tensor) -> TrainingState:
    tensors = {"model": {"w": weights}, "optimizer": {"m.w": weights}}
    return TrainingState(tensors, {"step": step, "best_val_loss": 1.0})


class SlowDisk:
    """checkpoint.save that waits until it is let go, and notes the order of things."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go = threading.Event()
        self.began: list[int] = []
        self._save = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, folder: Path, what: TrainingState, keep: int, best: bool) -> Path:
        self.began.append(what.state["step"])
        assert self.go.wait(10)
        return self._save(folder, what, keep, best)


def test_training_goes_on_and_what_it_changes_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, reports = SlowDisk(monkeypatch), list[dict[str, Any]]()
    writer, weights = CheckpointWriter(tmp_path, reports.append), torch.zeros(1000)
    writer.save(snapshot(1, weights), keep=3, best=True)
    weights.fill_(7)  # training's next step, while nothing is on the disk yet
    assert reports == []
    disk.go.set()
    writer.finish()
    loaded = checkpoint.load_step(tmp_path, 1)
    assert torch.equal(loaded.tensors["model"]["w"], torch.zeros(1000))
    assert [(s["step"], s["best"], s["path"].name) for s in reports] == [(1, True, "step-00000001")]


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, reports = SlowDisk(monkeypatch), list[dict[str, Any]]()
    writer, weights = CheckpointWriter(tmp_path, reports.append), torch.zeros(1000)
    writer.save(snapshot(1, weights), keep=3, best=False)
    second = threading.Thread(target=writer.save, args=(snapshot(2, weights + 2), 3, False))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert disk.began == [1]
    disk.go.set()
    second.join(10)
    writer.finish()
    assert [s["step"] for s in reports] == disk.began == [1, 2]
    for step, value in ((1, 0), (2, 2)):  # the buffers of the first were not the second's yet
        loaded = checkpoint.load_step(tmp_path, step).tensors["model"]["w"]
        assert torch.equal(loaded, torch.full((1000,), float(value)))


def test_a_full_disk_is_reported_at_once_and_raised_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Path:
        raise OSError(28, "No space left on device")

    reports: list[dict[str, Any]] = []
    writer, weights = CheckpointWriter(tmp_path, reports.append), torch.zeros(10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        writer.save(snapshot(1, weights), keep=3, best=False)
        # Nothing was ever written: another attempt would begin at step 0 and end here again.
        with pytest.raises(UserError, match=r"no checkpoint could be written .*No space left"):
            writer.finish()
    assert reports == [{"step": 1, "error": "[Errno 28] No space left on device"}]
    writer.save(snapshot(2, weights), keep=3, best=False)
    writer.finish()
    assert checkpoint.steps(tmp_path) == ["step-00000002"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        writer.save(snapshot(3, weights), keep=3, best=False)
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
