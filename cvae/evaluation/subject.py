"""What is evaluated: a trained model, one split of its data, and this rank's share of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvae.data.feed import MicroBatch, micro_batches
from cvae.data.order import eval_blocks
from cvae.data.store import Split
from cvae.inference import images_at_once
from cvae.models.cvae import Cvae
from cvae.sampling import Trained
from cvae.training.ranks import Ranks

Advance = Callable[[float], object]


class Part(NamedTuple):
    """Some images of this rank's share, as the model takes them."""

    block: int
    """Number of the evaluated block that they are of, and which of its places they have."""
    places: slice
    rows: NDArray[np.int64]
    """Of the split."""
    batch: MicroBatch


@dataclass(frozen=True)
class Subject:
    trained: Trained
    split: Split
    ranks: Ranks
    advance: Advance
    """Is told how many more images of this rank are done, or what share of one."""

    @property
    def model(self) -> Cvae:
        return self.trained.model

    @property
    def seed(self) -> int:
        return self.trained.experiment.seed

    def parts(self, advances: bool = True) -> Iterator[Part]:
        """This rank's images in order; over all ranks each image of the split once.

        advances: whether a part is done when the next is asked for; else the caller tells.
        """
        data, model = self.trained.data, self.model
        at_once = images_at_once(model)
        for number, block in enumerate(eval_blocks(self.seed, len(self.split), model.latent_shape)):
            share = self.ranks.share(len(block.indices))
            pieces = micro_batches(data, self.split, block, share, at_once, self.ranks.device)
            first = share.start
            for piece in pieces:
                places = slice(first, first + len(piece.images))
                yield Part(number, places, block.indices[places], piece)
                if advances:
                    self.advance(len(piece.images))
                first = places.stop

    def every(self, values: list[Tensor], rows: list[NDArray[np.int64]], width: int) -> Tensor:
        """(len(split), width) fp32 on every rank, from each rank's rows of it, (b, width) each."""
        whole = torch.zeros(len(self.split), width, device=self.ranks.device)
        for part, value in zip(rows, values, strict=True):
            whole[torch.from_numpy(part)] = value.float().reshape(len(part), width)
        return self.ranks.sum(whole)
