from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cvae.config.experiment import Experiment
from cvae.data import draws
from cvae.data.store import Manifest
from cvae.errors import UserError
from cvae.models.cvae import build_model
from cvae.run.directory import RunDirectory
from cvae.sampling import inference
from cvae.sampling.inference import decode, reconstruct, sample
from cvae.sampling.sampler import load_run
from cvae.sampling.trained_model import TrainedModel
from tests.conftest import TEXT_DIM, tiny_experiment
from tests.helpers.trained_runs import encode_with, make_run, save_weights


@pytest.fixture
def labelled(tiny_store: Path) -> TrainedModel:
    return load_run(make_run())


def test_a_run_without_a_checkpoint_is_one_line(tiny_store: Path) -> None:
    experiment = make_run("full").experiment()
    with pytest.raises(UserError, match="no intact checkpoint yet"):
        load_run(RunDirectory.create("empty", experiment))


def test_averaged_weights_are_taken_where_they_are_kept(tiny_store: Path) -> None:
    run = make_run()
    weights = build_model(run.experiment().model, (1, 16, 16), 3, seed=5).state_dict()
    save_weights(run, weights, step=9, part="ema")
    trained = load_run(run)
    assert trained.step == 9
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor.cpu(), weights[name])


def test_weights_that_do_not_fit_the_prepared_data_are_one_line(tiny_store: Path) -> None:
    run = make_run()
    manifest = Manifest.model_validate_json((tiny_store / "manifest.json").read_bytes())
    classes = [*(manifest.classes or []), "highest"]
    changed = manifest.model_copy(update={"classes": classes})
    (tiny_store / "manifest.json").write_text(changed.to_json())
    with pytest.raises(UserError, match="do not fit"):
        load_run(run)


def test_one_prompt_and_one_noise_are_one_image(labelled: TrainedModel) -> None:
    first = labelled.draw(["low", "high"], 3)
    assert first.shape == (2, 3, 1, 16, 16)
    assert first.dtype == np.uint8
    again = labelled.draw(["high"], 5)
    # Another batch may round otherwise in the last bit, hence one level of 255.
    assert np.abs(again[0, :3].astype(int) - first[1]).max() <= 1
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0, 0], first[0, 1])


@pytest.mark.parametrize("prompt", ["MIDDLE", " middle ", 1, "1"])
def test_a_class_goes_by_name_or_number(labelled: TrainedModel, prompt: str | int) -> None:
    assert labelled.condition([prompt]).tolist() == [[0, 1, 0]]
    assert labelled.labels([prompt]) == ["middle"]


def test_an_unknown_class_is_answered_with_the_nearest(labelled: TrainedModel) -> None:
    with pytest.raises(UserError, match="'midle' is no class of tiny; did you mean middle"):
        labelled.draw(["midle"], 1)
    with pytest.raises(UserError, match="its classes are low, middle, high"):
        labelled.draw(["3"], 1)


def test_a_run_without_condition_takes_no_captions(tiny_store: Path) -> None:
    with pytest.raises(UserError, match="without a condition"):
        load_run(make_run(condition="none")).draw(["low"], 1)


def test_new_captions_are_read_by_the_encoder_of_the_run(tiny_captioned_store: Path) -> None:
    encode_with(tiny_captioned_store)
    trained = load_run(make_run(captioned=True, encoder="minilm"))
    known = trained.data.val.caption(4)
    prepared = trained.data.condition(trained.data.val, np.array([4]), np.zeros(1))
    assert prepared is not None
    np.testing.assert_allclose(trained.condition([f"  {known}\n"]), prepared, atol=1e-5)
    images = trained.draw([known, "something else entirely"], 2)
    assert not np.array_equal(images[0], images[1])
    with pytest.raises(UserError, match="caption 2 of 3 is empty"):
        trained.draw(["fine", " \n", "fine"], 1)

    entry = trained.encoder_entry
    assert entry is not None
    other = replace(trained, encoder_entry=entry.model_copy(update={"hash": "0" * 64}))
    with pytest.raises(UserError, match="'minilm' is not the one that prepared the captions of"):
        other.draw(["anything"], 1)


def test_draws_come_from_the_runs_own_prior(tiny_captioned_store: Path) -> None:
    model = Experiment.model_validate(tiny_experiment(captioned=True)).model
    cvae = build_model(model.model_copy(update={"prior": "text"}), (1, 16, 16), TEXT_DIM, 0).eval()
    cvae.prior.moments[-1].bias.data += 1.5
    noise, condition = (
        draws.sample_noise(0, 5, cvae.latent_shape),
        np.eye(5, TEXT_DIM, dtype=np.float32),
    )
    # log σ² is 1.5, too.
    z = (1.5 + np.exp(0.75) * noise).astype(np.float32)
    assert np.array_equal(sample(cvae, noise, condition), decode(cvae, z, condition))
    assert not np.array_equal(sample(cvae, noise, condition), decode(cvae, noise, condition))


def test_arrays_and_prompts_of_one_image_each(labelled: TrainedModel) -> None:
    images = np.array(labelled.data.val.images[:3])
    z = labelled.encode(images, [0, 1, 2])
    assert z.shape == (3, 4)
    assert z.dtype == np.float32
    whole = labelled.reconstruct(images, ["low", "middle", "high"])
    assert np.array_equal(labelled.decode(z, [0, 1, 2]), whole)
    with pytest.raises(UserError, match="3 rows need 3 prompts, not 2"):
        labelled.reconstruct(images, [0, 1])
    with pytest.raises(
        UserError, match=r"takes uint8 images \(B, 1, 16, 16\), not float32 \(3, 4\)"
    ):
        labelled.encode(z, [0, 1, 2])  # type: ignore[arg-type]
    for prompts in (None, [], "low"):
        with pytest.raises(UserError, match="tiny draws from classes; give a list of them"):
            labelled.draw(prompts, 2)
    with pytest.raises(UserError, match="the minimum is 1"):
        labelled.draw(["low"], 0)


def test_a_run_without_condition_draws_for_nothing(tiny_store: Path) -> None:
    trained = load_run(make_run(condition="none"))
    assert trained.draw(None, 5).shape == (1, 5, 1, 16, 16)


def test_parts_make_no_difference(labelled: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(21)
    images = labelled.data.val.images[rows]
    condition = labelled.data.condition(labelled.data.val, rows, np.zeros(21))
    whole = reconstruct(labelled.model, images, condition)
    monkeypatch.setattr(inference, "_BATCH", 4)
    parts = reconstruct(labelled.model, images, condition)
    assert whole.shape == images.shape
    assert np.abs(whole.astype(int) - parts).max() <= 1
