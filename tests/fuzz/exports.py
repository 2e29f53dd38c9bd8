"""Exported models that somebody has changed, with and without new checksums."""

import hashlib
import json
import os
import random
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from unittest import mock

from cvae.errors import UserError
from cvae.files.checksums import sha256_of_json
from cvae.sampling.export_format import CONFIG
from tests.conftest import write_store
from tests.fuzz import damage
from tests.fuzz.frame import Case, command, target

_CHECKED = [CONFIG, "experiment.yaml", "model.safetensors", "samples.png"]


@cache
def _original() -> tuple["tempfile.TemporaryDirectory[str]", Path]:
    """An exported model of three classes in a home that lasts as long as this process."""
    from cvae.sampling.export import export_run
    from tests.helpers.trained_runs import make_run

    kept = tempfile.TemporaryDirectory(prefix="fuzz-")
    home = Path(kept.name)
    with mock.patch.dict(os.environ, {"CVAE_HOME": str(home)}):
        write_store(home, captioned=False, sizes=(6, 3))
        export_run(make_run(), home / "out")
    return kept, home / "out"


@target("exports")
def exports(draw: random.Random, folder: Path) -> Case:
    original = _original()[1]
    out = folder / "out"
    damage.copy(original, out)
    done = [_change(draw, out) for _ in range(draw.choice([1, 1, 2]))]
    sealed = draw.random() < 0.6 and _seal(draw, out)
    same = not sealed and all(_is_same(original / name, out / name) for name in _CHECKED)

    def read() -> None:
        from cvae.sampling import inference, sampler
        from workflows import evaluate, generate

        home = {"CVAE_HOME": str(folder)}
        drawn = folder / "drawn.png"
        words = [str(out), "1", "-n", "1", "--out", str(drawn)]
        with mock.patch.dict(os.environ, home), damage.untouched(out):
            # Without its config.json and its weights it can be no more than a run without checkpoints.
            names = [*_CHECKED, "kind of model", "format", "do not fit", "out/checkpoints"]
            outcome = command(generate.main, words, *names)
            assert drawn.exists() == (not outcome.refusal), "a picture all the same, or none"
            assert outcome.refusal or sealed or same, "a folder that is not what was exported"
            with suppress(UserError):
                trained = sampler.load(out)
                assert inference.is_finite(trained.model), "weights that are no numbers"
                images = trained.draw([0], 2)
                assert images.shape == (1, 2, *trained.image_shape), f"images {images.shape}"
            # It is no run: nothing of it can be evaluated, and nothing may be written there.
            assert command(evaluate.main, [str(out)], "out", str(out), "tiny").refusal
        if outcome.refusal:
            raise UserError(outcome.refusal)

    return Case(f"{done} sealed: {sealed}", read)


def _change(draw: random.Random, out: Path) -> str:
    if draw.random() < 0.3 and (out / "model.safetensors").is_file():
        with suppress(Exception):  # of weights that were damaged before
            return _other_weights(draw, out / "model.safetensors")
    return damage.damage_a_file(draw, out, [*_CHECKED, "README.md"])


def _other_weights(draw: random.Random, file: Path) -> str:
    import torch
    from safetensors.torch import load, save

    tensors = load(file.read_bytes())
    name = draw.choice(sorted(tensors))
    value = tensors[name].clone()
    act = draw.choice(["nan", "inf", "shape", "type", "gone", "more", "zero", "empty"])
    if act in ("nan", "inf"):
        value.view(-1)[draw.randrange(value.numel())] = float(act)
    changed = {
        "shape": lambda: value[..., :-1].contiguous(),
        "type": lambda: value.to(draw.choice([torch.float64, torch.float16, torch.int64])),
        "zero": lambda: value * 0,
        "empty": lambda: value[:0].contiguous(),
    }
    tensors[name] = changed.get(act, lambda: value)()
    if act == "gone":
        del tensors[name]
    if act == "more":
        tensors[draw.choice(["x", "", "é" * 99, f"{name}.more"])] = value
    file.write_bytes(save(tensors))
    return f"{name}: {act}"


def _seal(draw: random.Random, out: Path) -> bool:
    """Gives config.json the checksums that fit, now and then after a change of its own; False if it cannot."""
    try:
        tree = json.loads((out / CONFIG).read_text())
        digests = tree["sha256"]
        del digests[CONFIG]
        for name in digests:
            digests[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
        if draw.random() < 0.5:
            changed = damage.other_value(draw, tree)
            tree = changed if isinstance(changed, dict) else tree
        if isinstance(tree.get("sha256"), dict):
            tree["sha256"][CONFIG] = sha256_of_json({**tree, "sha256": {**tree["sha256"]}})
        (out / CONFIG).write_text(json.dumps(tree))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def _is_same(one: Path, other: Path) -> bool:
    if not other.is_file():
        return False
    if one.name != CONFIG:
        return one.read_bytes() == other.read_bytes()
    with suppress(ValueError, RecursionError):
        return bool(json.loads(one.read_bytes()) == json.loads(other.read_bytes()))
    return False
