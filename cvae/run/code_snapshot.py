"""The code of a run, as it was when the run was submitted.

A job may wait in the queue for hours, and start again days later; until then somebody edits the checkout. So a
submission copies the project's packages to <home>/code/<id>, and the job's PYTHONPATH begins with that folder.
Runs that were submitted from the same sources and commit share one copy, to which each has a link: code/<id>.

    <home>/code/<id>/cvae, slurm, …   the packages' *.py
                     commit.json      {"commit", "uncommitted_changes", "source"}
                     changes.patch    what makes these sources of that commit; also of files that git does not know
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cvae.errors import UserError
from cvae.files import paths

_PACKAGES = ("cvae", "slurm", "workflows", "analysis")
_FACTS, _PATCH = "commit.json", "changes.patch"
_UNUSED_S = 30 * 24 * 3600.0


class Code(NamedTuple):
    """What a process of ours runs."""

    root: Path
    """The folder of the packages: a checkout, an installation or a snapshot."""
    source: str
    """sha256 over the names and contents of the packages' *.py."""
    commit: str | None
    """None where git knows of none."""
    uncommitted_changes: bool

    def __str__(self) -> str:
        """As "commit 0123456789ab with uncommitted changes"."""
        if self.commit is None:
            return f"sources {self.source[:12]}"
        changes = f" with uncommitted changes ({self.source[:12]})"
        return f"commit {self.commit[:12]}{changes if self.uncommitted_changes else ''}"


def read(root: Path = paths.PROJECT_ROOT) -> Code:
    """What lies there; by default what this very process has imported."""
    source = _sha256(sources(root))
    if (root / _FACTS).is_file():
        facts = json.loads((root / _FACTS).read_text())
        return Code(root, source, facts["commit"], facts["uncommitted_changes"])
    return Code(root, source, _commit(root), bool(_changes(root)))


def sources(root: Path) -> dict[str, bytes]:
    """The packages' *.py, by their paths below root."""
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for package in _PACKAGES
        for file in sorted((root / package).rglob("*.py"))
    }


class CodeSnapshot:
    """The code of this process, held until write() makes a folder of it. Made from a snapshot it is that one."""

    def __init__(self, root: Path = paths.PROJECT_ROOT) -> None:
        self._contents = sources(root)
        self.source = _sha256(self._contents)
        """See Code."""
        if (root / _FACTS).is_file():
            for name in (_FACTS, _PATCH):
                with contextlib.suppress(FileNotFoundError):
                    self._contents[name] = (root / name).read_bytes()
            return
        changes = _changes(root)
        facts = {
            "commit": _commit(root),
            "uncommitted_changes": bool(changes),
            "source": self.source,
        }
        self._contents[_FACTS] = (json.dumps(facts, indent=1) + "\n").encode()
        if changes:
            self._contents[_PATCH] = changes

    @cached_property
    def path(self) -> Path:
        """Where write() puts it."""
        return _store() / _sha256(self._contents)[:16]

    def write(self) -> Path:
        """Makes the folder, unless it is there. Raises UserError where that cannot be, or it has been changed."""
        try:
            if self.path.is_dir():
                os.utime(self.path)  # it is in use; see _prune
            else:
                _prune()
                self._make()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot keep the run's code there: {error.strerror}"
            ) from None
        if _sha256(sources(self.path)) != self.source:
            raise UserError(
                f"{self.path} was edited, but runs rely on it as it was; move it away and start again"
            )
        return self.path

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        nascent = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        try:
            for name, content in self._contents.items():
                file = nascent / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            umask = os.umask(0)
            os.umask(umask)
            nascent.chmod(0o777 & ~umask)  # mkdtemp makes folders private
            nascent.rename(self.path)
        except OSError:
            shutil.rmtree(nascent, ignore_errors=True)
            # Another launch may have been faster.
            if not self.path.is_dir():
                raise


def link(run: Path, code: Path) -> None:
    """Makes the snapshot one of the run's; relative, so that home may be moved."""
    folder = run / "code"
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / code.name).symlink_to(os.path.relpath(code, folder.resolve()))


def _prune() -> None:
    """Removes snapshots that no run or sweep links to and that nobody has submitted with for a month."""
    owners = (paths.runs_dir(), paths.sweeps_dir())
    linked = {file.name for folder in owners for file in folder.glob("*/code/*")}
    for folder in _store().glob("*"):
        with contextlib.suppress(OSError):
            if folder.name not in linked and folder.stat().st_mtime < time.time() - _UNUSED_S:
                shutil.rmtree(folder)


def _store() -> Path:
    return paths.home() / "code"


def _sha256(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _commit(root: Path) -> str | None:
    found = _git(root, "rev-parse", "HEAD")
    return None if found is None else found.decode().strip()


def _changes(root: Path) -> bytes:
    """What `git apply` needs to make the packages' *.py of the commit; empty without git."""
    packages = [package for package in _PACKAGES if (root / package).is_dir()]
    specs = [f":(glob){package}/**/*.py" for package in packages]
    with tempfile.TemporaryDirectory() as folder:
        # git diff leaves out what is untracked: an index of our own makes it known. The user's stays as it is.
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        if _git(root, "read-tree", "HEAD", **index) is None:
            return b""
        _git(root, "add", "--intent-to-add", "--", *packages, **index)
        return _git(root, "diff", "--binary", "--no-ext-diff", "HEAD", "--", *specs, **index) or b""


def _git(root: Path, *arguments: str, **environment: str) -> bytes | None:
    """None where git fails, or knows another project than the one at root."""
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
