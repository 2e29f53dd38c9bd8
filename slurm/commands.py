"""SLURM's own commands: does it answer, what nodes has it, what became of a job."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

from cvae.errors import UserError

_TIMEOUT_S = 20
_PENDING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}

# Of a job that ended well; the second where the queue has forgotten it and there is no accounting.
DONE = ("COMPLETED", "FORGOTTEN")


class NodeSize(NamedTuple):
    """What SLURM says of one node of a partition."""

    partition: str
    gpus: int
    cpus: int
    time_limit_min: int | None
    """The partition's; None where it has none."""


class JobState(NamedTuple):
    """Where a job is, whoever runs it."""

    phase: Literal["queued", "running", "ended", "unknown"]
    word: str
    """SLURM's own word, as COMPLETED or TIMEOUT."""
    reason: str = ""
    """Why it waits, or where it runs."""
    start: float | None = None
    """When it started or is expected to; unix seconds."""

    @property
    def alive(self) -> bool:
        return self.phase in ("queued", "running")


class Slurm:
    """SLURM's commands for one cluster: the one of `conf`, else the one that this host belongs to."""

    def __init__(self, conf: str | None):
        self.environment = {"SLURM_CONF": os.path.expanduser(conf)} if conf else {}

    def answers(self) -> bool:
        """Whether a controller is up; seconds at most."""
        try:
            self.require("")
        except UserError:
            return False
        return True

    def require(self, name: str) -> None:
        """Raises UserError where no controller is up; quicker than the other commands' own time-outs."""
        try:
            if "is UP" in self._run("scontrol", "ping", timeout=5):
                return
            problem = "its controller is down"
        except UserError as error:
            problem = str(error)
        raise UserError(f"cluster {name}: SLURM does not answer: {problem}")

    def node_sizes(self, partition: str | None, gpu_type: str | None) -> list[NodeSize]:
        """The nodes of a partition, or of the default one. Raises UserError where there is none such."""
        # Asked for all partitions, so that a misspelt one can be told from one without nodes.
        text = self._run("sinfo", "--noheader", "--Node", "--format=%P|%G|%c|%l")
        rows = [line.split("|") for line in text.splitlines()]
        default = next((row[0] for row in rows if row[0].endswith("*")), None)
        wanted = partition or (default or "").rstrip("*")
        sizes = [
            NodeSize(wanted, gpus_of(gres, gpu_type), int(cpus.rstrip("+")), minutes_of(limit))
            for name, gres, cpus, limit in rows
            if name.rstrip("*") == wanted
        ]
        if not sizes:
            names = ", ".join(sorted({row[0].rstrip("*") for row in rows})) or "none"
            asked = f"partition {partition!r}" if partition else "default partition"
            raise UserError(f"SLURM has no {asked}; there are {names}")
        return sizes

    def preemption(self, partition: str | None) -> tuple[str, int]:
        """A partition's (or the default one's) PreemptMode, and the seconds between signal and kill."""
        text = self._run("scontrol", "show", "partition", "--oneliner", *filter(None, [partition]))
        rows = [
            dict(word.split("=", 1) for word in x.split() if "=" in word) for x in text.splitlines()
        ]
        row = next((x for x in rows if partition or x.get("Default") == "YES"), rows[0])
        killed = re.search(r"KillWait\s*=\s*(\d+)", self._run("scontrol", "show", "config"))
        notice = int(row.get("GraceTime", 0)) or int(killed.group(1) if killed else 30)
        return row.get("PreemptMode", "OFF").split(",")[-1], notice

    def test(self, script: str) -> float | None:
        """When SLURM would start an sbatch script, unix seconds, where it can tell; submits nothing.

        Raises UserError where SLURM would refuse it: account, QOS, limits.
        """
        answer = self._run("sbatch", "--test-only", stdin=script, both=True)
        found = re.search(r"to start at (\S+)", answer)
        return _unix(found.group(1)) if found else None

    def job(self, job_id: str) -> JobState:
        """Asks the queue and, for a job that it has forgotten, the accounting."""
        return self.jobs([job_id])[job_id]

    def jobs(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Returns the state of every job: one question to the queue, and one to the accounting if need be."""
        wanted = ",".join(job_ids)
        forgotten = JobState(
            "ended", "FORGOTTEN", "neither the queue nor the accounting knows the job"
        )
        found: dict[str, JobState] = {}
        try:
            columns = "--format=%i|%T|%r|%S|%N"
            text = self._run("squeue", "--noheader", "--states=all", f"--jobs={wanted}", columns)
        except UserError as error:
            if "Invalid job id" not in str(error):
                return dict.fromkeys(job_ids, JobState("unknown", "UNKNOWN", str(error)))
            if len(job_ids) > 1:
                # Some SLURMs refuse the whole list for one job that they have forgotten.
                return {job_id: self.job(job_id) for job_id in job_ids}
            text = ""
        rows, unreadable = _rows(text, job_ids, columns=5)
        for job_id, (word, reason, start, hosts) in rows.items():
            found[job_id] = _state(word, reason if word in _PENDING else hosts, start)
        missing = [job_id for job_id in job_ids if job_id not in found]
        with suppress(UserError):
            columns = "--format=JobID,State,NodeList,Start"
            asked = ["--noheader", "--parsable2", "--allocations", columns]
            text = self._run("sacct", *asked, f"--jobs={','.join(missing)}") if missing else ""
            for job_id, (word, hosts, start) in _rows(text, missing, columns=4)[0].items():
                found[job_id] = _state(word.split()[0], hosts, start)
        if unreadable:
            # The job may be what the queue was about to speak of.
            forgotten = JobState("unknown", "UNKNOWN", f"SLURM's squeue says: {unreadable[:200]}")
        return {job_id: found.get(job_id, forgotten) for job_id in job_ids}

    def details(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, as JobState, Restarts, PreemptTime. Raises UserError."""
        text = self._run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def last_word(self, job_id: str) -> str:
        """The accounting's word for how the job's try before the present one ended; "" where it has none."""
        with suppress(UserError):
            options = ["--noheader", "--parsable2", "--allocations", "--duplicates"]
            text = self._run("sacct", *options, f"--jobs={job_id}", "--format=State")
            words = [line.split()[0] for line in text.splitlines() if line.strip()]
            past = [word for word in words if word in _ENDED or word == "REQUEUED"]
            return past[-1] if past else ""
        return ""

    def nodes_like(self, node: str, partition: str) -> list[str]:
        """The working nodes of a partition with the same features and GPUs as `node`, itself among them."""
        form = "--format=%N|%t|%f %G"
        text = self._run("sinfo", "--noheader", "--Node", f"--partition={partition}", form)
        rows = [line.split("|") for line in text.splitlines()]
        kind = next((row[2] for row in rows if row[0] == node), "")
        unusable = re.compile(r"down|drain|drng|fail|unk|maint|boot|plnd|\*")
        return [row[0] for row in rows if row[2] == kind and not unusable.search(row[1])]

    def hostnames(self, nodelist: str) -> list[str]:
        """ "cvae-node[1-2]" → ["cvae-node1", "cvae-node2"]; the list itself if SLURM cannot be asked."""
        with suppress(UserError):
            return self._run("scontrol", "show", "hostnames", nodelist).split()
        return [nodelist]

    def lost_nodes(self, nodes: list[str]) -> list[str]:
        """Returns those of the nodes that SLURM counts as failed or does not hear of; [] if it cannot be asked."""
        with suppress(UserError):
            options = ["--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%t"]
            rows = [line.split("|") for line in self._run("sinfo", *options).splitlines()]
            lost = {row[0] for row in rows if re.search(r"down|fail|unk|\*", row[1])}
            return [node for node in nodes if node in lost]
        return []

    def requeue(self, job_id: str) -> None:
        """Ends the job's present try and puts it back into the queue; returns, too, if it is back already.

        Raises UserError if SLURM refuses or does not answer.
        """
        try:
            self._run("scontrol", "requeue", job_id)
        except UserError as error:
            # An earlier request, whose answer was lost, was carried out.
            if "pending execution" not in str(error):
                raise

    def hold_off(self, job_id: str, nodes: list[str], pause_s: float) -> None:
        """Keeps a waiting job away from nodes and from starting so soon. Raises UserError if it does not wait."""
        changes = [f"ExcNodeList={','.join(nodes)}"] if nodes else []
        changes += [f"StartTime=now+{pause_s:.0f}"] if pause_s else []
        self._run("scontrol", "update", f"JobId={job_id}", *changes)

    def tell_to_save(self, job_id: str) -> None:
        """SIGTERM to every rank of a running job, and nothing more."""
        self._run("scancel", "--signal=TERM", job_id)

    def cancel(self, job_id: str) -> None:
        """Takes a job out of the queue, or ends it: SIGTERM, and SIGKILL after SLURM's KillWait."""
        self._run("scancel", job_id)

    def _run(
        self,
        *command: str,
        stdin: str | None = None,
        timeout: float = _TIMEOUT_S,
        both: bool = False,
    ) -> str:
        """What the command prints. Raises UserError with the last line of its complaint."""
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
            raise UserError(f"SLURM's {command[0]} is not installed here") from None
        except OSError as error:
            raise UserError(f"SLURM's {command[0]} cannot be run: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"SLURM's {command[0]} did not answer in {timeout:.0f} s") from None
        if done.returncode:
            raise UserError(f"SLURM says: {complaint(done.stderr) or f'{command[0]} failed'}")
        return done.stdout + done.stderr if both else done.stdout


def _own_options() -> dict[str, str]:
    """Returns the environment without a person's own options of these commands: SQUEUE_PARTITION hides jobs."""
    habits = ("SQUEUE_", "SACCT_", "SINFO_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(habits)}
    return kept | {"SLURM_TIME_FORMAT": "standard"}


# What SLURM's commands say if asking again is of no use. Everything else (time-outs, a controller in standby
# mode, errors of munge) may pass.
_FINAL = re.compile(
    r"disabled|Invalid job id|denied|violates|not permitted|not supported|not installed|Only batch"
    r"|failed to fetch config"
)


def is_final(words: str) -> bool:
    return _FINAL.search(words) is not None


def complaint(stderr: str) -> str:
    """The line of SLURM's many that says what is wrong: the last that is not about the job in general."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line] or lines
    return re.sub(r"^(\w+: )?(error|fatal): ", "", telling[-1]) if telling else ""


def gpus_of(gres: str, gpu_type: str | None) -> int:
    """GPUs (of a type) in SLURM's GRES notation: "gpu:4", "gpu:v100:4(S:0-1),shard:8", "(null)"."""
    total = 0
    for kind, number in re.findall(r"(?:^|,)gpu(?::([^:,()]+))??:(\d+)", gres):
        if gpu_type is None or kind == gpu_type:
            total += int(number)
    return total


_MOST_MINUTES = 10**7
# "90", "90:00", "1:30:00"; "1-12", "1-12:30", "1-12:30:00".
_TIME = re.compile(
    r"(?:(?P<days>\d{1,6})-)?(?P<first>\d{1,9})(?::(?P<second>\d{1,9}))?(?::(?P<third>\d{1,9}))?",
    re.ASCII,
)


def minutes_of(limit: str) -> int | None:
    """SLURM's notations of a time limit in minutes, begun ones counted; None for "infinite" and nonsense."""
    found = _TIME.fullmatch(limit)
    if found is None:
        return None
    parts = [int(found[name]) for name in ("first", "second", "third") if found[name] is not None]
    if found["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        hours += 24 * int(found["days"])
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total = -(-(60 * (60 * hours + minutes) + seconds) // 60)
    return total if total <= _MOST_MINUTES else None


# As RUNNING, RESV_DEL_HOLD; the accounting's are followed by more, as in "CANCELLED by 0".
_STATE_WORD = re.compile(r"[A-Z_]+\b.*")


def _rows(text: str, job_ids: Sequence[str], columns: int) -> tuple[dict[str, list[str]], str]:
    """Returns the columns of each wanted job's first line, without its id; and the first line that is of no use.

    That may be an error that SLURM, or a site's wrapper, has printed among the answers, a line cut short, or a
    part of an array, as which no job of ours is submitted.
    """
    rows: dict[str, list[str]] = {}
    unreadable = ""
    for line in filter(str.strip, text.splitlines()):
        job_id, *rest = line.split("|")
        is_whole = 1 + len(rest) == columns and _STATE_WORD.fullmatch(rest[0])
        if is_whole and job_id in job_ids:
            rows.setdefault(job_id, rest)
        elif not is_whole or re.split(r"[_+]", job_id)[0] in job_ids:
            unreadable = unreadable or line.strip()
    return rows, unreadable


def _state(word: str, reason: str, start: str) -> JobState:
    phase: Literal["queued", "running", "ended"] = "running"
    if word in _PENDING:
        phase = "queued"
    elif word in _ENDED:
        phase = "ended"
    return JobState(phase, word, reason, _unix(start))


def _unix(moment: str) -> float | None:
    """SLURM's local time; None for "N/A" and "Unknown"."""
    with suppress(ValueError):
        return time.mktime(time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))
    return None
