"""−ELBO and text gain of a split against a computation image by image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cvae.config.experiment import Experiment
from cvae.data.draws import eval_blocks
from cvae.data.experiment_data import open_data
from cvae.distributed.ranks import Ranks
from cvae.evaluation.elbo import evaluate_elbo
from cvae.models.cvae import build_model
from tests.conftest import tiny_experiment

ALONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_it_is_the_mean_over_single_images(
    tiny_captioned_store: Path, micro_batch_size: int | None
) -> None:
    plain = tiny_experiment(captioned=True, micro_batch_size=micro_batch_size)
    experiment = Experiment.model_validate(plain)
    data = open_data(experiment)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, 0).eval()
    (block,) = eval_blocks(experiment.seed, len(data.val), model.latent_shape)
    own, gains = [], []
    for row in range(len(data.val)):
        images = torch.from_numpy(data.val.images[[row]])
        noise = torch.from_numpy(block.noise[[row]])
        stranger = (row + 1) % len(data.val)
        parts = []
        for described in (row, stranger):
            # The stranger's caption is picked by the image's own draw.
            captions = data.val.condition(np.array([described]), block.caption_choice[[row]])
            assert captions is not None
            with torch.no_grad():
                elbo = model(images, torch.from_numpy(captions), noise)
            parts.append(float(elbo.recon_loss + elbo.kl))
        own.append(parts[0])
        gains.append(parts[1] - parts[0])
    found = evaluate_elbo(model, data, data.val, experiment, ALONE)
    assert found["loss"] == pytest.approx(np.mean(own), rel=1e-5)
    assert found["loss"] == pytest.approx(found["recon_loss"] + found["kl"])
    assert found["text_gain"] == pytest.approx(np.mean(gains), abs=1e-4)
    expected = np.std(gains, ddof=1) / np.sqrt(len(gains))
    assert found["text_gain_se"] == pytest.approx(expected, rel=1e-3)


def test_a_model_without_captions_has_no_text_gain(tiny_store: Path) -> None:
    experiment = Experiment.model_validate(tiny_experiment())
    data = open_data(experiment)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, 0)
    assert "text_gain" not in evaluate_elbo(model, data, data.val, experiment, ALONE)
