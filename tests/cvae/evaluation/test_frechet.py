from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.evaluation.evaluation_input import EvaluationInput
from cvae.evaluation.frechet import Inception, RandomFeatures, evaluate_frechet
from cvae.sampling.sampler import load_run
from tests.helpers.trained_runs import make_run


def subject() -> EvaluationInput:
    trained = load_run(make_run(), torch.device("cpu"))
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    return EvaluationInput(trained, trained.data.train, ranks, lambda images: None)


class TwoNumbers(nn.Module):
    """Mean brightness of the upper and of the lower half."""

    num_features = 2

    def forward(self, images: Tensor) -> Tensor:
        halves = images.double().mean(1).reshape(len(images), 2, -1).mean(2)
        return halves / 255


def test_the_distance_is_that_of_two_gaussians(tiny_store: Path) -> None:
    inputs = subject()
    distances = evaluate_frechet(inputs, TwoNumbers(), "two")
    features = TwoNumbers()
    real, made = [], []
    for part, _ in inputs.map(lambda part: None):
        images, condition, noise = part.batch
        real.append(features(images))
        drawn = inputs.model.decode(inputs.model.draw_latent(noise, condition), condition)
        made.append(features((drawn * 255).round()).detach())
    x, y = torch.cat(real), torch.cat(made)
    # Dowson & Landau 1982: for 2×2 matrices tr √M = √(tr M + 2 √det M).
    product = torch.cov(x.T) @ torch.cov(y.T)
    root = (product.trace() + 2 * product.det().clamp(min=0).sqrt()).sqrt()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace()
    expected = expected + torch.cov(y.T).trace() - 2 * root
    assert distances["two_samples"] == pytest.approx(float(expected), rel=1e-6)
    assert set(distances) == {"two_reconstructions", "two_samples"}


def test_random_features_are_always_the_same() -> None:
    images = torch.randint(0, 256, (4, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    one = RandomFeatures()(images.byte())
    torch.manual_seed(6)
    assert torch.equal(one, RandomFeatures()(images.byte()))
    assert one.shape == (4, 64)
    assert one.std() > 0


class Extractor(nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.float().mean(dim=(2, 3)) if return_features else images.float()


def test_a_users_inception_gives_its_features(tiny_store: Path, tmp_path: Path) -> None:
    file = tmp_path / "inception.pt"
    torch.jit.script(Extractor()).save(str(file))
    network = Inception(file, torch.device("cpu"))
    assert network.num_features == 3
    distances = evaluate_frechet(subject(), network, "fid")
    assert set(distances) == {"fid_reconstructions", "fid_samples"}
    file.write_text("no network")
    with pytest.raises(UserError, match="must be a TorchScript network"):
        Inception(file, torch.device("cpu"))
