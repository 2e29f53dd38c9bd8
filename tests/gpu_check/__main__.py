"""python -m tests.gpu_check [--out DIR] [--only NAME …] [--minutes 9] [--small]

Exit status: 0 everything passed, was measured or was skipped with its reason; 1 a check failed; 2 bad input.
"""

import argparse
import json
import math
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from cvae.command_line import Parser, run
from cvae.errors import UserError, did_you_mean
from tests.gpu_check import apart, facts, report
from tests.gpu_check.checks import CHECKS, Check
from tests.gpu_check.runner import Result, run_check

_LONGEST_START_S = 120


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    chosen = _chosen(options.only)
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {out}: is a file; name a folder") from None
    # A terminated check ends its children and leaves its table, like an interrupted one.
    signal.signal(signal.SIGTERM, _interrupt)
    deadline = time.monotonic() + 60 * options.minutes
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as home:
        machine = _facts(Path(home))
        small = options.small or machine["gpus"] == 0
        header = _header(machine, small)
        for key, value in header.items():
            print(f"{key}: {value}")
        report.write(out, header, results, chosen)
        for number, check in enumerate(chosen, start=1):
            print(f"{number:2}/{len(chosen)} {check.name:14} ", end="", flush=True)
            result = run_check(check, Path(home), small, deadline - time.monotonic())
            results.append(result)
            report.write(out, header, results, chosen[number:])
            print(_line(result), flush=True)
    print(f"{report.summary(results)}; the table is in {out / report.MARKDOWN}")
    return 1 if any(result.verdict == "failed" for result in results) else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m tests.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = "\n".join(f"  {check.name:14} {check.what}" for check in CHECKS.values())
    parser.epilog = f"checks, the most important first:\n{names}"
    default = Path("reports/gpu_check")
    parser.add_argument("--out", type=Path, default=default, help="folder of the table")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="just these checks")
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="for everything together")
    parser.add_argument(
        "--small", action="store_true", help="the size for a CPU; without a GPU it is always that"
    )
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return value


def _chosen(names: list[str]) -> list[Check]:
    for name in names:
        if name not in CHECKS:
            near = did_you_mean(name, CHECKS) or f"; there are {', '.join(CHECKS)}"
            raise UserError(f"--only {name}: no such check{near}")
    return [check for check in CHECKS.values() if not names or check.name in names]


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _facts(home: Path) -> dict[str, Any]:
    """Asks about device and packages in a process of its own: this one opens no CUDA context."""
    result, log = home / "facts.json", home / "facts.log"
    status = apart.call(facts.write, (result,), log, _LONGEST_START_S)
    if status is None:
        raise UserError("PyTorch and its device did not answer for two minutes")
    if status != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"PyTorch cannot be used here: {last[:300]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _header(machine: dict[str, Any], small: bool) -> dict[str, str]:
    size = "small, as for a CPU" if small else "full"
    return {**machine["header"], "size": size, "date": time.strftime("%Y-%m-%d %H:%M %z")}


def _line(result: Result) -> str:
    shown = [finding for finding in result.findings if finding.verdict == result.verdict]
    first = shown[0] if shown else None
    why = f"  {first.what} {first.measured}" if first and result.verdict != "passed" else ""
    return f"{result.verdict:8} {result.seconds:5.1f} s{why}"[:200]


if __name__ == "__main__":
    run(main)
