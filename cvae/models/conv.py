"""The paper's COCO baseline: four strided convolutions down, four transposed ones up."""

from itertools import pairwise

from torch import Tensor, nn

from cvae.config import experiment
from cvae.models.backbone import ImageShape, Moments
from cvae.models.bottleneck import FromLatent, ToMoments

STAGES = 4


def stage_widths(width: int) -> list[int]:
    """Returns the channels of each stage: every stage halves height and width and doubles the channels."""
    return [width * 2**stage for stage in range(STAGES)]


class ConvEncoder(nn.Module):
    """Four convolutions (kernel 4, stride 2), each doubling the channels, then the head to μ and log σ²."""

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        super().__init__()
        channels, height, breadth = shape
        widths = stage_widths(model.conv.width)
        self.stages = nn.ModuleList(
            nn.Conv2d(narrow, wide, kernel_size=4, stride=2, padding=1)
            for narrow, wide in pairwise([channels, *widths])
        )
        maps = (widths[-1], height >> STAGES, breadth >> STAGES)
        self.head = ToMoments(model, maps, widths, condition_dim)
        self.latent_shape = self.head.latent_shape

    def forward(self, images: Tensor, condition: Tensor | None) -> Moments:
        """(B, C, H, W), (B, condition_dim) → two of (B, *latent_shape)."""
        maps = images
        for number, convolution in enumerate(self.stages):
            maps = self.head.fusion.modulate(number, convolution(maps), condition).relu()
        moments: Moments = self.head(maps, condition)
        return moments


class ConvDecoder(nn.Module):
    """The head from the latent, then four transposed convolutions, each halving the channels."""

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        super().__init__()
        channels, height, breadth = shape
        widths = stage_widths(model.conv.width)[::-1]
        maps = (widths[0], height >> STAGES, breadth >> STAGES)
        self.head = FromLatent(model, maps, widths, condition_dim)
        self.stages = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1)
            for wide, narrow in pairwise([*widths, channels])
        )

    def forward(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """(B, *latent_shape), (B, condition_dim) → raw output (B, C, H, W), before the sigmoid."""
        maps: Tensor = self.head(latent, condition)
        for number, up in enumerate(self.stages):
            maps = up(self.head.fusion.modulate(number, maps, condition).relu())
        return maps


def build(
    model: experiment.Model, shape: ImageShape, condition_dim: int
) -> tuple[ConvEncoder, ConvDecoder]:
    return ConvEncoder(model, shape, condition_dim), ConvDecoder(model, shape, condition_dim)
