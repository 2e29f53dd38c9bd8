"""Sites whose SLURM is busy, refuses, or lacks a part: what is named, and what goes on all the same."""

from pathlib import Path

import pytest

from slurm import attempts, supervisor
from slurm.attempts import Attempt, AttemptEnd, Cause
from slurm.commands import Slurm
from slurm.job_state import Submission, requeue_warning
from tests.helpers.attempt_log import AT_LIMIT, JOB, begin, last_end, opened
from tests.helpers.site import BUSY, DISABLED, GONE, NO_ACCOUNTING, Site, site

__all__ = ["site"]
RUNNING = "JobState=RUNNING Restarts=1 PreemptTime=None"


@pytest.fixture(autouse=True)
def on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setattr(supervisor, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervisor, "_UPDATE_PATIENCE_S", 0.0)


def scontrol(site: Site, requeue: str, details: str = RUNNING) -> None:
    site.says("scontrol", f'requeue*) {requeue};;', f'"show job"*) echo {details};;',
              '"show hostnames"*) echo n1;;')  # fmt: skip


def refusing(words: str, times: int, site: Site) -> str:
    count = f"$(grep -c '^scontrol requeue' {site.folder}/asked)"
    return f'[ {count} -gt {times} ] || {{ echo "{words}" >&2; exit 1; }}'


