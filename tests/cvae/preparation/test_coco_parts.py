"""Parts of a COCO store: filled by ranks, cut short by kills, made from something else."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from cvae.data.store import Store, open_store, store_path
from cvae.errors import UserError
from cvae.preparation import caption_encoding, image_decoding
from cvae.preparation.caption_encoding import CaptionParts
from cvae.preparation.coco import CocoRequest, prepare_coco
from cvae.preparation.part_workers import PartPlan, fill_parts
from tests.cvae.data.conftest import (
    contents,
    write_coco,
)

SPLITS = {"train": "train2017", "val": "val2017"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), {"train2017": 150, "val2017": 30})


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoding, "PART", 16)
    monkeypatch.setattr(caption_encoding, "PART", 4)


@pytest.mark.usefixtures("home", "small_parts")
def test_any_number_of_ranks_fills_the_same_store(
    root: Path, small_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    path = store_path("coco", 16)
    alone = contents(path)

    def by_ranks(plan: PartPlan) -> None:
        """Three ranks, of which the second gets nothing done."""
        plan.write()
        left = [plan.unfinished()]
        assert left == [plan.total]
        for rank in (0, 2):
            for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("LOCAL_RANK", 0)):
                monkeypatch.setenv(name, str(value))
            fill_parts(plan.folder)
            left.append(plan.unfinished())
        assert left[0] > left[1] > left[2] > 0

    shutil.rmtree(path)
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert), by_ranks)
    assert contents(path) == alone


@pytest.mark.usefixtures("home")
def test_a_rank_with_another_encoder_stops(
    root: Path, small_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Path(shutil.copytree(small_bert, tmp_path / "twin"))
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))

    def elsewhere(plan: PartPlan) -> None:
        plan.write()
        (twin / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred")
        fill_parts(plan.folder)

    with pytest.raises(UserError, match="is not the one that the preparation was begun with"):
        prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, str(twin)), elsewhere)


@pytest.mark.usefixtures("home")
def test_what_killed_writers_left_is_no_part_of_the_store(
    root: Path, small_bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_litter(self: CaptionParts, *arguments: object) -> int:
        folder = self.folder.parent / "val"
        (folder / ".captions.json.x7f").write_text("cut")
        return original(self, *arguments)  # type: ignore[arg-type]

    original = CaptionParts.write_vectors
    monkeypatch.setattr(CaptionParts, "write_vectors", leave_litter)
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    assert not any("x7f" in name for name in contents(store_path("coco", 16)))
    open_store("coco", 16).verify()


@pytest.mark.usefixtures("home", "small_parts")
def test_parts_of_another_source_are_not_used(
    root: Path, small_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_coco(tmp_path / "other", {"val2017": 31})
    with monkeypatch.context() as patch:
        patch.setattr("cvae.preparation.coco.CaptionParts.write_vectors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_coco(CocoRequest(other, {"val": "val2017"}, 16, small_bert))
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    begun = contents(store_path("coco", 16))
    shutil.rmtree(store_path("coco", 16))
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    assert contents(store_path("coco", 16)) == begun


def interrupt(*_: object) -> int:
    raise KeyboardInterrupt


def _prepare(home: Path, root: Path, encoder: str) -> None:
    os.environ["CVAE_HOME"] = str(home)
    image_decoding.PART, caption_encoding.PART = 16, 32
    prepare_coco(CocoRequest(root, SPLITS, 16, encoder))


def test_killed_at_many_moments_it_ends_in_the_same_bytes(
    root: Path, small_bert: str, tmp_path: Path
) -> None:
    # A fork server, so that torch is imported once and not once a kill.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.cvae.preparation.test_coco_parts", "torch", "transformers"]
    )

    def start(home: Path) -> multiprocessing.context.ForkServerProcess:
        process = context.Process(target=_prepare, args=(home, root, small_bert))
        process.start()
        return process

    start(tmp_path / "undisturbed").join()
    undisturbed = contents(tmp_path / "undisturbed" / "data" / "coco-16")

    home = tmp_path / "killed"
    parts = home / "data" / "coco-16" / ".preparing"
    finished: dict[Path, int] = {}
    for count in (0, 5, 22):  # of finished parts: before, in decoding, in encoding
        process = start(home)
        while process.is_alive() and len(finished_parts(parts)) < count:
            time.sleep(0.002)
        assert process.pid is not None
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert psutil.wait_procs(workers, timeout=10)[1] == []  # no orphan works on
        now = finished_parts(parts)
        assert finished.items() <= now.items()  # no finished part was made again
        finished = now
    final = start(home)
    final.join()
    assert final.exitcode == 0
    assert contents(home / "data" / "coco-16") == undisturbed
    Store(home / "data" / "coco-16").verify()


def finished_parts(folder: Path) -> dict[Path, int]:
    """When each part was made."""
    files = [*folder.glob("*.images/0*.json"), *folder.glob("*.text/0*.npy")]
    return {file: file.stat().st_mtime_ns for file in files}
