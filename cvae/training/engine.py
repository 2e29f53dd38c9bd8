"""The interface between the training loop and an engine, and what DDP and DeepSpeed have in common."""

import copy
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvae.config.experiment import Experiment
from cvae.data.feed import MicroBatch
from cvae.distributed import precision
from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.models.cvae import Cvae, Elbo
from cvae.run.checkpoint import TrainingState
from cvae.training.optimization import build_adam


class Engine(ABC):
    """Owns model, optimizer, loss scale and averaged weights; knows nothing of files and steps.

    The gradient of a step is that of the mean loss over the *global* batch, whatever the number of ranks,
    the sizes of their shares and the accumulation. All ranks call every method together.
    """

    name: str

    def __init__(self, model: Cvae, experiment: Experiment, ranks: Ranks):
        training, device = experiment.training, ranks.device
        self.ranks, self.model = ranks, model.to(device)
        self.precision = precision.resolve(training.precision, device)
        """fp32, tf32, bf16 or fp16: training.precision as resolved on this device."""
        self.batch_size = training.global_batch_size
        self.clip_norm = experiment.optimizer.clip_norm
        self.adam = build_adam(self.model, experiment.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        # Multiplies the summed loss before the backward pass. Engines divide the gradients' sum by the number of
        # ranks, and the sum is needed. In fp16 the update multiplies the gradients instead: this early, the
        # factor would make them overflow the earlier the more ranks there are.
        n_summed = 1 if self.scaler.is_enabled() else ranks.world_size
        self.loss_factor = n_summed / self.batch_size
        self.ema_decay = training.ema_decay
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if self.ema_decay else None

    @property
    def eval_model(self) -> Cvae:
        """The model to evaluate and sample from: its weights are the averaged ones if they are kept."""
        return self.ema or self.model

    @abstractmethod
    def settle(self, batch: Sequence[MicroBatch]) -> None:
        """Prepares for the first step, so that it adds up as it would in the middle of a run."""

    @abstractmethod
    def step(self, batch: Sequence[MicroBatch], lr: float, beta: float) -> Tensor:
        """Makes one update from this rank's micro-batches.

        Returns (4,) fp32 on the device: this rank's sums of recon_loss, kl and loss in nats divided by
        global_batch_size, which are still to be added up over the ranks; and the norm of the whole gradient
        before clipping.
        """

    @abstractmethod
    def snapshot(self, progress: dict[str, Any]) -> TrainingState:
        """Returns whole tensors by parameter name, and `progress` with the loss scale; of use on rank 0 alone.

        The form is the same for every engine, so that any of them can restore it.
        """

    @abstractmethod
    def restore(self, state: TrainingState) -> None:
        """Continues from a state, whichever engine and number of ranks wrote it."""

    def _clip(self, gradients: list[Tensor]) -> Tensor:
        """Clips whole gradients; returns their norm before that."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, norm)
        return norm

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _restore_rest(self, state: TrainingState) -> None:
        """Restores the averaged weights, if they are whole, and the loss scale."""
        if self.ema is not None:
            self.ema.load_state_dict(state.tensors["ema"])
        if self.scaler.is_enabled() and state.state["loss_scale"]:
            self.scaler.load_state_dict(state.state["loss_scale"])


def summed_loss(elbo: Elbo, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss summed over a micro-batch, and (3,), detached: sums of recon_loss, kl and loss."""
    recon_loss, kl, penalty = (part.sum() for part in elbo)
    loss = recon_loss + beta * penalty
    return loss, torch.stack([recon_loss, kl, loss]).detach()


def build_engine(model: Cvae, experiment: Experiment, ranks: Ranks) -> Engine:
    """Returns the engine that training.engine names, with PyTorch's switches set for it.

    Raises UserError if DeepSpeed is requested and not installed, or if the device lacks the precision.
    """
    precision.establish(experiment.training, ranks.device)
    # Imported on demand: importing DeepSpeed takes seconds.
    if experiment.training.engine == "deepspeed":
        check_deepspeed()
        from cvae.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, experiment, ranks)
    from cvae.training.ddp_engine import DdpEngine

    return DdpEngine(model, experiment, ranks)


def check_deepspeed() -> None:
    """Raises UserError if DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "training.engine = 'deepspeed' needs the package deepspeed, which is not installed:"
            " python -m pip install --constraint constraints.txt deepspeed"
        )
