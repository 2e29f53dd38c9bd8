"""prepare.py as it is called: what it says, and its exit status."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cvae.data.store import store_path
from cvae.preparation.store_writer import locked
from tests.conftest import PROJECT_ROOT
from tests.cvae.data.conftest import small_bert, write_coco
from tests.helpers.stores import write_idx_folder

__all__ = ["small_bert"]


def prepare(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "workflows/prepare.py", *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_help_comes_at_once() -> None:
    code = "import sys; sys.argv = ['prepare.py', '--help']; import workflows.prepare as p\n"
    code += "try: p.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'pycocotools'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    assert "fashion_mnist" in result.stdout
    assert result.stdout.endswith("[]\n")


def test_a_mistake_is_one_line_and_writes_nothing(home: Path) -> None:
    folder = write_idx_folder(home / "idx")
    images = folder / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-100])
    for arguments, message in (
        (["fashion_mnist", "--source", folder], "train-images-idx3-ubyte.gz is damaged"),
        (["scenes", "--count", "-5"], "--count: -5 is not a whole number above 0"),
        (["coco", "--root", home / "nowhere"], "must hold train2017/ and annotations/"),
        (["coco", "--root", home, "--split", "val2014", "val2017"], "would be one split"),
        (["coco", "--root", home, "--split", "../val2017"], "give the name of a folder in --root"),
        (["coco", "--root", images, "--download"], "is a file; it must be the folder"),
        (["mnist"], "invalid choice: 'mnist'"),
    ):
        result = prepare(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        assert result.stdout == ""
    assert not list((home / "data").glob("[!.]*"))


def test_an_encoder_out_of_reach_says_how_to_place_it_before_anything_is_decoded(
    home: Path,
) -> None:
    root = write_coco(home / "coco", {"val2017": 5})
    result = prepare(
        *("coco", "--root", root, "--split", "val2017"),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(home / "hub"),
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: text encoder 'bert-base-uncased' is neither here nor")
    assert "hf download bert-base-uncased --local-dir DIR" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list((home / "data").glob("[!.]*"))


def test_coco_is_prepared_once(home: Path, small_bert: str) -> None:
    root = write_coco(home / "coco", {"train2017": 120, "val2017": 20})
    (root / "train2017" / "000000000007.jpg").write_bytes(b"")
    command = ("coco", "--root", root, "--size", 16, "--text", small_bert)
    first = prepare(*command)
    assert first.returncode == 0
    lines = first.stdout.splitlines()
    assert "prepared" in lines[0]
    assert any(
        line.startswith("  train: 119 images") and "1 skipped (see manifest.json)" in line
        for line in lines
    )
    assert "    1 × empty file (000000000007.jpg)" in lines
    assert "Traceback" not in first.stderr
    assert "Loading weights" not in first.stderr  # transformers' own bars
    again = prepare(*command)
    assert again.returncode == 0
    assert "complete and intact: nothing to do" in again.stdout
    with locked(store_path("coco", 16)):
        began = time.monotonic()
        second = prepare(*command)
        assert second.returncode == 2
        assert "is being prepared by another process" in second.stderr
        assert time.monotonic() - began < 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(home: Path) -> None:
    home.chmod(0o500)
    result = prepare("fashion_mnist")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "Permission denied" in result.stderr
