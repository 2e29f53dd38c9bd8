"""What a command may put where: an output takes the place of nothing but what the same command has made.

A folder that a command writes appears whole under its name, or grows there. It holds a marker that names the
command and the files; a folder with that marker, and with no other file, is the only kind that is replaced.
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
from cvae.files import paths
from cvae.files.file_lock import file_lock

MARKER = ".made-by.json"
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What a file system says that cannot exchange two names in one step.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def check_file(path: Path) -> None:
    """Raises UserError unless an output file can be put at `path`: nothing is there, or an ordinary file."""
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_kind(mode)}, which an output does not replace; name a file")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")


def check_folder(
    folder: Path, made_by: str, older: Callable[[Path], bool] = lambda folder: False
) -> Path:
    """Returns the absolute path of `folder`, where the command `made_by` may put its output.

    older: recognises what a version of the command made that left no marker. Raises UserError unless nothing is
    there, or an empty folder, or a folder that the command made and that holds nothing else.
    """
    mode = _mode(folder)
    if mode is not None and not stat.S_ISDIR(mode):
        raise UserError(f"{folder} is {_kind(mode)}, which is not replaced; name a new folder")
    path = folder.resolve()
    for place, what in _protected():
        if place == path or path in place.parents:
            raise UserError(f"{folder} is {what}, or holds it; name a new folder")
    if os.path.ismount(path):
        raise UserError(f"{folder} is a mount point; name a new folder in it")
    ancestor = next(parent for parent in path.parents if os.path.lexists(parent))
    if not ancestor.is_dir():
        raise UserError(f"{folder} cannot be made: {ancestor} is not a folder")
    if not path.exists() or older(path):
        return path
    if not os.listdir(path):
        inside = [
            p
            for p in path.parents
            for f in ("experiment.yaml", "manifest.json")
            if (p / f).exists()
        ]
        if inside:
            raise UserError(f"{folder} is part of {inside[0]}; name a folder elsewhere")
        return path
    files = _files_made(path, made_by)
    if files is None:
        raise UserError(
            f"{folder} is not empty, and was not made by {made_by}; name a new folder, or remove it first"
        )
    if strange := sorted(_files(path) - files):
        raise UserError(
            f"{folder} holds {strange[0]}, which {made_by} did not make; name a new folder, or move it away"
        )
    return path


@contextmanager
def whole_folder(
    folder: Path, made_by: str, older: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the context ends well, and is gone otherwise.

    What is at `folder` is replaced in one step if check_folder permits it, now and at the end. Raises UserError
    as check_folder, or if another process is writing there, and OSError (disk full, no permission).
    """
    path = check_folder(folder, made_by, older)
    nascent, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    _restore(path, old, made_by, older)
    with suppress(FileExistsError):
        nascent.mkdir()
    with file_lock(nascent, refusal=_in_use(folder)):
        _clear(nascent, made_by, older)
        try:
            (nascent / MARKER).write_text(json.dumps({"made_by": made_by, "files": None}))
            yield nascent
            _mark(nascent, made_by)
            for file in nascent.rglob("*"):
                paths.fsync(file)
            check_folder(folder, made_by, older)
            _put(nascent, path, old)
            paths.fsync(path.parent)
        finally:
            for leftover in (nascent, old):
                if _is_own(leftover, made_by, older):
                    shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def growing_folder(
    folder: Path, made_by: str, older: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """The same folder under its own name at once, for results that have to be there while work goes on.

    Everything that is there when the context ends, well or badly, counts as made by the command. What an
    earlier one left stays until it is written over or removed. Raises as whole_folder.
    """
    path = check_folder(folder, made_by, older)
    path.mkdir(parents=True, exist_ok=True)
    with file_lock(path, refusal=_in_use(folder)):
        check_folder(folder, made_by, older)
        _mark(path, made_by)
        try:
            yield path
        finally:
            _mark(path, made_by)


def _in_use(folder: Path) -> str:
    return f"{folder} is being written by another process just now"


def _put(nascent: Path, path: Path, old: Path) -> None:
    """Gives the new folder its name. What was there is at `nascent` or `old` afterwards."""
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
        # Killed between the two renames, the old folder gets its name back by _restore.
        os.rename(path, old)
        try:
            os.rename(nascent, path)
        except OSError:
            os.rename(old, path)
            raise


def _exchange(one: Path, other: Path) -> None:
    """Exchanges two names in one step. Raises OSError, with one of _NO_EXCHANGE if that cannot be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def _restore(path: Path, old: Path, made_by: str, older: Callable[[Path], bool]) -> None:
    """Undoes the first of two renames if the process was killed before the second."""
    if not os.path.lexists(path) and _is_own(old, made_by, older):
        os.rename(old, path)


def _clear(nascent: Path, made_by: str, older: Callable[[Path], bool]) -> None:
    """Empties what a process left that was killed. Raises UserError if it is somebody else's."""
    if os.listdir(nascent) and not _is_own(nascent, made_by, older):
        raise UserError(f"{nascent} is in the way, and was not left by {made_by}; remove it")
    for entry in nascent.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_own(folder: Path, made_by: str, older: Callable[[Path], bool]) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return _marker(folder).get("made_by") == made_by or older(folder)


def _files_made(folder: Path, made_by: str) -> set[str] | None:
    """The files that the command says it has made there; None if it does not say so."""
    marker = _marker(folder)
    files = marker.get("files")
    if marker.get("made_by") != made_by or not isinstance(files, list):
        return None
    return {MARKER, *map(str, files)}


def _mark(folder: Path, made_by: str) -> None:
    """Writes down that the command has made all that is in the folder."""
    marker = {"made_by": made_by, "files": sorted(_files(folder))}
    paths.write_atomically(folder / MARKER, json.dumps(marker, indent=1) + "\n")


def _marker(folder: Path) -> dict[str, object]:
    try:
        content = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _files(folder: Path) -> set[str]:
    """Everything below a folder but the folders, and what NFS keeps of files that somebody still reads."""
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if (file.is_symlink() or not file.is_dir()) and not file.name.startswith(".nfs")
    }


def _protected() -> list[tuple[Path, str]]:
    """Folders that no output takes the place of, nor of those that they are in."""
    places = {
        os.path.expanduser("~"): "your home folder",
        str(paths.PROJECT_ROOT): "the project's own folder",
        str(paths.runs_dir()): "the folder of all runs",
        str(paths.sweeps_dir()): "the folder of all sweeps",
        str(paths.data_dir()): "the folder of the prepared data",
    }
    with suppress(OSError):  # it may have been deleted
        places[os.getcwd()] = "the current folder"
    return [(Path(place).resolve(), what) for place, what in places.items()]


def _mode(path: Path) -> int | None:
    """The mode of what is there; None for nothing. Raises UserError for what cannot be looked at."""
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
