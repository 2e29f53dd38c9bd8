"""Locks that processes hold on files, on every file system.

The kernel frees its locks when their process ends, however it ends. Some file systems have none:
Lustre mounted without `-o flock`, NFS without its lock service, some FUSE. There, a process announces
itself by an empty file next to the locked one, whose name identifies the process, and is refused
while another's file exists. These names are never used twice, so whoever finds the file of a process
that has ended may remove it.
"""

import errno
import fcntl
import itertools
import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cvae.errors import UserError

_log = logging.getLogger(__name__)

_UNSUPPORTED = (
    *(errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL),
    *(errno.ENOTTY, errno.EPERM, errno.EACCES),
    errno.EBADF,  # a POSIX lock on a folder
)
# A process on another host counts as ended if it has not touched its file for so long, by the clock of
# the file server. A file system that fails over may pause for a minute.
_TOUCH_EVERY_S, _GONE_AFTER_S = 5.0, 75.0
# Two that announce themselves at the same moment see each other, and both retry for so long.
_SAME_MOMENT_S = 0.5
_warned_folders: set[Path] = set()
_numbers = itertools.count(1)


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
    with ExitStack() as lock:
        lock.callback(os.close, file)
        pause = 0.01
        while not _acquire(file, path, lock):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise Locked(refusal or f"{path} is locked by another process")
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, 0.5)
        yield


def has_flock(folder: Path) -> bool:
    """Returns whether the folder's file system supports flock. Raises OSError if it is not writable."""
    probe = folder / f".flock-{_Owner.new().name}"
    file = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return _flock(file) is not None
    finally:
        os.close(file)
        with suppress(OSError):
            probe.unlink()


def _acquire(file: int, path: Path, lock: ExitStack) -> bool:
    """Tries to take the lock, by the best means that the file system has, until `lock` is closed."""
    acquired = _flock(file)
    if acquired is not None:
        return acquired
    acquired = _byte_lock(file)
    if path.parent not in _warned_folders:
        _warned_folders.add(path.parent)
        means = "lock files" if acquired is None else "locks of bytes"
        _log.warning("%s: the file system does not support flock; using %s", path.parent, means)
    return _announce(path, lock) if acquired is None else acquired


def _flock(file: int) -> bool | None:
    return _try(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))


def _byte_lock(file: int) -> bool | None:
    """Takes a POSIX lock that, like flock's, belongs to the open file and not to the process."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return _try(lambda: fcntl.fcntl(file, fcntl.F_OFD_SETLK, request))


def _try(lock: Callable[[], object]) -> bool | None:
    """Returns whether the lock was taken, or None if the file system does not support such locks."""
    try:
        lock()
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


class _Owner(NamedTuple):
    """A process that holds or wants a lock; the name of its file consists of these fields."""

    host: str
    boot: str
    pids: str  # the namespace of process ids; each container has its own
    pid: int
    began: str
    number: int  # distinguishes the locks of one process

    @classmethod
    def new(cls) -> "_Owner":
        pid = os.getpid()
        return cls(*_this_host(), pid, _start_time(pid) or "0", next(_numbers))

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

    def has_ended(self) -> bool | None:
        """Returns None if that cannot be seen from here: on another host, or in another container."""
        host, boot, pids = _this_host()
        if self.host == host and self.boot != boot:
            return True
        if (self.host, self.pids) != (host, pids):
            return None
        return _start_time(self.pid) != self.began


def _this_host() -> tuple[str, str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return socket.gethostname(), boot, str(os.stat("/proc/self/ns/pid").st_ino)


def _start_time(pid: int) -> str | None:
    """Returns when a process of this host started, in the kernel's ticks; None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _announce(path: Path, lock: ExitStack) -> bool:
    """Returns whether only this process has a file next to `path`; it stays until `lock` is closed."""
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
            over = threading.Event()
            thread = threading.Thread(target=_touch, args=(own, over), daemon=True)
            thread.start()
            lock.callback(own.unlink, missing_ok=True)  # callbacks run in reverse order
            lock.callback(thread.join, _TOUCH_EVERY_S)
            lock.callback(over.set)
            return True
        own.unlink(missing_ok=True)
        if time.monotonic() - began > _SAME_MOMENT_S:
            return False
        time.sleep(random.uniform(0.01, 0.1))


def _others(path: Path, own: Path) -> bool:
    """Returns whether another process has a file next to `path`; removes those of ended processes."""
    prefix = f"{path.name}.held,"
    now = own.stat().st_mtime
    others = False
    for name in os.listdir(path.parent):
        owner = _Owner.read(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if owner is None or name == own.name:
            continue
        file = path.with_name(name)
        ended = owner.has_ended()
        if ended is None:
            try:
                ended = now - file.stat().st_mtime > _GONE_AFTER_S
            except FileNotFoundError:
                continue
        if ended:
            file.unlink(missing_ok=True)
        else:
            others = True
    return others


def _touch(file: Path, over: threading.Event) -> None:
    """Shows other hosts, which cannot see this process, that it is alive."""
    while not over.wait(_TOUCH_EVERY_S):
        with suppress(OSError):
            os.utime(file)
