"""The table as Markdown and JSON, written anew after every check."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.gpu_check.checks import Check
from tests.gpu_check.runner import Result

MARKDOWN, JSON = "gpu_check.md", "gpu_check.json"


def write(
    folder: Path, header: dict[str, str], results: Sequence[Result], coming: Sequence[Check]
) -> None:
    """Writes both files; `coming` are the checks that have not run yet. Raises OSError."""
    _replace(folder / MARKDOWN, markdown(header, results, coming))
    _replace(folder / JSON, json.dumps(_tree(header, results, coming), indent=1) + "\n")


def summary(results: Sequence[Result]) -> str:
    """Returns "12 passed, 1 failed, …" over the checks."""
    verdicts = [result.verdict for result in results]
    kinds = ("passed", "failed", "measured", "skipped")
    return ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds if kind in verdicts)


def markdown(
    header: dict[str, str], results: Sequence[Result], coming: Sequence[Check] = ()
) -> str:
    lines = ["# GPU check", ""]
    lines += [f"- {key}: {value}" for key, value in header.items()]
    lines += [f"- result: {summary(results) or 'nothing has run yet'}"]
    if coming:
        lines += [f"- not run yet: {', '.join(check.name for check in coming)}"]
    lines += [
        "",
        "| check | verdict | what | measured | reference | s |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.extend(_row(cells) for cells in _rows(result))
    for result in results:
        if result.log:
            lines += ["", f"## The end of the log of {result.check.name}", "", "```"]
            lines += [result.log.replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def _rows(result: Result) -> Iterator[list[str]]:
    """A row of the check as a whole, then one for each finding."""
    findings, seconds = result.findings, f"{result.seconds:.0f}"
    name, what = f"**{result.check.name}**", result.check.what
    if len(findings) == 1 and not findings[0].what:
        only = findings[0]
        yield [name, only.verdict, what, only.measured, only.reference, seconds]
        return
    yield [name, result.verdict, what, "", "", seconds]
    for finding in findings:
        yield ["", finding.verdict, finding.what, finding.measured, finding.reference, ""]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(' '.join(text.replace('|', '/').split()) for text in cells)} |"


def _tree(
    header: dict[str, str], results: Sequence[Result], coming: Sequence[Check]
) -> dict[str, Any]:
    return {
        "header": header,
        "checks": [
            {
                "name": result.check.name,
                "what": result.check.what,
                "verdict": result.verdict,
                "seconds": round(result.seconds, 1),
                "findings": [dataclasses.asdict(finding) for finding in result.findings],
                "log": result.log,
            }
            for result in results
        ],
        "not_run": [check.name for check in coming],
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
