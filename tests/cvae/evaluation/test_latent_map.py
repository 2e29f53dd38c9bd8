from pathlib import Path

import numpy as np
import pytest

from cvae.errors import UserError
from cvae.evaluation.latents import latent_map, linear_probe
from cvae.sampling.sampler import load_run
from tests.helpers.trained_runs import make_run


def test_the_probe_finds_classes_where_they_are_and_not_in_noise() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 2000)
    noise = generator.standard_normal((2000, 8)).astype(np.float32)
    centres = 6 * generator.standard_normal((5, 8)).astype(np.float32)
    found = linear_probe(noise + centres[labels], labels)
    assert found.accuracy > 0.98
    assert found.n_test == 1000
    # As many dimensions as images to fit: whoever tested on those would find every class in noise.
    noise = generator.standard_normal((2000, 500)).astype(np.float32)
    blind = linear_probe(noise, labels)
    assert blind.chance == pytest.approx(0.2, abs=0.03)
    assert blind.accuracy == pytest.approx(blind.chance, abs=0.06)


def test_a_map_is_the_same_every_time(tiny_store: Path) -> None:
    trained = load_run(make_run(condition="none"))
    first, again = latent_map(trained), latent_map(trained)
    assert first.name == "plain VAE (tiny)"
    assert first.places.shape == (21, 2)
    assert np.isfinite(first.places).all()
    assert np.array_equal(first.places, again.places)
    assert first.probe == again.probe
    assert trained.data.val.labels is not None
    assert first.labels.tolist() == trained.data.val.labels.tolist()


def test_a_map_needs_labels(tiny_captioned_store: Path) -> None:
    with pytest.raises(UserError, match="tinytext has no labels"):
        latent_map(load_run(make_run(captioned=True)))
