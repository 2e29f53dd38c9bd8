"""Checkpoints: made visible by a rename, checked by sha256, loaded without unpickling.

checkpoints/
    step-00000469/model.safetensors       weights, fp32, by parameter name
    step-00000469/optimizer.safetensors   Adam's state as <state>.<parameter name>
    step-00000469/ema.safetensors         averaged weights, where the experiment keeps them
    step-00000469/state.json              step, best loss so far, loss scale; sha256 of all files
    best -> step-00000469                 lowest validation loss so far
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file, sha256_of_json
from cvae.files.paths import fsync
from cvae.files.weights_file import write_weights

Tensors = dict[str, Tensor]
_STATE = "state.json"
_BEST = "best"


class TrainingState(NamedTuple):
    """Everything that a run needs to go on from where it stopped."""

    tensors: dict[str, Tensors]
    """"model", "optimizer" and, with EMA, "ema"; each by name."""
    state: dict[str, Any]
    """step, best_val_loss and other plain data."""

    def is_finite(self) -> bool:
        """Returns whether no tensor holds an inf or a nan; waits for the device once."""
        values = [value for tensors in self.tensors.values() for value in tensors.values()]
        return bool(torch.stack([value.isfinite().all() for value in values]).all())


def save(folder: Path, training_state: TrainingState, keep: int, best: bool) -> Path:
    """Writes a checkpoint, removes all but the newest `keep` and the best one, and returns its folder.

    Raises OSError (disk full); the earlier checkpoints are then untouched. A file that cannot be
    removed is no error: the next save tries again.
    """
    name = _name(training_state.state["step"])
    final, temporary = folder / name, folder / f".{name}.new"
    _remove_leftovers(folder)
    temporary.mkdir(parents=True)
    try:
        digests = {}
        for part, tensors in training_state.tensors.items():
            file = temporary / f"{part}.safetensors"
            write_weights(tensors, file)
            digests[file.name] = sha256_of_file(file)
            fsync(file)
        digests[_STATE] = sha256_of_json(training_state.state)
        state = {**training_state.state, "sha256": digests}
        (temporary / _STATE).write_text(json.dumps(state, indent=1))
        fsync(temporary / _STATE)
        if final.exists():  # a damaged one, before which this run resumed
            _discard(final)
        os.rename(temporary, final)
        fsync(folder)
    except Exception:  # safetensors has an exception of its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if best:
        link = folder / f".{_BEST}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, folder / _BEST)
    for old in steps(folder)[:-keep]:
        if [old] != _best(folder):
            with suppress(OSError):
                _discard(folder / old)
    return final


def load_newest(folder: Path, warn: Callable[[str], None]) -> TrainingState | None:
    """Returns the newest checkpoint whose checksums match, or None if there is no checkpoint.

    `warn` is called with a message for every damaged checkpoint that is skipped. Raises UserError if
    all of them are damaged.
    """
    names = steps(folder)
    for name in reversed(names):
        try:
            return _load(folder / name)
        except ValueError as error:
            warn(f"checkpoint {name} is damaged ({error}); falling back to the one before")
    if names:
        raise UserError(
            f"{folder}: every checkpoint is damaged ({', '.join(names)}); remove them to start anew"
        )
    return None


def load_step(folder: Path, step: int) -> TrainingState:
    """Returns the checkpoint of a step. Raises UserError if it is damaged or missing."""
    name = _name(step)
    try:
        return _load(folder / name)
    except ValueError as error:
        raise UserError(f"{folder / name}: cannot be read here: {error}") from None


def load_weights(folder: Path, warn: Callable[[str], None]) -> tuple[Tensors, int]:
    """Returns the weights of the best intact checkpoint (averaged, if it has such) and its step.

    Falls back to the newest intact one; `warn` is called with a message for every damaged checkpoint.
    Raises UserError if none is intact.
    """
    for name in _best(folder) + steps(folder)[::-1]:
        part = "ema" if (folder / name / "ema.safetensors").exists() else "model"
        try:
            loaded = _load(folder / name, parts=(part,))
        except ValueError as error:
            warn(f"checkpoint {name} is damaged ({error}); taking another")
            continue
        return loaded.tensors[part], loaded.state["step"]
    raise UserError(f"{folder}: there is no intact checkpoint yet")


def steps(folder: Path) -> list[str]:
    """Returns the names of the checkpoints in a folder, oldest first."""
    return sorted(path.name for path in folder.glob("step-*"))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _best(folder: Path) -> list[str]:
    link = folder / _BEST
    return [os.readlink(link)] if link.is_symlink() else []


def _load(folder: Path, parts: tuple[str, ...] = ()) -> TrainingState:
    """Reads the named parts, by default all. Raises ValueError with what is damaged."""
    try:
        state = json.loads((folder / _STATE).read_text())
        digests: dict[str, str] = state.pop("sha256")
        if digests.pop(_STATE) != sha256_of_json(state):
            raise ValueError(f"the checksum of {_STATE} does not match")
        present = {file.name for file in folder.glob("*.safetensors")}
        required = {f"{part}.safetensors" for part in parts or ("model", "optimizer")}
        if unlisted := sorted((present | required) - digests.keys()):
            raise ValueError(f"{_STATE} has no checksum of {unlisted[0]}")
        tensors = {}
        for name, digest in digests.items():
            part = name.removesuffix(".safetensors")
            if parts and part not in parts:
                continue
            # Not mapped: a mapping would keep a removed file on the disk as long as the tensors live.
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"the checksum of {name} does not match")
            tensors[part] = load(content)
    except (
        *(OSError, KeyError, AttributeError, TypeError, RecursionError),
        *(SafetensorError, json.JSONDecodeError),
    ) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return TrainingState(tensors, state)


def _discard(checkpoint: Path) -> None:
    """Removes a checkpoint. Renames it first, so that no reader meets half of one.

    On NFS a file that somebody still reads leaves a `.nfs…` file, which keeps the folder from being
    removed; the next save tries again. Raises OSError if the checkpoint cannot be renamed.
    """
    old = Path(
        tempfile.mkdtemp(prefix=f".{checkpoint.name}.", suffix=".old", dir=checkpoint.parent)
    )
    try:
        os.rename(checkpoint, old / checkpoint.name)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what an earlier save left behind because it was killed or could not remove it."""
    for leftover in [*folder.glob(".step-*.new"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
