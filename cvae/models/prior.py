"""p(z|c): the prior, which the KL term pulls the posterior to and new latents are drawn from."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvae.models.backbone import Moments

_HIDDEN = 512


class StandardPrior(nn.Module):
    """N(0, I) (Kingma & Welling 2014), whatever the condition; the interface of every prior."""

    def __init__(self, condition_dim: int, latent_shape: Sequence[int]):
        super().__init__()

    def kl(self, posterior: Moments, condition: Tensor | None) -> Tensor:
        """Returns KL(q(z|x,c) || p(z|c)) of each latent dimension in nats, (B, *latent_shape), fp32.

        Kingma & Welling 2014, appendix B.
        """
        mean, log_variance = posterior
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)

    def log_prob(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """Returns log p(z|c) in nats, (B,) fp64, of z (B, *latent_shape)."""
        return normal_log_prob(latent)

    def draw(self, noise: Tensor, condition: Tensor | None) -> Tensor:
        """Returns z ~ p(z|c), (B, *latent_shape), from standard normal noise of that shape."""
        return noise


class TextPrior(StandardPrior):
    """A diagonal Gaussian whose mean and variance are learned functions of c (Sohn et al. 2015, eq. 4).

    It starts as N(0, I).
    """

    def __init__(self, condition_dim: int, latent_shape: Sequence[int]):
        super().__init__(condition_dim, latent_shape)
        self.latent_shape = tuple(latent_shape)
        last = nn.Linear(_HIDDEN, 2 * torch.Size(latent_shape).numel())
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.moments = nn.Sequential(nn.Linear(condition_dim, _HIDDEN), nn.SiLU(), last)

    def forward(self, condition: Tensor | None) -> Moments:
        """Returns the prior's moments, (B, *latent_shape) fp32 each, for a condition (B, condition_dim)."""
        assert condition is not None
        mean, log_variance = self.moments(condition).float().chunk(2, dim=1)
        shape = (-1, *self.latent_shape)
        return Moments(mean.reshape(shape), log_variance.reshape(shape))

    def kl(self, posterior: Moments, condition: Tensor | None) -> Tensor:
        prior = self.forward(condition)
        gap = posterior.log_variance - prior.log_variance
        distance = (posterior.mean - prior.mean).square() * (-prior.log_variance).exp()
        return 0.5 * (distance + gap.exp() - 1 - gap)

    def log_prob(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        prior = self.forward(condition)
        scaled = (latent - prior.mean) * (-0.5 * prior.log_variance).exp()
        log_variance = prior.log_variance.flatten(1).sum(1, dtype=torch.float64)
        return normal_log_prob(scaled) - 0.5 * log_variance

    def draw(self, noise: Tensor, condition: Tensor | None) -> Tensor:
        prior = self.forward(condition)
        return prior.mean + (0.5 * prior.log_variance).exp() * noise


def normal_log_prob(values: Tensor) -> Tensor:
    """Returns log N(x; 0, I) in nats, (B,) fp64, of x (B, …)."""
    flat = values.flatten(1)
    constant = flat.shape[1] * math.log(2 * math.pi)
    return -0.5 * (flat.square().sum(1, dtype=torch.float64) + constant)


PRIORS: dict[str, type[StandardPrior]] = {"standard": StandardPrior, "text": TextPrior}
