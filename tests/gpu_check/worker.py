"""One check in a process of its own: `python -m tests.gpu_check.worker NAME RESULT HOME small|full`.

Each finding is written as soon as it is there, so that a check that hangs or crashes keeps those before.
"""

import dataclasses
import faulthandler
import importlib
import json
import logging
import os
import sys
from pathlib import Path

from tests.gpu_check import stand_in
from tests.gpu_check.checks import CHECKS
from tests.gpu_check.findings import Finding, Skip, skipped


def main(name: str, result: Path, home: Path, size: str) -> None:
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING)
    os.environ["CVAE_HOME"] = str(home)
    stand_in.install_if_needed()
    from tests.gpu_check.setting import Setting

    module, _, function = CHECKS[name].target.partition(":")
    findings: list[Finding] = []
    try:
        check = getattr(importlib.import_module(f"tests.gpu_check.{module}"), function)
        for finding in check(Setting(size == "small", home), *CHECKS[name].arguments):
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


def _write(result: Path, findings: list[Finding], ended: bool) -> None:
    new = result.with_suffix(".new")
    rows = [dataclasses.asdict(finding) for finding in findings]
    new.write_text(json.dumps({"ended": ended, "findings": rows}))
    os.replace(new, result)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
