import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from cvae.data.store import Store, store_path
from cvae.errors import UserError
from cvae.preparation.coco import CocoRequest, prepare_coco
from cvae.preparation.fashion_mnist import prepare_fashion_mnist
from cvae.preparation.parts import parts_folder, run_parallel
from cvae.preparation.scenes_coco import prepare_scenes
from cvae.preparation.store_writer import locked, save_array
from cvae.progress import progress_bar
from tests.cvae.data.conftest import contents, write_coco
from tests.helpers.stores import write_idx_folder


def test_a_lock_lasts_as_long_as_its_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_hold, args=(tmp_path / "store", tmp_path / "held")
    )
    process.start()
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.02)
        with (
            pytest.raises(UserError, match="prepared by another process"),
            locked(tmp_path / "store"),
        ):
            pass
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with locked(tmp_path / "store"):
        pass


def _hold(path: Path, held: Path) -> None:
    with locked(path):
        held.touch()
        time.sleep(100)


def test_parts_of_other_settings_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    parts_folder(folder, {"size": 1})
    (folder / "a").touch()
    parts_folder(folder, {"size": 1})
    assert (folder / "a").exists()
    parts_folder(folder, {"size": 2})
    assert not (folder / "a").exists()


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    for number, array in enumerate(
        [
            np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
            np.zeros((0, 5), np.float32),
            np.arange(12, dtype=np.int64).reshape(3, 4).T,
        ]
    ):
        save_array(tmp_path / f"{number}.npy", array)
        back = np.load(tmp_path / f"{number}.npy")
        np.testing.assert_array_equal(back, array)
        assert back.dtype == array.dtype


def _half(number: int) -> int:
    if number == 3:
        raise OSError(errno.ENOSPC, "No space left on device")
    return number


def _die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_what_goes_wrong_in_a_worker_is_raised_here() -> None:
    with progress_bar(10, "item", "test") as bar:
        run_parallel(_half, [1, 2], bar)
        assert bar.n == 3
        with pytest.raises(OSError, match="No space left") as caught:
            run_parallel(_half, [1, 3], bar)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(UserError, match="a worker process was killed"):
            run_parallel(_die, [1], bar)
    assert not any("spawn_main" in line for line in _command_lines_of_children())


def _command_lines_of_children() -> list[str]:
    lines = []
    for child in psutil.Process().children():
        # A child that has ended since it was listed, waited for or not, runs nothing any more.
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(child.cmdline()))
    return lines


def test_an_install_cut_short_is_completed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_idx_folder(home / "idx")
    prepare_fashion_mnist(source)
    path = store_path("fashion_mnist", 28)
    whole = contents(path)
    shutil.rmtree(path)

    replaced = 0
    original = os.replace

    def replace_some(source: Path, target: Path) -> None:
        nonlocal replaced
        if Path(target).is_relative_to(path) and ".preparing" not in Path(target).parts:
            replaced += 1
            if replaced == 3:
                raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_some)
        with pytest.raises(KeyboardInterrupt):
            prepare_fashion_mnist(source)
    assert not (path / "manifest.json").exists()  # two files are there, but no store
    shutil.rmtree(source)  # nor is the source needed any more
    assert not prepare_fashion_mnist().made
    assert contents(path) == whole
    Store(path).verify()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
    )
    if mount.returncode != 0:
        pytest.skip("a small disk needs root to be mounted")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_costs_nothing(full_disk: Path, tmp_path: Path) -> None:
    source = write_idx_folder(tmp_path / "idx", train=600)
    command = [sys.executable, "workflows/prepare.py", "fashion_mnist", "--source", str(source)]
    result = subprocess.run(
        command, env={**os.environ, "CVAE_HOME": str(full_disk)}, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith(
        f"error: the disk of {full_disk}/data/fashion_mnist-28 is full;"
    )
    assert result.stderr.count("\n") == 1
    assert not list(full_disk.glob("data/*/manifest.json"))


def test_a_disk_that_fills_up_while_coco_is_prepared_costs_nothing(
    full_disk: Path, tmp_path: Path, small_bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_coco(tmp_path / "coco", {"val2017": 40})
    monkeypatch.setenv("CVAE_HOME", str(full_disk))
    with pytest.raises(UserError, match=r"the disk of .*coco-64 is full; what is finished is kept"):
        prepare_coco(CocoRequest(root, {"val": "val2017"}, 64, small_bert))
    assert not list(full_disk.glob("data/*/manifest.json"))
    subprocess.run(["mount", "-o", "remount,size=8m", full_disk], check=True)
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 64, small_bert)).store.verify()


@pytest.mark.parametrize("kind", ["folder", "file", "named pipe"])
def test_what_prepare_did_not_make_stays(home: Path, small_bert: str, kind: str) -> None:
    coco = write_coco(home / "source", {"val2017": 3})
    path = home / "data" / "coco-16"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    else:
        os.mkfifo(path)
    before = os.lstat(path)
    with pytest.raises(UserError, match=r"is not a folder|but no prepared store"):
        prepare_coco(CocoRequest(coco, {"val": "val2017"}, 16, small_bert))
    assert os.lstat(path).st_ino == before.st_ino
    drawn = home / "data" / "scenes-coco"
    drawn.mkdir()
    (drawn / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"is not ours to overwrite"):
        prepare_scenes(4, text_encoder=small_bert)
    assert (drawn / "thesis.tex").read_text() == "mine"
