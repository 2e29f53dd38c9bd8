"""The Stable Diffusion autoencoder (Rombach et al. 2022, appendix G) on the blocks of diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvae.config import experiment
from cvae.models.backbone import ImageShape, Moments
from cvae.models.bottleneck import FromLatent, ToMoments

# A vector latent passes through a map with the number of channels of Stable Diffusion's latent.
_MAP_CHANNELS = 4


class _Side(nn.Module):
    """Runs the blocks of encoder and decoder, with gradient checkpointing if it is switched on."""

    def __init__(self, model: experiment.Model):
        super().__init__()
        self.gradient_checkpointing = model.ldm.gradient_checkpointing

    def run(self, block: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(maps)
        output: Tensor = checkpoint(block, maps, use_reentrant=False, preserve_rng_state=False)
        return output


class LdmEncoder(_Side):
    """ResNet blocks and mid attention, then the head to μ and log σ²; images are centred as published."""

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        super().__init__(model)
        channels, height, breadth = shape
        map_channels = model.latent_dim if model.is_spatial else _MAP_CHANNELS
        widths = model.ldm.block_out_channels
        self.body: Any = Encoder(
            in_channels=channels,
            out_channels=map_channels,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            **_blocks(model),
        )
        maps = (2 * map_channels, height >> model.halvings, breadth >> model.halvings)
        self.head = ToMoments(model, maps, widths, condition_dim)
        self.latent_shape = self.head.latent_shape

    def forward(self, images: Tensor, condition: Tensor | None) -> Moments:
        """(B, C, H, W) in [0, 1], (B, condition_dim) → two of (B, *latent_shape)."""
        maps = self.body.conv_in(2 * images - 1)
        for number, block in enumerate(self.body.down_blocks):
            maps = self.head.fusion.modulate(number, self.run(block, maps), condition)
        maps = self.run(self.body.mid_block, maps)
        maps = self.body.conv_out(self.body.conv_act(self.body.conv_norm_out(maps)))
        moments: Moments = self.head(maps, condition)
        return moments


class LdmDecoder(_Side):
    """The head from the latent, mid attention and ResNet blocks; an image in [−1, 1], not clamped."""

    def __init__(self, model: experiment.Model, shape: ImageShape, condition_dim: int):
        super().__init__(model)
        channels, height, breadth = shape
        widths = model.ldm.block_out_channels[::-1]
        self.body: Any = Decoder(
            in_channels=_MAP_CHANNELS,
            out_channels=channels,
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            **_blocks(model),
        )
        size = (height >> model.halvings, breadth >> model.halvings)
        self.post_quant_conv: nn.Module = nn.Identity()
        if model.is_spatial:
            # The text joins the latent between the two convolutions, and so passes through a full one.
            self.post_quant_conv = nn.Conv2d(model.latent_dim, model.latent_dim, kernel_size=1)
            self.head = FromLatent(model, (widths[0], *size), widths, condition_dim)
            self.body.conv_in = nn.Identity()
        else:
            self.head = FromLatent(model, (_MAP_CHANNELS, *size), widths, condition_dim)

    def forward(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        """(B, *latent_shape), (B, condition_dim) → raw output (B, C, H, W)."""
        maps = self.body.conv_in(self.head(self.post_quant_conv(latent), condition))
        maps = self.run(self.body.mid_block, maps)
        for number, block in enumerate(self.body.up_blocks):
            maps = self.head.fusion.modulate(number, self.run(block, maps), condition)
        output: Tensor = self.body.conv_out(self.body.conv_act(self.body.conv_norm_out(maps)))
        return output


def _blocks(model: experiment.Model) -> dict[str, Any]:
    return {
        "block_out_channels": model.ldm.block_out_channels,
        "layers_per_block": model.ldm.layers_per_block,
        "norm_num_groups": model.ldm.norm_num_groups,
    }


def build(
    model: experiment.Model, shape: ImageShape, condition_dim: int
) -> tuple[LdmEncoder, LdmDecoder]:
    return LdmEncoder(model, shape, condition_dim), LdmDecoder(model, shape, condition_dim)
