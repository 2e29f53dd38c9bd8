"""Runs the checks one after the other, each in a process that can crash or hang without harm to the rest."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu_check.checks import Check
from tests.gpu_check.findings import Finding, Verdict, judged, skipped, verdict_of

PROJECT_ROOT = Path(__file__).resolve().parents[2]
# A check may take so many times what it is expected to take.
_PATIENCE = 3
_LOG_LINES = 40


@dataclass
class Result:
    """What became of one check; its log is kept if it failed."""

    check: Check
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    log: str = ""

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.findings)


def run_check(check: Check, home: Path, small: bool, left_s: float) -> Result:
    """Runs one check and ends it, with all its children, after three times its time or when left_s are over."""
    if left_s < check.seconds:
        why = f"no time left: it takes about {check.seconds} s, {max(0.0, left_s):.0f} s were left"
        return Result(check, [skipped("", why)])
    limit_s = min(_PATIENCE * check.seconds, left_s)
    result, log = home / f"{check.name}.json", home / f"{check.name}.log"
    command = [sys.executable, "-m", "tests.gpu_check.worker", check.name]
    command += [str(result), str(home), "small" if small else "full"]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    seconds = time.monotonic() - began
    findings, ended = _read(result)
    text = log.read_text(errors="replace").strip()
    if status is None:
        findings.append(judged("", False, f"ended after {limit_s:.0f} s", "its time limit"))
    elif status != 0 or not ended:
        last = text.splitlines()[-1][:300] if text else "no output"
        how = f"signal {-status}" if status < 0 else f"status {status}"
        findings.append(judged("", False, f"{how}: {last}", "the check runs to its end"))
    result.unlink(missing_ok=True)
    outcome = Result(check, findings, seconds)
    if outcome.verdict == "failed":
        outcome.log = "\n".join(text.splitlines()[-_LOG_LINES:])
    return outcome


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of the check: its session is its own, so this meets nothing else."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(result: Path) -> tuple[list[Finding], bool]:
    try:
        told = json.loads(result.read_text())
    except FileNotFoundError:
        return [], False
    return [Finding(**row) for row in told["findings"]], told["ended"]
