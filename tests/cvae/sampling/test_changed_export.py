"""An exported folder that somebody has changed and sealed again: one line, and nothing outside it is touched."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cvae.errors import UserError
from cvae.files.checksums import sha256_of_json
from cvae.sampling.export import export_run
from cvae.sampling.sampler import load
from tests.helpers.trained_runs import make_run

Tree = dict[str, Any]


def reseal(folder: Path, change: Callable[[Tree], object] = lambda tree: None) -> None:
    """Gives config.json the checksums that the files have now, after a change of its own."""
    file = folder / "config.json"
    tree = json.loads(file.read_text())
    del tree["sha256"]["config.json"]
    for name in tree["sha256"]:
        tree["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(tree)
    if isinstance(tree["sha256"], dict):
        tree["sha256"]["config.json"] = sha256_of_json(tree)
    file.write_text(json.dumps(tree))


def with_value(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, lambda tree: tree.update({key: value}))


def listed(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        digest = hashlib.sha256((folder / "samples.png").read_bytes()).hexdigest()
        shutil.copy(folder / "samples.png", folder.parent / "outside")
        reseal(folder, lambda tree: tree["sha256"].update({name: digest}))

    return act


def unlisted(*names: str) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, lambda tree: [tree["sha256"].pop(name) for name in names])


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        changed = change(tensors)
        save_file(changed if isinstance(changed, dict) else tensors, file)
        reseal(folder)

    return act


def content(name: str, text: str | bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        reseal(folder)

    return act


def linked(folder: Path) -> None:
    shutil.move(folder / "samples.png", folder.parent / "elsewhere.png")
    (folder / "samples.png").symlink_to("../elsewhere.png")
    reseal(folder)


def piped(folder: Path) -> None:
    (folder / "samples.png").unlink()
    os.mkfifo(folder / "samples.png")


def one(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("weight"))


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / "experiment.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        reseal(folder)

    return act


def missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


CHANGES: dict[str, Callable[[Path], None]] = {
    "name that climbs": with_value("name", "../../pwn"),
    "absolute name": with_value("name", "/tmp/pwn"),
    "name of dots": with_value("name", ".."),
    "empty name": with_value("name", ""),
    "name with an escape": with_value("name", "a\x1b[2J"),
    "long name": with_value("name", "x" * 10_000),
    "name that is a number": with_value("name", 7),
    "step below 0": with_value("step", -1),
    "step beyond all": with_value("step", 10**30),
    "a shape of nothing": with_value("image_shape", [1, 0, 16]),
    "a shape beyond memory": with_value("image_shape", [1, 10**9, 10**9]),
    "another shape": with_value("image_shape", [1, 32, 32]),
    "another condition": with_value("condition_dim", 4),
    "negative condition": with_value("condition_dim", -3),
    "other classes": with_value("classes", ["low", "high"]),
    "no data": with_value("data", None),
    "unknown key": with_value("what", 1),
    "digest of an absolute name": listed("/etc/hostname"),
    "digest of a name that climbs": listed("../outside"),
    "digest of a hidden climb": listed("text_encoder/../../outside"),
    "digest of a folder": listed("text_encoder/.."),
    "digest of nothing": listed(""),
    "digest with a NUL": listed("a\0b"),
    "no digests": lambda folder: reseal(folder, lambda tree: tree.update(sha256={})),
    "digests that are a list": lambda folder: reseal(folder, lambda tree: tree.update(sha256=[])),
    "weights without digest": unlisted("model.safetensors"),
    "experiment without digest": unlisted("experiment.yaml"),
    "a link out of it": linked,
    "no config": missing("config.json"),
    "no experiment": missing("experiment.yaml"),
    "no file of weights": missing("model.safetensors"),
    "a pipe": piped,
    "NaN": weights(lambda t: t[one(t)].view(-1)[0].fill_(float("nan"))),
    "infinity": weights(lambda t: t[one(t)].view(-1)[-1].fill_(-float("inf"))),
    "double precision": weights(lambda t: {name: x.double() for name, x in t.items()}),
    "half precision": weights(lambda t: {**t, one(t): t[one(t)].half()}),
    "whole numbers": weights(lambda t: {**t, one(t): t[one(t)].to(torch.int8)}),
    "a weight missing": weights(lambda t: t.pop(one(t)) is None),
    "a weight more": weights(lambda t: {**t, "pwn": torch.zeros(1)}),
    "transposed": weights(lambda t: {**t, one(t): t[one(t)].T.contiguous()}),
    "no weights": content("model.safetensors", b""),
    "a header without end": content("model.safetensors", b"\xff" * 64),
    "a header of brackets": content("model.safetensors", b"\x40" + bytes(7) + b"[" * 64),
    "a pickle": content("model.safetensors", b"\x80\x04K\x01."),
    "an empty experiment": content("experiment.yaml", ""),
    "a deep experiment": content("experiment.yaml", "a: " + "[" * 900),
    "a huge experiment": content("experiment.yaml", "# " + "x" * (2 << 20)),
    "an experiment of bytes": content("experiment.yaml", b"\xff\xfe\x00"),
    "a model beyond memory": replaced("hidden_dim: 32", "hidden_dim: 2000000000"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import write_store

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVAE_HOME", str(home))
        write_store(home, captioned=False)
        export_run(make_run(), home / "out")
    return home / "out"


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_was_sealed_again_is_one_line(original: Path, home: Path, kind: str) -> None:
    folder = home / "deep" / "out"
    shutil.copytree(original, folder)
    CHANGES[kind](folder)
    with pytest.raises(UserError) as refused:
        load(folder)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 700
    assert "input_value" not in message
    assert re.search(
        r"config\.json|experiment\.yaml|\.safetensors|samples\.png|do not fit", message
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, "{", '{"format": "\\ud800"}', "\0"]
)
def test_config_that_is_none(original: Path, home: Path, text: str) -> None:
    shutil.copytree(original, home / "out")
    (home / "out" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"is damaged|another kind of model"):
        load(home / "out")
