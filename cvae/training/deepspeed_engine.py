"""The DeepSpeed engine: ZeRO stages 0 to 3, following the curve that DdpEngine follows."""

import copy
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cvae.config.experiment import Experiment
from cvae.data.feed import MicroBatch
from cvae.distributed import precision
from cvae.distributed.ranks import Ranks
from cvae.models.cvae import Cvae, Elbo
from cvae.run.checkpoint import Tensors, TrainingState
from cvae.training import zero_state
from cvae.training.adam import build_adam
from cvae.training.ema import copy_buffers, update_average


class DeepSpeedEngine:
    """See cvae.training.engine.Engine.

    To DeepSpeed every model is an fp32 one: autocast is inside of it and the loss scale is torch's, so that
    weights, gradients and their sums over the ranks are fp32 in every precision, as under DDP.
    """

    def __init__(self, model: Cvae, experiment: Experiment, ranks: Ranks):
        training = experiment.training
        self.ranks, self.model = ranks, model.to(ranks.device)
        self.stage = training.deepspeed.zero_stage
        self.name = f"deepspeed, ZeRO {self.stage}"
        self.precision = precision.resolve(training.precision, ranks.device)
        self.clip_norm = experiment.optimizer.clip_norm
        self.batch_size = training.global_batch_size
        # Stages 2 and 3 talk in every backward pass: all ranks make as many, whatever their shares.
        most = -(-self.batch_size // ranks.world_size)
        self.passes = -(-most // (training.micro_batch_size or most))
        self.adam = build_adam(model, experiment.optimizer)
        self.adam.register_step_pre_hook(self._before_update)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16")
        self.scaler.scale(torch.zeros((), device=ranks.device))  # makes its tensors
        # What the scaler is shown: the gradient's norm, which has an inf or nan where the gradient has.
        self.gauge = nn.Parameter(torch.zeros(1, device=ranks.device))
        self.gauge_reader = torch.optim.SGD([self.gauge], lr=0.0)
        self.norm = torch.zeros((), device=ranks.device)

        self.ema_decay = training.ema_decay
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if self.ema_decay else None
        self.outline = copy.deepcopy(self.model).requires_grad_(False).to("meta")
        self._whole: Cvae | None = None
        self.engine, self.zero = self._initialize()
        self.storage = zero_state.STORAGE[self.stage](self.adam, self.zero)
        self.ema_shards: dict[str, Tensor] = {}
        if self.stage == 3 and self.ema is not None:
            self.ema = None
            for name, parameter in self.model.named_parameters():
                shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                self.ema_shards[name] = shard.detach().clone()

    @property
    def eval_model(self) -> Cvae:
        if self.stage < 3:
            return self.ema or self.model
        # Sharded weights have to be gathered by all ranks together, and ranks evaluate different numbers of
        # batches: each evaluates a whole copy, which lasts until the next step.
        if self._whole is None:
            self._whole = copy.deepcopy(self.outline).to_empty(device=self.ranks.device)
            copy_buffers(self._whole, self.model)
            whole = dict(self._whole.named_parameters())
            for name, parameter in self.model.named_parameters():
                own: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                shard = self.ema_shards.get(name, own)
                whole[name].data.copy_(zero_state.share_shards(parameter, shard))
        return self._whole

    def settle(self, batch: Sequence[MicroBatch]) -> None:
        """Nothing: the order in which DeepSpeed adds gradients up does not change after the first step."""

    def step(self, batch: Sequence[MicroBatch], lr: float, beta: float) -> Tensor:
        self._whole = None
        for group in self.adam.param_groups:
            group["lr"] = lr
        scale = 1.0
        if self.zero is not None and self.scaler.is_enabled():
            scale = self.scaler.get_scale()
            self.zero.override_loss_scale(scale)
        # DeepSpeed divides the gradients' sum by the number of ranks; what is wanted is the sum. In fp16 the
        # update takes that back: here, the factor would make gradients overflow the earlier the more ranks.
        ranks = 1 if self.scaler.is_enabled() else self.ranks.world_size
        totals = torch.zeros(3, device=self.ranks.device)
        for number in range(self.passes):
            # A rank with fewer micro-batches than others takes part once more with a weight of nothing.
            counts = number < len(batch)
            elbo: Elbo = self.engine(*batch[number if counts else 0])
            loss = (elbo.recon_loss + beta * elbo.kl_penalty).sum()
            loss = loss * (ranks / self.batch_size if counts else 0.0)
            self.engine.set_gradient_accumulation_boundary(number == self.passes - 1)
            scaled = self.scaler.scale(loss) if self.zero is None else loss
            self.engine.backward(scaled, scale_wrt_gas=False)
            if counts:
                with torch.no_grad():
                    recon_loss, kl, penalty = (part.sum() for part in elbo)
                    totals += torch.stack([recon_loss, kl, recon_loss + beta * penalty])
        if self.model.likelihood.is_adaptive:
            self.model.observe(self.ranks.sum(totals[0].clone()) / self.batch_size)
        if self.zero is not None and self.scaler.is_enabled():
            self.zero.override_loss_scale(scale / self.ranks.world_size)
            # This rank's parts of the whole gradient; its norm, which decides, is that of all ranks' parts.
            own = [part for group in self.zero.averaged_gradients.values() for part in group or ()]
            precision.overflow(own, self.ranks.world_size)
        self.engine.step()
        if self.zero is not None:
            self.norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)
            self.norm = self.norm.to(self.ranks.device)
        if self.scaler.is_enabled():
            self.gauge.grad = self.norm.reshape(1).clone()
            self.scaler.unscale_(self.gauge_reader)
            self.scaler.update()
        self._average()
        return torch.cat([totals / self.batch_size, self.norm.reshape(1)])

    def snapshot(self, state: dict[str, Any]) -> TrainingState:
        model, optimizer, ema = Tensors(), Tensors(), Tensors()
        known = bool(self.adam.state)  # not before the first update: fp16 may skip some
        for name, parameter in self.model.named_parameters():
            _keep(model, name, self.storage.weight(parameter))
            if known:
                optimizer[f"step.{name}"] = self.storage.updates().clone()
                for key in zero_state.STATES:
                    _keep(optimizer, f"{key}.{name}", self.storage.state(parameter, key))
            if name in self.ema_shards:
                _keep(ema, name, zero_state.gather_shards(parameter, self.ema_shards[name]))
        model.update(self.model.named_buffers())
        if self.ema is not None:
            ema = dict(self.ema.state_dict())
        elif ema:
            ema.update(self.model.named_buffers())
        tensors = {"model": model, "optimizer": optimizer} | ({"ema": ema} if ema else {})
        if not self.ranks.is_first:
            tensors = {}
        return TrainingState(tensors, {**state, "loss_scale": self.scaler.state_dict()})

    def restore(self, snapshot: TrainingState) -> None:
        saved, states = snapshot.tensors["model"], snapshot.tensors["optimizer"]
        for name, parameter in self.model.named_parameters():
            self.storage.put_weight(parameter, saved[name])
            if f"step.{name}" in states:
                parts = {key: states[f"{key}.{name}"] for key in ("step", *zero_state.STATES)}
                self.storage.put_state(parameter, parts)
            if name in self.ema_shards:
                whole = snapshot.tensors["ema"][name]
                self.ema_shards[name].copy_(zero_state.shard_of(parameter, whole))
        self.storage.settle()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(saved[name])
        if self.ema is not None:
            self.ema.load_state_dict(snapshot.tensors["ema"])
        if self.scaler.is_enabled() and snapshot.state["loss_scale"]:
            self.scaler.load_state_dict(snapshot.state["loss_scale"])

    def _initialize(self) -> tuple[Any, Any]:
        """DeepSpeed's engine, and its ZeRO optimizer; None in its place for stage 0."""
        deepspeed = _import_deepspeed(self.ranks.device)
        if not dist.is_initialized():
            # A rank that is alone has no process group, and DeepSpeed needs one.
            backend = "nccl" if self.ranks.device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        index = self.ranks.device.index or 0
        os.environ.setdefault("LOCAL_RANK", str(index))  # DeepSpeed asserts that it is set
        engine, optimizer, _, _ = deepspeed.initialize(
            # The device that is ours: DeepSpeed would take LOCAL_RANK, which may exceed the visible GPUs.
            args=SimpleNamespace(device_rank=index),
            model=_Autocast(self.model, self.precision, self.ranks.device),
            optimizer=self.adam,
            config={
                # DeepSpeed only reports by these two; batches and accumulation are ours.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                # In stage 0 the clipping is ours, too: DeepSpeed does not tell the norm there.
                "gradient_clipping": (self.clip_norm or 0.0) if self.stage else 0.0,
                # No linear layer of DeepSpeed's own: it would replace torch's in the whole process.
                "zero_optimization": {"stage": self.stage, "memory_efficient_linear": False},
            },
        )
        return engine, optimizer if self.stage else None

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Stage 0: unscales, measures and clips the gradient, which is whole on every rank by now."""
        if self.zero is not None:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.scaler.is_enabled():
            precision.overflow(gradients, self.ranks.world_size)
            torch._foreach_div_(gradients, self.scaler.get_scale() / self.ranks.world_size)
        self.norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, self.norm)
        if self.scaler.is_enabled() and not self.norm.isfinite():
            self.adam.zero_grad()  # an overflow: nothing is updated

    def _average(self) -> None:
        if self.ema_decay is None:
            return
        if self.ema is not None:
            update_average(self.ema, self.model, self.ema_decay)
            return
        shards = [p.ds_tensor.detach() for p in self.model.parameters()]  # type: ignore[attr-defined]
        torch._foreach_lerp_(list(self.ema_shards.values()), shards, 1 - self.ema_decay)


class _Autocast(nn.Module):
    """The model as DeepSpeed sees it."""

    def __init__(self, model: Cvae, kind: str, device: torch.device):
        super().__init__()
        self.model, self.kind, self.device = model, kind, device

    def forward(self, *micro: Any) -> Elbo:
        with precision.autocast(self.kind, self.device):
            elbo: Elbo = self.model(*micro)
        return elbo


def _keep(tensors: Tensors, name: str, value: Tensor | None) -> None:
    if value is not None:
        tensors[name] = value


def _import_deepspeed(device: torch.device) -> ModuleType:
    """The package, silent but for errors."""
    # Said beforehand, it searches for no other accelerator and warns of nothing.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with _without("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that newer versions of torch have others for.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # An all-reduce for inference on CPUs, which DeepSpeed would compile at first use: nothing here calls it,
    # and compute nodes have neither a compiler nor a home to write to.
    # On a GPU the table is left alone: it is made at first use, by probing every operation with a warning each.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module


@contextmanager
def _without(package: str) -> Iterator[None]:
    """As if `package` were not installed.

    DeepSpeed's autotuner tries to import MLflow, for nothing that is used here: seconds on every rank.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
