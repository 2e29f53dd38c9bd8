"""Checkpoints in the background: what was saved is what was handed over, in its order, and errors are told."""

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
    disk, said = SlowDisk(monkeypatch), list[dict[str, Any]]()
    saver, weights = CheckpointWriter(tmp_path, said.append), torch.zeros(1000)
    saver.save(snapshot(1, weights), keep=3, best=True)
    weights.fill_(7)  # training's next step, while nothing is on the disk yet
    assert said == []
    disk.go.set()
    saver.finish()
    found = checkpoint.load_step(tmp_path, 1)
    assert torch.equal(found.tensors["model"]["w"], torch.zeros(1000))
    assert [(s["step"], s["best"], s["path"].name) for s in said] == [(1, True, "step-00000001")]


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, said = SlowDisk(monkeypatch), list[dict[str, Any]]()
    saver, weights = CheckpointWriter(tmp_path, said.append), torch.zeros(1000)
    saver.save(snapshot(1, weights), keep=3, best=False)
    second = threading.Thread(target=saver.save, args=(snapshot(2, weights + 2), 3, False))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert disk.began == [1]
    disk.go.set()
    second.join(10)
    saver.finish()
    assert [s["step"] for s in said] == disk.began == [1, 2]
    for step, value in ((1, 0), (2, 2)):  # the buffers of the first were not the second's yet
        found = checkpoint.load_step(tmp_path, step).tensors["model"]["w"]
        assert torch.equal(found, torch.full((1000,), float(value)))


def test_a_full_disk_is_told_at_once_and_raised_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Path:
        raise OSError(28, "No space left on device")

    said: list[dict[str, Any]] = []
    saver, weights = CheckpointWriter(tmp_path, said.append), torch.zeros(10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        saver.save(snapshot(1, weights), keep=3, best=False)
        # Nothing was ever written: another attempt would begin at step 0 and end here again.
        with pytest.raises(UserError, match=r"no checkpoint could be written .*No space left"):
            saver.finish()
    assert said == [{"step": 1, "error": "[Errno 28] No space left on device"}]
    saver.save(snapshot(2, weights), keep=3, best=False)
    saver.finish()
    assert checkpoint.steps(tmp_path) == ["step-00000002"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        saver.save(snapshot(3, weights), keep=3, best=False)
        with pytest.raises(OSError, match="No space left"):
            saver.finish()
