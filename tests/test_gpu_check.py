"""The GPU check in its small size: on a CPU, without most packages, and on a product broken on purpose."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT_ROOT

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
_BREAK = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if name == {module!r}:
            whole = spec.loader.exec_module
            def broken(module):
                whole(module)
                exec({code!r}, module.__dict__)
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


@pytest.mark.parametrize(
    ("name", "module", "code", "rows"),
    [
        (
            "not-finite",
            "cvae.training.meter",
            "Meter._first_bad = lambda self: self._noted.clear()",
            ["fp32: the step is named", "bf16: the step is named"],
        ),
        (
            "resume",
            "cvae.data.order",
            "import os\n_draw = _generator\n"
            "def _generator(seed, stream, counter): return _draw(seed + os.getpid(), stream, counter)",
            ["1 rank, fp32: resumed beside undisturbed", "1 rank: the journals' losses"],
        ),
    ],
)
def test_a_broken_product_fails(
    tmp_path: Path, name: str, module: str, code: str, rows: list[str]
) -> None:
    done = check(tmp_path, "--only", name, customized=_BREAK.format(module=module, code=code))
    assert done.returncode == 1, done.stdout + done.stderr
    findings = found(tmp_path)[name]["findings"]
    assert [one["what"] for one in findings if one["verdict"] == "failed"] == rows


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


def test_no_time_left_is_a_skip(tmp_path: Path) -> None:
    done = check(tmp_path, "--only", "resume", "--minutes", "0.1")
    assert done.returncode == 0
    assert "no time left" in found(tmp_path)["resume"]["findings"][0]["measured"]
