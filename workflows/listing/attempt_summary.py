"""The story of a run: every try, where it ran, how far it came, why it ended and what that cost."""

from dataclasses import replace

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


def story(run: RunDirectory, lines: list[Line], job: JobState) -> list[str]:
    """One line a try, oldest first; none before the first. job: where the last submission is now."""
    told: list[Attempt] = []
    last = ""
    for submission in submissions(run):
        told += attempts.read(run.logs, submission.job_id)
        last = submission.job_id
    if not told:
        return []
    if job.phase == "ended" and told[-1].end is None:
        told[-1] = replace(
            told[-1], end=diagnose_unrecorded(run.logs, last, told[-1], job.slurm_state)
        )
    elif job.phase == "ended" and told[-1].end and told[-1].end.requeue == "asked":
        told[-1] = attempts.answered(told[-1], "SLURM was asked to requeue it and has not")
    ends = [one.began for one in told[1:]] + [float("inf")]
    stretches = [
        _stretch([line for line in lines if one.began <= line["time"] < end])
        for one, end in zip(told, ends, strict=True)
    ]
    resumed = [stretch[0] if stretch else None for stretch in stretches[1:]] + [None]
    return [
        _words(number, one, stretch, after)
        for number, (one, stretch, after) in enumerate(
            zip(told, stretches, resumed, strict=True), start=1
        )
    ]


def _stretch(lines: list[Line]) -> tuple[int, int] | None:
    """The step that it began from and the last that is known of it; None where it never trained."""
    start = next((line["step"] for line in lines if line["kind"] == "start"), None)
    if start is None:
        return None
    steps = [line["step"] for line in lines if line["kind"] in ("step", "checkpoint", "end")]
    return start, max([start, *steps])


def _words(number: int, one: Attempt, stretch: tuple[int, int] | None, resumed: int | None) -> str:
    shown = one.nodes[:_NODES_SHOWN]
    more = f" and {len(one.nodes) - len(shown)} more" if len(one.nodes) > len(shown) else ""
    parts = [f"{number}: {clock(one.began)} on {', '.join(shown)}{more}"]
    if stretch is not None:
        parts.append(f"step {stretch[0]:,} to {stretch[1]:,}")
    if one.ended is not None and one.ended > one.began:
        parts.append(f"after {duration(one.ended - one.began)}")
    parts.append("running" if one.end is None else one.end.reason)
    if stretch is not None and resumed is not None and stretch[1] > resumed:
        parts.append(f"{count(stretch[1] - resumed, 'step')} lost")
    if one.end is not None and one.end.excluded:
        parts.append(f"next without {', '.join(one.end.excluded)}")
    if one.end is not None and one.end.requeue == "refused":
        parts.append(one.end.outlook)
    return "; ".join(parts)
