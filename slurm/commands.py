"""SLURM's own commands: whether its controller answers, which nodes it has, and the states of jobs."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

from cvae.errors import UserError

_TIMEOUT_S = 20
_PENDING = {
    "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"
}  # fmt: skip
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT"
}  # fmt: skip
# Of a job that ended well; the second if the queue has forgotten it and there is no accounting.
DONE = ("COMPLETED", "FORGOTTEN")
# Answers after which asking again is of no use. Others (time-outs, a controller in standby mode, errors of munge)
# may pass.
_FINAL = re.compile(
    r"disabled|Invalid job id|denied|violates|not permitted|not supported|Only batch"
    r"|failed to fetch config"
)


class SlurmError(UserError):
    """A command of SLURM cannot be run, does not answer, or complains.

    complaint: SLURM's own words, "" if there are none. is_final: asking again is of no use.
    """

    def __init__(self, message: str, complaint: str = "", is_final: bool = False) -> None:
        super().__init__(message)
        self.complaint = complaint
        self.is_final = is_final or _FINAL.search(complaint) is not None


class NodeSize(NamedTuple):
    """One node of a partition."""

    partition: str
    gpus: int
    cpus: int
    time_limit_min: int | None  # that of the partition; None if it has none


class JobState(NamedTuple):
    """The state of a job on SLURM or on this machine."""

    phase: Literal["queued", "running", "ended", "unknown"]
    slurm_state: str  # as SLURM calls it, e.g. COMPLETED or TIMEOUT
    reason: str = ""  # why it waits, or where it runs
    start: float | None = None  # when it started or is expected to; unix seconds

    @property
    def alive(self) -> bool:
        return self.phase in ("queued", "running")


class Slurm:
    """The commands for the cluster that a slurm.conf describes; without one, for the cluster of this host.

    All methods raise SlurmError, a UserError, if SLURM refuses or does not answer, unless they say otherwise.
    """

    def __init__(self, conf: str | None):
        self.environment = {"SLURM_CONF": os.path.expanduser(conf)} if conf else {}

    def answers(self) -> bool:
        """Returns, within seconds, whether a controller is up."""
        try:
            self.require("")
        except UserError:
            return False
        return True

    def require(self, name: str) -> None:
        """Raises UserError if no controller is up, sooner than the other commands time out."""
        try:
            if "is UP" in self._run("scontrol", "ping", timeout=5):
                return
            problem = "its controller is down"
        except SlurmError as error:
            problem = str(error)
        raise UserError(f"cluster {name}: SLURM does not answer: {problem}")

    def node_sizes(self, partition: str | None, gpu_type: str | None) -> list[NodeSize]:
        """Returns the nodes of a partition, or of the default one. Raises UserError if there is none such."""
        # All partitions, to tell a misspelt one from one without nodes.
        rows = self._table("sinfo", "--noheader", "--Node", "--format=%P|%G|%c|%l")
        default = next((row[0] for row in rows if row[0].endswith("*")), "")
        wanted = partition or default.rstrip("*")
        sizes = [
            NodeSize(wanted, gpus_of(gres, gpu_type), int(cpus.rstrip("+")), minutes_of(limit))
            for name, gres, cpus, limit in rows
            if name.rstrip("*") == wanted
        ]
        if not sizes:
            names = ", ".join(sorted({row[0].rstrip("*") for row in rows})) or "none"
            missing = f"partition {partition!r}" if partition else "default partition"
            raise UserError(f"SLURM has no {missing}; there are {names}")
        return sizes

    def preemption(self, partition: str | None) -> tuple[str, int]:
        """Returns the PreemptMode of a partition (or the default one) and the seconds between signal and kill."""
        text = self._run("scontrol", "show", "partition", "--oneliner", *filter(None, [partition]))
        rows = [_fields(line) for line in text.splitlines()]
        row = next((row for row in rows if partition or row.get("Default") == "YES"), rows[0])
        killed = re.search(r"KillWait\s*=\s*(\d+)", self._run("scontrol", "show", "config"))
        notice = int(row.get("GraceTime", 0)) or int(killed.group(1) if killed else 30)
        return row.get("PreemptMode", "OFF").split(",")[-1], notice

    def test(self, script: str) -> float | None:
        """Returns when SLURM would start an sbatch script, in unix seconds, if it can tell; submits nothing.

        Raises SlurmError if SLURM would refuse it because of the account, QOS or limits.
        """
        answer = self._run("sbatch", "--test-only", stdin=script, both=True)
        start = re.search(r"to start at (\S+)", answer)
        return _unix(start.group(1)) if start else None

    def job(self, job_id: str) -> JobState:
        return self.jobs([job_id])[job_id]

    def jobs(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Returns the states of jobs from one query of the queue and, if need be, one of the accounting.

        Does not raise: the phase of a job that SLURM says nothing about is "unknown".
        """
        states: dict[str, JobState] = {}
        try:
            columns = "--format=%i|%T|%r|%S|%N"
            jobs = f"--jobs={','.join(job_ids)}"
            text = self._run("squeue", "--noheader", "--states=all", jobs, columns)
        except SlurmError as error:
            if "Invalid job id" not in error.complaint:
                return dict.fromkeys(job_ids, JobState("unknown", "UNKNOWN", str(error)))
            if len(job_ids) > 1:
                # Some SLURMs refuse the whole list for one job that they have forgotten.
                return {job_id: self.job(job_id) for job_id in job_ids}
            text = ""
        rows, unreadable = _rows(text, job_ids, columns=5)
        for job_id, (state, reason, start, hosts) in rows.items():
            states[job_id] = _state(state, reason if state in _PENDING else hosts, start)
        missing = [job_id for job_id in job_ids if job_id not in states]
        with suppress(SlurmError):
            columns = "--format=JobID,State,NodeList,Start"
            text = self._sacct(columns, f"--jobs={','.join(missing)}") if missing else ""
            for job_id, (state, hosts, start) in _rows(text, missing, columns=4)[0].items():
                states[job_id] = _state(state.split()[0], hosts, start)
        forgotten = JobState(
            "ended", "FORGOTTEN", "neither the queue nor the accounting knows the job"
        )
        if unreadable:
            # The line may have been about the job.
            forgotten = JobState("unknown", "UNKNOWN", f"SLURM's squeue says: {unreadable[:200]}")
        return {job_id: states.get(job_id, forgotten) for job_id in job_ids}

    def details(self, job_id: str) -> dict[str, str]:
        """Returns the fields of `scontrol show job`, such as JobState, Restarts and PreemptTime."""
        return _fields(self._run("scontrol", "show", "job", "--oneliner", job_id))

    def last_state(self, job_id: str) -> str:
        """Returns the state in the accounting of the attempt before the present one; "" if there is none."""
        with suppress(SlurmError):
            text = self._sacct("--duplicates", f"--jobs={job_id}", "--format=State")
            states = [line.split()[0] for line in text.splitlines() if line.strip()]
            past = [state for state in states if state in _ENDED or state == "REQUEUED"]
            return past[-1] if past else ""
        return ""

    def nodes_like(self, node: str, partition: str) -> list[str]:
        """Returns the usable nodes of a partition with the features and GPUs of `node`, with that node."""
        form = "--format=%N|%t|%f %G"
        rows = self._table("sinfo", "--noheader", "--Node", f"--partition={partition}", form)
        kind = next((row[2] for row in rows if row[0] == node), "")
        unusable = re.compile(r"down|drain|drng|fail|unk|maint|boot|plnd|\*")
        return [row[0] for row in rows if row[2] == kind and not unusable.search(row[1])]

    def hostnames(self, nodelist: str) -> list[str]:
        """Returns ["n1", "n2"] for "n[1-2]"; the list itself if SLURM does not answer."""
        with suppress(SlurmError):
            return self._run("scontrol", "show", "hostnames", nodelist).split()
        return [nodelist]

    def lost_nodes(self, nodes: list[str]) -> list[str]:
        """Returns those of the nodes that have failed or cannot be reached; [] if SLURM does not answer."""
        with suppress(SlurmError):
            options = ["--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%t"]
            rows = self._table("sinfo", *options)
            lost = {row[0] for row in rows if re.search(r"down|fail|unk|\*", row[1])}
            return [node for node in nodes if node in lost]
        return []

    def requeue(self, job_id: str) -> None:
        """Ends the job's attempt and puts the job back into the queue, if it is not back already."""
        try:
            self._run("scontrol", "requeue", job_id)
        except SlurmError as error:
            # An earlier request, whose answer was lost, has been carried out.
            if "pending execution" not in error.complaint:
                raise

    def hold_off(self, job_id: str, nodes: list[str], pause_s: float) -> None:
        """Keeps a waiting job off some nodes, and from starting before the pause is over."""
        changes = [f"ExcNodeList={','.join(nodes)}"] if nodes else []
        changes += [f"StartTime=now+{pause_s:.0f}"] if pause_s else []
        self._run("scontrol", "update", f"JobId={job_id}", *changes)

    def tell_to_save(self, job_id: str) -> None:
        """Sends SIGTERM to every rank of a running job."""
        self._run("scancel", "--signal=TERM", job_id)

    def cancel(self, job_id: str) -> None:
        """Removes a job from the queue, or ends it: by SIGTERM, and by SIGKILL after SLURM's KillWait."""
        self._run("scancel", job_id)

    def _sacct(self, *options: str) -> str:
        return self._run("sacct", "--noheader", "--parsable2", "--allocations", *options)

    def _table(self, *command: str) -> list[list[str]]:
        return [line.split("|") for line in self._run(*command).splitlines()]

    def _run(
        self,
        *command: str,
        stdin: str | None = None,
        timeout: float = _TIMEOUT_S,
        both: bool = False,
    ) -> str:
        """Returns what the command prints. Raises SlurmError with the line of its complaint that matters."""
        try:
            done = subprocess.run(
                command,
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                env=_own_options() | self.environment,
            )
        except FileNotFoundError:
            raise SlurmError(f"SLURM's {command[0]} is not installed here", is_final=True) from None
        except OSError as error:
            final = isinstance(error, PermissionError)
            problem = f"SLURM's {command[0]} cannot be run: {error.strerror}"
            raise SlurmError(problem, is_final=final) from None
        except subprocess.TimeoutExpired:
            raise SlurmError(f"SLURM's {command[0]} did not answer in {timeout:.0f} s") from None
        if done.returncode:
            words = complaint(done.stderr) or f"{command[0]} failed"
            raise SlurmError(f"SLURM says: {words}", words)
        return done.stdout + done.stderr if both else done.stdout


