"""MLflow's view of a run, kept by a process of its own beside rank 0.

MLflow's imports, its HTTP and its database take seconds and hold the interpreter's lock; the training
loop should feel none of it. The trainer writes the journal and nothing else. The mirror follows the
journal and may lag, die or be killed at any moment: mlflow.json says from where to go on.
"""

import logging
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cvae.errors import UserError
from cvae.files.file_lock import file_lock
from cvae.redaction import guard_output, without_password, without_secrets
from cvae.tracking.mlflow_state import behind

if TYPE_CHECKING:
    from cvae.tracking.mlflow_push import Pusher

__all__ = ["Mirror", "behind", "start_mirror", "sync"]

_POLL = 1.5  # seconds
_LONGEST_WAIT = 8.0  # between two attempts while MLflow is away
_PATIENCE_AFTER_END = 60.0  # without an answer; the trainer, if it still lives, usually has less

_log = logging.getLogger(__name__)


class Mirror:
    """The mirror's process. Nothing that happens to it reaches the trainer."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._process = self._start()

    def finish(self, timeout_s: float) -> int:
        """Tells the mirror that the journal has ended and waits until it has caught up.

        Returns the number of journal lines that MLflow does not have; `sync` can bring them later.
        """
        deadline = time.monotonic() + timeout_s
        try:
            if self._process is None or self._process.poll() is not None:
                _log.warning("the MLflow mirror had died (%s)", self._log_file)
                self._process = self._start()
            if self._process is not None:
                hurry(self._process.pid)
                self._say_end(self._process)
                self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            assert self._process is not None
            # It survives that by design.
            self._process.kill()
            self._process.wait()
        except OSError as error:
            _log.warning("the MLflow mirror: %s", error)
        try:
            return behind(self._run_dir)
        except (OSError, UserError) as error:
            _log.warning("MLflow: %s", error)
            return 0

    @property
    def _log_file(self) -> Path:
        return _log_file(self._run_dir)

    def _start(self) -> "subprocess.Popen[bytes] | None":
        try:
            with open(self._log_file, "ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-m", "cvae.tracking.mlflow_mirror", str(self._run_dir)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C and the signals of a launcher are for the trainer; the mirror hears the
                    # news from it, or from the end of the pipe should the trainer be killed.
                    start_new_session=True,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                )
        except OSError as error:
            _log.warning("no MLflow mirror: %s", error)
            return None

    @staticmethod
    def _say_end(process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(b"end\n")
            process.stdin.close()
        except BrokenPipeError:
            pass


def start_mirror(run_dir: Path) -> Mirror:
    """Starts the mirror of a run's journal; its own log is logs/mlflow.log in the run directory."""
    return Mirror(Path(run_dir))


def sync(run_dir: Path, progress: Callable[[int], object]) -> None:
    """Brings all of the journal to MLflow, for a run whose mirror could not.

    `progress` hears how many lines have arrived since it was called last, of `behind(run_dir)` in
    all. Raises UserError where MLflow does not answer, or where a mirror is at work.
    """
    prepare_mlflow()
    from cvae.tracking.mlflow_push import Pusher

    with _alone(run_dir, wait=False):
        pusher = Pusher(run_dir)
        try:
            pusher.push(progress)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"MLflow at {without_password(pusher.uri)} does not take the run: {one_line(error)}"
            ) from None


def main(run_dir: Path) -> int:
    """Follows the journal until standard input says or is at its end; exit status 0: all is there."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    step_back()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    guard_output()
    _log.info("loading MLflow")
    prepare_mlflow()
    from cvae.tracking.mlflow_push import Pusher

    with _alone(run_dir, wait=True):
        try:
            return _follow(Pusher(run_dir))
        except UserError as error:
            _log.error("error: %s", error)
            return 2


def step_back() -> None:
    """Leaves the cores to others: what follows is no hurry."""
    os.nice(10)
    # Linux weighs sessions against each other, and only within one by its processes' niceness. A session that
    # is not this process's own is somebody's terminal.
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text("10")


def hurry(pid: int) -> None:
    """Gives a mirror its share of the cores again: the training is over, and somebody waits.

    It leads its session. Its niceness cannot be taken back, but among sessions that does not count.
    """
    with suppress(OSError):
        if os.getsid(pid) == pid:
            Path(f"/proc/{pid}/autogroup").write_text("0")


def _follow(pusher: "Pusher") -> int:
    away_since: float | None = None
    noticed = False
    wait = 0.0
    _log.info("mirroring to %s", without_password(pusher.uri))
    while True:
        # Asked before reading: what was written before the end was told is read below.
        ended = told_end(wait)
        try:
            pusher.push()
            if ended:
                pusher.end_unless_ended()
                return 0
            wait = _POLL
            if noticed:
                _log.info("MLflow is back, after %.0f s", time.monotonic() - (away_since or 0))
            away_since, noticed = None, False
        except UserError:
            raise
        except Exception as error:
            now = time.monotonic()
            if away_since is None:
                # A first failure may be no more than a connection that was idle for too long.
                away_since, wait = now, 0.5
            elif not noticed:
                noticed = True
                _log.warning("MLflow is away: %s", one_line(error))
            if ended and now - away_since > _PATIENCE_AFTER_END:
                _log.error(
                    "giving up; `python workflows/runs.py sync %s` brings the rest",
                    pusher.run_dir.name,
                )
                return 1
            if ended:
                time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)


def told_end(timeout: float) -> bool:
    """Waits so many seconds; whether standard input has said something, or ended."""
    readable, _, _ = select.select([sys.stdin], [], [], timeout)
    return bool(readable)


def _alone(run_dir: Path, wait: bool) -> AbstractContextManager[None]:
    """One process at a time pushes a run; a mirror outlives its killed trainer for some moments."""
    refusal = f"{run_dir.name}: its mirror is at work, nothing to sync"
    return file_lock(_log_file(run_dir), math.inf if wait else 0.0, refusal)


def newest_word(run_dir: Path) -> str:
    """Returns the last line of the mirror's log: what it is doing, or why it cannot."""
    try:
        with open(Path(run_dir) / "logs" / "mlflow.log", "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 1000))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return re.sub(r"^[\d-]+ [\d:,]+ ", "", lines[-1]) if lines else ""


def _log_file(run_dir: Path) -> Path:
    folder = Path(run_dir) / "logs"
    folder.mkdir(exist_ok=True)
    return folder / "mlflow.log"


def prepare_mlflow() -> None:
    """What has to be said to MLflow before it is imported by a mirror."""
    # The pusher repeats what failed. MLflow's own repetitions would also create a run twice.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow prints a traceback whenever its database is busy; the mirror says it in one line.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A bar on the terminal stays whole.
    warnings.filterwarnings("ignore", module=r"(mlflow|sqlalchemy|alembic)\b")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def one_line(error: Exception) -> str:
    """What MLflow says, on one line of at most 300 characters and without a password."""
    return without_secrets(" ".join(str(error).split()))[:300]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
