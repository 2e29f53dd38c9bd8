"""The code of a run, as it was when the run was submitted.

A job may wait in the queue for hours and restart days later, while somebody edits the checkout. So a
submission copies the project's packages to <home>/code/<id>, and the job's PYTHONPATH begins with that
folder. Runs submitted from the same sources and commit share one copy; each has a link code/<id> to it.

    <home>/code/<id>/cvae, slurm, …   the packages' *.py
                     commit.json      {"commit", "uncommitted_changes", "source"}
                     changes.patch    turns the commit into these sources, untracked files included
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cvae.errors import UserError
from cvae.files import paths

_PACKAGES = ("cvae", "slurm", "workflows", "analysis")
_COMMIT_FILE, _PATCH_FILE = "commit.json", "changes.patch"
_UNUSED_S = 30 * 24 * 3600.0


class Code(NamedTuple):
    """Identifies the code that a process of the project runs."""

    root: Path
    """The folder of the packages: a checkout, an installation or a snapshot."""
    source: str
    """sha256 over the names and contents of the packages' *.py."""
    commit: str | None
    """None without git."""
    uncommitted_changes: bool

    def __str__(self) -> str:
        """Returns, for example, "commit 0123456789ab with uncommitted changes (ba9876543210)"."""
        if self.commit is None:
            return f"sources {self.source[:12]}"
        changes = f" with uncommitted changes ({self.source[:12]})"
        return f"commit {self.commit[:12]}{changes if self.uncommitted_changes else ''}"


def read(root: Path = paths.PROJECT_ROOT) -> Code:
    """Identifies the code in a folder, by default the code that this process has imported."""
    source = _sha256(sources(root))
    if (root / _COMMIT_FILE).is_file():
        facts = json.loads((root / _COMMIT_FILE).read_text())
        return Code(root, source, facts["commit"], facts["uncommitted_changes"])
    return Code(root, source, _commit(root), bool(_changes(root)))


def sources(root: Path) -> dict[str, bytes]:
    """Returns the contents of the packages' *.py by their paths below `root`."""
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for package in _PACKAGES
        for file in sorted((root / package).rglob("*.py"))
    }


class CodeSnapshot:
    """The code in `root`, in memory until write() makes a folder of it. A snapshot's snapshot is itself."""

    def __init__(self, root: Path = paths.PROJECT_ROOT) -> None:
        self._contents = sources(root)
        self.source = _sha256(self._contents)
        """See Code."""
        if (root / _COMMIT_FILE).is_file():
            files = [root / name for name in (_COMMIT_FILE, _PATCH_FILE)]
            self._contents |= {file.name: file.read_bytes() for file in files if file.is_file()}
            return
        changes = _changes(root)
        facts = {"commit": _commit(root), "uncommitted_changes": bool(changes)}
        facts["source"] = self.source
        self._contents[_COMMIT_FILE] = (json.dumps(facts, indent=1) + "\n").encode()
        if changes:
            self._contents[_PATCH_FILE] = changes

    @cached_property
    def path(self) -> Path:
        """The folder that write() makes."""
        return _snapshots() / _sha256(self._contents)[:16]

    def write(self) -> Path:
        """Makes the folder unless it exists, and returns it.

        Raises UserError if it cannot be written or has been edited.
        """
        try:
            if self.path.is_dir():
                os.utime(self.path)  # in use: see _remove_unused
            else:
                _remove_unused()
                self._make()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if _sha256(sources(self.path)) != self.source:
            raise UserError(
                f"{self.path} was edited, but runs rely on it as it was; move it away and start again"
            )
        return self.path

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        try:
            for name, content in self._contents.items():
                file = temporary / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)  # mkdtemp makes folders private
            temporary.rename(self.path)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not self.path.is_dir():  # otherwise another launch was faster
                raise


def link(run: Path, code: Path) -> None:
    """Links a snapshot into a run's folder code/, relatively, so that home may be moved."""
    folder = run / "code"
    folder.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (folder / code.name).symlink_to(os.path.relpath(code, folder.resolve()))


def _remove_unused() -> None:
    """Removes snapshots to which no run or sweep links and with which nobody has submitted for a month."""
    owners = (paths.runs_dir(), paths.sweeps_dir())
    linked = {file.name for folder in owners for file in folder.glob("*/code/*")}
    for folder in _snapshots().glob("*"):
        with suppress(OSError):
            if folder.name not in linked and folder.stat().st_mtime < time.time() - _UNUSED_S:
                shutil.rmtree(folder)


def _snapshots() -> Path:
    return paths.home() / "code"


def _sha256(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _commit(root: Path) -> str | None:
    commit = _git(root, "rev-parse", "HEAD")
    return None if commit is None else commit.decode().strip()


def _changes(root: Path) -> bytes:
    """Returns the patch that turns HEAD into the packages' *.py; empty without git."""
    packages = [package for package in _PACKAGES if (root / package).is_dir()]
    specs = [f":(glob){package}/**/*.py" for package in packages]
    with tempfile.TemporaryDirectory() as folder:
        # git diff omits untracked files unless the index lists them. The user's index is not touched.
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        if _git(root, "read-tree", "HEAD", **index) is None:
            return b""
        _git(root, "add", "--intent-to-add", "--", *packages, **index)
        return _git(root, "diff", "--binary", "--no-ext-diff", "HEAD", "--", *specs, **index) or b""


def _git(root: Path, *arguments: str, **environment: str) -> bytes | None:
    """Returns git's output, or None if git fails or `root` is not the root of a repository."""
    try:
        if not (root / ".git").exists():
            return None
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, **environment},
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