def _own_options() -> dict[str, str]:
    """Returns the environment without a person's own options of these commands: SQUEUE_PARTITION hides jobs."""
    habits = ("SQUEUE_", "SACCT_", "SINFO_")
    others = {key: value for key, value in os.environ.items() if not key.startswith(habits)}
    return others | {"SLURM_TIME_FORMAT": "standard"}


def _fields(line: str) -> dict[str, str]:
    """Returns {"A": "1"} for words such as "A=1"."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def complaint(stderr: str) -> str:
    """Returns the line that says what is wrong: the last that is not about the job in general."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line] or lines
    return re.sub(r"^(\w+: )?(error|fatal): ", "", errors[-1]) if errors else ""


def gpus_of(gres: str, gpu_type: str | None) -> int:
    """Returns the GPUs (of a type) in SLURM's GRES notation: "gpu:4", "gpu:v100:4(S:0-1),shard:8", "(null)"."""
    counts = re.findall(r"(?:^|,)gpu(?::([^:,()]+))??:(\d+)", gres)
    return sum(int(number) for kind, number in counts if gpu_type in (None, kind))


_MOST_MINUTES = 10**7
# "90", "90:00", "1:30:00"; "1-12", "1-12:30", "1-12:30:00".
_TIME = re.compile(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", re.ASCII)


def minutes_of(limit: str) -> int | None:
    """Returns a time limit of SLURM in minutes, rounded up; None for "infinite" and nonsense."""
    match = _TIME.fullmatch(limit)
    if match is None:
        return None
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts = [0, *parts]  # no hours
    hours, minutes, seconds = [*parts, 0, 0][:3]
    total = -(-(60 * (60 * (24 * int(days or 0) + hours) + minutes) + seconds) // 60)
    return total if total <= _MOST_MINUTES else None


# As RUNNING, RESV_DEL_HOLD; in the accounting more may follow, as in "CANCELLED by 0".
_STATE = re.compile(r"[A-Z_]+\b.*")


def _rows(text: str, job_ids: Sequence[str], columns: int) -> tuple[dict[str, list[str]], str]:
    """Returns the columns of each wanted job's first line, without its id; and the first unreadable line.

    That may be an error that SLURM, or a site's wrapper, has printed among the answers, a truncated line, or a
    part of a job array, as which no job of ours is submitted.
    """
    rows: dict[str, list[str]] = {}
    unreadable = ""
    for line in filter(str.strip, text.splitlines()):
        job_id, *rest = line.split("|")
        is_whole = 1 + len(rest) == columns and _STATE.fullmatch(rest[0])
        if is_whole and job_id in job_ids:
            rows.setdefault(job_id, rest)
        elif not is_whole or re.split(r"[_+]", job_id)[0] in job_ids:
            unreadable = unreadable or line.strip()
    return rows, unreadable


def _state(slurm_state: str, reason: str, start: str) -> JobState:
    phase: Literal["queued", "running", "ended"] = "running"
    if slurm_state in _PENDING:
        phase = "queued"
    elif slurm_state in _ENDED:
        phase = "ended"
    return JobState(phase, slurm_state, reason, _unix(start))


def _unix(moment: str) -> float | None:
    """Returns unix seconds for SLURM's local time; None for "N/A" and "Unknown"."""
    with suppress(ValueError):
        return time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))
    return None
