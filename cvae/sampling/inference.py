"""Arrays through a model, in parts that fit into memory: encoding, decoding, drawing."""

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvae.distributed.device import memory
from cvae.models.cvae import Cvae, to_unit
from cvae.progress import progress_bar

Images = NDArray[np.uint8]
Vectors = NDArray[np.float32]
Advance = Callable[[int], object]
T = TypeVar("T")
_BATCH, _PIXELS, _PARAMETERS = 256, 2**20, 2**30
_BATCH_OF_A_GPU = 512
# Of the memory of a CPU's host, and the share of what is free on a GPU.
_BYTES_OF_A_HOST, _SHARE_OF_A_GPU = 2**31, 0.5
# While an image passes through a model, so many maps of the largest size are held at once, or fewer.
_MAPS_AT_ONCE = 8
_memory: "WeakKeyDictionary[Cvae, int]" = WeakKeyDictionary()


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
    """Returns how many images go through the model together.

    A GPU takes as many as its free memory holds. On a CPU, which gains nothing from large batches, there are fewer
    of large images, whose activations fill the caches, and fewer with a large model, so that progress is seen.
    """
    device = device_of(model)
    if device.type == "cuda":
        return max(1, min(_BATCH_OF_A_GPU, memory_for_images(device) // memory_of_an_image(model)))
    pixels = model.shape[1] * model.shape[2]
    return max(1, min(_BATCH, _PIXELS // pixels, _PARAMETERS // model.n_parameters()))


def memory_for_images(device: torch.device) -> int:
    """Returns the bytes that a batch may take on a device."""
    if device.type == "cuda":
        # What PyTorch holds in reserve, as after training, is free for this process alone.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE_OF_A_GPU * (memory(device).free + reserve))
    return _BYTES_OF_A_HOST


@torch.inference_mode()
def memory_of_an_image(model: Cvae) -> int:
    """Returns an estimate of the bytes that one image takes on its way through the model, without gradients.

    It is measured once for each model, by the largest map that an image becomes.
    """
    if model not in _memory:
        # A likelihood computes with images in fp64.
        largest = 2 * math.prod(model.shape)

        def look(module: object, inputs: object, output: object) -> None:
            nonlocal largest
            if isinstance(output, Tensor):
                largest = max(largest, output.numel())

        hooks = [module.register_forward_hook(look) for module in model.modules()]
        try:
            device = device_of(model)
            image = torch.zeros(1, *model.shape, device=device)
            width = model.condition_dim
            condition = torch.zeros(1, width, device=device) if width else None
            model.decode(model.encode(image, condition).mean, condition)
        finally:
            for hook in hooks:
                hook.remove()
        _memory[model] = _MAPS_AT_ONCE * largest * torch.float32.itemsize
    return _memory[model]


class AdaptiveBatches:
    """Cuts items into parts that fit into the memory of the device."""

    def __init__(self, size: int):
        """size: the most items of a part. It is halved whenever the device runs out of memory."""
        self.size = size

    def each(self, items: range, function: Callable[[slice], T]) -> Iterator[T]:
        """Yields the function of every part of the items, in order.

        Raises torch.OutOfMemoryError if the device has no room for a single item.
        """
        start = items.start
        while start < items.stop:
            part = slice(start, min(start + self.size, items.stop))
            fits = True
            try:
                found = function(part)
            except torch.OutOfMemoryError:
                if part.stop - start == 1:
                    raise
                fits = False
            if fits:
                yield found
                start = part.stop
            else:
                # Not before the exception is gone, which holds on to the tensors of what failed.
                self.size = (part.stop - start) // 2
                torch.cuda.empty_cache()


def is_finite(model: Cvae) -> bool:
    """Returns whether every weight is a finite number. Bytes hide it: NaN becomes black."""
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


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
    device = device_of(model)

    def computed(part: slice) -> NDArray[Any]:
        rows = None if condition is None else torch.from_numpy(condition[part]).to(device)
        # A copy: memory-mapped images are read-only, which torch warns of.
        block = torch.from_numpy(np.array(inputs[part])).to(device)
        found: NDArray[Any] = function(block, rows).cpu().numpy()
        return found

    blocks = []
    with progress_bar(len(inputs), "image", "images", disable=advance is not None, delay=2) as bar:
        for block in AdaptiveBatches(images_at_once(model)).each(range(len(inputs)), computed):
            blocks.append(block)
            (advance or bar.update)(len(block))
    return np.concatenate(blocks)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (images * 255).round().clamp(0, 255).byte()
