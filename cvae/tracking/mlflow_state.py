"""mlflow.json in a run's folder: which run of which MLflow store has how much of the journal."""

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
    """A tag of the run in MLflow, chosen before the run is created there, by which a process finds the
    run again that died before it could save the run's id."""
    run_id: str | None = None
    offset: Annotated[int, Field(ge=0)] = 0
    """The bytes of the journal that MLflow has acknowledged."""
    folder: str = ""
    """The folder that this state belongs to; older versions did not save it."""


_STATE = TypeAdapter(State)


def load(run_dir: Path) -> State:
    """Returns the state, or a new one, which it saves, for a run that MLflow does not know.

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
    """Returns the state, or None for a run that MLflow does not know.

    A copy of a run's folder is such a run, since both may go on; a moved folder keeps its run.
    """
    state = json_file.load(run_dir / STATE_FILE, _STATE)
    if state is None or state.folder in ("", os.path.realpath(run_dir)):
        return state
    try:
        original = json_file.load(Path(state.folder, STATE_FILE), _STATE)
        is_copy = not os.path.samefile(state.folder, run_dir)
    except (OSError, UserError):
        return state
    return None if is_copy and original and original.run_dir_id == state.run_dir_id else state


def save(run_dir: Path, state: State) -> None:
    json_file.save(run_dir / STATE_FILE, asdict(state))


def behind(run_dir: Path) -> int:
    """Returns how many journal lines MLflow does not have yet. Raises UserError if mlflow.json is damaged."""
    state = _read(run_dir)
    offset = 0 if state is None else state.offset
    return sum(1 for _ in journal.read_each(run_dir / JOURNAL_FILE, offset))


def tracking_uri(state: State) -> str:
    """Returns the URI, with its password, of the store that has the run, whatever is configured now.

    Raises UserError if that is MLflow's deprecated file store, which would keep repeated points twice.
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
