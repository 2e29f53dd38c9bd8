"""Every study answers --help, is listed with its document, and imports no test."""

import ast
import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
LIST = (FOLDER / "README.md").read_text()
STUDIES = sorted(
    file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith(("test_", "__"))
)


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_answers_help(study: str) -> None:
    parser = importlib.import_module(f"tests.studies.{study}").parser()
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    assert output.getvalue().startswith("usage: ")


def test_the_list_holds_each_study_once() -> None:
    assert sorted(re.findall(r"^\| `python -m tests\.studies\.(\w+)", LIST, re.M)) == STUDIES


def test_the_document_of_a_study_names_its_command() -> None:
    for study, document in re.findall(
        r"^\| `python -m tests\.studies\.(\w+).*\((\S+)\)", LIST, re.M
    ):
        assert f"python -m tests.studies.{study}" in (FOLDER / document).read_text(), study


def test_no_study_and_no_helper_imports_a_test() -> None:
    for file in [*FOLDER.rglob("*.py"), *FOLDER.parent.glob("helpers/*.py")]:
        if file.name.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", "") or "", *(alias.name for alias in node.names)]
                parts = [part for name in names for part in name.split(".")]
                assert not [part for part in parts if part.startswith("test_")], file
