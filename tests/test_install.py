"""The installation keeps a PyTorch that was built for this machine's hardware."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.conftest import PROJECT_ROOT


def _needs() -> list[str]:
    """Returns the requirements of the package and of its extra `dev`, without their markers."""
    return [line.partition(";")[0].strip() for line in requires("cvae-workflow") or []]


def test_lock_keeps_a_pytorch_that_is_there(tmp_path: Path) -> None:
    """pip finds an older PyTorch for CUDA 12.6 among the installed packages, and leaves it."""
    metadata = tmp_path / "torch-2.10.0+cu126.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0+cu126\n"
    )
    (metadata / "RECORD").write_text("")
    (metadata / "INSTALLER").write_text("pip")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index"]
    done = subprocess.run(
        [*command, "--constraint", "constraints.txt", *_needs()],
        cwd=PROJECT_ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Requirement already satisfied: torch>=2.6" in done.stdout
    assert "Would install" not in done.stdout, done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ([], "pip show --quiet torch"),
        (["TORCH=cu126"], "--torch-backend 'cu126' --reinstall-package torch torch"),
    ],
)
def test_make_install_takes_the_build_of_pytorch(
    tmp_path: Path, setting: list[str], expected: str
) -> None:
    """make is asked what it would do in a fresh clone."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-torch.txt"):
        shutil.copy(PROJECT_ROOT / name, tmp_path)
    command = ["make", "--dry-run", "install", *setting]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert expected in done.stdout
    # The chosen build is there before anything that needs a PyTorch is installed.
    assert done.stdout.index(expected) < done.stdout.index("--editable")


def test_a_wheel_holds_the_templates(tmp_path: Path) -> None:
    """setuptools lists the files that it would put into a wheel of a copy of the packages."""
    for folder in ("cvae", "slurm", "workflows", "analysis"):
        shutil.copytree(
            PROJECT_ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT_ROOT / name, tmp_path)
    build = "from setuptools import setup; setup(script_args=['-q', 'build_py', '-d', 'built'])"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True)
    sources = {
        path.relative_to(tmp_path)
        for top in ("cvae", "slurm", "workflows", "analysis")
        for path in (tmp_path / top).rglob("*")
        if path.is_file()
    }
    built = {
        path.relative_to(tmp_path / "built")
        for path in (tmp_path / "built").rglob("*")
        if path.is_file()
    }
    assert built == sources
    assert Path("analysis/templates/report.html.j2") in built
