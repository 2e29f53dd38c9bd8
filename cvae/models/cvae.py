"""The conditional variational autoencoder, built from a backbone, a fusion, a likelihood and a prior."""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cvae.config import experiment
from cvae.models.backbone import ImageShape, Moments
from cvae.models.likelihood import LIKELIHOODS
from cvae.models.prior import PRIORS, normal_log_prob


class Elbo(NamedTuple):
    """The parts of −ELBO, one value per image, in nats; all (B,) in fp32."""

    recon_loss: Tensor
    kl: Tensor
    kl_penalty: Tensor
    """The term that beta weighs: kl with each latent dimension's share raised to free_bits."""


class Cvae(nn.Module):
    """p(x|z,c) p(z|c) with the amortised posterior q(z|x,c) (Sohn et al. 2015, eq. 4; Kingma & Welling 2014)."""

    condition_mean: Tensor
    condition_std: Tensor

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        """shape: channels, height, width of an image. condition_dim: 0 if model.condition is none."""
        super().__init__()
        self.shape, self.condition_dim = shape, condition_dim
        self.beta, self.free_bits = model.beta, model.free_bits
        self.likelihood = LIKELIHOODS[model.likelihood](signed_output=model.backbone == "ldm")
        # Saved with the weights, so that a loaded model conditions as it did in training.
        self.register_buffer("condition_mean", torch.zeros(condition_dim))
        self.register_buffer("condition_std", torch.ones(condition_dim))
        # A backbone is the module of its name. It is imported only if it is used: diffusers takes seconds.
        backbone = importlib.import_module(f"cvae.models.{model.backbone}")
        self.encoder, self.decoder = backbone.build(model, shape, condition_dim)
        self.latent_shape: tuple[int, ...] = self.encoder.latent_shape
        self.prior = PRIORS[model.prior](condition_dim, self.latent_shape)

    def forward(self, images: Tensor, condition: Tensor | None, noise: Tensor) -> Elbo:
        """Returns the parts of −ELBO for a batch, with one draw of z per image.

        images: (B, C, H, W) uint8. condition: (B, condition_dim) or None. noise: (B, *latent_shape),
        standard normal; z = μ + σ·noise (Kingma & Welling 2014, section 2.4).
        """
        target, condition = to_unit(images), self._standardized(condition)
        moments = self._moments(target, condition)
        latent = moments.mean + (0.5 * moments.log_variance).exp() * noise
        output = self.decoder(latent, condition)
        terms = self.prior.kl(moments, condition).flatten(1)
        kl = terms.sum(1)
        penalty = terms.clamp(min=self.free_bits).sum(1) if self.free_bits else kl
        return Elbo(self.likelihood.recon_loss(output, target), kl, penalty)

    def log_weights(
        self, images: Tensor, observed: Tensor, condition: Tensor | None, noise: Tensor
    ) -> Tensor:
        """Returns log p(x|z,c) p(z|c) / q(z|y,c) of K draws of z for each of B images, (K, B) fp64, in nats.

        images: y, the posterior's input, (B, C, H, W) uint8. observed: x, whose likelihood it is, alike; for a
        binary likelihood its pixels are 0 or 255. Whatever y is, the weights average to p(x|c) (Burda et al. 2016,
        eq. 8). noise: (K, B, *latent_shape).
        """
        condition = self._standardized(condition)
        moments = self._moments(to_unit(images), condition)
        n_draws = len(noise)
        latent = moments.mean + (0.5 * moments.log_variance).exp() * noise

        def each(values: Tensor) -> Tensor:
            return values.expand(n_draws, *values.shape).flatten(0, 1)

        z, c = latent.flatten(0, 1), None if condition is None else each(condition)
        nll = self.likelihood.nll(self.decoder(z, c), each(observed))
        spread = 0.5 * moments.log_variance.flatten(1).sum(1, dtype=torch.float64)
        posterior = normal_log_prob(noise.flatten(0, 1)) - each(spread)
        return (self.prior.log_prob(z, c) - nll - posterior).reshape(n_draws, -1)

    def draw_latent(self, noise: Tensor, condition: Tensor | None) -> Tensor:
        """Returns z ~ p(z|c), (B, *latent_shape), from standard normal noise of that shape."""
        return self.prior.draw(noise, self._standardized(condition))

    def encode(self, target: Tensor, condition: Tensor | None) -> Moments:
        """Returns the moments of q(z|x,c) in fp32, for images (B, C, H, W) in [0, 1]."""
        return self._moments(target, self._standardized(condition))

    def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """Returns mean images (B, C, H, W) in [0, 1] for z (B, *latent_shape)."""
        output = self.decoder(latent, self._standardized(condition))
        return self.likelihood.mean(output).clamp(0, 1)

    def set_condition_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Standardizes every condition vector c from now on as (c − mean) / std; both (condition_dim,)."""
        self.condition_mean.copy_(mean)
        self.condition_std.copy_(std)

    def _standardized(self, condition: Tensor | None) -> Tensor | None:
        return None if condition is None else (condition - self.condition_mean) / self.condition_std

    def _moments(self, target: Tensor, condition: Tensor | None) -> Moments:
        moments: Moments = self.encoder(target, condition)
        # exp(log σ²) and KL leave fp16's range early: from here on everything is fp32.
        return Moments(moments.mean.float(), moments.log_variance.float())

    def observe(self, mean_recon_loss: Tensor) -> None:
        """Passes the last global batch's mean recon_loss, (), to the likelihood, which may adapt."""
        self.likelihood.observe(mean_recon_loss, math.prod(self.shape))

    def bits_per_dim(self, nats_per_image: float) -> float:
        """Returns −ELBO in bits per pixel and channel, the likelihood's constant included."""
        return (nats_per_image / math.prod(self.shape) + self.likelihood.nats_per_dim) / math.log(2)

    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def to_unit(images: Tensor) -> Tensor:
    """Returns uint8 images as fp32 in [0, 1]; called on the device, to which a quarter of the bytes travel."""
    return images.float() / 255


def build_model(model: experiment.Model, shape: ImageShape, condition_dim: int, seed: int) -> Cvae:
    """Returns a freshly initialised model; its weights are a function of the arguments alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Cvae(model, shape, condition_dim)


def flops(step: Callable[[], object]) -> int:
    """Returns the floating point operations of matrix products and convolutions in a step, both passes."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
