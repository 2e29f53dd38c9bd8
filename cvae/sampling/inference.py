"""Arrays through a model, in batches that fit into memory: encoding, decoding, drawing."""

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
# Bytes of a CPU's host, and share of the free memory of a GPU.
_BYTES_OF_A_HOST, _SHARE_OF_A_GPU = 2**31, 0.5
# At most this many maps of the largest size are held at once while an image passes through a model.
_MAPS_AT_ONCE = 8
_memory: "WeakKeyDictionary[Cvae, int]" = WeakKeyDictionary()


def decode(model: Cvae, latent: Vectors, condition: Vectors | None) -> Images:
    """Returns the mean images, uint8 (B, C, H, W), for z (B, *latent_shape) and condition (B, condition_dim)."""
    return _in_batches(model, lambda z, c: to_bytes(model.decode(z, c)), latent, condition)


def encode(model: Cvae, images: Images, condition: Vectors | None) -> Vectors:
    """Returns μ of q(z|x,c), float32 (B, *latent_shape), for uint8 images (B, C, H, W)."""
    means: Vectors = _in_batches(
        model, lambda x, c: model.encode(to_unit(x), c).mean, images, condition
    )
    return means


def sample(
    model: Cvae, noise: Vectors, condition: Vectors | None, advance: Advance | None = None
) -> Images:
    """Returns one image for each row of standard normal noise (B, *latent_shape).

    z is drawn from the model's own prior p(z|c); the image is its mean image. `advance` is called with the
    number of further images that are done; without it they have a progress bar of their own.
    """

    def draw(part: Tensor, c: Tensor | None) -> Tensor:
        return to_bytes(model.decode(model.draw_latent(part, c), c))

    return _in_batches(model, draw, noise, condition, advance)


def sample_rows(
    model: Cvae, condition: Vectors, noise: Vectors, advance: Advance | None = None
) -> Images:
    """Returns (M, n, C, H, W): a row for each of M conditions, all with the same n rows of noise."""
    count = len(noise)
    z = np.concatenate([noise] * len(condition))
    images = sample(model, z, condition.repeat(count, axis=0), advance)
    return images.reshape(len(condition), count, *images.shape[1:])


def reconstruct(model: Cvae, images: Images, condition: Vectors | None) -> Images:
    """Encodes uint8 images (B, C, H, W) and decodes the posterior's mean; returns the same shape."""
    return decode(model, encode(model, images, condition), condition)


def images_at_once(model: Cvae) -> int:
    """Returns how many images go through the model together.

    On a GPU as many as its free memory holds. A CPU gains nothing from large batches: fewer if the images
    are large, whose activations fill the caches, and fewer with a large model, so that progress is visible.
    """
    device = device_of(model)
    if device.type == "cuda":
        return max(1, min(_BATCH_OF_A_GPU, memory_for_images(device) // memory_of_an_image(model)))
    pixels = model.shape[1] * model.shape[2]
    return max(1, min(_BATCH, _PIXELS // pixels, _PARAMETERS // model.n_parameters()))


def memory_for_images(device: torch.device) -> int:
    """Returns the bytes that a batch may use on a device."""
    if device.type != "cuda":
        return _BYTES_OF_A_HOST
    # This process can use the reserve that PyTorch holds, as after training.
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_SHARE_OF_A_GPU * (memory(device).free + reserve))


@torch.inference_mode()
def memory_of_an_image(model: Cvae) -> int:
    """Returns an estimate of the bytes that one image takes on its way through the model, without gradients.

    It is measured once per model, from the largest map that an image becomes.
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
            device, width = device_of(model), model.condition_dim
            image = torch.zeros(1, *model.shape, device=device)
            condition = torch.zeros(1, width, device=device) if width else None
            model.decode(model.encode(image, condition).mean, condition)
        finally:
            for hook in hooks:
                hook.remove()
        _memory[model] = _MAPS_AT_ONCE * largest * torch.float32.itemsize
    return _memory[model]


class AdaptiveBatches:
    """Cuts items into batches that fit into the memory of the device."""

    def __init__(self, size: int):
        """size: the largest batch. It is halved whenever the device runs out of memory."""
        self.size = size

    def map(self, items: range, function: Callable[[slice], T]) -> Iterator[T]:
        """Yields the function's value for each batch of the items, in order.

        Raises torch.OutOfMemoryError if the device has no room for a single item.
        """
        start = items.start
        while start < items.stop:
            batch = slice(start, min(start + self.size, items.stop))
            fits = True
            try:
                value = function(batch)
            except torch.OutOfMemoryError:
                if batch.stop - start == 1:
                    raise
                fits = False
            if fits:
                yield value
                start = batch.stop
            else:
                # Outside the handler: the exception holds on to the tensors of what failed.
                self.size = (batch.stop - start) // 2
                torch.cuda.empty_cache()


def is_finite(model: Cvae) -> bool:
    """Returns whether every weight is a finite number. Pictures hide it: NaN becomes black."""
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


def device_of(model: Cvae) -> torch.device:
    return next(model.parameters()).device


def to_bytes(images: Tensor) -> Tensor:
    """Converts images in [0, 1] to uint8."""
    return (images * 255).round().clamp(0, 255).byte()


@torch.inference_mode()
def _in_batches(
    model: Cvae,
    function: Callable[[Tensor, Tensor | None], Tensor],
    inputs: NDArray[Any],
    condition: Vectors | None,
    advance: Advance | None = None,
) -> NDArray[Any]:
    """Returns the function of inputs (B, …) and condition (B, condition_dim), on the model's device."""
    device = device_of(model)

    def compute(batch: slice) -> NDArray[Any]:
        rows = None if condition is None else torch.from_numpy(condition[batch]).to(device)
        # A copy, because memory-mapped images are read-only, which torch warns about.
        block = torch.from_numpy(np.array(inputs[batch])).to(device)
        values: NDArray[Any] = function(block, rows).cpu().numpy()
        return values

    blocks = []
    with progress_bar(len(inputs), "image", "images", disable=advance is not None, delay=2) as bar:
        for block in AdaptiveBatches(images_at_once(model)).map(range(len(inputs)), compute):
            blocks.append(block)
            (advance or bar.update)(len(block))
    return np.concatenate(blocks)
