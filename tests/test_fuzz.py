"""A few of the inputs that `python -m tests.fuzz` makes by the thousand."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis import tables
from cvae.files import json_file
from cvae.preparation import coco_annotations
from cvae.run import checkpoint
from cvae.sampling import sampler
from tests.fuzz.frame import fuzz

# Models need imports of seconds; of what a case costs there are as many as take a fraction of a second.
CASES = {
    **dict.fromkeys(("experiments", "clusters", "sweeps", "stores", "command_lines"), 60),
    "exports": 12,
    "coco": 12,
    "runs": 4,
    "reports": 1,
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(name: str) -> None:
    from tests.fuzz import targets

    assert name in targets.ALL
    assert list(fuzz(name, CASES[name], seed=1)) == []


def _trusting(path: Path, kind: Any) -> Any:
    return json.loads(path.read_bytes())


def _mixed(folder: Path, warn: Any) -> checkpoint.TrainingState:
    return checkpoint.load_step(folder, 1)._replace(state={"step": 2})


@pytest.mark.parametrize(
    ("target", "place", "name", "broken", "kind"),
    [
        ("exports", sampler, "_misfit", lambda *_: None, "wrongly accepted"),
        ("coco", coco_annotations, "_clean", str, "wrongly accepted"),
        ("runs", checkpoint, "load_newest", _mixed, "wrongly accepted"),
        ("runs", json_file, "load", _trusting, "traceback"),
        ("reports", tables, "_folders", lambda *_: [], "wrongly accepted"),
    ],
)
def test_a_broken_reader_is_found(
    target: str, place: Any, name: str, broken: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, broken)
    assert any(finding.kind == kind for finding in fuzz(target, 40, seed=1))
