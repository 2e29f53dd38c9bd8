"""Summarises the attempts of a run: where each ran, how far it came, how it ended and what that cost."""

from dataclasses import replace
from itertools import pairwise

from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line
from slurm import attempts
from slurm.attempts import Attempt
from slurm.cluster_file import count
from slurm.commands import JobState
from slurm.failure_diagnosis import diagnose_unrecorded
from workflows.jobs.run_state import submissions
from workflows.terminal.formatting import clock, duration

_NODES_SHOWN = 8


def attempt_lines(run: RunDirectory, lines: list[Line], job: JobState) -> list[str]:
    """Returns one line per attempt, oldest first. lines: the journal. job: the state of the last submission's."""
    ids = [submission.job_id for submission in submissions(run)]
    made = [attempt for job_id in ids for attempt in attempts.read(run.logs, job_id)]
    if not made:
        return []
    last = made[-1]
    if job.phase == "ended" and last.end is None:
        end = diagnose_unrecorded(run.logs, ids[-1], last, job.slurm_state)
        made[-1] = replace(last, end=end)
    elif job.phase == "ended" and last.end and last.end.requeue == "asked":
        made[-1] = attempts.answered(last, "SLURM was asked to requeue it and has not")
    bounds = [*(attempt.began for attempt in made), float("inf")]
    spans = [
        _span([line for line in lines if begin <= line["time"] < end])
        for begin, end in pairwise(bounds)
    ]
    resumed_at = [*(span[0] if span else None for span in spans[1:]), None]
    return [
        f"{number}: {_summary(attempt, span, resumed)}"
        for number, (attempt, span, resumed) in enumerate(
            zip(made, spans, resumed_at, strict=True), 1
        )
    ]


def _span(lines: list[Line]) -> tuple[int, int] | None:
    """Returns the first and the last known step of an attempt; None if it did not train."""
    start = next((line["step"] for line in lines if line["kind"] == "start"), None)
    if start is None:
        return None
    steps = [line["step"] for line in lines if line["kind"] in ("step", "checkpoint", "end")]
    return start, max([start, *steps])


def _summary(attempt: Attempt, span: tuple[int, int] | None, resumed_at: int | None) -> str:
    end, hidden = attempt.end, len(attempt.nodes) - _NODES_SHOWN
    nodes = ", ".join(attempt.nodes[:_NODES_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
    parts = [f"{clock(attempt.began)} on {nodes}"]
    if span is not None:
        parts.append(f"step {span[0]:,} to {span[1]:,}")
    if attempt.ended is not None and attempt.ended > attempt.began:
        parts.append(f"after {duration(attempt.ended - attempt.began)}")
    parts.append("running" if end is None else end.reason)
    if span is not None and resumed_at is not None and span[1] > resumed_at:
        parts.append(f"{count(span[1] - resumed_at, 'step')} lost")
    if end is not None and end.excluded:
        parts.append(f"next without {', '.join(end.excluded)}")
    if end is not None and end.requeue == "refused":
        parts.append(end.outlook)
    return "; ".join(parts)
