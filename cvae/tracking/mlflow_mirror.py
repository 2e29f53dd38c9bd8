"""The mirror: a process next to rank 0 that carries a run's journal to MLflow.

MLflow's imports, its HTTP and its database take seconds and hold the interpreter's lock, so the trainer
writes nothing but the journal. The mirror may lag, die or be killed at any moment: mlflow.json records
how far it got.
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

from cvae.errors import UserError, one_line
from cvae.files.file_lock import file_lock
from cvae.redaction import guard_output, without_password, without_secrets
from cvae.tracking.mlflow_state import behind

__all__ = ["Mirror", "behind", "start_mirror", "sync"]

_POLL_S = 1.5
_LONGEST_WAIT_S = 8.0  # between two attempts while MLflow is away

_log = logging.getLogger(__name__)


class Mirror:
    """The mirror's process, as its trainer sees it. None of its failures reaches the trainer."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._process = self._start()

    def finish(self, timeout_s: float) -> int:
        """Waits until the mirror has brought the rest of the journal, which has ended, to MLflow.

        Returns the number of journal lines that MLflow does not have; `sync` can bring them later.
        """
        deadline = time.monotonic() + timeout_s
        try:
            if self._process is None or self._process.poll() is not None:
                _log.warning("the MLflow mirror had died (%s)", _log_file(self._run_dir))
                self._process = self._start()
            if self._process is not None:
                hurry(self._process.pid)
                assert self._process.stdin is not None
                with suppress(BrokenPipeError):
                    self._process.stdin.close()
                self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            assert self._process is not None
            self._process.kill()
            self._process.wait()
        except OSError as error:
            _log.warning("the MLflow mirror: %s", error)
        try:
            return behind(self._run_dir)
        except (OSError, UserError) as error:
            _log.warning("MLflow: %s", error)
            return 0

    def _start(self) -> "subprocess.Popen[bytes] | None":
        try:
            with open(_log_file(self._run_dir), "ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-m", "cvae.tracking.mlflow_mirror", str(self._run_dir)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    # Signals are for the trainer. The mirror ends when the trainer closes the pipe,
                    # or when the trainer is killed.
                    start_new_session=True,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                )
        except OSError as error:
            _log.warning("no MLflow mirror: %s", error)
            return None


def start_mirror(run_dir: Path) -> Mirror:
    """Starts the mirror of a run's journal; its log is logs/mlflow.log in the run's folder."""
    return Mirror(Path(run_dir))


def sync(run_dir: Path, progress: Callable[[int], object]) -> None:
    """Brings the whole journal to MLflow, for a run whose mirror could not.

    `progress` is called with the number of lines that have arrived since the last call, of
    `behind(run_dir)` in all. Raises UserError if MLflow does not respond or a mirror is at work.
    """
    prepare_mlflow()
    from cvae.tracking.mlflow_push import Pusher

    with _lock(run_dir, 0.0):
        pusher = Pusher(run_dir)
        try:
            pusher.push(progress)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"MLflow at {without_password(pusher.uri)} does not take the run: {_reason(error)}"
            ) from None


def main(run_dir: Path) -> int:
    """Follows the journal until standard input ends. Returns the exit status, 0 if MLflow has all of it."""
    set_up_process()
    _log.info("loading MLflow")
    from cvae.tracking.mlflow_push import Pusher

    with _lock(run_dir, math.inf):
        try:
            pusher = Pusher(run_dir)
            _log.info("mirroring to %s", without_password(pusher.uri))
            return follow(pusher.push, pusher.end_unless_ended, patience_s=60.0)
        except UserError as error:
            _log.error("error: %s", error)
            return 2


def set_up_process() -> None:
    """Prepares a mirror's process: it ignores signals, leaves the cores to others, and logs to stderr."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    # Linux weighs sessions against each other, and niceness only within one. If this process does not
    # lead its session, that is somebody's terminal.
    if os.getsid(0) == os.getpid():
        _weigh_session(os.getpid(), 10)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    guard_output()
    prepare_mlflow()


def hurry(pid: int) -> None:
    """Gives a mirror its full share of the cores: the training is over, and somebody waits.

    Its niceness cannot be taken back, but among sessions that does not count.
    """
    with suppress(OSError):
        if os.getsid(pid) == pid:
            _weigh_session(pid, 0)


def _weigh_session(pid: int, nice: int) -> None:
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def follow(push: Callable[[], object], end: Callable[[], object], patience_s: float) -> int:
    """Calls `push` again and again and, once standard input has ended, `end`.

    Returns 0, or 1 if MLflow did not respond for `patience_s` after the end of the input. Raises
    UserError if `push` or `end` does.
    """
    away_since: float | None = None
    ended_at: float | None = None
    noticed = False
    wait = 0.0
    while True:
        # Checked before reading: everything that was written before the end is then read.
        if ended_at is not None:
            time.sleep(wait)
        elif select.select([sys.stdin], [], [], wait)[0]:
            ended_at = time.monotonic()
            hurry(os.getpid())
        try:
            push()
            if ended_at is not None:
                end()
                return 0
            if noticed:
                _log.info("MLflow is back, after %.0f s", time.monotonic() - (away_since or 0))
            wait, away_since, noticed = _POLL_S, None, False
        except UserError:
            raise
        except Exception as error:
            now = time.monotonic()
            if away_since is None:
                # A first failure may be only a connection that was idle for too long.
                away_since, wait = now, 0.5
                continue
            if not noticed:
                noticed = True
                _log.warning("MLflow is away: %s", _reason(error))
            if ended_at is not None and now - max(ended_at, away_since) > patience_s:
                _log.error("giving up: %s", _reason(error))
                return 1
            wait = min(2 * wait, _LONGEST_WAIT_S)


def _lock(run_dir: Path, patience_s: float) -> AbstractContextManager[None]:
    """Lets one process at a time push a run; a mirror outlives its killed trainer for some moments."""
    refusal = f"{run_dir.name}: its mirror is at work, nothing to sync"
    return file_lock(_log_file(run_dir), patience_s, refusal)


def last_log_line(run_dir: Path) -> str:
    """Returns the last line of the mirror's log, without its time; "" if there is none."""
    try:
        with open(Path(run_dir) / "logs" / "mlflow.log", "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 1000))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return re.sub(r"^[\d-]+ [\d:,]+ ", "", lines[-1]) if lines else ""


def _reason(error: Exception) -> str:
    return one_line(without_secrets(str(error)))


def _log_file(run_dir: Path) -> Path:
    folder = Path(run_dir) / "logs"
    folder.mkdir(exist_ok=True)
    return folder / "mlflow.log"


def prepare_mlflow() -> None:
    """Sets the variables and filters that MLflow reads when it is imported."""
    # The pusher repeats what failed. MLflow's own retries would also create a run twice.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # MLflow prints a traceback whenever its database is busy; the mirror logs one line.
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        os.environ.setdefault(name, value)
    # Warnings would split a progress bar on the terminal.
    warnings.filterwarnings("ignore", module=r"(mlflow|sqlalchemy|alembic)\b")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
