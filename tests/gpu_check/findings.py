"""What a check finds: rows of the table, each with its number, its unit and what it is compared with."""

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["passed", "failed", "skipped", "measured"]


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    verdict: Verdict
    measured: str
    """With its unit."""
    reference: str = ""
    """What it is compared with, and why."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The same for programs."""


class Skip(Exception):
    """A check cannot run here; the message says what it needs."""


def judged(what: str, good: bool, shown: str, reference: str, **numbers: float) -> Finding:
    """Returns a row that passes or fails."""
    return Finding(what, "passed" if good else "failed", shown, reference, numbers)


def measured(what: str, shown: str, reference: str = "", **numbers: float) -> Finding:
    """Returns a row that nothing depends on."""
    return Finding(what, "measured", shown, reference, numbers)


def skipped(what: str, why: str) -> Finding:
    return Finding(what, "skipped", why)


def needs(*packages: str) -> None:
    """Raises Skip if one of the packages is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise Skip(f"needs the package {name}")


def verdict_of(findings: list[Finding]) -> Verdict:
    """Returns the whole check's verdict."""
    order: tuple[Verdict, ...] = ("failed", "passed", "measured")
    verdicts = {finding.verdict for finding in findings}
    return next((verdict for verdict in order if verdict in verdicts), "skipped")
