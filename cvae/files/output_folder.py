"""What a command may overwrite: nothing but output that the same command has made.

A folder that a command writes appears whole under its name. It contains a marker that names the
command and its files. Only a folder with that marker and without any other file is ever replaced.
"""

import ctypes
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cvae.errors import UserError
from cvae.files import json_file, paths
from cvae.files.file_lock import file_lock

MARKER = ".made-by.json"
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    **dict.fromkeys((stat.S_IFBLK, stat.S_IFCHR), "a device"),
}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Errors of file systems that cannot exchange two names in one step.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def _never(folder: Path) -> bool:
    return False


def check_file(path: Path) -> None:
    """Raises UserError unless an output file can be put at `path`: nothing or a regular file is there."""
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_kind(mode)}, which an output does not replace; name a file")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")


def check_folder(folder: Path, made_by: str, older: Callable[[Path], bool] = _never) -> Path:
    """Returns the absolute path of a folder in which the command `made_by` may put its output.

    older: returns whether a folder was made by a version of the command that left no marker. Raises
    UserError unless nothing is there, or an empty folder, or one that contains only what the command
    made.
    """
    mode = _mode(folder)
    if mode is not None and not stat.S_ISDIR(mode):
        raise UserError(f"{folder} is {_kind(mode)}, which is not replaced; name a new folder")
    path = folder.resolve()
    for place, description in _protected():
        if place == path or path in place.parents:
            raise UserError(f"{folder} is {description}, or holds it; name a new folder")
    if os.path.ismount(path):
        raise UserError(f"{folder} is a mount point; name a new folder in it")
    ancestor = next(parent for parent in path.parents if os.path.lexists(parent))
    if not ancestor.is_dir():
        raise UserError(f"{folder} cannot be made: {ancestor} is not a folder")
    if not path.exists() or older(path):
        return path
    if not os.listdir(path):
        for parent in path.parents:
            if any((parent / name).exists() for name in ("experiment.yaml", "manifest.json")):
                raise UserError(f"{folder} is part of {parent}; name a folder elsewhere")
        return path
    marker = _marker(path)
    files = marker.get("files")
    if marker.get("made_by") != made_by or not isinstance(files, list):
        raise UserError(
            f"{folder} is not empty, and was not made by {made_by}; name a new folder, or remove it first"
        )
    if strange := sorted(_files(path) - {MARKER, *map(str, files)}):
        raise UserError(
            f"{folder} holds {strange[0]}, which {made_by} did not make; name a new folder, or move it away"
        )
    return path


@contextmanager
def whole_folder(
    folder: Path, made_by: str, older: Callable[[Path], bool] = _never
) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` when the context ends without an error.

    Otherwise it is removed. What is at `folder` is replaced in one step, if check_folder permits that
    both now and at the end. Raises UserError as check_folder does or if another process is writing
    there, and OSError (disk full, no permission).
    """

    def is_own(path: Path) -> bool:
        if path.is_symlink() or not path.is_dir():
            return False
        return _marker(path).get("made_by") == made_by or older(path)

    path = check_folder(folder, made_by, older)
    nascent, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(path) and is_own(old):
        os.rename(old, path)  # a process was killed between the two renames of _replace
    with suppress(FileExistsError):
        nascent.mkdir()
    with file_lock(nascent, refusal=in_use(folder)):
        if os.listdir(nascent) and not is_own(nascent):
            raise UserError(f"{nascent} is in the way, and was not left by {made_by}; remove it")
        for leftover in nascent.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        try:
            (nascent / MARKER).write_text(json.dumps({"made_by": made_by, "files": None}))
            yield nascent
            mark(nascent, made_by)
            for file in nascent.rglob("*"):
                paths.fsync(file)
            check_folder(folder, made_by, older)
            _replace(path, nascent, old)
            paths.fsync(path.parent)
        finally:
            for leftover in filter(is_own, (nascent, old)):
                shutil.rmtree(leftover, ignore_errors=True)


def in_use(folder: Path) -> str:
    return f"{folder} is being written by another process just now"


def _replace(path: Path, nascent: Path, old: Path) -> None:
    """Renames `nascent` to `path`; what was there is at `nascent` or `old` afterwards."""
    try:
        os.rename(nascent, path)  # onto nothing, or onto an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    try:
        _exchange(nascent, path)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        os.rename(path, old)
        try:
            os.rename(nascent, path)
        except OSError:
            os.rename(old, path)
            raise


def _exchange(one: Path, other: Path) -> None:
    """Exchanges two names in one step. Raises OSError, one of _NO_EXCHANGE if that is not supported."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def mark(folder: Path, made_by: str) -> None:
    """Marks all files that are in a folder as made by a command."""
    json_file.save(folder / MARKER, {"made_by": made_by, "files": sorted(_files(folder))})


def _marker(folder: Path) -> dict[str, object]:
    try:
        content = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _files(folder: Path) -> set[str]:
    """Returns every file below a folder, except those that NFS keeps while a process reads them."""
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if (file.is_symlink() or not file.is_dir()) and not file.name.startswith(".nfs")
    }


def _protected() -> list[tuple[Path, str]]:
    """Returns folders that no output replaces, directly or as part of a parent, with descriptions."""
    places = {
        os.path.expanduser("~"): "your home folder",
        str(paths.PROJECT_ROOT): "the project's own folder",
        str(paths.runs_dir()): "the folder of all runs",
        str(paths.sweeps_dir()): "the folder of all sweeps",
        str(paths.data_dir()): "the folder of the prepared data",
    }
    with suppress(OSError):  # it may have been deleted
        places[os.getcwd()] = "the current folder"
    return [(Path(place).resolve(), description) for place, description in places.items()]


def _mode(path: Path) -> int | None:
    """Returns the mode of a path, None if it does not exist. Raises UserError if it cannot be used."""
    try:
        path.resolve()
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)[:200]} cannot be used: {reason}") from None


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a special file")
