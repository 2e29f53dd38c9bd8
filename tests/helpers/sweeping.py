"""Runs sweep.py as a process and reads the trials that it has written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import PROJECT_ROOT, tiny_experiment
from workflows.sweeps.directory import SweepDirectory, Trial


def write(home: Path, space: object, **keys: object) -> str:
    training = {"epochs": 6, "eval_every": 2, "log_every": 5, **keys.pop("training", {})}  # type: ignore[dict-item]
    (home / "tiny.yaml").write_text(yaml.safe_dump(tiny_experiment(**training)))
    file = home / "sweep.yaml"
    tree = {"name": "s", "experiment": str(home / "tiny.yaml"), "space": space, **keys}
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def start(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "workflows/sweep.py", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=PROJECT_ROOT, text=True, **pipes)


def sweep(*words: str) -> tuple[int, str]:
    process = start(*words)
    output = process.communicate()[0]
    return process.returncode, output


def trials(name: str) -> list[Trial]:
    return SweepDirectory.open(name).trials()
