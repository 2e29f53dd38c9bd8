"""What the training loop asks of an engine: DDP or DeepSpeed, with the same meaning of every word."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from cvae.config.experiment import Experiment
from cvae.data.feed import MicroBatch
from cvae.distributed import precision
from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.models.cvae import Cvae
from cvae.run.checkpoint import TrainingState


class Engine(Protocol):
    """Owns model, optimizer, loss scale and averaged weights; knows nothing of files and steps.

    The gradient of a step is that of the mean loss over the *global* batch, whatever the number of ranks,
    the sizes of their shares and the accumulation. All ranks call every method together.
    """

    name: str
    precision: str
    """fp32, tf32, bf16 or fp16, as training.precision was resolved on this device."""

    @property
    def eval_model(self) -> Cvae:
        """The weights that are evaluated and sampled from: the averaged ones where they are kept."""

    def settle(self, batch: Sequence[MicroBatch]) -> None:
        """Before the first step: whatever makes it add up as it would in the middle of a run."""

    def step(self, batch: Sequence[MicroBatch], lr: float, beta: float) -> Tensor:
        """One update from this rank's micro-batches.

        Returns (4,) fp32 on the device, to be added up over the ranks but for the last: this rank's sums of
        recon_loss, kl and loss in nats divided by global_batch_size; norm of the whole gradient before
        clipping.
        """

    def snapshot(self, state: dict[str, Any]) -> TrainingState:
        """Whole tensors by the parameters' names beside `state`; of use on rank 0 alone.

        The same for every engine, so that any of them can restore it.
        """

    def restore(self, snapshot: TrainingState) -> None:
        """Continues from a snapshot, whichever engine and number of ranks wrote it."""


def build_engine(model: Cvae, experiment: Experiment, ranks: Ranks) -> Engine:
    """Returns the engine that training.engine names, with PyTorch's switches set for it.

    Raises UserError if DeepSpeed is asked for and not installed, or the device lacks the precision.
    """
    precision.establish(experiment.training, ranks.device)
    # Imported when asked for: importing DeepSpeed takes seconds.
    if experiment.training.engine == "deepspeed":
        check_deepspeed()
        from cvae.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, experiment, ranks)
    from cvae.training.ddp_engine import DdpEngine

    return DdpEngine(model, experiment, ranks)


def check_deepspeed() -> None:
    """Raises UserError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "training.engine = 'deepspeed' needs the package deepspeed, which is not installed:"
            " python -m pip install --constraint constraints.txt deepspeed"
        )
