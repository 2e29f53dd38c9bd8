"""Draws the images, captions and noise of each step as functions of (seed, step, sample) only.

Everything is drawn for the *global* batch on the CPU and sliced by rank afterwards, with a counter-based
generator (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Therefore the
number of ranks, the accumulation and the moment of a restart cannot change a draw.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# One stream per purpose: draws of one cannot shift the draws of another.
_ORDER, _CAPTION, _NOISE, _EVAL, _SAMPLE, _IWAE, _BINARY = range(7)
EVAL_BLOCK = 512


class Batch(NamedTuple):
    """The draws of one optimizer step, for the whole global batch of B images."""

    indices: NDArray[np.int64]  # (B,) rows of the training split
    caption_choice: NDArray[np.float64]  # (B,) in [0, 1), selects one of an image's captions
    noise: NDArray[np.float32]  # (B, *latent_shape) standard normal


class BatchOrder:
    """The endless stream of training batches: a new permutation of the rows in each epoch.

    A batch may span two epochs, so that every batch is full and every image is seen once per epoch.
    """

    def __init__(
        self, seed: int, rows: NDArray[np.int64], batch_size: int, latent_shape: tuple[int, ...]
    ):
        """rows: the rows of the training split that are trained on."""
        self.seed, self.rows, self.batch_size = seed, rows, batch_size
        self.latent_shape = latent_shape
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def batch(self, step: int) -> Batch:
        """Returns the draws of an optimizer step, counted from 0."""
        indices = np.concatenate([*self._pieces(step * self.batch_size, self.batch_size)])
        choice = _generator(self.seed, _CAPTION, step).random(self.batch_size)
        shape = (self.batch_size, *self.latent_shape)
        noise = _generator(self.seed, _NOISE, step).standard_normal(shape, dtype=np.float32)
        return Batch(indices, choice, noise)

    def _pieces(self, first: int, n: int) -> Iterator[NDArray[np.int64]]:
        """Yields the n rows of the stream that begin with number `first`, epoch by epoch."""
        while n > 0:
            epoch, offset = divmod(first, len(self.rows))
            piece = self._permutation(epoch)[offset : offset + n]
            yield piece
            first, n = first + len(piece), n - len(piece)

    def _draw_permutation(self, epoch: int) -> NDArray[np.int64]:
        return self.rows[_generator(self.seed, _ORDER, epoch).permutation(len(self.rows))]


def chosen_count(images: int, fraction: float) -> int:
    """Returns the number of images that a run with this data.fraction trains on, at least one."""
    return images if fraction == 1 else max(1, round(fraction * images))


def choose_fraction(seed: int, ids: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """Returns the rows of the images that a run trains on, in order: chosen_count(N, fraction) of N.

    Images are ranked by a hash of the seed and their id. So the same images are chosen on every machine
    and from a store of any image size, and those of a smaller fraction are among those of a larger one.
    """
    if fraction == 1:
        return np.arange(len(ids))
    queue = [hashlib.sha256(f"{seed}:{image_id}".encode()).digest() for image_id in ids.tolist()]
    first = sorted(range(len(ids)), key=queue.__getitem__)[: chosen_count(len(ids), fraction)]
    return np.sort(np.array(first, np.int64))


def eval_blocks(seed: int, n_images: int, latent_shape: tuple[int, ...]) -> Iterator[Batch]:
    """Yields the images of an evaluated split in order, in blocks of EVAL_BLOCK; the last may be shorter.

    Captions and noise are the same in every evaluation, so that two of them differ only by the model.
    """
    for number, start in enumerate(range(0, n_images, EVAL_BLOCK)):
        indices = np.arange(start, min(start + EVAL_BLOCK, n_images))
        generator = _generator(seed, _EVAL, number)
        # Drawn for a whole block, so that the first images of a split do not depend on its length.
        choice = generator.random(EVAL_BLOCK)
        noise = generator.standard_normal((EVAL_BLOCK, *latent_shape), dtype=np.float32)
        yield Batch(indices, choice[: len(indices)], noise[: len(indices)])


def iwae_noise(
    seed: int, block: int, draws: range, latent_shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Returns these draws of z for a block of images: (len(draws), EVAL_BLOCK, *latent_shape)."""
    shape = (EVAL_BLOCK, *latent_shape)
    # The numbers of block and draw share one 64-bit word.
    generators = (_generator(seed, _IWAE, (block << 32) + draw) for draw in draws)
    return np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])


def binarised(seed: int, rows: NDArray[np.int64], images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draws each pixel of images (B, C, H, W) as 0 or 255, with its grey value / 255 as probability of 255.

    The draws depend on (seed, row) only, so every evaluation sees the same binary images.
    """
    greys = images.astype(np.float32) / 255
    draws = [
        _generator(seed, _BINARY, int(row)).random(images.shape[1:], np.float32) for row in rows
    ]
    return np.where(np.stack(draws) < greys, 255, 0).astype(np.uint8)


def sample_noise(seed: int, count: int, latent_shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns the noise of sample pictures, (count, *latent_shape), which depends on the seed only."""
    return _generator(seed, _SAMPLE, 0).standard_normal((count, *latent_shape), dtype=np.float32)


def _generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    # The counter is in the high words: Philox counts in the low ones, so streams never overlap.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, counter, 0]))
