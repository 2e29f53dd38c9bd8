"""The paper's FashionMNIST model: one hidden layer on either side."""

import math

from torch import Tensor, nn

from cvae.config import experiment
from cvae.models.backbone import ImageShape, Moments
from cvae.models.fusion import build_fusion


class MlpEncoder(nn.Module):
    """Maps pixels and condition through a hidden layer to μ and log σ²."""

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        super().__init__()
        hidden_dim = model.mlp.hidden_dim
        self.latent_shape = (model.latent_dim,)
        self.fusion = build_fusion(model.fusion, (math.prod(shape),), (hidden_dim,), condition_dim)
        self.hidden = nn.Linear(self.fusion.out_channels, hidden_dim)
        self.moments = nn.Linear(hidden_dim, 2 * model.latent_dim)

    def forward(self, images: Tensor, condition: Tensor | None) -> Moments:
        """(B, C, H, W), (B, condition_dim) → two of (B, latent_dim)."""
        hidden = self.hidden(self.fusion.join(images.flatten(1), condition))
        hidden = self.fusion.modulate(0, hidden, condition).relu()
        return Moments(*self.moments(hidden).chunk(2, dim=1))


class MlpDecoder(nn.Module):
    """Maps latent and condition through a hidden layer to pixels."""

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        super().__init__()
        self.shape, hidden_dim = shape, model.mlp.hidden_dim
        self.fusion = build_fusion(model.fusion, (model.latent_dim,), (hidden_dim,), condition_dim)
        self.hidden = nn.Linear(self.fusion.out_channels, hidden_dim)
        self.pixels = nn.Linear(hidden_dim, math.prod(shape))

    def forward(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """(B, latent_dim), (B, condition_dim) → raw output (B, C, H, W), before the sigmoid."""
        hidden = self.hidden(self.fusion.join(latent, condition))
        hidden = self.fusion.modulate(0, hidden, condition).relu()
        pixels: Tensor = self.pixels(hidden)
        return pixels.reshape(-1, *self.shape)


def build(
    model: experiment.Model, shape: ImageShape, condition_dim: int
) -> tuple[MlpEncoder, MlpDecoder]:
    return MlpEncoder(model, shape, condition_dim), MlpDecoder(model, shape, condition_dim)
