"""Where things live: everything a person makes is under one home folder."""

import os
import stat
import tempfile
from pathlib import Path

from cvae.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def home() -> Path:
    """The folder that holds data/, runs/ and MLflow's store: $CVAE_HOME, else the project's root."""
    return Path(os.path.realpath(os.environ.get("CVAE_HOME") or PROJECT_ROOT))


def data_dir() -> Path:
    return home() / "data"


def runs_dir() -> Path:
    return home() / "runs"


def sweeps_dir() -> Path:
    return home() / "sweeps"


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, else an SQLite file in home(), where a bare `mlflow ui` finds it too.

    Raises UserError if no URI can name that file.
    """
    if set_by_hand := os.environ.get("MLFLOW_TRACKING_URI"):
        return set_by_hand
    if "?" in str(home()):
        # What follows is the URI's query: the store would be another file, in another folder.
        raise UserError(f"{home()}: MLflow cannot keep its store in a folder with '?' in its name")
    return f"sqlite:///{home() / 'mlflow.db'}"


def printable(name: str) -> str:
    """Returns a file's name as text that can be written anywhere: other bytes than UTF-8 and controls as \\xff."""
    text = os.fsencode(name).decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes the whole file or leaves what was there: temporary name, fsync, rename.

    Raises OSError (disk full, no permission); the temporary file is gone by then. Raises UserError if a device,
    a named pipe or a socket is there, which a rename would remove.
    """
    if _is_special(path):
        raise UserError(f"{path} is a special file, which is not replaced")
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        share(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def share(file: str | Path) -> None:
    """Gives a file the permissions that the umask grants to new files.

    Python's tempfile and safetensors make files private, but colleagues read each other's runs.
    """
    # The umask can only be read by setting it; a file that another thread makes meanwhile is private, not open.
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(file, 0o666 & ~umask)


def _is_special(path: Path) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False  # what is wrong, writing will find
    return not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode))


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
