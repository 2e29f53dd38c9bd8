"""Preparing on a real SLURM of two hosts."""

import shutil
from pathlib import Path

import pytest

from cvae.data.store import store_path
from tests.cvae.data.conftest import contents, small_bert, write_coco
from workflows.prepare import main

__all__ = ["small_bert"]
pytestmark = pytest.mark.cluster


@pytest.mark.usefixtures("cluster")
def test_two_hosts_prepare_the_same_bytes(
    home: Path, small_bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_coco(home / "coco", {"val2017": 40})
    command = ["coco", "--root", str(root), "--split", "val2017", "--size", "16"]
    command += ["--text", small_bert]
    assert main(command) == 0
    alone = contents(store_path("coco", 16))
    shutil.rmtree(store_path("coco", 16))
    assert main([*command, "--nodes", "2", "--gpus", "2", "--cluster", "testcluster"]) == 0
    assert "2 nodes × 1 = 2 ranks" in capsys.readouterr().out
    assert contents(store_path("coco", 16)) == alone
