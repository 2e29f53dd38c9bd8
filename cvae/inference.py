"""Arrays through a model, in parts that fit into memory: encoding, decoding, drawing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvae.data.building import progress_bar
from cvae.models.cvae import Cvae, to_unit

Images = NDArray[np.uint8]
Vectors = NDArray[np.float32]
Advance = Callable[[int], object]
_BATCH, _PIXELS, _PARAMETERS = 256, 2**20, 2**30


def decode(model: Cvae, latent: Vectors, condition: Vectors | None) -> Images:
    """Mean images, uint8 (B, C, H, W), for z (B, *latent_shape) and condition (B, condition_dim)."""

    def decoded(z: Tensor, c: Tensor | None) -> Tensor:
        return to_bytes(model.decode(z, c))

    return _in_parts(model, decoded, latent, condition)


def encode(model: Cvae, images: Images, condition: Vectors | None) -> Vectors:
    """μ of q(z|x,c), float32 (B, *latent_shape), for uint8 images (B, C, H, W)."""

    def encoded(x: Tensor, c: Tensor | None) -> Tensor:
        return model.encode(to_unit(x), c).mean

    means: Vectors = _in_parts(model, encoded, images, condition)
    return means


def sample(
    model: Cvae, noise: Vectors, condition: Vectors | None, advance: Advance | None = None
) -> Images:
    """One image per row of standard normal noise (B, *latent_shape): z of the model's own prior p(z|c),
    then its mean image.

    advance: is told how many more images are done; without it a bar of their own tells.
    """

    def drawn(part: Tensor, c: Tensor | None) -> Tensor:
        return to_bytes(model.decode(model.draw_latent(part, c), c))

    return _in_parts(model, drawn, noise, condition, advance)


def sample_rows(
    model: Cvae, condition: Vectors, noise: Vectors, advance: Advance | None = None
) -> Images:
    """(M, n, C, H, W): a row for each of M conditions, all with the same n rows of noise."""
    count = len(noise)
    z = np.concatenate([noise] * len(condition))
    images = sample(model, z, condition.repeat(count, axis=0), advance)
    return images.reshape(len(condition), count, *images.shape[1:])


def reconstruct(model: Cvae, images: Images, condition: Vectors | None) -> Images:
    """Images through the model and back, by way of the posterior's mean; uint8 (B, C, H, W) twice."""
    return decode(model, encode(model, images, condition), condition)


def images_at_once(model: Cvae) -> int:
    """Images that go through the model together: fewer of large ones, whose activations fill the memory, and
    fewer with a large model, so that progress is seen."""
    pixels = model.shape[1] * model.shape[2]
    return max(1, min(_BATCH, _PIXELS // pixels, _PARAMETERS // model.n_parameters()))


def device_of(model: Cvae) -> torch.device:
    return next(model.parameters()).device


@torch.inference_mode()
def _in_parts(
    model: Cvae,
    function: Callable[[Tensor, Tensor | None], Tensor],
    inputs: NDArray[Any],
    condition: Vectors | None,
    advance: Advance | None = None,
) -> NDArray[Any]:
    """function of inputs (B, …) and condition (B, condition_dim), computed on the model's device."""
    device, size = device_of(model), images_at_once(model)
    blocks = []
    with progress_bar(len(inputs), "image", "images", disable=advance is not None, delay=2) as bar:
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            rows = None if condition is None else torch.from_numpy(condition[part]).to(device)
            # A copy: memory-mapped images are read-only, which torch warns of.
            block = torch.from_numpy(np.array(inputs[part])).to(device)
            blocks.append(function(block, rows).cpu().numpy())
            (advance or bar.update)(len(block))
    return np.concatenate(blocks)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (images * 255).round().clamp(0, 255).byte()
