"""Checkpoints are whole or absent, and damage is noticed."""

import json
import os
from pathlib import Path

import pytest
import torch

from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.run import checkpoint
from cvae.run.checkpoint import TrainingState


def snapshot(step: int) -> TrainingState:
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"m.w": torch.zeros(3)}}
    return TrainingState(tensors, {"step": step, "best_val_loss": 1.5})


def newest_step(folder: Path, warnings: list[str] | None = None) -> int:
    loaded = checkpoint.load_newest(folder, (warnings if warnings is not None else []).append)
    assert loaded is not None
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((3,), float(loaded.state["step"])))
    return int(loaded.state["step"])


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path, pytest.fail) is None
    checkpoint.save(tmp_path, snapshot(7), keep=3, best=False)
    loaded = checkpoint.load_newest(tmp_path, pytest.fail)
    assert loaded is not None
    assert loaded.state == {"step": 7, "best_val_loss": 1.5}
    assert torch.equal(loaded.tensors["optimizer"]["m.w"], torch.zeros(3))


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, snapshot(step), keep=2, best=step == 2)
    assert checkpoint.steps(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert checkpoint.load_weights(tmp_path, pytest.fail)[1] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        *checkpoint.steps(tmp_path),
    ]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove", "unlist", "brackets"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path, file: str, harm: str) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), keep=3, best=False)
    path = tmp_path / "step-00000002" / file
    content = path.read_bytes()
    if harm == "flip":
        path.write_bytes(content[:-4] + bytes([content[-4] ^ 16]) + content[-3:])
    elif harm == "remove":
        path.unlink()
    elif harm == "brackets":
        path.write_bytes(b"[" * 100_000)
    elif harm == "unlist":
        state = json.loads((path.parent / "state.json").read_text())
        del state["sha256"][file]
        (path.parent / "state.json").write_text(json.dumps(state))
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    warnings: list[str] = []
    assert newest_step(tmp_path, warnings) == 1
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]
    assert "\n" not in warnings[0]
    (tmp_path / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.load_newest(tmp_path, warnings.append)


def test_the_weights_of_a_damaged_best_one_are_passed_over_aloud(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), keep=3, best=True)
    checkpoint.save(tmp_path, snapshot(2), keep=3, best=False)
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    assert checkpoint.load_weights(tmp_path, warnings.append)[1] == 2
    assert "step-00000001 is damaged" in warnings[0]


def test_saving_over_a_damaged_one_mends_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), keep=3, best=False)
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, snapshot(1), keep=3, best=False)
    assert newest_step(tmp_path) == 1


def test_remains_of_a_killed_save_are_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), keep=3, best=False)
    (tmp_path / ".step-00000002.new").mkdir()
    (tmp_path / ".step-00000002.new" / "model.safetensors").write_bytes(b"half")
    assert newest_step(tmp_path) == 1
    checkpoint.save(tmp_path, snapshot(2), keep=3, best=False)
    assert newest_step(tmp_path) == 2


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full") or os.geteuid() != 0:
        pytest.skip("needs root for a small file system of its own")
    import subprocess

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        checkpoint.save(tmp_path, snapshot(1), keep=3, best=True)
        large = TrainingState({"model": {"w": torch.zeros(40_000)}}, {"step": 2})
        with pytest.raises(Exception, match=r"(?i)space"):
            checkpoint.save(tmp_path, large, keep=1, best=True)
        assert newest_step(tmp_path) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000001"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle in a checkpoint's place is damage, also with a checksum that fits."""
    checkpoint.save(tmp_path, snapshot(1), keep=3, best=False)
    folder = tmp_path / "step-00000001"
    torch.save({"w": torch.zeros(3)}, folder / "model.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["model.safetensors"] = sha256_of_file(folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.load_newest(tmp_path, lambda _: None)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = checkpoint.save(tmp_path, snapshot(1), keep=1, best=True)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode}


def test_what_cannot_be_removed_fails_no_save_and_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a folder stays while somebody has one of its removed files open."""

    def busy(*arguments: object, **more: object) -> None:
        raise OSError(39, "Directory not empty")

    checkpoint.save(tmp_path, snapshot(1), keep=1, best=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        for step in (2, 3):
            checkpoint.save(tmp_path, snapshot(step), keep=1, best=False)
    assert checkpoint.steps(tmp_path) == ["step-00000003"]
    checkpoint.save(tmp_path, snapshot(4), keep=1, best=False)
    checkpoint.save(tmp_path, snapshot(4), keep=1, best=False)  # over itself, as over a damaged one
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_what_was_loaded_holds_no_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), keep=1, best=False)
    loaded = checkpoint.load_step(tmp_path, 1)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    loaded.tensors["model"]["w"].add_(1)  # and it is the reader's own
