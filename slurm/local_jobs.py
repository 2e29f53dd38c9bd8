"""Jobs on this machine: submitit's local executor, made to outlive the terminal in which it was started.

As a program (`python -m slurm.local_jobs FOLDER PATIENCE [SUPERVISION MAX_RESTARTS]`) this is the controller of
one job: it starts a process per rank, passes SIGTERM on to them and, as `srun --kill-on-bad-exit` does, ends all
of them when one fails.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from submitit.local.local import Controller, LocalExecutor, LocalJob

from cvae.files.paths import write_atomically
from slurm.attempts import Cause, failure_file
from slurm.commands import JobState
from slurm.failure_diagnosis import CONTROLLER_LOG, signals_of
from slurm.supervision import AttemptLog, Supervision

# For the other ranks to finish writing after one has failed. MLflow's mirror is a process of its own and goes on.
_PATIENCE_S = 12.0
_POLL_S = 0.1
_SUFFIX = "CVAE_JOB_SUFFIX"


class DetachedExecutor(LocalExecutor):  # type: ignore[misc]  # submitit is not checked, see pyproject
    """Differs from submitit's own in three ways.

    That one starts its controller in the terminal's session, where Ctrl-C and a closed window reach it; ends the
    job after a time-out; and chooses the GPUs that the job sees.

    Parameters: tasks_per_node; env: of the ranks; patience_s: what the other ranks get after one has failed;
    supervision and max_restarts: see slurm/supervision.py.
    """

    def _submit_command(self, command: str) -> Any:
        tasks = self.parameters["tasks_per_node"]
        arguments = [str(self.folder), str(self.parameters.get("patience_s", _PATIENCE_S))]
        if self.parameters.get("supervision"):
            arguments.append(json.dumps(self.parameters["supervision"]))
            arguments.append(str(self.parameters["max_restarts"]))
        # A pid comes again, in a container soon: files of an earlier job must not be taken for this one's.
        suffix = f"{time.time():.0f}"
        environment = os.environ | {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_TIMEOUT_S": "0",
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            **self.parameters["env"],
            _SUFFIX: suffix,
        }
        with (self.folder / CONTROLLER_LOG).open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "slurm.local_jobs", *arguments],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return LocalJob(self.folder, _job_id(process.pid, suffix), list(range(tasks)), process)

    def _internal_update_parameters(self, **parameters: Any) -> None:
        self.parameters.update(parameters)


class _Controller(Controller):  # type: ignore[misc]
    asked_to_end = False

    def __init__(self, folder: Path):
        super().__init__(folder)
        # submitit uses the controller's pid as the job's id.
        self.pid = _job_id(os.getpid(), os.environ[_SUFFIX])

    def run_to_end(self, patience_s: float) -> int:
        """Runs one attempt. Returns the status of the rank that failed first; 0 if none did."""
        try:
            self.start_tasks()
            return self._wait(patience_s)
        finally:
            self.kill_tasks()

    def run_supervised(self, patience_s: float, log: AttemptLog) -> None:
        """Runs as many attempts as the job may have."""
        while True:
            log.begin([os.uname().nodename])
            if log.last.number > 1:
                os.environ["CVAE_RESTARTED"] = "1"
            end = log.diagnose(self.run_to_end(patience_s))
            end = replace(end, restarts=end.restarts and not self.asked_to_end)
            log.close(end)
            if end.cause in (Cause.CRASH, Cause.BAD_INPUT):
                log.report_failure(end, end.restarts)
            if not end.restarts:
                return

    def _is_orphaned(self) -> bool:
        owner = os.environ.get("CVAE_ENDS_WITH")
        try:
            return owner is not None and psutil.Process(int(owner)).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def _forward_signal(self, signum: signal.Signals, *args: Any) -> None:
        self.asked_to_end |= signum == signal.SIGTERM
        super()._forward_signal(signum, *args)

    def _wait(self, patience_s: float) -> int:
        running = dict(enumerate(self.tasks))
        deadline, status = float("inf"), 0
        while running and time.monotonic() < deadline:
            if not self.asked_to_end and self._is_orphaned():
                print(
                    f"job {self.pid}: the process that owns it is gone; asked to save", flush=True
                )
                self._forward_signal(signal.SIGTERM)
            for rank, task in list(running.items()):
                code = task.poll()
                if code is not None:
                    del running[rank]
                if code:
                    self._report_failure(rank, code)
                    deadline = min(deadline, time.monotonic() + patience_s)
                    status = status or code
            time.sleep(_POLL_S)
        return status

    def _report_failure(self, rank: int, code: int) -> None:
        """Reports that a rank has failed, unless the rank has done so itself."""
        signals = signals_of(-code)
        print(f"job {self.pid}: rank {rank} failed: {', '.join(signals) or code}", flush=True)
        file = failure_file(self.folder, self.pid, rank)
        if not file.exists():
            report = {"time": time.time(), "rank": rank, "host": os.uname().nodename, "error": ""}
            report |= {"signals": signals, "exit_status": None if signals else code}
            write_atomically(file, json.dumps(report))


def _job_id(pid: int, suffix: str) -> str:
    return f"{pid}-{suffix}"


def pid_of(job_id: str) -> int:
    """Returns the controller's pid, which is the whole id of older jobs."""
    return int(job_id.partition("-")[0])


def started_at(pid: int) -> float:
    """Returns when a process was started, in unix seconds; with its pid, that identifies it."""
    return psutil.Process(pid).create_time()


def look(pid: int, started: float) -> JobState:
    """Returns whether anything of the job is left: its controller or, if that was killed, a rank."""
    if _members(pid, started):
        return JobState("running", "RUNNING", os.uname().nodename, started)
    return JobState("ended", "ENDED")


def tell_to_save(pid: int, started: float) -> None:
    """Sends SIGTERM to every rank, by way of the controller if it lives."""
    members = _members(pid, started)
    for process in members[:1] if members and members[0].pid == pid else members:
        process.send_signal(signal.SIGTERM)


def kill(pid: int, started: float) -> None:
    for process in _members(pid, started):
        process.kill()


def _members(pid: int, started: float) -> list[psutil.Process]:
    """Returns the live processes of the session that the job's controller leads or led; the controller first."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) != pid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            # A later process that was given the same pid. psutil derives the time from the clock, which may have
            # been set since.
            if process.pid == pid and abs(process.create_time() - started) > 60:
                return []
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
        members.append(process)
    return sorted(members, key=lambda process: process.pid != pid)


def main(folder: str, patience_s: str, supervision: str = "", max_restarts: str = "0") -> None:
    # Inside an allocation SLURM warns every process of its end by SIGUSR2; the ranks bind it for themselves.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    controller = _Controller(Path(folder))
    if not supervision:
        controller.run_to_end(float(patience_s))
        return
    supervised = Supervision(*json.loads(supervision))
    log = AttemptLog(controller.folder, controller.pid, supervised, int(max_restarts))
    controller.run_supervised(float(patience_s), log)


if __name__ == "__main__":
    main(*sys.argv[1:])
