"""The DDP engine: PyTorch's DistributedDataParallel, or the plain model if there is one rank."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cvae.config.experiment import Experiment
from cvae.data.feed import MicroBatch
from cvae.distributed import precision
from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.models.cvae import Cvae
from cvae.run.checkpoint import Tensors, TrainingState
from cvae.training.engine import Engine, summed_loss
from cvae.training.optimization import update_average


class DdpEngine(Engine):
    name = "ddp"

    def __init__(self, model: Cvae, experiment: Experiment, ranks: Ranks):
        super().__init__(model, experiment, ranks)
        self.parallel: nn.Module = self.model
        if ranks.world_size > 1:
            self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            # torch 2.13 renames the constructor's argument and warns of the old name.
            self.parallel.broadcast_buffers = False
        # Evaluation and drawing, whose batches have other sizes, are not compiled.
        self.is_compiled = experiment.training.compile
        self.objective: Callable[..., tuple[Tensor, Tensor]] = self._objective
        if self.is_compiled:
            _check_compiler(ranks.device)
            self.objective = torch.compile(self._objective, dynamic=False)

    def settle(self, batch: Sequence[MicroBatch]) -> None:
        """Makes throw-away backward passes, so that DDP lays out its buckets before the first step that counts.

        DDP orders its buckets anew after the first backward pass, and a gradient's place in a bucket decides
        the order in which a ring adds it up. Without this, the first step after a resume would be added up
        in another order than the same step of a run that was never interrupted. Compilation happens here too,
        when no watchdog waits for a step.
        """
        if self.ranks.world_size > 1 or self.is_compiled:
            for _ in range(2):
                torch.autograd.backward(self.objective(batch[0], torch.tensor(1.0))[0])
            self.adam.zero_grad()

    def step(self, batch: Sequence[MicroBatch], lr: float, beta: float) -> Tensor:
        # A tensor: a number would be compiled into the graph, and anew whenever it changes.
        weight = torch.tensor(beta)
        totals: Tensor | None = None
        for number, micro in enumerate(batch, start=1):
            with self._reduce_gradients(number == len(batch)):
                loss, sums = self.objective(micro, weight)
                torch.autograd.backward(self.scaler.scale(loss))
            totals = sums if totals is None else totals + sums
        assert totals is not None
        if self.model.likelihood.is_adaptive:
            self.model.observe(self.ranks.sum(totals[0].clone()))
        norm = self._update(lr)
        return torch.cat([totals, norm.reshape(1)])

    def snapshot(self, progress: dict[str, Any]) -> TrainingState:
        tensors: dict[str, Tensors] = {
            "model": dict(self.model.state_dict()),
            "optimizer": {
                f"{key}.{name}": value
                for name, parameter in self.model.named_parameters()
                for key, value in self.adam.state[parameter].items()
            },
        }
        if self.ema is not None:
            tensors["ema"] = dict(self.ema.state_dict())
        return TrainingState(tensors, {**progress, "loss_scale": self.scaler.state_dict()})

    def restore(self, state: TrainingState) -> None:
        self.model.load_state_dict(state.tensors["model"])
        saved = state.tensors["optimizer"]
        for name, parameter in self.model.named_parameters():
            if f"step.{name}" in saved:  # absent before the first update, which fp16 may skip
                self.adam.state[parameter] = {
                    key: saved[f"{key}.{name}"].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self._restore_rest(state)

    def _objective(self, micro: MicroBatch, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss to differentiate; and (3,), sums of recon_loss, kl and loss over the batch size."""
        with precision.autocast(self.precision, self.ranks.device):
            elbo = self.parallel(*micro)
        loss, sums = summed_loss(elbo, beta)
        return loss * self.loss_factor, sums / self.batch_size

    def _reduce_gradients(self, now: bool) -> AbstractContextManager[Any]:
        if now or not isinstance(self.parallel, DistributedDataParallel):
            return nullcontext()
        return self.parallel.no_sync()

    def _update(self, lr: float) -> Tensor:
        gradients = self._gradients()
        if self.scaler.is_enabled():
            torch._foreach_mul_(gradients, self.ranks.world_size)
            precision.overflow(gradients)
        self.scaler.unscale_(self.adam)
        norm = self._clip(gradients)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.scaler.step(self.adam)
        self.scaler.update()
        self.adam.zero_grad()
        if self.ema is not None and self.ema_decay is not None:
            update_average(self.ema, self.model, self.ema_decay)
        return norm


def _check_compiler(device: torch.device) -> None:
    """Raises UserError if torch.compile would find no compiler, or on a CPU could not link with PyTorch.

    On a CPU it generates C++. On a GPU Triton brings its own compiler, but builds its launchers with the host's
    C compiler.
    """
    on_cpu = device.type == "cpu"
    variable, names = ("CXX", ("g++", "clang++")) if on_cpu else ("CC", ("gcc", "clang"))
    candidates = filter(None, [os.environ.get(variable), *names])
    if not any(map(shutil.which, candidates)):
        language, hardware = ("C++", "CPU") if on_cpu else ("C", "GPU")
        raise UserError(
            f"training.compile = true needs a {language} compiler on a {hardware}, and there is no {names[0]}"
            f" here: install one, or train with training.compile=false"
        )
    library = os.path.dirname(torch.__file__)
    # PyTorch hands its folder to the linker unquoted.
    if on_cpu and len(library.split()) > 1:
        raise UserError(
            f"training.compile = true: PyTorch cannot link on a CPU from {library}, whose path has a space;"
            " install it elsewhere, or train with training.compile=false"
        )
