"""Every script ends with at most one line, whatever its streams, folder and environment are."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cvae import command_line
from cvae.errors import UserError, cut, did_you_mean, one_line, shown
from tests.conftest import PROJECT_ROOT

# A miniature script, which starts in a tenth of the time of a real one.
_SCRIPT = """
import os, sys
from cvae import command_line; from cvae.files import paths
from cvae.errors import UserError

def main(words):
    print("ok × é")
    if words == ["open"]:
        open("missing/file")
    if words == ["home"]:
        paths.home().mkdir()
    if words[:1] == ["say"]:
        raise UserError(words[1] * 100)
    return 0

command_line.run(main)
"""


def _run(
    folder: Path, words: str = "", redirect: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    command = f"exec {shlex.quote(sys.executable)} {script} {words} {redirect}"
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **environment},
        cwd=folder,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("words", "redirect", "environment", "status", "expected"),
    [
        ("", "", {"PYTHONIOENCODING": "ascii"}, 0, ""),
        ("", "", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 0, ""),
        ("", ">&-", {}, 0, ""),
        ("", "<&- >&- 2>&-", {}, 0, ""),
        ("say x", "2>&-", {}, 2, ""),
        ("say x", "2>/dev/full", {}, 2, ""),
        ("", ">/dev/full", {}, 2, "error: No space left on device"),
        ("$'caf\\xe9'", "", {}, 2, "is not text in UTF-8"),
        ("say $'\\e[31m\\n'", "", {}, 2, "error: \\x1b[31m \\x1b[31m"),
        ("open", "", {}, 2, "error: No such file or directory: missing/file"),
        ("home", "", {"CVAE_HOME": "/tmp/" + "x" * 300}, 2, "error: File name too long: /tmp/xxx"),
        ("home", "", {"CVAE_HOME": "/dev/null/x"}, 2, "error: Not a directory: /dev/null/x"),
    ],
)
def test_a_script_ends_with_at_most_one_line(
    tmp_path: Path,
    words: str,
    redirect: str,
    environment: dict[str, str],
    status: int,
    expected: str,
) -> None:
    ended = _run(tmp_path, words, redirect, **environment)
    assert ended.returncode == status
    assert ended.stderr.startswith("error: ") == bool(expected)
    assert expected in ended.stderr
    assert ended.stderr.count("\n") == bool(expected)
    assert len(ended.stderr) <= 420


def test_a_deleted_working_directory_is_reported_in_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    (tmp_path / "script.py").write_text(_SCRIPT)
    command = f"cd {gone}; rmdir {gone}; exec {shlex.quote(sys.executable)} {tmp_path}/script.py"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: the current folder has been deleted")


@pytest.mark.parametrize("module", ["slurm", "token", "yaml", "types"])
def test_a_module_that_hides_another_is_named(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").touch()
    code = f"import sys; sys.path.insert(0, {str(PROJECT_ROOT)!r}); import cvae"
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ended.returncode == 2 or module == "types"  # without it Python itself does not start
    assert f"{module}.py" in ended.stderr


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "x", "²", "٣", "9" * 5000, "2147483648"])
def test_a_value_that_is_no_positive_number_is_reported_in_one_short_line(text: str) -> None:
    parser = command_line.Parser(prog="x")
    parser.add_argument("-n", type=command_line.positive)
    with pytest.raises(UserError, match="above 0") as caught:
        parser.parse_args([f"-n{text}" if text else "-n="])
    assert len(str(caught.value)) <= 300


def test_no_value_is_too_large_or_too_deep_to_be_shown() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**10_000, deep, "x" * 10**6, {"k" * 1000: "\udcff"}, [10**9] * 10**5):
        assert len(shown(value)) <= 200
    assert one_line("a\n\x1b[31m b" + "\x07" * 500) == one_line("a \\x1b[31m b" + "\x07" * 500)
    assert len(one_line("\x07" * 500)) == 400
    assert cut("abcdef", 4) == "ab…f"
    # Freeing it all at once would overflow the stack.
    while deep:
        deep = deep.pop()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "choices", "expected"),
    [
        ("latent_dim", ["model.latent_dim", "model.latent"], "model.latent_dim"),
        ("modle.latnt_dim", ["model.latent_dim", "seed"], "model.latent_dim"),
        ("Midle", ["LOW", "Middle"], "Middle"),
        ("demo-lr_0.003", ["demo-lr_0.03", "x-lr_1.003"], "demo-lr_0.03 or x-lr_1.003"),
        ("zzz", ["model.latent_dim", "seed"], ""),
        ("zzz", [], ""),
    ],
)
def test_the_nearest_names_are_offered(name: str, choices: list[str], expected: str) -> None:
    assert did_you_mean(name, choices) == (f"; did you mean {expected}?" if expected else "")
