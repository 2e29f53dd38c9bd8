"""Runs the checks one after the other, each in a process that can crash or hang without harm to the rest."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu_check import apart, worker
from tests.gpu_check.checks import Check
from tests.gpu_check.findings import Finding, Verdict, judged, skipped, verdict_of

# A check may take so many times what it is expected to take, and a minute at least: a shared file system may be
# slow when it reads PyTorch for the first time. A busy CPU is slower still.
_PATIENCE, _LEAST_S, _LEAST_ON_A_CPU_S = 3, 60, 240
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
    """Runs one check and ends it, with all its children, when it hangs or left_s are over.

    Only the former is a fault: what there is no time for is skipped.
    """
    if left_s < check.seconds:
        why = f"no time left: it takes about {check.seconds} s, {max(0.0, left_s):.0f} s were left"
        return Result(check, [skipped("", why)])
    least_s = _LEAST_ON_A_CPU_S if small else _LEAST_S
    patience_s = max(least_s, _PATIENCE * check.seconds)
    limit_s = min(patience_s, left_s)
    result, log = home / f"{check.name}.json", home / f"{check.name}.log"
    began = time.monotonic()
    status = apart.call(worker.check, (check.name, result, home, small), log, limit_s)
    seconds = time.monotonic() - began
    findings, ended = _read(result)
    text = log.read_text(errors="replace").strip()
    if status is None and limit_s < patience_s:
        what = "the rest" if findings else ""
        findings.append(skipped(what, f"no time left: ended after {limit_s:.0f} s"))
    elif status is None:
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


def _read(result: Path) -> tuple[list[Finding], bool]:
    try:
        report = json.loads(result.read_text())
    except FileNotFoundError:
        return [], False
    return [Finding(**row) for row in report["findings"]], report["ended"]
