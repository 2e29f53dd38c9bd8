"""What a command may replace, tried with every kind of file that an output can meet."""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cvae.errors import UserError
from cvae.files import output_folder, paths
from cvae.files.output_folder import (
    MARKER,
    check_file,
    check_folder,
    whole_folder,
)
from tests.helpers.growing_folder import growing_folder


def write(folder: Path, text: str = "new", made_by: str = "report.py") -> None:
    with whole_folder(folder, made_by) as nascent:
        (nascent / "page").write_text(text)


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def full(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


KINDS: dict[str, Callable[[Path], object]] = {
    "device": lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
    "named pipe": os.mkfifo,
    "socket": bind,
    "file": lambda path: path.write_text("mine"),
    "link to a folder": lambda path: path.symlink_to(path.parent),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "looping link": lambda path: path.symlink_to(path),
    "folder of others": full,
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_others_are_not_replaced(home: Path, kind: str) -> None:
    path = home / "there" / "out"
    path.parent.mkdir()
    try:
        KINDS[kind](path)
    except PermissionError:
        pytest.skip("only root makes devices")
    before = os.lstat(path)
    with pytest.raises(UserError):
        write(path)
    if kind != "file":
        with pytest.raises(UserError):
            check_file(path)
    if stat.S_IFMT(before.st_mode) in (stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK):
        with pytest.raises(UserError):
            paths.write_atomically(path, "new")
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(path.parent) == ["out"]


@pytest.mark.parametrize(
    "name", [".", "..", "/", "~", "runs", "data", "/proc", "file/out", "x" * 300, "a\0b"]
)
def test_an_output_never_replaces_these_folders(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (home / "file").write_text("mine")
    (home / "here").mkdir()
    monkeypatch.chdir(home / "here")
    place = (
        Path.home() if name == "~" else Path(name) if name.startswith(("/", ".")) else home / name
    )
    with pytest.raises(UserError):
        check_folder(place, "report.py")
    with pytest.raises(UserError):
        check_folder(paths.PROJECT_ROOT, "report.py")


def test_a_command_replaces_only_its_own_output(home: Path) -> None:
    out = home / "deep" / "out"
    write(out, "old")
    write(out)
    assert (out / "page").read_text() == "new"
    assert os.listdir(out.parent) == ["out"]
    with pytest.raises(UserError, match=r"was not made by export\.py"):
        write(out, made_by="export.py")
    (out / "deep").mkdir()
    (out / "deep" / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds deep/notes"):
        write(out)
    assert (out / "deep" / "notes").read_text() == "mine"


def test_a_file_that_appears_meanwhile_is_kept(home: Path) -> None:
    out = home / "out"

    def interrupted() -> None:
        with whole_folder(out, "report.py") as nascent:
            (nascent / "page").write_text("new")
            os.mkfifo(out)

    with pytest.raises(UserError, match="named pipe"):
        interrupted()
    assert stat.S_ISFIFO(os.lstat(out).st_mode)
    out.unlink()
    (home / ".out.new").mkdir()
    (home / ".out.new" / "mine").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        write(out)
    assert (home / ".out.new" / "mine").read_text() == "mine"
    assert not out.exists()


@pytest.mark.parametrize("exchanges", [True, False])
def test_after_a_kill_at_any_rename_the_old_or_the_new_folder_is_whole(
    home: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """Killed just before each rename in turn; the next call succeeds and leaves nothing else."""
    out = home / "there" / "out"
    rename = os.rename
    if not exchanges:
        number, words = output_folder.errno.EINVAL, "no exchange here"

        def refuse(one: Path, other: Path) -> None:
            raise OSError(number, words)

        monkeypatch.setattr(output_folder, "_exchange", refuse)
    for moment in range(3):
        write(out, "old")
        child = os.fork()
        if child == 0:
            left = iter(range(moment))

            def killed(one: Path, other: Path, left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    os._exit(1)
                rename(one, other)

            os.rename = killed
            try:
                write(out)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        if exchanges:
            assert (out / "page").read_text() in ("old", "new")
        write(out, "newest")
        assert (out / "page").read_text() == "newest"
        assert set(os.listdir(out)) == {"page", MARKER}
        assert os.listdir(out.parent) == ["out"]


def test_only_one_process_writes_at_a_time(home: Path) -> None:
    with whole_folder(home / "out", "report.py") as nascent:
        (nascent / "page").write_text("first")
        with pytest.raises(UserError, match="being written by another process"):
            write(home / "out")
    assert (home / "out" / "page").read_text() == "first"


def grow(folder: Path, then: Callable[[], object] = lambda: None) -> None:
    with growing_folder(folder, "benchmark.py") as path:
        then()
        (path / "table").write_text("one round")
        os.stat(path / "second round")


def test_a_growing_folder_belongs_to_its_command_however_it_ends(home: Path) -> None:
    folder = home / "out"
    with pytest.raises(UserError, match="another process"):
        grow(folder, then=lambda: grow(folder))
    with pytest.raises(FileNotFoundError):
        grow(folder)
    with growing_folder(folder, "benchmark.py"):
        assert (folder / "table").read_text() == "one round"
    with pytest.raises(UserError, match=r"not made by report\.py"):
        write(folder)
    (folder / "mine").write_text("mine")
    with pytest.raises(UserError, match="holds mine, which benchmark"):
        grow(folder)
    assert {file.name for file in folder.iterdir()} == {MARKER, "table", "mine"}
