"""What is evaluated: a trained model, one split of its data, and this rank's share of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cvae.data.draws import Batch, eval_blocks
from cvae.data.feed import MicroBatch, micro_batches
from cvae.data.store import Split
from cvae.distributed.ranks import Ranks
from cvae.models.cvae import Cvae
from cvae.sampling.inference import AdaptiveBatches, images_at_once
from cvae.sampling.trained_model import TrainedModel

Advance = Callable[[float], object]
T = TypeVar("T")


class EvaluationBatch(NamedTuple):
    """Some images of this rank's share, as the model takes them."""

    block: int
    """Number of the evaluated block that they are of, and which of its places they have."""
    places: slice
    rows: NDArray[np.int64]
    """Of the split."""
    batch: MicroBatch


@dataclass(frozen=True)
class EvaluationInput:
    trained: TrainedModel
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

    def each(
        self, function: Callable[[EvaluationBatch], T], advances: bool = True
    ) -> Iterator[tuple[EvaluationBatch, T]]:
        """Yields this rank's images in order, and the function of them. All ranks together have each image once.

        The function must change nothing: it is called again with fewer images if the device runs out of memory.
        advances: whether a part is done when the next is asked for; otherwise the function reports it.
        """
        data, model = self.trained.data, self.model
        parts = AdaptiveBatches(images_at_once(model))
        for number, block in enumerate(eval_blocks(self.seed, len(self.split), model.latent_shape)):
            share = self.ranks.share(len(block.indices))

            def computed(
                places: slice, number: int = number, block: Batch = block
            ) -> tuple[EvaluationBatch, T]:
                (batch,) = micro_batches(data, self.split, block, places, None, self.ranks.device)
                part = EvaluationBatch(number, places, block.indices[places], batch)
                return part, function(part)

            for part, found in parts.each(range(share.start, share.stop), computed):
                yield part, found
                if advances:
                    self.advance(len(part.rows))

    def every(self, values: list[Tensor], rows: list[NDArray[np.int64]], width: int) -> Tensor:
        """(len(split), width) fp32 on every rank, from each rank's rows of it, (b, width) each."""
        whole = torch.zeros(len(self.split), width, device=self.ranks.device)
        for part, value in zip(rows, values, strict=True):
            whole[torch.from_numpy(part)] = value.float().reshape(len(part), width)
        return self.ranks.sum(whole)