@pytest.mark.parametrize("path", ["after", "at the limit"])
def test_a_refused_requeue_is_told_as_what_it_is(
    site: Site, tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol(site, refusing(DISABLED, 99, site), RUNNING if path == "after" else AT_LIMIT)
    begin(tmp_path)
    if path == "after":
        supervisor.after(opened(tmp_path, 3), 1)
    else:
        supervisor.at_limit(opened(tmp_path, 3))
    last = last_end(tmp_path)
    assert (last.restarts, last.requeue) == (False, "refused")
    assert DISABLED in last.refusal
    assert site.times("scontrol requeue") == 1, "asking again would be of no use"
    out = capsys.readouterr().out
    assert "it restarts" not in out
    assert f"it should have restarted, but SLURM says: {DISABLED}" in out.splitlines()[-1]
    assert f"{DISABLED}; resume it by hand, restarts False" in (tmp_path / "noted").read_text()


@pytest.mark.parametrize(("requeue", "warned"), [("0", True), ("1", False)])
def test_a_job_that_slurm_will_not_requeue_is_announced(
    site: Site, requeue: str, warned: bool
) -> None:
    fields = {"time": 1.0, "cluster": "c", "executor": "slurm", "job_id": JOB, "host": "login"}
    submission = Submission.model_validate({**fields, "nodes": 1, "gpus": 1, "world_size": 1})
    site.says("scontrol", f"show*) echo JobState=PENDING Requeue={requeue} Restarts=0;;")
    assert ("Requeue=0 for job 12 on c" in (requeue_warning(submission) or "")) == warned
    site.fails("scontrol", GONE)
    assert requeue_warning(submission) is None


def test_a_busy_controller_is_asked_again(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol(site, refusing(BUSY, 3, site))
    begin(tmp_path)
    supervisor.after(opened(tmp_path, 3), 1)
    last = last_end(tmp_path)
    assert (last.restarts, last.requeue) == (True, "accepted")
    assert site.times("scontrol requeue") == 4
    assert "put it back into its queue" in capsys.readouterr().out


def test_an_answer_that_was_lost_counts(site: Site, tmp_path: Path) -> None:
    scontrol(site, refusing("Job is pending execution for job 12", 99, site))
    assert supervisor.requeue(Slurm(None), JOB) == ""


def test_a_controller_that_stays_away_ends_in_the_truth(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.patiently, "__defaults__", (0.05,))
    site.fails("scontrol", GONE)
    begin(tmp_path)
    supervisor.after(opened(tmp_path, 3), 1)
    last = last_end(tmp_path)
    assert (last.cause, last.restarts, last.requeue) == ("crash", False, "refused")
    assert "Unable to contact slurm controller" in last.outlook
    assert "restarts False" in (tmp_path / "noted").read_text()


def test_killed_while_it_asks_it_has_promised_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(slurm: Slurm, job_id: str) -> str:
        raise KeyboardInterrupt

    scontrol(site, "exit 0")
    begin(tmp_path)
    monkeypatch.setattr(supervisor, "requeue", killed)
    with pytest.raises(KeyboardInterrupt):
        supervisor.after(opened(tmp_path, 3), 1)
    assert last_end(tmp_path).outlook == "SLURM is asked to requeue it"
    # The next attempt shows that SLURM did.
    begin(tmp_path)
    first = attempts.read(tmp_path, JOB)[0].end
    assert first is not None
    assert first.requeue == "accepted"


def test_better_on_a_bad_node_than_nowhere(site: Site, tmp_path: Path) -> None:
    scontrol(site, refusing(DISABLED, 99, site))
    site.says("sinfo", "*%f*) echo 'n1|idle|v100 gpu:4'; echo 'n2|idle|v100 gpu:4';;")
    end = AttemptEnd(Cause.CRASH, "n1", 0, message="boom")
    crashed = [Attempt(number, 0.0, ["n1"], 1.0, end, f"step-{number}") for number in (1, 2)]
    attempts.write(tmp_path, JOB, crashed)
    assert supervisor.before(opened(tmp_path)) == 0
    last = attempts.read(tmp_path, JOB)[-1]
    assert (last.number, last.end) == (3, None)
    # A SLURM that takes the request is left to start it elsewhere, but not for ever.
    scontrol(site, "exit 0")
    codes = []
    for _ in range(5):
        earlier = attempts.read(tmp_path, JOB)
        attempts.write(tmp_path, JOB, [one for one in earlier if one.ended is not None])
        codes.append(supervisor.before(opened(tmp_path)))
    assert codes == [supervisor.NOT_HERE] * 3 + [0] * 2
    assert any("ExcNodeList=n1" in line for line in site.commands)


LOST = "*** JOB 12 ON n1 CANCELLED AT 2026-11-25T12:29:50 DUE TO NODE FAILURE, SEE SLURMCTLD LOG"


@pytest.mark.parametrize(
    ("log", "down", "cause", "node"),
    [
        (f"srun: error: Node failure on n2\nslurmstepd-n1: error: {LOST}\n", "", "node", "n2"),
        (f"slurmstepd-n1: error: {LOST}\n", "n2", "node", "n2"),
        ("", "n2", "node", "n2"),
        ("", "", "slurm", ""),
        ("error: *** JOB 12 ON n1 CANCELLED AT 1 DUE TO PREEMPTION ***\n", "", "preempted", ""),
        ("error: *** STEP 12.0 ON n1 CANCELLED AT 1 DUE TO TIME LIMIT ***\n", "", "time limit", ""),
        ("error: *** JOB 12 ON n1 CANCELLED AT 1 DUE TO JOB REQUEUE ***\n", "", "slurm", ""),
    ],
)
@pytest.mark.parametrize("accounting", ["missing", "down"])
def test_without_accounting_a_lost_node_is_named(
    site: Site, tmp_path: Path, accounting: str, log: str, down: str, cause: str, node: str
) -> None:
    if accounting == "missing":
        site.lacks("sacct")
    else:
        site.fails("sacct", NO_ACCOUNTING)
    scontrol(site, "exit 0")
    lost = f" echo '{down}|down*'" if down else " true"
    site.says("sinfo", f"*%N*) echo 'n1|mix'; echo 'n3|down';{lost};;")
    opened(tmp_path).begin(["n1", "n2"])
    attempts.log_file(tmp_path, JOB, 0).write_text(f"=== try 1 on n1, n2\n{log}")
    assert supervisor.before(opened(tmp_path)) == 0
    first, second = attempts.read(tmp_path, JOB)
    assert first.end is not None
    assert (first.end.cause, first.end.node, second.end) == (cause, node, None)


def test_lost_nodes_and_slurms_own_ends_get_pauses_and_an_end(site: Site, tmp_path: Path) -> None:
    scontrol(site, "exit 0")
    site.lacks("sacct")
    codes = []
    for _ in range(40):
        codes.append(supervisor.before(opened(tmp_path)))
        attempts.log_file(tmp_path, JOB, 0).write_text("srun: error: Node failure on n2\n")
        if codes[-1] == supervisor.GIVEN_UP:
            break
    assert codes[-1] == supervisor.GIVEN_UP
    assert codes.count(0) == 11
    pauses = [int(line.rpartition("+")[2]) for line in site.commands if "StartTime=now" in line]
    assert pauses == [150, 300, 600, 1200, 2400, *[3600] * 4]
    last = last_end(tmp_path)
    assert (last.restarts, last.node, last.without_progress) == (False, "n2", 11)
    assert "restarts False" in (tmp_path / "noted").read_text().splitlines()[-1]


def test_progress_ends_the_pauses() -> None:
    end = AttemptEnd(Cause.NODE, "n1")
    lost = [Attempt(n, 0.0, ["n1"], 1.0, end, f"step-{n}") for n in range(30)]
    assert attempts.pause_after_slurm(lost) == 0.0
    end = AttemptEnd(Cause.PREEMPTED)
    assert attempts.pause_after_slurm([Attempt(n, 0.0, ["n1"], 1.0, end) for n in range(30)]) == 0.0


def test_a_crash_that_brought_nothing_is_followed_by_a_pause(site: Site, tmp_path: Path) -> None:
    scontrol(site, "exit 0")
    for _ in range(2):
        begin(tmp_path)
        supervisor.after(opened(tmp_path, 3), 1)
    assert [line for line in site.commands if "StartTime" in line] == [
        "scontrol update JobId=12 StartTime=now+150"
    ]
