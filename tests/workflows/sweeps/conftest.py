"""A machine for sweeps."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def place(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with tiny data, on a machine without a SLURM controller."""
    home = tiny_store.parent.parent
    scontrol = home / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    return home
