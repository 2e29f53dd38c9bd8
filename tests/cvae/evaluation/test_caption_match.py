import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cvae.data.store import Manifest, Split
from cvae.errors import UserError
from cvae.evaluation.caption_match import caption_match, distinct_scenes, match_grid, nearest
from cvae.models.cvae import Cvae
from cvae.sampling.sampler import load_run
from cvae.sampling.trained_model import TrainedModel
from tests.helpers.trained_runs import make_run


class Oracle(Cvae):
    """Draws the real image of the caption that it is given."""

    vectors: Tensor
    pictures: Tensor

    def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        return self.pictures[torch.cdist(condition, self.vectors).argmin(1)]


class Blind(Cvae):
    """Draws without a look at the caption."""

    def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.rand((len(latent), *self.shape), generator=generator)


@pytest.fixture
def trained(tiny_captioned_store: Path) -> TrainedModel:
    return load_run(make_run(captioned=True), torch.device("cpu"))


def test_an_oracle_matches_all_captions(trained: TrainedModel) -> None:
    val = trained.data.val
    rows = np.arange(len(val))
    condition = trained.data.condition(val, rows, np.zeros(len(val)))
    assert condition is not None
    trained.model.__class__ = Oracle
    trained.model.vectors = torch.from_numpy(condition)
    trained.model.pictures = torch.from_numpy(val.images[rows]).float() / 255
    match = caption_match(trained)
    assert match.share == 1
    assert match.chance == 1 / 21
    assert match.sentence() == "21 of 21 captions matched to their own scene: 100 % (chance 5 %)"


def test_a_blind_model_is_near_chance(trained: TrainedModel) -> None:
    trained.model.__class__ = Blind
    match = caption_match(trained)
    assert match.share < 0.25
    again = caption_match(trained)
    assert np.array_equal(match.drawn, again.drawn)
    right, wrong = (
        match._replace(right=match.right | True),
        match._replace(right=match.right & False),
    )
    assert match_grid(right).tobytes() != match_grid(wrong).tobytes()


def test_nearest_is_by_mean_squared_error() -> None:
    generator = np.random.default_rng(0)
    real = generator.integers(0, 256, (9, 3, 4, 4)).astype(np.uint8)
    drawn = generator.integers(0, 256, (7, 3, 4, 4)).astype(np.uint8)
    difference = drawn[:, None].astype(float) - real[None]
    by_definition = (difference**2).mean((2, 3, 4)).argmin(1)
    assert nearest(drawn, real).tolist() == by_definition.tolist()


def test_scenes_that_look_or_read_alike_are_left_out(tiny_captioned_store: Path) -> None:
    folder = tiny_captioned_store / "val"
    offsets = np.load(folder / "caption_offsets.npy")
    captions = json.loads((folder / "captions.json").read_text())
    captions[offsets[3]] = captions[offsets[1]]
    (folder / "captions.json").write_text(json.dumps(captions))
    images = np.load(folder / "images.npy")
    images[5] = images[0]
    np.save(folder / "images.npy", images)
    manifest = Manifest.model_validate_json((tiny_captioned_store / "manifest.json").read_text())
    scenes = distinct_scenes(Split(folder, manifest, None), 6)
    assert scenes.indices.tolist() == [0, 1, 2, 4, 6, 7]
    assert scenes.captions[1] == captions[offsets[1]]
    assert np.array_equal(scenes.images[4], images[6])


def test_only_captions_can_be_matched(tiny_store: Path) -> None:
    with pytest.raises(UserError, match="not conditioned on captions"):
        caption_match(load_run(make_run()))
