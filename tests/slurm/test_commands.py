"""What is made of SLURM's answers about jobs, the odd ones included."""

import time

import pytest

from slurm.commands import Slurm
from tests.helpers.site import GONE, NO_ACCOUNTING, Site, site

__all__ = ["site"]
RUNNING = "12|RUNNING|None|2026-11-25T12:00:00|n[1-2]"
PENDING = "12|PENDING|(launch failed, requeued held)|N/A|"
ENDED = "12|CANCELLED by 0|n1|Unknown"


def echo(*lines: str) -> str:
    """A case of the fake command that prints the lines as they are."""
    printed = " ".join(f"'{line}'" for line in lines)
    return rf"*) printf '%b\n' {printed}; exit 0;;" if lines else "*) exit 0;;"


@pytest.mark.parametrize(
    ("squeue", "sacct", "phase", "word", "reason"),
    [
        ([RUNNING], [], "running", "RUNNING", "n[1-2]"),
        ([PENDING], [], "queued", "PENDING", "(launch failed, requeued held)"),
        (["12|COMPLETING|None|N/A|n1"], [], "running", "COMPLETING", "n1"),
        # The queue has forgotten it.
        ([], [ENDED], "ended", "CANCELLED", "n1"),
        ([], [], "ended", "FORGOTTEN", "neither the queue nor"),
        (["JOBID|STATE|REASON|START_TIME|NODELIST"], [ENDED], "ended", "CANCELLED", "n1"),
        (["JOBID|STATE|REASON|START_TIME|NODELIST"], [], "ended", "FORGOTTEN", "neither"),
        ([], ["JobID|State|NodeList|Start"], "ended", "FORGOTTEN", "neither"),
        ([], ["12|"], "ended", "FORGOTTEN", "neither"),
        ([], ["12||n1|Unknown"], "ended", "FORGOTTEN", "neither"),
        # The queue says something, but nobody can say what.
        (["12|RUNN"], [], "unknown", "UNKNOWN", "squeue says: 12|RUNN"),
        (["12|RUNN"], [ENDED], "ended", "CANCELLED", "n1"),
        (["12||None|N/A|"], [], "unknown", "UNKNOWN", "squeue says: 12||None|N/A|"),
        (["12|1|2|3|4"], [], "unknown", "UNKNOWN", "squeue says: 12|1|2|3|4"),
        ([GONE], [], "unknown", "UNKNOWN", f"squeue says: {GONE}"),
        (["", " ", GONE, "second"], [GONE], "unknown", "UNKNOWN", f"squeue says: {GONE}"),
        (["12_3|RUNNING|None|N/A|n1"], [], "unknown", "UNKNOWN", "squeue says: 12_3|RUNNING"),
        (["12+0|RUNNING|None|N/A|n1"], [], "unknown", "UNKNOWN", "squeue says: 12+0|RUNNING"),
        # The job's own line is whole, whatever is around it.
        (["", GONE, "a name", "of | two lines", RUNNING], [], "running", "RUNNING", "n[1-2]"),
        (["13_[1-9]|PENDING|None|N/A|", RUNNING], [], "running", "RUNNING", "n[1-2]"),
        (["113|RUNNING|None|N/A|n9"], [], "ended", "FORGOTTEN", "neither"),
        ([r"\0377\0351"], [], "unknown", "UNKNOWN", "squeue says: "),
    ],
)  # fmt: skip
def test_what_the_queue_and_the_accounting_say(
    site: Site, squeue: list[str], sacct: list[str], phase: str, word: str, reason: str
) -> None:
    site.says("squeue", echo(*squeue))
    site.says("sacct", echo(*sacct))
    state = Slurm(None).job("12")
    assert (state.phase, state.slurm_state) == (phase, word)
    assert state.reason.startswith(reason) or reason in state.reason
    assert "\n" not in state.reason


def test_many_jobs_are_asked_for_at_once(site: Site) -> None:
    site.says("squeue", echo(RUNNING, "13|RUNN", "15|COMPLETED|None|N/A|n1"))
    site.says("sacct", echo("14|TIMEOUT|n1|Unknown"))
    states = Slurm(None).jobs(["12", "13", "14", "15"])
    assert [states[id].slurm_state for id in states] == [
        "RUNNING",
        "UNKNOWN",
        "TIMEOUT",
        "COMPLETED",
    ]
    assert [command.split()[0] for command in site.commands] == ["squeue", "sacct"]
    assert site.commands[1].endswith("--jobs=13,14")


def test_a_queue_that_refuses_the_list_for_one_job_is_asked_one_by_one(site: Site) -> None:
    refused = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    site.says("squeue", f"*=12,13*|*=13*) {refused};;", echo(RUNNING))
    site.fails("sacct", NO_ACCOUNTING)
    states = Slurm(None).jobs(["12", "13"])
    assert [state.slurm_state for state in states.values()] == ["RUNNING", "FORGOTTEN"]


def test_no_answer_is_no_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Slurm._run, "__kwdefaults__", {"stdin": None, "timeout": 0.1, "both": False}
    )
    site.says("squeue", "*) exec sleep 5;;")
    started = time.monotonic()
    states = Slurm(None).jobs(["12", "13"])
    assert time.monotonic() - started < 2
    assert {(state.phase, state.reason) for state in states.values()} == {
        ("unknown", "SLURM's squeue did not answer in 0 s")
    }
    (site.folder / "squeue").chmod(0o644)
    assert Slurm(None).job("12").reason == "SLURM's squeue cannot be run: Permission denied"


def test_a_persons_habits_hide_no_job(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    started = "[ $SLURM_TIME_FORMAT = standard ] && s=2026-11-25T12:00:00 || s=Today"
    site.says(
        "squeue", f'*) [ $SQUEUE_PARTITION ] || {{ {started}; echo "12|RUNNING|None|$s|n1"; }};;'
    )
    state = Slurm(None).job("12")
    assert state.slurm_state == "RUNNING"
    assert state.start is not None
