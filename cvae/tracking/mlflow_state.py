"""Where a run stands with MLflow: mlflow.json in the run directory."""

import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from cvae.errors import UserError
from cvae.files import json_file, paths
from cvae.redaction import without_password
from cvae.run import journal

STATE_FILE = "mlflow.json"
JOURNAL_FILE = "journal.jsonl"

_log = logging.getLogger(__name__)


@dataclass
class State:
    tracking_uri: str
    """Without its password: colleagues read each other's runs."""
    run_dir_id: str
    """Tag of the run in MLflow, known before the run is made there: whoever dies between making it
    and writing its id down finds it again."""
    run_id: str | None = None
    offset: Annotated[int, Field(ge=0)] = 0
    """Bytes of the journal that MLflow has acknowledged."""
    folder: str = ""
    """The folder whose state this is; it was not written down at first."""


_STATE = TypeAdapter(State)


def load(run_dir: Path) -> State:
    """Returns the state; a new one, already saved, for a run that MLflow does not know.

    Raises UserError if the file is damaged.
    """
    state = _read(run_dir)
    if state is None:
        state = State(without_password(paths.tracking_uri()), uuid.uuid4().hex)
    if state.folder != (folder := os.path.realpath(run_dir)):
        state.folder = folder
        save(run_dir, state)
    return state


def _read(run_dir: Path) -> State | None:
    """Returns the state; None for a run that MLflow does not know, as the copy of another run's folder is.

    Two runs that go on from one folder are not one run in MLflow. A folder that was moved keeps its run.
    """
    state = json_file.load(run_dir / STATE_FILE, _STATE)
    if state is None or state.folder in ("", os.path.realpath(run_dir)):
        return state
    try:
        first = json_file.load(Path(state.folder, STATE_FILE), _STATE)
        copied = not os.path.samefile(state.folder, run_dir)
    except (OSError, UserError):
        return state
    return None if copied and first and first.run_dir_id == state.run_dir_id else state


def save(run_dir: Path, state: State) -> None:
    paths.write_atomically(run_dir / STATE_FILE, json.dumps(asdict(state), indent=1))


def behind(run_dir: Path) -> int:
    """Returns how many journal lines MLflow does not have yet. Raises UserError if mlflow.json is damaged."""
    there = _read(run_dir)
    offset = 0 if there is None else there.offset
    return sum(1 for _ in journal.read_each(run_dir / JOURNAL_FILE, offset))


def tracking_uri(state: State) -> str:
    """The store that the run is in: it stays there when the environment has changed since.

    Raises UserError where it is MLflow's deprecated file store: that keeps a point twice that is
    sent twice.
    """
    stored, configured = state.tracking_uri, paths.tracking_uri()
    if without_password(configured) == without_password(stored):
        stored = configured
    else:
        _log.warning(
            "the run stays in %s, although MLFLOW_TRACKING_URI now means %s",
            without_password(stored),
            without_password(configured),
        )
    if "://" not in stored or stored.startswith("file:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI={without_password(stored)}: MLflow's file store is not supported;"
            " use sqlite:///<file> or the http(s):// address of an `mlflow server`"
        )
    return stored
