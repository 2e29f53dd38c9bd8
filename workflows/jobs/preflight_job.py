"""Looking at the nodes without training on them: `launch.py --preflight`."""

import os
import shutil
import time

from cvae.config import yaml_model
from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files import paths
from cvae.preflight.checks import Facts, size
from cvae.preflight.inspection import EXPERIMENT_FILE, REPORT_FILE, Report
from cvae.run.code_snapshot import Snapshot
from slurm import job_state
from slurm.cluster_file import Placement, TimeLimit
from slurm.commands import DONE, JobState
from slurm.executors import Job
from slurm.failure_diagnosis import first_failure
from slurm.job_state import Submission
from workflows.jobs.plan import locate
from workflows.jobs.submission import job_environment, submitted
from workflows.terminal.formatting import aligned, count, shown, table
from workflows.terminal.live_display import Display

ALONE = "cvae.preflight.inspection:alone"
PASSED, FAILED = 0, 1
_POLL_S = {"slurm": 2.0, "local": 0.3}
_LAG_S = 30.0
_SHORT_MIN = 10


def preflight(
    asked: Placement,
    cluster_name: str | None,
    experiment: Experiment | None,
    minutes: int | None = None,
) -> int:
    """Runs the checks as a job and prints what they say, by node. Returns the command's exit status.

    minutes: the job's time limit on SLURM, if another one is asked for than a short one.
    Raises UserError where there is no such cluster, it is too small, or it refuses the job.
    """
    time_limit = TimeLimit(minutes, short=_SHORT_MIN)
    place, placement, facts = locate(asked, cluster_name, dry=False, time=time_limit)
    needs = f"those of {experiment.name}" if experiment else "not known, its data are not prepared"
    print(aligned([*facts, ("needs", needs)]), flush=True)
    # Where runs write. The name keeps it out of their list.
    folder = paths.runs_dir() / f".preflight-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        if experiment is not None:
            text = yaml_model.dump(experiment, "What the preflight checks for.")
            paths.write_atomically(folder / EXPERIMENT_FILE, text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    job = Job("preflight", folder, ALONE, (folder,), job_environment(Snapshot().write()))
    with submitted(job, place, placement, asked.world_size) as submission:
        warning = job_state.requeue_warning(submission)
        state = _wait(submission)
    if warning:
        print(f"warning: {warning}")
    file, deadline = folder / REPORT_FILE, time.monotonic() + _LAG_S
    while not file.exists() and state.word in DONE and time.monotonic() < deadline:
        time.sleep(_POLL_S[submission.executor])
    if not file.exists():
        failure = first_failure(folder, submission.job_id)
        print(f"failed: {failure or f'{submission.where} ended as {state.word}'}")
        print(f"log: {shown(failure.log if failure else folder)}")
        return FAILED
    report = Report.model_validate_json(file.read_text())
    print(report_text(report))
    shutil.rmtree(folder, ignore_errors=True)
    return FAILED if report.texts("error") else PASSED


def report_text(report: Report) -> str:
    hosts: dict[str, list[Facts]] = {}
    for fact in report.facts:
        hosts.setdefault(fact.host, []).append(fact)
    header = ["NODE", "RANKS", "DEVICE", "FREE MEMORY", "FREE DISK", "CLOCK", "TORCH", "CODE"]
    rows = [_row(host, facts, report.facts[0]) for host, facts in hosts.items()]
    lines = [table(header, rows, right=["RANKS", "FREE MEMORY", "FREE DISK", "CLOCK"])]
    net = report.network
    if net is not None:
        lines.append(f"all-reduce over {count(len(report.facts), 'rank')}: {net}")
    lines += [f"{finding.level}: {finding.text}" for finding in report.findings]
    word = "failed" if report.texts("error") else "passed"
    return "\n".join([*lines, f"{word}; the checks took {report.seconds:.1f} s"])


def _row(host: str, facts: list[Facts], first: Facts) -> list[str]:
    mine = facts[0]
    device = "CPU"
    if mine.gpu is not None:
        major, minor = mine.gpu.capability
        device = f"{len(facts)} × {mine.gpu.name} (sm_{major}{minor})"
    return [
        host,
        str(len(facts)),
        device,
        size(min(fact.free_memory for fact in facts)),
        "" if mine.free_disk is None else size(mine.free_disk),
        f"{mine.clock - first.clock:+.1f} s",
        mine.torch,
        (mine.code or "")[:12],
    ]


def _wait(submission: Submission) -> JobState:
    display = Display()
    try:
        while True:
            state = job_state.look(submission)
            if state.phase == "ended":
                return state
            where = "queued" if state.phase == "queued" else "looking at the nodes"
            if state.phase == "unknown":
                where = f"cannot query the job ({state.reason}); retrying"
            display.status(f"{where}: {submission.where}")
            time.sleep(_POLL_S[submission.executor])
    finally:
        display.clear()
