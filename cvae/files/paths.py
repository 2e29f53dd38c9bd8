"""Where files are stored, all below one home folder, and how a file is written whole."""

import os
import stat
import tempfile
from pathlib import Path

from cvae.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def home() -> Path:
    """Returns the folder of data/, runs/, sweeps/ and MLflow's store: $CVAE_HOME or the project's root."""
    return Path(os.path.realpath(os.environ.get("CVAE_HOME") or PROJECT_ROOT))


def data_dir() -> Path:
    return home() / "data"


def runs_dir() -> Path:
    return home() / "runs"


def sweeps_dir() -> Path:
    return home() / "sweeps"


def tracking_uri() -> str:
    """Returns $MLFLOW_TRACKING_URI, or else the URI of an SQLite file in home().

    Raises UserError if no URI can name that file.
    """
    if configured := os.environ.get("MLFLOW_TRACKING_URI"):
        return configured
    if "?" in str(home()):
        # A URI's query begins there: the store would be another file, in another folder.
        raise UserError(f"{home()}: MLflow cannot keep its store in a folder with '?' in its name")
    return f"sqlite:///{home() / 'mlflow.db'}"


def printable(name: str) -> str:
    """Returns a file's name with control characters, and bytes that are not UTF-8, as \\xff."""
    text = os.fsencode(name).decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file, or leaves the old one: temporary file, fsync, rename.

    Raises OSError (disk full, no permission), after which no temporary file is left. Raises UserError
    if `path` is a device, a named pipe or a socket, which a rename would remove.
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
    # The umask can only be read by setting it; files that other threads create meanwhile are private.
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(file, 0o666 & ~umask)


def _is_special(path: Path) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False  # writing reports what is wrong
    return not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode))


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
