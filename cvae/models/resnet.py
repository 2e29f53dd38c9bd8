"""The paper's ResNet: residual blocks in the four stages of the convolutional baseline."""

from itertools import pairwise

from torch import Tensor, nn

from cvae.config import experiment
from cvae.models.backbone import ImageShape, Moments
from cvae.models.bottleneck import FromLatent, ToMoments
from cvae.models.conv import STAGES, stage_widths

_CHANNELS_PER_GROUP = 16  # Wu & He 2018, table 3


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns a norm with the most groups of equal size that have 16 channels or more each."""
    groups = max(1, channels // _CHANNELS_PER_GROUP)
    return nn.GroupNorm(next(n for n in range(groups, 0, -1) if channels % n == 0), channels)


class ResidualBlock(nn.Module):
    """x + F(x) with pre-activation (He et al. 2016, "Identity mappings", figure 4e), GroupNorm and SiLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.residual = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            group_norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, channels, H, W) → the same shape."""
        residual: Tensor = self.residual(maps)
        return maps + residual


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(count)))


class ResnetEncoder(nn.Module):
    """Four stages, each a strided convolution and residual blocks, then the head to μ and log σ²."""

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        super().__init__()
        channels, height, breadth = shape
        widths = stage_widths(model.resnet.width)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, kernel_size=4, stride=2, padding=1),
                *_blocks(wide, model.resnet.blocks),
            )
            for narrow, wide in pairwise([channels, *widths])
        )
        self.last = nn.Sequential(group_norm(widths[-1]), nn.SiLU())
        maps = (widths[-1], height >> STAGES, breadth >> STAGES)
        self.head = ToMoments(model, maps, widths, condition_dim)
        self.latent_shape = self.head.latent_shape

    def forward(self, images: Tensor, condition: Tensor | None) -> Moments:
        """(B, C, H, W), (B, condition_dim) → two of (B, *latent_shape)."""
        maps = images
        for number, stage in enumerate(self.stages):
            maps = self.head.fusion.modulate(number, stage(maps), condition)
        moments: Moments = self.head(self.last(maps), condition)
        return moments


class ResnetDecoder(nn.Module):
    """Mirrors the encoder: the head from the latent, then four stages of residual blocks and a doubling."""

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        super().__init__()
        channels, height, breadth = shape
        widths = stage_widths(model.resnet.width)[::-1]
        maps = (widths[0], height >> STAGES, breadth >> STAGES)
        self.head = FromLatent(model, maps, widths, condition_dim)
        self.stages = nn.ModuleList(_blocks(wide, model.resnet.blocks) for wide in widths)
        self.ups = nn.ModuleList(
            nn.Sequential(
                group_norm(wide),
                nn.SiLU(),
                nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1),
            )
            for wide, narrow in pairwise([*widths, channels])
        )

    def forward(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """(B, *latent_shape), (B, condition_dim) → raw output (B, C, H, W), before the sigmoid."""
        maps: Tensor = self.head(latent, condition)
        for number, (stage, up) in enumerate(zip(self.stages, self.ups, strict=True)):
            maps = up(self.head.fusion.modulate(number, stage(maps), condition))
        return maps


def build(
    model: experiment.Model, shape: ImageShape, condition_dim: int
) -> tuple[ResnetEncoder, ResnetDecoder]:
    return ResnetEncoder(model, shape, condition_dim), ResnetDecoder(model, shape, condition_dim)
