"""The input of an evaluation: a trained model, one split of its data, and this rank's share of it."""

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
from cvae.run.journal import Journal
from cvae.sampling.inference import AdaptiveBatches, images_at_once
from cvae.sampling.trained_model import TrainedModel

T = TypeVar("T")


class EvaluationBatch(NamedTuple):
    """Some images of this rank's share, as the model takes them."""

    block: int  # number of the block of evaluated images that they belong to
    places: slice  # their places in the block
    rows: NDArray[np.int64]  # their rows in the split
    batch: MicroBatch


@dataclass(frozen=True)
class EvaluationInput:
    trained: TrainedModel
    split: Split
    ranks: Ranks
    advance: Callable[[float], object]
    """Is called with the number of further images of this rank that are done, or with a share of one."""
    writer: Journal | None = None  # the run's journal, on rank 0

    @property
    def model(self) -> Cvae:
        return self.trained.model

    @property
    def seed(self) -> int:
        return self.trained.experiment.seed

    def map(
        self, function: Callable[[EvaluationBatch], T], advances: bool = True
    ) -> Iterator[tuple[EvaluationBatch, T]]:
        """Yields this rank's batches in order, each with function(batch). The ranks share the images.

        The function must change nothing: it is called again with fewer images if the device runs out of
        memory. With `advances` false the function reports its progress itself.
        """
        data, model = self.trained.data, self.model
        batches = AdaptiveBatches(images_at_once(model))
        for number, block in enumerate(eval_blocks(self.seed, len(self.split), model.latent_shape)):
            share = self.ranks.share(len(block.indices))

            def compute(
                places: slice, number: int = number, block: Batch = block
            ) -> tuple[EvaluationBatch, T]:
                (images,) = micro_batches(data, self.split, block, places, None, self.ranks.device)
                batch = EvaluationBatch(number, places, block.indices[places], images)
                return batch, function(batch)

            for batch, value in batches.map(range(share.start, share.stop), compute):
                yield batch, value
                if advances:
                    self.advance(len(batch.rows))

    def gather(self, function: Callable[[EvaluationBatch], Tensor], width: int) -> Tensor:
        """Returns the function's values for all images, fp32 (len(split), width), on every rank.

        function: returns `width` values for each image of a batch.
        """
        values = torch.zeros(len(self.split), width, device=self.ranks.device)
        with torch.inference_mode():
            for batch, own in self.map(function):
                values[torch.from_numpy(batch.rows)] = own.float().reshape(-1, width)
        return self.ranks.sum(values)
