"""Where things live: everything a person makes is under one home folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder that holds data/, runs/ and MLflow's store: $CVAE_HOME, else the project's root."""
    return Path(os.environ.get("CVAE_HOME") or PROJECT_ROOT).resolve()


def data_dir() -> Path:
    return home() / "data"


def runs_dir() -> Path:
    return home() / "runs"


def sweeps_dir() -> Path:
    return home() / "sweeps"


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, else an SQLite file in home(), where a bare `mlflow ui` finds it too."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes the whole file or leaves what was there: temporary name, fsync, rename.

    Raises OSError (disk full, no permission); the temporary file is gone by then.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; colleagues read each other's runs.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the context ends well, and is gone otherwise.

    What was at `folder` is replaced. Raises OSError (disk full, no permission).
    """
    nascent, old = (folder.parent / f".{folder.name}.{suffix}" for suffix in ("new", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        for leftover in (nascent, old):
            shutil.rmtree(leftover, ignore_errors=True)
        nascent.mkdir()
        yield nascent
        for file in nascent.rglob("*"):
            fsync(file)
        if folder.exists():
            os.rename(folder, old)
        os.rename(nascent, folder)
        fsync(folder.parent)
    finally:
        for leftover in (nascent, old):
            shutil.rmtree(leftover, ignore_errors=True)
