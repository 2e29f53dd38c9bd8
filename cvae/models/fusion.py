"""The ways in which the condition enters a backbone, each a class used by encoder and decoder alike."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """Fuses nothing: the plain VAE's, and the base class of all fusions.

    A backbone calls `join` at its bottleneck (on the features that become μ and log σ², or on the latent that
    becomes features) and `modulate` after every stage. A fusion implements one of the two.
    """

    out_channels: int
    """The number of channels, or features, that `join` returns."""

    def __init__(self, bottleneck: Sequence[int], stages: Sequence[int], condition_dim: int):
        """bottleneck: shape (F,) or (F, h, w) of what is joined; stages: channels of each stage's maps."""
        super().__init__()
        self.out_channels = bottleneck[0]

    def join(self, features: Tensor, condition: Tensor | None) -> Tensor:
        """(B, F, …), (B, condition_dim) → (B, out_channels, …)."""
        return features

    def modulate(self, stage: int, maps: Tensor, condition: Tensor | None) -> Tensor:
        """(B, stages[stage], …), (B, condition_dim) → the same shape."""
        return maps


class Concat(Fusion):
    """Concatenates features and condition; for a map, each of its numbers becomes a constant channel."""

    def __init__(self, bottleneck: Sequence[int], stages: Sequence[int], condition_dim: int):
        super().__init__(bottleneck, stages, condition_dim)
        self.out_channels += condition_dim

    def join(self, features: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        appended = condition.to(features.dtype)
        if features.dim() > 2:
            appended = _over_maps(appended, features).expand(-1, -1, *features.shape[2:])
        return torch.cat([features, appended], dim=1)


class Add(Fusion):
    """Adds the condition, projected to the features' shape (a vector or a map)."""

    def __init__(self, bottleneck: Sequence[int], stages: Sequence[int], condition_dim: int):
        super().__init__(bottleneck, stages, condition_dim)
        self.project = nn.Linear(condition_dim, torch.Size(bottleneck).numel())

    def join(self, features: Tensor, condition: Tensor | None) -> Tensor:
        projected: Tensor = self.project(condition)
        return features + projected.reshape(features.shape)


class Film(Fusion):
    """Scales every channel of every stage by 1 + γ(c) and shifts it by β(c) (Perez et al. 2018, eq. 1 and 2).

    γ and β start at zero: at first the text has no effect.
    """

    def __init__(self, bottleneck: Sequence[int], stages: Sequence[int], condition_dim: int):
        super().__init__(bottleneck, stages, condition_dim)
        self.gamma_beta = nn.ModuleList(
            nn.Linear(condition_dim, 2 * channels) for channels in stages
        )
        for layer in self.gamma_beta.parameters():
            nn.init.zeros_(layer)

    def modulate(self, stage: int, maps: Tensor, condition: Tensor | None) -> Tensor:
        gamma, beta = _over_maps(self.gamma_beta[stage](condition), maps).chunk(2, dim=1)
        return maps * (1 + gamma) + beta


FUSIONS: dict[str, type[Fusion]] = {"concat": Concat, "add": Add, "film": Film}


def build_fusion(
    name: str, bottleneck: Sequence[int], stages: Sequence[int], condition_dim: int
) -> Fusion:
    """Returns the fusion of that name; Fusion itself for condition_dim 0, which stands for no condition."""
    kind = FUSIONS[name] if condition_dim else Fusion
    return kind(bottleneck, stages, condition_dim)


def _over_maps(vectors: Tensor, maps: Tensor) -> Tensor:
    """Returns vectors (B, C) as (B, C, 1, …), with as many dimensions as `maps`."""
    return vectors.reshape(*vectors.shape, *[1] * (maps.dim() - 2))
