"""One check in a process of its own.

Each finding is written as soon as it is there, so that a check that hangs or crashes keeps those before.
"""

import dataclasses
import faulthandler
import importlib
import json
import logging
import os
from pathlib import Path

from tests.gpu_check import stand_in
from tests.gpu_check.checks import CHECKS
from tests.gpu_check.findings import Finding, Skip, skipped


def check(name: str, result: Path, home: Path, small: bool) -> None:
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING)
    os.environ["CVAE_HOME"] = str(home)
    stand_in.install_if_needed()
    from tests.gpu_check.setting import Setting

    if small:
        _use_one_thread()
    module, _, function = CHECKS[name].target.partition(":")
    findings: list[Finding] = []
    try:
        made = getattr(importlib.import_module(f"tests.gpu_check.{module}"), function)
        for finding in made(Setting(small, home), *CHECKS[name].arguments):
            findings.append(finding)
            _write(result, findings, ended=False)
    except Skip as reason:
        findings.append(skipped("", str(reason)))
    except ModuleNotFoundError as error:
        # A package of the project's own that is missing is a fault.
        if (error.name or "").partition(".")[0] in ("cvae", "slurm", "workflows", "tests", ""):
            raise
        findings.append(skipped("", f"needs the package {error.name}"))
    _write(result, findings, ended=True)


def _use_one_thread() -> None:
    """Tiny models gain nothing from threads, which wait for each other on a busy machine."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _write(result: Path, findings: list[Finding], ended: bool) -> None:
    new = result.with_suffix(".new")
    rows = [dataclasses.asdict(finding) for finding in findings]
    new.write_text(json.dumps({"ended": ended, "findings": rows}))
    os.replace(new, result)
