"""The likelihoods against torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from cvae.models.likelihood import LIKELIHOODS, OptimalGaussian

generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def test_bernoulli_is_that_of_torch_distributions() -> None:
    output, target = normal(4, 1, 8, 8), torch.rand(4, 1, 8, 8, generator=generator)
    log_prob = Bernoulli(logits=output, validate_args=False).log_prob(target).flatten(1).sum(1)
    torch.testing.assert_close(LIKELIHOODS["bernoulli"]().recon_loss(output, target), -log_prob)


def test_gaussian_is_a_normal_of_variance_one_half_up_to_its_constant() -> None:
    likelihood = LIKELIHOODS["gaussian"]()
    output, target = normal(4, 3, 8, 8), torch.rand(4, 3, 8, 8, generator=generator)
    density = Normal(output.sigmoid(), math.sqrt(0.5)).log_prob(target).flatten(1).sum(1)
    # nats_per_dim also holds the width of a pixel's level, 1/255.
    constant = (likelihood.nats_per_dim - math.log(255)) * 3 * 8 * 8
    torch.testing.assert_close(likelihood.recon_loss(output, target) + constant, -density)


def test_of_an_image_by_itself_half_the_distance_to_one_is_the_pixel() -> None:
    output, target = normal(4, 3, 8, 8), torch.rand(4, 3, 8, 8, generator=generator)
    signed = LIKELIHOODS["gaussian"](signed_output=True)
    expected = ((output / 2 + 0.5 - target) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(signed.recon_loss(output, target), expected)


@pytest.mark.parametrize("variance", [0.5, 0.01])
def test_optimal_gaussian_is_a_normal_of_its_variance(variance: float) -> None:
    likelihood = OptimalGaussian()
    likelihood.variance.fill_(variance)
    output, target = normal(4, 3, 8, 8), torch.rand(4, 3, 8, 8, generator=generator)
    density = Normal(output.sigmoid(), math.sqrt(variance)).log_prob(target).flatten(1).sum(1)
    constant = (likelihood.nats_per_dim - math.log(255)) * 3 * 8 * 8
    torch.testing.assert_close(likelihood.recon_loss(output, target) + constant, -density)


def test_optimal_gaussian_finds_the_variance_that_costs_least() -> None:
    likelihood = OptimalGaussian()
    output, target = normal(16, 3, 8, 8), torch.rand(16, 3, 8, 8, generator=generator)
    for _ in range(200):
        likelihood.observe(likelihood.recon_loss(output, target).mean(), 3 * 8 * 8)
    found = float(likelihood.variance)
    assert found == pytest.approx(float((output.sigmoid() - target).square().mean()), rel=1e-3)
    least = likelihood.recon_loss(output, target).sum()
    for other in (0.97 * found, 1.03 * found):
        likelihood.variance.fill_(other)
        assert likelihood.recon_loss(output, target).sum() > least


def test_a_perfect_reconstruction_has_the_variance_of_rounding() -> None:
    likelihood = OptimalGaussian()
    target = torch.rand(2, 1, 4, 4, generator=generator)
    for _ in range(300):
        likelihood.observe(likelihood.recon_loss(target.logit(), target).mean(), 16)
    assert float(likelihood.variance) == pytest.approx(1 / 12 / 255**2, rel=1e-3)
