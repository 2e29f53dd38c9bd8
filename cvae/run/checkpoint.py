"""Checkpoints: visible by rename, checked by sha256, loaded without unpickling anything.

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


def save(folder: Path, snapshot: TrainingState, keep: int, best: bool) -> Path:
    """Writes a snapshot and removes all but the newest `keep` and the best one.

    Raises OSError (disk full); what was there before is then untouched. What cannot be removed is no error:
    the next save tries again.
    """
    name = _name(snapshot.state["step"])
    final, nascent = folder / name, folder / f".{name}.new"
    _sweep(folder)
    nascent.mkdir(parents=True)
    try:
        digests = {}
        for part, tensors in snapshot.tensors.items():
            file = nascent / f"{part}.safetensors"
            write_weights(tensors, file)
            digests[file.name] = sha256_of_file(file)
            fsync(file)
        digests[_STATE] = sha256_of_json(snapshot.state)
        state = {**snapshot.state, "sha256": digests}
        (nascent / _STATE).write_text(json.dumps(state, indent=1))
        fsync(nascent / _STATE)
        if final.exists():  # a damaged one that this run fell back behind
            _discard(final)
        os.rename(nascent, final)
        fsync(folder)
    except Exception:
        # safetensors has an exception of its own for a full disk.
        shutil.rmtree(nascent, ignore_errors=True)
        raise
    if best:
        link = folder / f".{_BEST}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, folder / _BEST)
    _prune(folder, keep)
    return final


def load_newest(folder: Path, warn: Callable[[str], None]) -> TrainingState | None:
    """The newest snapshot whose checksums hold; None where there is none at all.

    warn: is told of every damaged checkpoint that was passed over.
    Raises UserError where there are checkpoints and all of them are damaged.
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
    """The snapshot of that step. Raises UserError where it is damaged or not there."""
    name = _name(step)
    try:
        return _load(folder / name)
    except ValueError as error:
        raise UserError(f"{folder / name}: cannot be read here: {error}") from None


def load_weights(folder: Path, warn: Callable[[str], None]) -> tuple[Tensors, int]:
    """Weights of the best intact checkpoint (the averaged ones where kept) and its step.

    Falls back to the newest intact one, and tells `warn` of every one passed over. Raises UserError where
    there is none.
    """
    best = [os.readlink(folder / _BEST)] if (folder / _BEST).is_symlink() else []
    for name in best + steps(folder)[::-1]:
        part = "ema" if (folder / name / "ema.safetensors").exists() else "model"
        try:
            snapshot = _load(folder / name, parts=(part,))
        except ValueError as error:
            warn(f"checkpoint {name} is damaged ({error}); taking another")
            continue
        return snapshot.tensors[part], snapshot.state["step"]
    raise UserError(f"{folder}: there is no intact checkpoint yet")


def steps(folder: Path) -> list[str]:
    """Names of the checkpoints there are, oldest first."""
    return sorted(path.name for path in folder.glob("step-*"))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _load(folder: Path, parts: tuple[str, ...] = ()) -> TrainingState:
    """Raises ValueError saying what is damaged. parts: those wanted; if empty, all that a run goes on from."""
    try:
        state = json.loads((folder / _STATE).read_text())
        digests: dict[str, str] = state.pop("sha256")
        if digests.pop(_STATE) != sha256_of_json(state):
            raise ValueError(f"the checksum of {_STATE} does not match")
        there = {file.name for file in folder.glob("*.safetensors")}
        needed = {f"{part}.safetensors" for part in parts or ("model", "optimizer")}
        if unlisted := sorted((there | needed) - digests.keys()):
            raise ValueError(f"{_STATE} has no checksum of {unlisted[0]}")
        tensors = {}
        for name, digest in digests.items():
            part = name.removesuffix(".safetensors")
            if parts and part not in parts:
                continue
            # Read and not mapped: a mapping would live as long as the tensors, and with it the removed file.
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"the checksum of {name} does not match")
            tensors[part] = load(content)
    except (
        OSError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        SafetensorError,
        json.JSONDecodeError,
    ) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return TrainingState(tensors, state)


def _prune(folder: Path, keep: int) -> None:
    best = os.readlink(folder / _BEST) if (folder / _BEST).is_symlink() else None
    for name in steps(folder)[:-keep]:
        if name != best:
            with suppress(OSError):
                _discard(folder / name)


def _discard(path: Path) -> None:
    """Takes a checkpoint's name away, and removes its files as far as they can be removed.

    Renamed first, so that a reader never meets half a checkpoint. On NFS a file that somebody still reads leaves a
    `.nfs…` file behind, which keeps its folder from being removed. Raises OSError if it cannot be renamed.
    """
    doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        os.rename(path, doomed / path.name)
    finally:
        shutil.rmtree(doomed, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what a kill, or a file that could not be removed, has left of earlier checkpoints."""
    for pattern in (".step-*.new", ".step-*.old"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
