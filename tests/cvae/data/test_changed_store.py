"""A store that was changed after its preparation: found at the next opening, whatever was changed and how."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvae.config.experiment import Experiment
from cvae.data import experiment_data, verified_checksums
from cvae.data.experiment_data import open_data
from cvae.data.store import open_store
from cvae.errors import UserError
from tests.conftest import tiny_experiment

CAPTIONED = Experiment.model_validate(tiny_experiment(captioned=True))
LABELLED = Experiment.model_validate(tiny_experiment())


def reseal(root: Path) -> None:
    """Gives the manifest the lengths and checksums that the files have now."""
    tree = json.loads((root / "manifest.json").read_text())
    for split, content in tree["splits"].items():
        for name, entry in content["files"].items():
            file = root / split / name
            entry["bytes"] = file.stat().st_size
            entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(tree))


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        file = root / "train" / name
        np.save(file, change(np.load(file)))

    return act


def replaced(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        file = root / "train" / name
        content = file.read_bytes()
        assert old in content
        file.write_bytes(content.replace(old, new, 1))

    return act


# Of a captioned store; each leaves the length of the file as it was.
AT_EQUAL_SIZE = {
    "every pixel inverted": changed("images.npy", lambda a: 255 - a),
    "one bit": replaced("images.npy", b"'|u1'", b"'|i1'"),
    "another order": replaced("images.npy", b"False", b"True "),
    "whole numbers for floats": replaced("text/toy.npy", b"<f4", b"<i4"),
    "the other end first": replaced("text/toy.npy", b"<f4", b">f4"),
    "transposed": changed("text/toy.npy", lambda a: a.reshape(a.shape[::-1])),
    "offsets a thousand times": changed("caption_offsets.npy", lambda a: a * 1000),
    "offsets that fall": changed("caption_offsets.npy", lambda a: a[::-1].copy()),
    "ids as floats": changed("ids.npy", lambda a: a.astype(float)),
    "a header of noise": replaced("ids.npy", b"{'descr", b"{{{{{{{"),
    "a deep header": replaced("ids.npy", b"{'descr': '<i8', 'fort", b"(" * 22),
    "no array at all": replaced("images.npy", b"\x93NUMPY", b"PK\x03\x04zip"[:6]),
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", AT_EQUAL_SIZE)
def test_a_file_changed_at_equal_size_is_refused(
    tiny_captioned_store: Path, kind: str, sealed: bool
) -> None:
    open_data(CAPTIONED)
    AT_EQUAL_SIZE[kind](tiny_captioned_store)
    if sealed:
        if kind == "every pixel inverted":
            return  # a store as good as any
        reseal(tiny_captioned_store)
    with pytest.raises(UserError, match=r"train/.* is damaged \("):
        open_data(CAPTIONED)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", -1),
        ("image_size", 10**30),
        ("image_size", 32),
        ("channels", 3),
        ("channels", 0),
        ("classes", []),
        ("classes", ["low", "high"]),
        ("splits.train.images", -1),
        ("splits.train.images", 0),
        ("splits.train.images", 49),
        ("splits.train.images", 10**30),
        ("splits.train.files", {}),
        ("splits.train.files", {"../../secret": {"bytes": 1, "sha256": "0" * 64}}),
        ("splits", {"../train": {}}),
        ("splits", []),
        ("text_encoders", 3),
        ("format", None),
    ],
)
def test_odd_manifests_are_one_line(tiny_store: Path, key: str, value: object) -> None:
    file = tiny_store / "manifest.json"
    tree = json.loads(file.read_text())
    *outer, last = key.split(".")
    block = tree
    for name in outer:
        block = block[name]
    block[last] = value
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError) as refused:
        open_data(LABELLED)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "content", ["", "[]", "nul", "[" * 100_000, '"\\ud800"', "{}", "\0", "1e999"]
)
def test_manifests_that_are_none(tiny_store: Path, content: str) -> None:
    (tiny_store / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_store("tiny", 16)


@pytest.mark.parametrize("content", ["", "[1]", "{}", "[" * 100_000, '["one caption"]'])
def test_captions_that_are_none(tiny_captioned_store: Path, content: str) -> None:
    (tiny_captioned_store / "train" / "captions.json").write_text(content)
    reseal(tiny_captioned_store)
    with pytest.raises(UserError, match=r"captions\.json is damaged"):
        _ = open_data(CAPTIONED).train.captions


def test_labels_outside_the_classes_are_refused(tiny_store: Path) -> None:
    for number in (-1, 3, 2**40):
        changed("labels.npy", lambda a, n=number: np.where(a == 1, n, a))(tiny_store)  # type: ignore[misc]
        reseal(tiny_store)
        with pytest.raises(UserError, match="labels are not all from 0 to 2"):
            open_data(LABELLED)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files count as settled at once; the list has those that were read whole."""
    monkeypatch.setattr(verified_checksums, "_SETTLED_S", -1.0)
    read: list[Path] = []
    hashed = verified_checksums.sha256_of_file

    def counted(path: Path, advance: Callable[[int], object]) -> str:
        read.append(path)
        return hashed(path, advance)

    monkeypatch.setattr(verified_checksums, "sha256_of_file", counted)
    return read


def test_a_store_is_read_once(tiny_store: Path, settled: list[Path], home: Path) -> None:
    for _ in range(3):
        open_data(LABELLED)
    assert len(settled) == len(set(settled)) == 6

    images = tiny_store / "val" / "images.npy"
    status = images.stat()
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    time.sleep(0.02)  # a tick of the file system's clock
    images.write_bytes(content)
    os.utime(images, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (images.stat().st_mtime_ns, images.stat().st_size) == (
        status.st_mtime_ns,
        status.st_size,
    )
    for _ in range(2):
        with pytest.raises(UserError, match=r"val/images\.npy is damaged \(its sha256"):
            open_data(LABELLED)
    assert settled[6:] == [images, images]

    content[-1] ^= 1
    images.write_bytes(content)
    open_data(LABELLED)
    (memory,) = (home / ".verified").glob("*.json")
    for odd in ("", "[]", "[" * 100_000, '{"a": ' + "{}" * 3):
        memory.write_text(odd)
        before = len(settled)
        open_data(LABELLED)
        assert len(settled) == before + 6


def test_what_was_just_written_is_not_remembered(tiny_store: Path, home: Path) -> None:
    open_data(LABELLED)
    assert not list((home / ".verified").glob("*.json"))


def test_without_a_place_to_remember_it_is_read_again(
    tiny_store: Path, settled: list[Path], home: Path
) -> None:
    (home / ".verified").write_text("in the way")
    for _ in range(2):
        open_data(LABELLED)
    assert len(settled) == 12


def test_ranks_of_a_host_read_a_store_once(
    tiny_store: Path, settled: list[Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, log = verified_checksums.sha256_of_file, home / "log"

    def slow(path: Path, advance: Callable[[int], object]) -> str:
        with log.open("a") as file:
            file.write(f"{path}\n")
        time.sleep(0.02)
        return hashed(path, advance)

    monkeypatch.setattr(verified_checksums, "sha256_of_file", slow)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                experiment_data.open_data(LABELLED)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 6
