"""Runs the checks of the nodes as a job, without training: `launch.py --preflight`."""

import os
import shutil
import time

from cvae.config import yaml_model
from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files import paths
from cvae.preflight.checks import Facts, size
from cvae.preflight.inspection import EXPERIMENT_FILE, REPORT_FILE, Report
from cvae.run.code_snapshot import CodeSnapshot
from slurm import job_state
from slurm.cluster_file import Placement, TimeLimit, count
from slurm.executors import Job
from workflows.jobs.plan import locate
from workflows.jobs.submission import job_environment
from workflows.jobs.waiting import run_and_wait, waiting_text
from workflows.terminal.formatting import aligned, table
from workflows.terminal.live_display import Display

ALONE = "cvae.preflight.inspection:run_alone"
PASSED, FAILED = 0, 1
_SHORT_MIN = 10


def preflight(
    requested: Placement,
    cluster_name: str | None,
    experiment: Experiment | None,
    minutes: int | None = None,
) -> int:
    """Checks the nodes in a job, prints the results by node and returns the command's exit status.

    experiment: what the nodes must hold; None checks the nodes alone. minutes: the job's time limit on SLURM,
    ten if None. Raises UserError if there is no such cluster, it is too small, or it refuses the job.
    """
    time_limit = TimeLimit(minutes, short=_SHORT_MIN)
    place, placement, facts = locate(requested, cluster_name, dry=False, time=time_limit)
    needs = f"those of {experiment.name}" if experiment else "unknown: its data are not prepared"
    print(aligned([*facts, ("needs", needs)]), flush=True)
    # Where runs write; the leading dot keeps it out of the list of runs.
    folder = paths.runs_dir() / f".preflight-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        if experiment is not None:
            text = yaml_model.dump(experiment, "What the preflight checks for.")
            paths.write_atomically(folder / EXPERIMENT_FILE, text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    job = Job("preflight", folder, ALONE, (folder,), job_environment(CodeSnapshot().write()))
    report_file, display, warnings = folder / REPORT_FILE, Display(), []
    try:
        result = run_and_wait(
            job,
            place,
            placement,
            requested.world_size,
            lambda submission, state: display.status(
                waiting_text(submission, state, f"checking the nodes: {submission.where}")
            ),
            is_complete=report_file.exists,
            on_submit=lambda submission: warnings.append(job_state.requeue_warning(submission)),
        )
    finally:
        display.clear()
    for warning in filter(None, warnings):
        print(f"warning: {warning}")
    if not report_file.exists():
        print(f"{result.submission.where} failed: {result.cause}\nlog: {result.log}")
        return FAILED
    report = Report.model_validate_json(report_file.read_text())
    print(report_text(report))
    shutil.rmtree(folder, ignore_errors=True)
    return FAILED if report.texts("error") else PASSED


def report_text(report: Report) -> str:
    """Returns a table of the nodes, the speed of the network, the findings and the verdict."""
    hosts: dict[str, list[Facts]] = {}
    for fact in report.facts:
        hosts.setdefault(fact.host, []).append(fact)
    header = ["NODE", "RANKS", "DEVICE", "FREE MEMORY", "FREE DISK", "CLOCK", "TORCH", "CODE"]
    rows = [_row(facts, report.facts[0].clock) for facts in hosts.values()]
    lines = [table(header, rows, right=["RANKS", "FREE MEMORY", "FREE DISK", "CLOCK"])]
    if report.network is not None:
        lines.append(f"all-reduce over {count(len(report.facts), 'rank')}: {report.network}")
    lines += [f"{finding.level}: {finding.text}" for finding in report.findings]
    verdict = "failed" if report.texts("error") else "passed"
    return "\n".join([*lines, f"{verdict}; the checks took {report.seconds:.1f} s"])


def _row(facts: list[Facts], clock: float) -> list[str]:
    first, device = facts[0], "CPU"
    if first.gpu is not None:
        major, minor = first.gpu.capability
        device = f"{len(facts)} × {first.gpu.name} (sm_{major}{minor})"
    free_memory = size(min(fact.free_memory for fact in facts))
    free_disk = "" if first.free_disk is None else size(first.free_disk)
    places = [first.host, str(len(facts)), device, free_memory, free_disk]
    return [*places, f"{first.clock - clock:+.1f} s", first.torch, (first.code or "")[:12]]
