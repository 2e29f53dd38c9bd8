"""What is left of a job that ended badly: which rank was first, how it ended, and its last words."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from slurm.job_files import CONTROLLER_LOG, TRY_MARK, log_file

_TAIL_LINES = 12
# Ends in srun's words, and what they mean.
_KILLED, _NO_MEMORY = "Killed", "Out Of Memory"
_MEANING = {
    _KILLED: "killed (SIGKILL), perhaps for want of memory",
    _NO_MEMORY: "out of memory: killed (SIGKILL)",
}
# Where SLURM confines jobs by cgroups it counts what the kernel has killed there.
_OOM_KILL = re.compile(r"Detected \d+ oom.kill event")
# What SLURM writes into the log of a job that it ends, and sacct's word for the same.
_DUE_TO = re.compile(r"\*\*\* (?:JOB|STEP) .* CANCELLED AT \S+ DUE TO ([A-Z ]+)")
_SACCT = {
    "NODE FAILURE": "NODE_FAIL",
    "PREEMPTION": "PREEMPTED",
    "TIME LIMIT": "TIMEOUT",
    "JOB REQUEUE": "REQUEUED",
}
_LOST_NODE = re.compile(r"Node failure on ([^\s,]+)", re.IGNORECASE)
# What the other ranks say when one has gone: a consequence, whatever their clocks say.
_CONSEQUENCE = re.compile(r"gloo|NCCL|Connection (closed|reset)|DistBackendError|DistNetworkError")


class Failure(NamedTuple):
    rank: int
    host: str
    how: str
    """The exception, or in srun's words: "Killed", "Exited with exit code 1"."""
    log: Path
    tail: list[str]
    """The last lines of its log."""
    bad_input: bool = False
    """Whether it was a UserError: to try the same again is of no use."""

    def __str__(self) -> str:
        host = f" on {self.host}" if self.host else ""
        return f"rank {self.rank}{host}: {_MEANING.get(self.how, self.how)}"


def first_failure(folder: Path, job_id: str) -> Failure | None:
    """The rank that went first; None where no trace tells. folder: that of the job's logs."""
    ends = _ends(folder, job_id)
    reports = _reports(folder, job_id)
    # A rank that is killed leaves no report, the ranks that miss it do. A rank that raised waits a little
    # before it ends, so that of mere exits the reports know better which came first.
    killed = ends and not ends[0][2].startswith("Exited")
    bad_input = False
    if ends and (killed or not reports):
        host, rank, how = ends[0]
        srun = log_file(folder, job_id, 0)
        if how == _KILLED and srun.exists() and _OOM_KILL.search(_last_try(srun)):
            how = _NO_MEMORY
    elif reports:
        host, rank, how, bad_input = reports[0]
    else:
        return None
    log = log_file(folder, job_id, rank)
    return Failure(rank, host, how, log, tail(log, _TAIL_LINES), bad_input)


def slurms_word(folder: Path, job_id: str) -> tuple[str, str]:
    """Returns why SLURM ended the last try, as sacct would call it, and the node it lost; from the job's log.

    Each is "" if the log does not say.
    """
    log = log_file(folder, job_id, 0)
    text = _last_try(log) if log.exists() else ""
    words = [_SACCT.get(words.strip(), "") for words in _DUE_TO.findall(text)]
    nodes = _LOST_NODE.findall(text)
    node = nodes[-1] if nodes else ""
    word = "NODE_FAIL" if node else next(filter(None, reversed(words)), "")
    return word, node


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a file, without those that only submitit's machinery writes."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return []
    kept = [line for line in text.splitlines() if line.strip() and "submitit" not in line]
    return kept[-lines:]


def _ends(folder: Path, job_id: str) -> list[tuple[str, int, str]]:
    """(host, rank, how) of the ranks that ended badly, in the order in which srun or the controller saw it."""
    found = []
    own, srun = folder / CONTROLLER_LOG, log_file(folder, job_id, 0)
    if own.exists():
        pattern = rf"^job {job_id}: (?P<host>)task (?P<rank>\d+): (?P<how>.+)$"
        found += re.findall(pattern, _last_try(own), re.MULTILINE)
    if srun.exists():
        pattern = r"srun: error: (?P<host>\S+): tasks? (?P<rank>\d+)[\d,-]*: (?P<how>.+)$"
        found += re.findall(pattern, _last_try(srun), re.MULTILINE)
    return [(host, int(rank), how) for host, rank, how in found]


def _last_try(log: Path) -> str:
    """A job that is tried again writes on in the same file."""
    text = log.read_text(errors="replace")
    begins = rf"^{TRY_MARK}\d+ on |Starting with JobEnvironment"
    return re.split(begins, text, flags=re.MULTILINE)[-1]


def _reports(folder: Path, job_id: str) -> list[tuple[str, int, str, bool]]:
    """(host, rank, how, whether bad input) of the ranks that could still say what was wrong.

    Causes before consequences.
    """
    reports = []
    for file in folder.glob(f"{job_id}_*_failure.json"):
        try:
            report = json.loads(file.read_text())
            consequence = _CONSEQUENCE.search(report["error"]) is not None
            key = (consequence, report["time"])
            bad_input = bool(report.get("bad_input"))
            reports.append((key, (report["host"], report["rank"], report["error"], bad_input)))
        except (OSError, ValueError, KeyError):
            continue
    return [report for _, report in sorted(reports)]
