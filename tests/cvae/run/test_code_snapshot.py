"""Snapshots of a small project under git: what they hold, what they share, what they refuse."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from cvae.errors import UserError
from cvae.run import code_snapshot
from cvae.run.code_snapshot import CodeSnapshot


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    done = subprocess.run(
        ["git", "-C", str(root), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def checkout(home: Path) -> Path:
    """Committed: one.py, two.py, three.py; since then two.py is changed, three.py gone, four.py new."""
    root = home / "checkout"
    for name in ("cvae/one.py", "cvae/deep/two.py", "slurm/three.py", "notes.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"name = {name!r}\n")
    git(home, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    (root / "cvae/deep/two.py").write_text("name = 'ü'")
    (root / "slurm/three.py").unlink()
    (root / "slurm/four.py").write_text("name = 4\n")
    (root / "notes.py").write_text("none of the job's business")
    (root / "cvae/large.bin").write_bytes(bytes(1000))
    return root


def test_commit_and_patch_make_the_snapshot_and_the_checkout_stays_as_it_was(
    checkout: Path, home: Path
) -> None:
    before = git(checkout, "status", "--porcelain")
    path = CodeSnapshot(checkout).write()
    assert git(checkout, "status", "--porcelain") == before

    snapshot = code_snapshot.read(path)
    assert (snapshot.commit, snapshot.uncommitted_changes) == (
        git(checkout, "rev-parse", "HEAD").strip(),
        True,
    )
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    packages = {"cvae/one.py", "cvae/deep/two.py", "slurm/four.py"}
    assert files == packages | {"commit.json", "changes.patch"}

    git(home, "clone", "-q", str(checkout), "again")
    git(home / "again", "apply", str(path / "changes.patch"))
    assert code_snapshot.sources(home / "again") == code_snapshot.sources(path)
    assert code_snapshot.read(checkout).source == snapshot.source


def test_equal_code_is_kept_once(checkout: Path, home: Path) -> None:
    first = CodeSnapshot(checkout)
    path = first.write()
    assert CodeSnapshot(checkout).write() == path
    # A job that submits another hands on what it runs itself.
    assert CodeSnapshot(path).write() == path
    assert [folder.name for folder in (home / "code").iterdir()] == [path.name]

    git(checkout, "commit", "-qam", "second")  # the same sources, to be found under another commit
    second = CodeSnapshot(checkout)
    assert (second.path != path, second.source) == (True, first.source)
    (checkout / "cvae/one.py").write_text("")
    assert CodeSnapshot(checkout).source != first.source


def test_an_edited_snapshot_is_refused(checkout: Path) -> None:
    path = CodeSnapshot(checkout).write()
    (path / "cvae/one.py").write_text("edited")
    with pytest.raises(UserError, match=r"was edited, but runs rely on it"):
        CodeSnapshot(checkout).write()


def test_without_git_there_is_a_snapshot_too(checkout: Path) -> None:
    (checkout / ".git").rename(checkout / "no-git")
    snapshot = code_snapshot.read(CodeSnapshot(checkout).write())
    assert (snapshot.commit, snapshot.uncommitted_changes) == (None, False)


def test_what_no_run_links_to_goes_after_a_month(checkout: Path, home: Path) -> None:
    kept, gone, young = (_changed(checkout, n).write() for n in range(3))
    run = home / "runs" / "a run"
    run.mkdir(parents=True)
    code_snapshot.link(run, kept)
    code_snapshot.link(run, kept)
    month_ago = time.time() - 31 * 24 * 3600
    for path in (kept, gone):
        os.utime(path, (month_ago, month_ago))
    new = _changed(checkout, 4).write()
    assert {path.name for path in (home / "code").iterdir()} == {kept.name, young.name, new.name}
    assert (run / "code" / kept.name / "cvae/one.py").read_text() == "0"


def _changed(checkout: Path, n: int) -> CodeSnapshot:
    (checkout / "cvae/one.py").write_text(str(n))
    return CodeSnapshot(checkout)
