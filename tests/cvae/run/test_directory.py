"""Folders of runs: made whole or not at all, under a name that is free."""

from contextlib import suppress
from pathlib import Path

import pytest

import workflows
from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.run.directory import RunDirectory, new_folder
from tests.conftest import tiny_experiment

TAKEN = UserError("taken")


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with new_folder(tmp_path / "runs" / "one", TAKEN) as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "runs" / "one" / "file").read_text() == "whole"
    for error in (KeyError("x"), KeyboardInterrupt()):
        with suppress(type(error)), new_folder(tmp_path / "runs" / "two", TAKEN) as folder:
            (folder / "half").touch()
            raise error
    with (
        pytest.raises(UserError, match="taken"),
        new_folder(tmp_path / "runs" / "one", TAKEN) as folder,
    ):
        (folder / "file").write_text("another")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        new_folder(tmp_path / "runs" / "one" / "file" / "three", TAKEN).__enter__()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "runs",
        "runs/one",
        "runs/one/file",
    ]
    assert (tmp_path / "runs" / "one" / "file").read_text() == "whole"


def test_the_commands_add_what_to_do_to_an_error(home: Path) -> None:
    assert workflows.HINTS
    experiment = Experiment.model_validate(tiny_experiment())
    RunDirectory.create("taken", experiment)
    with pytest.raises(UserError) as caught:
        RunDirectory.create("taken", experiment)
    assert "runs.py" not in str(caught.value)
    assert "`python workflows/runs.py resume taken`" in caught.value.with_hint()
    with pytest.raises(UserError) as caught:
        RunDirectory.open("quite another")
    assert caught.value.with_hint().endswith("`runs.py list` shows the runs there are")
    with pytest.raises(UserError) as caught:
        RunDirectory.open("takne")
    assert caught.value.with_hint().endswith("did you mean taken?")
