"""The GPU check in its small size: on a CPU, without most packages, and on a product broken on purpose."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT_ROOT
from tests.gpu_check import apart, runner
from tests.gpu_check.checks import CHECKS
from tests.gpu_check.runner import run_check

# What a machine with a GPU often lacks.
_ABSENT = (
    "submitit ray mlflow deepspeed diffusers pandas pycocotools sklearn optuna pyarrow jinja2 pytest"
    " pydantic pydantic_core"
)
_BLOCK = f"""
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {_ABSENT.split()!r}
        return None if absent else super().find_spec(name, path, target)
known = importlib.machinery.PathFinder
sys.meta_path = [Finder if finder is known else finder for finder in sys.meta_path]
"""
# A meter that sees no NaN, and batches that are others in each process.
_BREAK = """
import importlib.machinery, sys
_CODE = {
    "cvae.training.rates": "Meter._first_bad = lambda self: self._noted.clear()",
    "cvae.data.draws": "import os\\n_draw = _generator\\n"
    "def _generator(seed, stream, counter): return _draw(seed + os.getpid(), stream, counter)",
}
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if name in _CODE:
            whole = spec.loader.exec_module
            def broken(module):
                whole(module)
                exec(_CODE[name], module.__dict__)
            spec.loader.exec_module = broken
        return spec
known = importlib.machinery.PathFinder
sys.meta_path = [Finder if finder is known else finder for finder in sys.meta_path]
"""


def check(out: Path, *arguments: str, customized: str = "") -> "subprocess.CompletedProcess[str]":
    """Runs the check; `customized` is run first in every Python process that it starts."""
    out.mkdir(exist_ok=True)
    (out / "sitecustomize.py").write_text(customized)
    path = os.pathsep.join(filter(None, [str(out), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu_check", "--out", str(out), "--small", *arguments],
        cwd=PROJECT_ROOT,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )


def found(out: Path) -> dict[str, Any]:
    tree = json.loads((out / "gpu_check.json").read_text())
    return {one["name"]: one for one in tree["checks"]}


def test_needs_few_packages_and_says_what_it_skips(tmp_path: Path) -> None:
    names = ("losses-conv", "losses-ldm", "not-finite")
    done = check(tmp_path, "--only", *names, customized=_BLOCK)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = found(tmp_path)
    assert [checks[name]["verdict"] for name in names] == ["passed", "skipped", "passed"]
    assert checks["losses-ldm"]["findings"][0]["measured"] == "needs the package diffusers"
    table = (tmp_path / "gpu_check.md").read_text()
    assert "pydantic stand-in" in table
    for name in names:
        assert f"\n| **{name}** | {checks[name]['verdict']} |" in table


def test_a_broken_product_fails(tmp_path: Path) -> None:
    names = ("not-finite", "resume")
    done = check(tmp_path, "--only", *names, customized=_BREAK)
    assert done.returncode == 1, done.stdout + done.stderr
    checks = found(tmp_path)
    failed = [
        [one["what"] for one in checks[name]["findings"] if one["verdict"] == "failed"]
        for name in names
    ]
    assert failed == [
        ["fp32: the step is named", "bf16: the step is named"],
        ["1 rank, fp32: resumed beside undisturbed", "1 rank: the journals' losses"],
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "resum"], "error: --only resum: no such check; did you mean resume?"),
        (["--minutes", "nan"], "nan is not a time above 0"),
        (["--out", "/dev/null"], "error: --out /dev/null: is a file; name a folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    done = check(tmp_path, *arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_there_is_time_for_all_of_them() -> None:
    """Of nine minutes, the rest is for the start."""
    assert sum(one.seconds for one in CHECKS.values()) <= 500


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls from this process, which has imported everything already."""
    monkeypatch.setattr(apart, "_FORKS", multiprocessing.get_context("fork"))


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("seconds", "left_s", "why"),
    [
        (30, 29.0, "no time left: it takes about 30 s, 29 s were left"),
        (0, 0.0, "no time left: ended after 0 s"),
    ],
)
def test_no_time_left_is_a_skip(tmp_path: Path, seconds: int, left_s: float, why: str) -> None:
    slow = CHECKS["resume"]._replace(seconds=seconds)
    result = run_check(slow, tmp_path, True, left_s)
    assert result.verdict == "skipped"
    assert [finding.measured for finding in result.findings] == [why]


@pytest.mark.usefixtures("forks")
def test_a_check_that_hangs_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LEAST_S", 0)
    result = run_check(CHECKS["resume"]._replace(seconds=0), tmp_path, False, 99.0)
    assert [(one.verdict, one.measured) for one in result.findings] == [
        ("failed", "ended after 0 s")
    ]
