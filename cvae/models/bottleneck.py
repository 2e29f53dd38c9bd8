"""Turns feature maps into a latent and back: into a vector, or a map of their own height and width."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvae.config import experiment
from cvae.models.backbone import ImageShape, Moments
from cvae.models.fusion import build_fusion


class ToMoments(nn.Module):
    """Maps the encoder's last feature map and the condition to μ and log σ²."""

    def __init__(
        self, model: experiment.Model, maps: ImageShape, stages: Sequence[int], condition_dim: int
    ):
        """maps: shape of the feature map. stages: channels of the encoder's stages, for `self.fusion`."""
        super().__init__()
        self.is_spatial = model.is_spatial
        features = maps if self.is_spatial else (torch.Size(maps).numel(),)
        self.fusion = build_fusion(model.fusion, features, stages, condition_dim)
        width = self.fusion.out_channels
        self.moments = (
            nn.Conv2d(width, 2 * model.latent_dim, kernel_size=1)
            if self.is_spatial
            else nn.Linear(width, 2 * model.latent_dim)
        )
        self.latent_shape = _latent_shape(model, maps)

    def forward(self, maps: Tensor, condition: Tensor | None) -> Moments:
        """(B, F, h, w), (B, condition_dim) → two of (B, *latent_shape)."""
        features = maps if self.is_spatial else maps.flatten(1)
        return Moments(*self.moments(self.fusion.join(features, condition)).chunk(2, dim=1))


class FromLatent(nn.Module):
    """Maps latent and condition to the decoder's first feature map."""

    def __init__(
        self, model: experiment.Model, maps: ImageShape, stages: Sequence[int], condition_dim: int
    ):
        """maps: shape of the feature map. stages: channels of the decoder's stages, for `self.fusion`."""
        super().__init__()
        self.maps, self.is_spatial = maps, model.is_spatial
        latent_shape = _latent_shape(model, maps)
        self.fusion = build_fusion(model.fusion, latent_shape, stages, condition_dim)
        width = self.fusion.out_channels
        self.project = (
            nn.Conv2d(width, maps[0], kernel_size=3, padding=1)
            if self.is_spatial
            else nn.Linear(width, torch.Size(maps).numel())
        )

    def forward(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """(B, *latent_shape), (B, condition_dim) → (B, F, h, w)."""
        projected: Tensor = self.project(self.fusion.join(latent, condition))
        return projected.reshape(-1, *self.maps)


def _latent_shape(model: experiment.Model, maps: ImageShape) -> tuple[int, ...]:
    return (model.latent_dim, *maps[1:]) if model.is_spatial else (model.latent_dim,)
