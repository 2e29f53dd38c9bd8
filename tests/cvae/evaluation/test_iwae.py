"""The importance-weighted bound compared with closed forms, on a model small enough to have them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cvae.data.draws import binarised, iwae_noise
from cvae.data.feed import MicroBatch
from cvae.distributed.ranks import Ranks
from cvae.evaluation.evaluation_input import EvaluationBatch
from cvae.evaluation.iwae import evaluate_iwae
from cvae.models.backbone import Moments
from cvae.models.cvae import Cvae
from cvae.models.likelihood import LIKELIHOODS, Gaussian, OptimalGaussian, discretised_gaussian
from cvae.models.prior import StandardPrior, TextPrior

LATENT, PIXELS, STD = 2, 3, 0.25


class Linear(Gaussian):
    """N(output, STD²) of densities: x is a real number, as in the closed form."""

    def nll(self, output: Tensor, images: Tensor) -> Tensor:
        distance = ((output.double() - images.double()) / STD).flatten(1)
        constant = distance.shape[1] * (math.log(STD) + 0.5 * math.log(2 * math.pi))
        return 0.5 * distance.square().sum(1) + constant


class LinearGaussian(Cvae):
    """x = W z + b + STD·ε with z ~ N(0, I): probabilistic PCA, whose p(x) and p(z|x) are Gaussian."""

    def __init__(self, exact: bool) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(3)
        self.condition_dim, self.beside = 0, nn.Parameter(torch.zeros(1))
        self.weight = torch.randn(PIXELS, LATENT, generator=generator, dtype=torch.float64)
        self.bias = torch.randn(PIXELS, generator=generator, dtype=torch.float64)
        self.exact = exact
        self.shape, self.latent_shape = (PIXELS, 1, 1), (LATENT,)
        self.likelihood = Linear()
        self.prior = StandardPrior(0, (LATENT,))

    def _moments(self, target: Tensor, condition: Tensor | None) -> Moments:
        x = target.flatten(1).double() * 255
        precision = torch.eye(LATENT, dtype=torch.float64) + self.weight.T @ self.weight / STD**2
        covariance = precision.inverse()
        mean = (x - self.bias) @ self.weight @ covariance / STD**2
        if not self.exact:
            mean = mean + 0.1
        # The exact posterior's covariance is not diagonal: rotate W so that it is.
        return Moments(mean, covariance.diagonal().log().expand_as(mean))

    def decoder(self, z: Tensor, condition: Tensor | None) -> Tensor:  # type: ignore[override]
        return (z.double() @ self.weight.T + self.bias).reshape(-1, PIXELS, 1, 1)

    def orthogonal(self) -> "LinearGaussian":
        _, _, right = torch.linalg.svd(self.weight)
        self.weight = self.weight @ right.T
        return self

    def nll(self, images: Tensor) -> Tensor:
        covariance = self.weight @ self.weight.T + STD**2 * torch.eye(PIXELS, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(self.bias, covariance)
        return -normal.log_prob(images.flatten(1).double())


class Alone(NamedTuple):
    """As EvaluationInput, for one batch of images on one rank."""

    model: Cvae
    images: Tensor
    seed: int = 0
    ranks: Ranks = Ranks(0, 1, torch.device("cpu"), None)

    @property
    def split(self) -> Tensor:
        return self.images

    def advance(self, images: float) -> None:
        pass

    def map(
        self, function: Callable[[EvaluationBatch], Tensor], advances: bool
    ) -> list[tuple[EvaluationBatch, Tensor]]:
        n = len(self.images)
        noise = torch.zeros(n, *self.model.latent_shape)
        part = EvaluationBatch(0, slice(0, n), np.arange(n), MicroBatch(self.images, None, noise))
        return [(part, function(part))]


@pytest.fixture
def images() -> Tensor:
    generator = np.random.default_rng(0)
    return torch.from_numpy(generator.integers(0, 3, (40, PIXELS, 1, 1)).astype(np.uint8))


@pytest.mark.parametrize("n_draws", [1, 2, 50])
def test_with_the_exact_posterior_the_bound_is_the_likelihood(images: Tensor, n_draws: int) -> None:
    model = LinearGaussian(exact=True).orthogonal()
    found = evaluate_iwae(Alone(model, images), n_draws)  # type: ignore[arg-type]
    assert found[f"iwae_{n_draws}"] == pytest.approx(float(model.nll(images).mean()), rel=1e-6)
    bits = found[f"iwae_{n_draws}"] / PIXELS / math.log(2)
    assert found[f"iwae_{n_draws}_bits_per_dim"] == pytest.approx(bits)


def test_with_another_posterior_the_bound_falls_to_the_likelihood(images: Tensor) -> None:
    model = LinearGaussian(exact=False).orthogonal()
    exact = float(model.nll(images).mean())
    found = [
        np.mean([evaluate_iwae(Alone(model, images, seed), n)[f"iwae_{n}"] for seed in range(40)])  # type: ignore[arg-type]
        for n in (1, 10, 100)
    ]
    assert found[0] > found[1] > found[2] > exact
    assert found[2] == pytest.approx(exact, abs=0.05)


def test_one_draw_is_the_elbo_in_the_mean(images: Tensor) -> None:
    model = LinearGaussian(exact=False).orthogonal()
    seeds = [evaluate_iwae(Alone(model, images, seed), 1)["iwae_1"] for seed in range(200)]  # type: ignore[arg-type]
    mean, log_variance = model._moments(images.float() / 255, None)
    kl = model.prior.kl(Moments(mean, log_variance), None).sum(1)
    # E‖x − Wz − b‖² in closed form.
    residual = (images.flatten(1).double() - mean @ model.weight.T - model.bias).square().sum(1)
    spread = (model.weight.square() @ log_variance.exp().T).sum(0)
    constant = PIXELS * (math.log(STD) + 0.5 * math.log(2 * math.pi))
    elbo = ((residual + spread) / (2 * STD**2) + constant + kl).mean()
    assert np.mean(seeds) == pytest.approx(float(elbo), rel=0.01)


def test_the_levels_of_a_discretised_gaussian_are_a_distribution() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    for mean, std in ((0.5, 0.7), (0.0, 0.01), (1.0, 0.002), (0.3141, 1 / 255 / 12**0.5)):
        nll = discretised_gaussian(torch.full((256, 1, 1, 1), mean), std, levels)
        assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-9)
    # Far tails, where a difference of two probabilities near 1 would be lost.
    far = discretised_gaussian(torch.zeros(1, 1, 1, 1), 0.01, levels[200:201])
    assert torch.isfinite(far).all()
    assert float(far) > 1000
    middle = discretised_gaussian(torch.full((1, 1, 1, 1), 0.5), 0.5, levels[128:129])
    density = 0.5 * math.log(2 * math.pi * 0.25) + (128 / 255 - 0.5) ** 2 / 0.5
    assert float(middle) == pytest.approx(density + math.log(255), abs=1e-4)


def test_a_gaussians_levels_have_the_variance_of_its_loss() -> None:
    images = torch.full((1, 1, 2, 2), 100, dtype=torch.uint8)
    output = torch.zeros(1, 1, 2, 2)
    fixed = Gaussian()
    assert torch.equal(
        fixed.nll(output, images),
        discretised_gaussian(torch.full((1, 1, 2, 2), 0.5), math.sqrt(0.5), images),
    )
    optimal = OptimalGaussian()
    optimal.variance.fill_(0.01)
    assert torch.allclose(
        optimal.nll(output, images),
        discretised_gaussian(torch.full((1, 1, 2, 2), 0.5), 0.1, images),
    )


def test_binary_images_are_draws_of_the_greys() -> None:
    grey = np.full((200, 1, 8, 8), 51, np.uint8)
    rows = np.arange(200)
    found = binarised(0, rows, grey)
    assert set(np.unique(found)) == {0, 255}
    assert (found > 0).mean() == pytest.approx(0.2, abs=0.01)
    # Whatever batch an image comes in.
    assert np.array_equal(binarised(0, rows[50:60], grey[50:60]), found[50:60])
    assert not np.array_equal(binarised(1, rows, grey), found)
    assert np.array_equal(
        binarised(0, rows[:1], np.full((1, 1, 2, 2), 255, np.uint8)).ravel(), [255] * 4
    )
    bernoulli = LIKELIHOODS["bernoulli"]()
    logits = torch.tensor([[[[math.log(3.0)]]]])
    assert bernoulli.is_binary
    assert float(bernoulli.nll(logits, torch.tensor([[[[255]]]]))) == pytest.approx(-math.log(0.75))
    assert float(bernoulli.nll(logits, torch.tensor([[[[0]]]]))) == pytest.approx(-math.log(0.25))


def test_draws_do_not_depend_on_how_they_are_cut() -> None:
    whole = iwae_noise(0, 3, range(6), (2,))
    assert np.array_equal(whole[4:], iwae_noise(0, 3, range(4, 6), (2,)))
    assert not np.array_equal(whole, iwae_noise(0, 4, range(6), (2,)))


def test_the_priors_densities() -> None:
    latent = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0.0, 1.0)
    found = StandardPrior(0, (3,)).log_prob(latent, None)
    assert torch.allclose(found, normal.log_prob(latent).sum(1).double(), atol=1e-5)
    prior = TextPrior(4, (3,))
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    condition = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    mean, log_variance = prior(condition)
    other = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = other.log_prob(latent).sum(1).double()
    assert torch.allclose(prior.log_prob(latent, condition), expected, atol=1e-4)
