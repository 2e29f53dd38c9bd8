"""Files written by commit 0e448e0 open: stores, runs, a sweep, an export, and a report with the same numbers."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import report
from cvae.data.store import Store
from cvae.sampling import load
from tests.conftest import PROJECT_ROOT
from workflows import runs

ARCHIVE = PROJECT_ROOT / "tests" / "data" / "written_by_0e448e0.tar.gz"


@pytest.fixture
def old_home(home: Path) -> Path:
    shutil.unpack_archive(ARCHIVE, home)
    return home


def test_stores_are_intact(old_home: Path) -> None:
    for name in ("tiny-16", "tinytext-16"):
        store = Store(old_home / "data" / name)
        for split in ("train", "val"):
            store.verify(split)


def test_runs_and_the_sweep_are_shown(old_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["list"]) == 0
    assert runs.main(["show", "old-labels"]) == 0
    assert runs.main(["show", "oldsweep-20261125-144904-01-lr_0.003"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished") >= 6
    assert "old-captions" in shown


def test_a_run_and_an_export_draw_what_they_drew(old_home: Path) -> None:
    drawn = np.load(old_home / "drawn.npy").astype(int)
    for name in (str(old_home / "export"), "old-labels"):
        images = load(name).draw(["low", "high"], 4)
        assert np.abs(images.astype(int) - drawn).max() <= 1  # another CPU may round otherwise


def test_a_report_has_the_same_numbers(old_home: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert report.main(["--runs", "old-labels", "old-captions", "--out", str(out)]) == 0
    for name in ("runs", "claims"):
        before = pd.read_csv(old_home / "report" / f"{name}.csv")
        after = pd.read_csv(out / "tables" / f"{name}.csv")
        # That commit counted the time until a later evaluation as the run's own.
        before = before.drop(columns=["minutes", "seconds per epoch"], errors="ignore")
        pd.testing.assert_frame_equal(after[before.columns], before, check_dtype=False)
