"""The interface of a backbone: an encoder to the moments of q(z|x,c) and a decoder to raw pixels."""

from typing import NamedTuple, Protocol

from torch import Tensor

ImageShape = tuple[int, int, int]
"""Channels, height, width."""


class Moments(NamedTuple):
    """A diagonal Gaussian over the latent; both (B, *latent_shape)."""

    mean: Tensor
    log_variance: Tensor


class Encoder(Protocol):
    latent_shape: tuple[int, ...]
    """(latent_dim,), or (latent_dim, h, w) for a spatial latent."""

    def __call__(self, images: Tensor, condition: Tensor | None) -> Moments:
        """Returns the moments of q(z|x,c) for images (B, C, H, W) in [0, 1] and condition (B, condition_dim)."""
        ...


class Decoder(Protocol):
    def __call__(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """Returns the raw output (B, C, H, W) for z (B, *latent_shape) and condition (B, condition_dim).

        It is logits; for ldm, an image in [−1, 1].
        """
        ...
