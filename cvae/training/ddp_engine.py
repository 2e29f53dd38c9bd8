"""The DDP engine: one optimizer step over the ranks, and the state that makes it resumable."""

import copy
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
from cvae.models.cvae import Cvae, Elbo
from cvae.run.checkpoint import Tensors, TrainingState
from cvae.training.adam import build_adam
from cvae.training.ema import update_average


class DdpEngine:
    """See cvae.training.engine.Engine."""

    name = "ddp"

    def __init__(self, model: Cvae, experiment: Experiment, ranks: Ranks):
        self.ranks = ranks
        self.model = model.to(ranks.device)
        self.precision = precision.resolve(experiment.training.precision, ranks.device)
        self.clip_norm = experiment.optimizer.clip_norm
        self.batch_size = experiment.training.global_batch_size
        self.optimizer = build_adam(model, experiment.optimizer)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16")
        self.ema_decay = experiment.training.ema_decay
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if self.ema_decay else None
        self.parallel: nn.Module = self.model
        if ranks.world_size > 1:
            self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            # The argument has another name from torch 2.13 on, which warns of the old one.
            self.parallel.broadcast_buffers = False
        # What evaluates and draws, in batches of other sizes, stays as it is.
        self.is_compiled = experiment.training.compile
        self.objective: Callable[..., tuple[Tensor, Tensor]] = self._objective
        if self.is_compiled:
            _check_compiler(ranks.device)
            self.objective = torch.compile(self._objective, dynamic=False)

    @property
    def eval_model(self) -> Cvae:
        return self.ema or self.model

    def autocast(self) -> AbstractContextManager[Any]:
        return precision.autocast(self.precision, self.ranks.device)

    def settle(self, batch: Sequence[MicroBatch]) -> None:
        """Throw-away backward passes, so that DDP lays out its buckets before the first step that counts.

        DDP orders its buckets anew after the first backward pass, and a gradient's place in a bucket decides
        the order in which a ring adds it up. Without this, the first step after a resume would be added up
        in another order than the same step of a run that was never interrupted. Compilation happens here too,
        where no watchdog waits for a step.
        """
        if self.ranks.world_size > 1 or self.is_compiled:
            for _ in range(2):
                torch.autograd.backward(self.objective(batch[0], torch.tensor(1.0))[0])
            self.optimizer.zero_grad()

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

    def snapshot(self, state: dict[str, Any]) -> TrainingState:
        tensors: dict[str, Tensors] = {
            "model": dict(self.model.state_dict()),
            "optimizer": {
                f"{key}.{name}": value
                for name, parameter in self.model.named_parameters()
                for key, value in self.optimizer.state[parameter].items()
            },
        }
        if self.ema is not None:
            tensors["ema"] = dict(self.ema.state_dict())
        return TrainingState(tensors, {**state, "loss_scale": self.scaler.state_dict()})

    def restore(self, snapshot: TrainingState) -> None:
        self.model.load_state_dict(snapshot.tensors["model"])
        saved = snapshot.tensors["optimizer"]
        for name, parameter in self.model.named_parameters():
            if f"step.{name}" in saved:  # not before the first update: fp16 may skip some
                self.optimizer.state[parameter] = {
                    key: saved[f"{key}.{name}"].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        if self.ema is not None:
            self.ema.load_state_dict(snapshot.tensors["ema"])
        if self.scaler.is_enabled() and snapshot.state["loss_scale"]:
            self.scaler.load_state_dict(snapshot.state["loss_scale"])

    def _objective(self, micro: MicroBatch, beta: Tensor) -> tuple[Tensor, Tensor]:
        """What is differentiated; and (3,), sums of recon_loss, kl and loss over the global batch size."""
        with self.autocast():
            elbo: Elbo = self.parallel(*micro)
        recon_loss, kl, penalty = (part.sum() for part in elbo)
        loss = recon_loss + beta * penalty
        sums = torch.stack([recon_loss, kl, loss]).detach() / self.batch_size
        # DDP divides the gradients' sum by the number of ranks; what is wanted is the sum. In fp16 _update takes
        # that back: here, the factor would make gradients overflow the earlier the more ranks there are.
        ranks = 1 if self.scaler.is_enabled() else self.ranks.world_size
        return loss * (ranks / self.batch_size), sums

    def _reduce_gradients(self, now: bool) -> AbstractContextManager[Any]:
        if now or not isinstance(self.parallel, DistributedDataParallel):
            return nullcontext()
        return self.parallel.no_sync()

    def _update(self, lr: float) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.scaler.is_enabled():
            torch._foreach_mul_(gradients, self.ranks.world_size)
            precision.overflow(gradients)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None and self.ema_decay is not None:
            update_average(self.ema, self.model, self.ema_decay)
        return norm


def _check_compiler(device: torch.device) -> None:
    """Raises UserError if torch.compile would find no compiler.

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
