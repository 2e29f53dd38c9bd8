"""Which images, captions and noise a step sees: functions of (seed, step, sample) and of nothing else.

Everything is drawn for the *global* batch and sliced by rank afterwards, on the CPU, by a counter-based
generator (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So the number of
ranks, the accumulation and the moment of a restart cannot change a draw.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# One stream per purpose: no draw of one can shift the draws of another.
_ORDER, _CAPTION, _NOISE, _EVAL, _SAMPLE, _IWAE, _BINARY = range(7)
EVAL_BLOCK = 512


class Batch(NamedTuple):
    """What one optimizer step is made of, for the whole global batch of B images."""

    indices: NDArray[np.int64]  # (B,) rows of the training split
    caption_choice: NDArray[np.float64]  # (B,) in [0, 1): which of an image's captions
    noise: NDArray[np.float32]  # (B, *latent_shape) standard normal


class BatchOrder:
    """The endless stream of training batches: one permutation of `rows` after the other.

    Batches run on over the end of an epoch, so that every batch is full and every image is seen exactly
    once per epoch.
    """

    def __init__(
        self,
        seed: int,
        rows: NDArray[np.int64],
        batch_size: int,
        latent_shape: tuple[int, ...],
    ):
        """rows: of the training split, those that are trained on."""
        self.seed, self.rows, self.batch_size = seed, rows, batch_size
        self.latent_shape = latent_shape
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def batch(self, step: int) -> Batch:
        """The batch of the optimizer step number `step`, counted from 0."""
        indices = np.concatenate([*self._pieces(step * self.batch_size, self.batch_size)])
        choice = _generator(self.seed, _CAPTION, step).random(self.batch_size)
        shape = (self.batch_size, *self.latent_shape)
        noise = _generator(self.seed, _NOISE, step).standard_normal(shape, dtype=np.float32)
        return Batch(indices, choice, noise)

    def _pieces(self, first: int, n: int) -> Iterator[NDArray[np.int64]]:
        """The n rows of the stream from its `first`-th on, epoch by epoch."""
        while n > 0:
            epoch, offset = divmod(first, len(self.rows))
            piece = self._permutation(epoch)[offset : offset + n]
            yield piece
            first, n = first + len(piece), n - len(piece)

    def _draw_permutation(self, epoch: int) -> NDArray[np.int64]:
        return self.rows[_generator(self.seed, _ORDER, epoch).permutation(len(self.rows))]


def chosen_count(images: int, fraction: float) -> int:
    """Returns on how many images of a split a run trains: all, or that fraction of them, at least one."""
    return images if fraction == 1 else max(1, round(fraction * images))


def choose_fraction(seed: int, ids: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """Rows of the images that a run trains on, in order: chosen_count(N, fraction) of N.

    Each image's place in the queue is a hash of the seed and its id: the same images are chosen on every
    machine and from a store of any image size, and a smaller fraction's are among a larger one's.
    """
    if fraction == 1:
        return np.arange(len(ids))
    queue = [hashlib.sha256(f"{seed}:{image_id}".encode()).digest() for image_id in ids.tolist()]
    first = sorted(range(len(ids)), key=queue.__getitem__)[: chosen_count(len(ids), fraction)]
    return np.sort(np.array(first, np.int64))


def eval_blocks(seed: int, n_images: int, latent_shape: tuple[int, ...]) -> Iterator[Batch]:
    """The images of an evaluated split in order, in blocks of EVAL_BLOCK; the last one may be shorter.

    Captions and noise are the same at every evaluation, so that two of them differ by the model alone.
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
    """(len(draws), EVAL_BLOCK, *latent_shape) standard normal: these draws of z for each image of a block."""
    shape = (EVAL_BLOCK, *latent_shape)
    return np.stack(
        [
            # Blocks and draws count in halves of one word.
            _generator(seed, _IWAE, (block << 32) + draw).standard_normal(shape, dtype=np.float32)
            for draw in draws
        ]
    )


def binarised(seed: int, rows: NDArray[np.int64], images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (B, C, H, W) of these rows, each pixel drawn as 0 or 255; its grey value is the probability of 255.

    The draws are functions of (seed, row): every evaluation sees the same binary images.
    """
    greys = images.astype(np.float32) / 255
    draws = [
        _generator(seed, _BINARY, int(row)).random(images.shape[1:], np.float32) for row in rows
    ]
    return np.where(np.stack(draws) < greys, 255, 0).astype(np.uint8)


def sample_noise(seed: int, count: int, latent_shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(count, *latent_shape) standard normal for pictures: the same in every run of the same seed."""
    return _generator(seed, _SAMPLE, 0).standard_normal((count, *latent_shape), dtype=np.float32)


def _generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    # The counter goes into the high words: Philox itself counts in the low ones, so streams never overlap.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, counter, 0]))
