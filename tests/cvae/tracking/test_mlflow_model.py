"""A run's model, back from a real MLflow store."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from cvae.data.store import Precision
from cvae.data.text_encoder import TextEncoder, load_encoder
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.sampling import trained_model
from cvae.sampling.export import write_model
from cvae.sampling.sampler import load, load_run
from cvae.tracking import mlflow_state
from cvae.tracking.mlflow_push import Pusher
from tests.conftest import PROJECT_ROOT
from tests.helpers.trained_runs import encode_with, make_run


def logged(run: RunDirectory, times: int = 1) -> str:
    """The run's id in MLflow, once its model was brought there, anew so many times."""
    write_model(run, run.path / "model")
    journal = Journal(run.journal_file)
    journal.append("start", step=0, world_size=1)
    journal.append("artifact", path="model", artifact_path="model")
    journal.append("end", status="finished", step=7, reason="")
    journal.close()
    for _ in range(times):
        Pusher(run.path).push()
        state = mlflow_state.load(run.path)
        mlflow_state.save(
            run.path, mlflow_state.State(state.tracking_uri, state.run_dir_id, state.run_id)
        )
    assert state.run_id is not None
    mlflow.set_tracking_uri(paths.tracking_uri())
    return state.run_id


def test_classes_in_images_out(tiny_store: Path) -> None:
    run = make_run(condition="label")
    model = mlflow.pyfunc.load_model(f"runs:/{logged(run)}/model")
    ours = load_run(run)
    names = ours.classes[:2]
    wanted = ours.draw(names, 3)
    for prompts in (
        names,
        [0, 1],
        np.array(names),
        pd.Series(names),
        pd.DataFrame({"class": names}),
    ):
        assert np.array_equal(model.predict(prompts, params={"count": 3}), wanted)
    assert not np.array_equal(model.predict(names, params={"count": 3, "seed": 5}), wanted)
    assert model.metadata.get_params_schema() is not None
    with pytest.raises(UserError, match="is no class of"):
        model.predict(["Boat"])
    with pytest.raises(UserError, match="one column"):
        model.predict(pd.DataFrame({"a": names, "b": names}))


def test_captions_in_images_out(
    tiny_captioned_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    encode_with(tiny_captioned_store)
    run = make_run(captioned=True, encoder="minilm")
    model = mlflow.pyfunc.load_model(f"runs:/{logged(run)}/model")
    captions = ["a red bus on a street", "two dogs 🐕"]
    # As the user guide shows it, in a folder of the person's own.
    (snippet,) = re.findall(
        r"\n((?:    .*\n)*    .*pyfunc.*\n(?:    .*\n)*)",
        (PROJECT_ROOT / "docs" / "guide.md").read_text(),
    )
    for shown, meant in {
        "sqlite:////folder/of/this/checkout/mlflow.db": paths.tracking_uri(),
        "<run id>": str(mlflow_state.load(run.path).run_id),
    }.items():
        assert shown in snippet
        snippet = snippet.replace(shown, meant)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    namespace: dict[str, Any] = {}
    exec(textwrap.dedent(snippet), namespace)
    assert np.array_equal(namespace["images"], load_run(run).draw(captions[:1], 8))
    assert list(Path().iterdir()) == []
    loads: list[str] = []

    def counted(name: str, precision: Precision) -> TextEncoder:
        loads.append(name)
        return load_encoder(name, precision)

    monkeypatch.setattr(trained_model, "load_encoder", counted)
    trained_model._load_encoder_once.cache_clear()
    drawn = model.predict(captions)
    assert np.array_equal(drawn, load_run(run).draw(captions, 1))
    for seed in (1, 2):
        model.predict(captions, params={"seed": seed})
    assert np.array_equal(model.predict(captions), drawn)
    assert loads == ["minilm"]
    with pytest.raises(UserError, match="caption 1 of 1 is empty"):
        model.predict([" "])


def test_a_model_without_condition_takes_nothing(tiny_captioned_store: Path) -> None:
    run = make_run(captioned=True, condition="none")
    model = mlflow.pyfunc.load_model(f"runs:/{logged(run)}/model")
    assert np.array_equal(model.predict([], params={"count": 2}), load_run(run).draw(None, 2))


def test_sent_again_it_is_the_same_one_model(tiny_store: Path) -> None:
    run_id = logged(make_run(condition="label"), times=3)
    client = MlflowClient()
    run = client.get_run(run_id)
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (model.name, model.source_run_id, model.status) == ("model", run_id, "READY")
    (output,) = run.outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 7)


def test_another_encoder_of_that_name_is_refused(tiny_captioned_store: Path) -> None:
    encode_with(tiny_captioned_store)
    run = make_run(captioned=True, encoder="minilm")
    manifest = tiny_captioned_store / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["text_encoders"]["minilm"]["hash"] = "0" * 64
    manifest.write_text(json.dumps(tree))
    model = mlflow.pyfunc.load_model(f"runs:/{logged(run)}/model")
    with pytest.raises(UserError, match="'minilm' is not the one that prepared the captions"):
        model.predict(["a red bus"])


def test_a_damaged_model_is_refused_and_needs_no_data(tiny_store: Path, tmp_path: Path) -> None:
    run = make_run(condition="label")
    write_model(run, run.path / "model")
    (tiny_store / "manifest.json").unlink()
    assert load(run.path / "model").draw(["0"], 1).shape[:2] == (1, 1)
    weights = run.path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"boom")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(run.path / "model")
