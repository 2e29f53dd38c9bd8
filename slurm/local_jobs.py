"""Jobs on this machine: submitit's local executor, made to outlive the terminal that it was started from.

As a program (`python -m slurm.local_jobs FOLDER`) this is the controller of one job: it starts a process per rank,
tells them to save when it gets SIGTERM, and, as `srun --kill-on-bad-exit` does, ends all when one ends badly.
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

from slurm.attempts import Cause
from slurm.commands import JobState
from slurm.failure_diagnosis import CONTROLLER_LOG
from slurm.supervision import AttemptLog, Supervision

# For the last words of the ranks that outlive a bad end. MLflow's mirror is a process of its own and goes on.
_PATIENCE_S = 12.0
_POLL_S = 0.1
_SUFFIX = "CVAE_JOB_SUFFIX"


class DetachedExecutor(LocalExecutor):  # type: ignore[misc]  # submitit is not checked, see pyproject
    """submitit's own starts its controller in the terminal's session, where Ctrl-C and a closed window reach
    it; ends the job after a time-out; and decides itself which GPUs the job sees.

    Parameters: tasks_per_node; env: of the ranks; patience_s: what the other ranks get after a bad end;
    supervision and max_restarts: see slurm/supervision.py.
    """

    def _submit_command(self, command: str) -> Any:
        tasks = self.parameters["tasks_per_node"]
        patience = self.parameters.get("patience_s", _PATIENCE_S)
        supervision = []
        if self.parameters.get("supervision"):
            restarts = str(self.parameters["max_restarts"])
            supervision = [json.dumps(self.parameters["supervision"]), restarts]
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
        }
        # A pid comes again, in a container soon: the files of an earlier job must not be taken for this one's.
        suffix = environment[_SUFFIX] = f"{time.time():.0f}"
        with (self.folder / CONTROLLER_LOG).open("a") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "slurm.local_jobs",
                    str(self.folder),
                    str(patience),
                    *supervision,
                ],
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
    told_to_end = False

    def __init__(self, folder: Path):
        super().__init__(folder)
        # submitit calls the job's id the controller's pid.
        self.pid = _job_id(os.getpid(), os.environ[_SUFFIX])

    def run_to_end(self, patience_s: float) -> int:
        """One try. Returns the status of the rank that ended badly first; 0 where none did."""
        try:
            self.start_tasks()
            return self._wait(patience_s)
        finally:
            self.kill_tasks()

    def run_supervised(
        self, patience_s: float, supervision: Supervision, max_restarts: int
    ) -> None:
        """Runs as many attempts as the job may have."""
        log = AttemptLog(self.folder, self.pid, supervision, max_restarts)
        while True:
            log.begin([os.uname().nodename])
            if log.last.number > 1:
                os.environ["CVAE_RESTARTED"] = "1"
            end = log.diagnose(self.run_to_end(patience_s))
            end = replace(end, restarts=end.restarts and not self.told_to_end)
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
        self.told_to_end |= signum == signal.SIGTERM
        super()._forward_signal(signum, *args)

    def _wait(self, patience_s: float) -> int:
        running = dict(enumerate(self.tasks))
        deadline, status = float("inf"), 0
        while running and time.monotonic() < deadline:
            if not self.told_to_end and self._is_orphaned():
                print(f"job {self.pid}: what it belongs to has gone; told to save", flush=True)
                self._forward_signal(signal.SIGTERM)
            for rank, task in list(running.items()):
                code = task.poll()
                if code is not None:
                    del running[rank]
                if code:
                    print(f"job {self.pid}: task {rank}: {_how(code)}", flush=True)
                    deadline = min(deadline, time.monotonic() + patience_s)
                    status = status or code
            time.sleep(_POLL_S)
        return status


def _job_id(pid: int, suffix: str) -> str:
    return f"{pid}-{suffix}"


def pid_of(job_id: str) -> int:
    """The controller's; older job ids are mere pids."""
    return int(job_id.partition("-")[0])


def _how(code: int) -> str:
    """In srun's words: "Killed", "Segmentation fault", "Exited with exit code 1"."""
    return f"Exited with exit code {code}" if code > 0 else str(signal.strsignal(-code))


def started_at(pid: int) -> float:
    """When a process was started, unix seconds: with its pid the identity of a process."""
    return psutil.Process(pid).create_time()


def look(pid: int, started: float) -> JobState:
    """Whether anything of the job is left: its controller or, should that have been killed, a rank."""
    if _members(pid, started):
        return JobState("running", "RUNNING", os.uname().nodename, started)
    return JobState("ended", "ENDED")


def tell_to_save(pid: int, started: float) -> None:
    """SIGTERM to every rank."""
    for process in _members(pid, started):
        # The controller passes it on; without one, each gets it.
        process.send_signal(signal.SIGTERM)
        if process.pid == pid:
            break


def kill(pid: int, started: float) -> None:
    for process in _members(pid, started):
        process.kill()


def _members(pid: int, started: float) -> list[psutil.Process]:
    """The live processes of the session that the job's controller leads or led; the controller first."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) != pid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            # A later process that was given the same pid. psutil derives the time from the clock, which
            # may have been set since.
            if process.pid == pid and abs(process.create_time() - started) > 60:
                return []
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
        members.append(process)
    return sorted(members, key=lambda process: process.pid != pid)


if __name__ == "__main__":
    # Inside an allocation SLURM warns every process of its end; the ranks bind it for themselves.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    controller = _Controller(Path(sys.argv[1]))
    if sys.argv[3:]:
        supervised = Supervision(*json.loads(sys.argv[3])), int(sys.argv[4])
        controller.run_supervised(float(sys.argv[2]), *supervised)
    else:
        controller.run_to_end(float(sys.argv[2]))
