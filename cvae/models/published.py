"""Starts an ldm model from the weights of a published AutoencoderKL (model.init_from)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvae.config import experiment
from cvae.errors import UserError
from cvae.hub import model_folder
from cvae.models.cvae import Cvae

_FILES = _CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# AutoencoderKL's parts and ours; the first prefix that fits counts.
_PLACES = {
    "decoder.conv_in": "decoder.head.project",
    "post_quant_conv": "decoder.post_quant_conv",
    "quant_conv": "encoder.head.moments",
    "encoder": "encoder.body",
    "decoder": "decoder.body",
}


def load_published(model: Cvae, settings: experiment.Model, source: str) -> None:
    """Copies AutoencoderKL's weights into a spatial ldm model; at first the text then has no effect.

    Raises UserError as published_folder does, and if the weights are damaged.
    """
    from diffusers import AutoencoderKL

    folder = published_folder(settings, model.shape[0], source)
    try:
        published, loading = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers, safetensors and torch each have their own family
        raise _unreadable(source, folder, error) from None
    # diffusers draws weights that the file lacks at random.
    lacking = sorted(loading["missing_keys"])
    odd = [name for name, value in published.state_dict().items() if not value.isfinite().all()]
    for names, reason in ((lacking, "is missing"), (odd, "has values that are not finite")):
        if names:
            raise _unreadable(source, folder, ValueError(f"{names[0]} {reason}"))
    state = {_place(name): value for name, value in published.state_dict().items()}
    own = model.state_dict()
    for name, value in _identities(published.config, own).items():
        state.setdefault(name, value)
    for fusion in (model.encoder.head.fusion, model.decoder.head.fusion):
        for parameter in fusion.parameters():
            nn.init.zeros_(parameter)
    for name in ("encoder.head.moments.weight", "decoder.head.project.weight"):
        # After concat the text's channels follow the features'.
        padding = torch.zeros_like(own[name][:, state[name].shape[1] :])
        state[name] = torch.cat([state[name].to(padding), padding], dim=1)
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys


def published_folder(settings: experiment.Model, channels: int, source: str) -> Path:
    """Returns the folder of an AutoencoderKL with the sizes of `settings`, fetching it if need be.

    source: a folder that save_pretrained has written (or one with such a folder vae/ in it), or a name on the
    Hugging Face hub. channels: of an image. Raises UserError if it cannot be fetched or does not fit.
    """
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    logging.set_verbosity_error()
    where = f"model.init_from = {source!r}"
    folder = _autoencoder_in(
        model_folder(
            source,
            lambda cached: (_autoencoder_in(cached) / _WEIGHTS).is_file(),
            lambda files: [f"vae/{file}" if f"vae/{file}" in files else file for file in _FILES],
            where,
        )
    )
    try:
        sizes = AutoencoderKL.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            published = AutoencoderKL.from_config(sizes).config
    except Exception as error:
        raise _unreadable(source, folder, error) from None
    if not (folder / _WEIGHTS).is_file():
        raise UserError(f"{where}: the folder has no {_WEIGHTS}")
    _check_sizes(published, settings, channels, where)
    return folder


def _autoencoder_in(folder: Path) -> Path:
    # Stable Diffusion's own repositories keep it in vae/.
    return next((f for f in (folder, folder / "vae") if (f / _CONFIG).is_file()), folder)


def _unreadable(source: str, folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).replace(str(folder), source).split())[:200]
    return UserError(
        f"model.init_from = {source!r}: no AutoencoderKL can be read from there ({reason}); it must hold"
        f" config.json and {_WEIGHTS}"
    )


def _check_sizes(published: Any, settings: experiment.Model, channels: int, where: str) -> None:
    ldm = settings.ldm
    sizes = {
        "model.ldm.block_out_channels": (
            list(published.block_out_channels),
            list(ldm.block_out_channels),
        ),
        "model.ldm.layers_per_block": (published.layers_per_block, ldm.layers_per_block),
        "model.ldm.norm_num_groups": (published.norm_num_groups, ldm.norm_num_groups),
        "model.latent_dim": (published.latent_channels, settings.latent_dim),
        "channels of an image": (published.in_channels, channels),
    }
    differing = [
        f"{key} = {theirs} there and {ours} here"
        for key, (theirs, ours) in sizes.items()
        if theirs != ours
    ]
    if differing:
        raise UserError(f"{where} does not fit: {'; '.join(differing)}")
    if not published.mid_block_add_attention or published.act_fn != "silu":
        raise UserError(f"{where} does not fit: it has no mid attention or another activation")


def _place(name: str) -> str:
    theirs = next(prefix for prefix in _PLACES if name.startswith(f"{prefix}."))
    return _PLACES[theirs] + name.removeprefix(theirs)


def _identities(published: Any, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns identities in place of the 1×1 convolutions that newer autoencoders have dropped."""
    dropped = {
        "encoder.head.moments": not published.use_quant_conv,
        "decoder.post_quant_conv": not published.use_post_quant_conv,
    }
    weights = {}
    for name in (name for name, is_dropped in dropped.items() if is_dropped):
        channels = len(own[f"{name}.bias"])
        weights[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
        weights[f"{name}.bias"] = torch.zeros(channels)
    return weights
