"""Locks that processes hold on files, on every file system: the only user of flock.

The kernel frees its locks when their process ends, however it ends. Some file systems have none: Lustre that is
mounted without `-o flock`, NFS without its lock service, some FUSE. There a process announces itself by an empty
file beside the locked one, whose name says who it is, and is refused while another's stands there. As these
names are never used twice, whoever finds one of a process that is gone may remove it.
"""

import errno
import fcntl
import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cvae.errors import UserError

_log = logging.getLogger(__name__)

_WITHOUT_LOCKS = (
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTTY,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,  # a POSIX lock on a folder
)
# A process on another host is taken for gone when it has not touched its file for so long, by the clock of
# the file server. A file system that fails over stands still for up to a minute.
_TOUCH_EVERY_S, _GONE_AFTER_S = 5.0, 75.0
# Two that announce themselves at the same moment see each other, and both step back for a moment.
_SAME_MOMENT_S = 0.5
_said: set[Path] = set()
_counter_lock = threading.Lock()
_counter = 0


class Locked(UserError):
    """Another process holds the lock."""


@contextmanager
def file_lock(path: Path, patience_s: float = 0.0, refusal: str = "") -> Iterator[None]:
    """Holds the lock on a file, which is created if it does not exist, or on an existing folder.

    Waits up to `patience_s` (math.inf: for ever) for another holder, then raises Locked, a UserError,
    with the message `refusal`. The lock ends with its process. Raises OSError if the file cannot be
    opened for writing.
    """
    deadline = time.monotonic() + patience_s
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_APPEND
    file = os.open(path, flags | os.O_CLOEXEC, 0o666)
    with ExitStack() as held:
        held.callback(os.close, file)
        pause = 0.01
        while not _acquire(file, path, held):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise Locked(refusal or f"{path} is locked by another process")
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, 0.5)
        yield


def has_flock(folder: Path) -> bool:
    """Returns whether the folder's file system supports flock. Raises OSError if no file can be made there."""
    probe = folder / f".flock-{_Owner.new().name}"
    file = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return _flock(file) is not None
    finally:
        os.close(file)
        with suppress(OSError):
            probe.unlink()


def _acquire(file: int, path: Path, held: ExitStack) -> bool:
    taken = _flock(file)
    if taken is not None:
        return taken
    taken = _byte_lock(file)
    kind = "locks of bytes" if taken is not None else "lock files"
    if path.parent not in _said:
        _said.add(path.parent)
        _log.warning("%s: the file system does not support flock; using %s", path.parent, kind)
    return taken if taken is not None else _announce(path, held)


def _flock(file: int) -> bool | None:
    """Returns whether the lock was taken, None if the file system does not have such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _refusal(error)
    return True


def _byte_lock(file: int) -> bool | None:
    """The same with a POSIX lock that belongs to the open file, like flock's, and not to the process."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        return _refusal(error)
    return True


def _refusal(error: OSError) -> bool | None:
    if isinstance(error, BlockingIOError):
        return False
    if error.errno in _WITHOUT_LOCKS:
        return None
    raise error


class _Owner(NamedTuple):
    """A holder, as its file's name says it."""

    host: str
    boot: str
    pids: str
    """The namespace of process numbers, which a container has of its own."""
    pid: int
    began: str
    number: int
    """Which of its process's locks."""

    @classmethod
    def new(cls) -> "_Owner":
        global _counter
        with _counter_lock:
            _counter += 1
        return cls(*_here(), os.getpid(), _began(os.getpid()) or "0", _counter)

    @classmethod
    def read(cls, name: str) -> "_Owner | None":
        try:
            host, boot, pids, pid, began, number = name.split(",")
            return cls(host, boot, pids, int(pid), began, int(number))
        except ValueError:
            return None

    @property
    def name(self) -> str:
        return ",".join(map(str, self))

    def gone(self) -> bool | None:
        """Returns None if that cannot be known here: on another host, or in another container."""
        host, boot, pids = _here()
        if self.host == host and self.boot != boot:
            return True  # it has booted since
        if (self.host, self.pids) != (host, pids):
            return None
        return _began(self.pid) != self.began


def _here() -> tuple[str, str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return socket.gethostname(), boot, str(os.stat("/proc/self/ns/pid").st_ino)


def _began(pid: int) -> str | None:
    """When a process of this host began, in the kernel's ticks; None if there is none that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _announce(path: Path, held: ExitStack) -> bool:
    """Returns whether this process alone has a file beside `path`, which stays there while the lock is held."""
    began = time.monotonic()
    own = path.with_name(f"{path.name}.held,{_Owner.new().name}")
    while True:
        os.close(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            free = not _others(path, own)
        except BaseException:
            own.unlink(missing_ok=True)
            raise
        if free:
            held.callback(own.unlink, missing_ok=True)
            held.enter_context(_touched(own))
            return True
        own.unlink(missing_ok=True)
        if time.monotonic() - began > _SAME_MOMENT_S:
            return False
        time.sleep(random.uniform(0.01, 0.1))


def _others(path: Path, own: Path) -> bool:
    """Returns whether another process holds `path` by its file. Files of those that are gone are removed."""
    mark = f"{path.name}.held,"
    now = own.stat().st_mtime
    found = False
    for name in os.listdir(path.parent):
        owner = _Owner.read(name.removeprefix(mark)) if name.startswith(mark) else None
        if owner is None or name == own.name:
            continue
        file = path.with_name(name)
        gone = owner.gone()
        if gone is None:
            try:
                gone = now - file.stat().st_mtime > _GONE_AFTER_S
            except FileNotFoundError:
                continue
        if gone:
            file.unlink(missing_ok=True)
        else:
            found = True
    return found


@contextmanager
def _touched(file: Path) -> Iterator[None]:
    """Shows other hosts, which cannot see this process, that it lives."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(_TOUCH_EVERY_S):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_TOUCH_EVERY_S)
