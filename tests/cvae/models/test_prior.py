"""The priors against torch.distributions."""

import torch
from torch.distributions import Normal, kl_divergence

from cvae.models.backbone import Moments
from cvae.models.prior import StandardPrior, TextPrior

generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def text_prior(*latent_shape: int) -> TextPrior:
    prior = TextPrior(5, latent_shape)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return prior


def as_normal(moments: Moments) -> Normal:
    return Normal(moments.mean, (0.5 * moments.log_variance).exp())


def test_kl_is_that_of_torch_distributions() -> None:
    mean, log_variance = normal(5, 7), normal(5, 7)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros(5, 7), torch.ones(5, 7))).sum(1)
    terms = StandardPrior(0, (7,)).kl(Moments(mean, log_variance), None)
    torch.testing.assert_close(terms.sum(1), expected)


def test_kl_to_a_text_prior_is_that_of_torch_distributions() -> None:
    prior, condition = text_prior(3, 2, 2), normal(4, 5)
    posterior = Moments(normal(4, 3, 2, 2), normal(4, 3, 2, 2))
    expected = kl_divergence(as_normal(posterior), as_normal(prior(condition)))
    torch.testing.assert_close(prior.kl(posterior, condition), expected)
    assert prior.kl(prior(condition), condition).abs().max() < 1e-6


def test_a_text_prior_starts_as_the_standard_one() -> None:
    condition, posterior = normal(4, 5), Moments(normal(4, 7), normal(4, 7))
    noise = normal(4, 7)
    fresh, standard = TextPrior(5, (7,)), StandardPrior(5, (7,))
    torch.testing.assert_close(fresh.kl(posterior, condition), standard.kl(posterior, condition))
    assert torch.equal(fresh.draw(noise, condition), standard.draw(noise, condition))


def test_draws_of_a_text_prior_have_its_moments() -> None:
    prior, condition = text_prior(3), normal(1, 5)
    drawn = prior.draw(normal(20000, 3), condition.expand(20000, -1))
    expected = as_normal(prior(condition))
    torch.testing.assert_close(drawn.mean(0), expected.mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0), expected.stddev[0], atol=0.05, rtol=0.02)
