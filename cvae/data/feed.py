"""Reads batches from the store and moves them to the device, some steps ahead of the training loop."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvae.data.draws import Batch, BatchOrder
from cvae.data.experiment_data import ExperimentData
from cvae.data.store import Split

_AHEAD = 2
# Prepared up to 16 batches at a time, at most 4 MB: waking the thread for each small batch costs more.
_BLOCK, _BLOCK_BYTES = 16, 4 << 20


class MicroBatch(NamedTuple):
    """b images of this rank's share of the global batch, on the device; the model takes them at once."""

    images: Tensor  # (b, C, H, W) uint8
    condition: Tensor | None  # (b, condition_dim) float32
    noise: Tensor  # (b, *latent_shape) float32


def micro_batches(
    data: ExperimentData,
    split: Split,
    batch: Batch,
    share: slice,
    micro_batch_size: int | None,
    device: torch.device,
) -> list[MicroBatch]:
    """Returns a rank's share of a global batch in pieces of at most micro_batch_size images."""
    size = micro_batch_size or max(1, share.stop - share.start)
    pieces = []
    for start in range(share.start, share.stop, size):
        part = slice(start, min(start + size, share.stop))
        indices = batch.indices[part]
        condition = data.condition(split, indices, batch.caption_choice[part])
        pieces.append(
            MicroBatch(
                _to(device, split.take_images(indices)),
                None if condition is None else _to(device, condition),
                _to(device, batch.noise[part]),
            )
        )
    return pieces


def training_feed(
    data: ExperimentData,
    order: BatchOrder,
    steps: range,
    share: slice,
    micro_batch_size: int | None,
    device: torch.device,
) -> Iterator[list[MicroBatch]]:
    """Yields this rank's micro-batches of each step, prepared in a thread while the device computes."""

    def prepare(block: range) -> list[list[MicroBatch]]:
        return [
            micro_batches(data, data.train, order.batch(step), share, micro_batch_size, device)
            for step in block
        ]

    n_bytes = (share.stop - share.start) * data.train.images[0].nbytes
    size = max(1, min(_BLOCK, _BLOCK_BYTES // max(1, n_bytes)))
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        ahead: deque[Future[list[list[MicroBatch]]]] = deque()
        for start in range(steps.start, steps.stop, size):
            ahead.append(thread.submit(prepare, range(start, min(start + size, steps.stop))))
            if len(ahead) > _AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _to(device: torch.device, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
