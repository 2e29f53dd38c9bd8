"""The DeepSpeed engine: ZeRO stages 0 to 3, which follow the curve that DdpEngine follows."""

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
from cvae.run.checkpoint import TrainingState
from cvae.training import zero_state
from cvae.training.engine import Engine, summed_loss
from cvae.training.optimization import copy_buffers, update_average


class DeepSpeedEngine(Engine):
    """To DeepSpeed every model is an fp32 one: autocast is inside of it and the loss scale is torch's.

    So weights, gradients and their sums over the ranks are fp32 in every precision, as under DDP.
    """

    def __init__(self, model: Cvae, experiment: Experiment, ranks: Ranks):
        super().__init__(model, experiment, ranks)
        self.stage = experiment.training.deepspeed.zero_stage
        self.name = f"deepspeed, ZeRO {self.stage}"
        # Stages 2 and 3 communicate in every backward pass: all ranks make as many, whatever their shares.
        most = -(-self.batch_size // ranks.world_size)
        self.passes = -(-most // (experiment.training.micro_batch_size or most))
        self.adam.register_step_pre_hook(self._before_update)
        self.scaler.scale(torch.zeros((), device=ranks.device))  # makes its tensors
        # The scaler watches this instead of the gradient: the gradient's norm, inf or nan if the gradient is.
        self.gauge = nn.Parameter(torch.zeros(1, device=ranks.device))
        self.gauge_reader = torch.optim.SGD([self.gauge], lr=0.0)
        self.norm = torch.zeros((), device=ranks.device)

        self.outline = copy.deepcopy(self.model).requires_grad_(False).to("meta")
        self._gathered: Cvae | None = None
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
            return super().eval_model
        # Sharded weights have to be gathered by all ranks together, and ranks evaluate different numbers of
        # batches: each evaluates a whole copy, which lasts until the next step.
        if self._gathered is None:
            self._gathered = copy.deepcopy(self.outline).to_empty(device=self.ranks.device)
            copy_buffers(self._gathered, self.model)
            targets = dict(self._gathered.named_parameters())
            for name, parameter in self.model.named_parameters():
                own: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                shard = self.ema_shards.get(name, own)
                whole = zero_state.from_shards(parameter, shard, everywhere=True)
                assert whole is not None
                targets[name].data.copy_(whole)
        return self._gathered

    def settle(self, batch: Sequence[MicroBatch]) -> None:
        """Does nothing: the order in which DeepSpeed adds gradients up never changes."""

    def step(self, batch: Sequence[MicroBatch], lr: float, beta: float) -> Tensor:
        self._gathered = None
        for group in self.adam.param_groups:
            group["lr"] = lr
        zero_scales = self.zero is not None and self.scaler.is_enabled()
        scale = self.scaler.get_scale() if zero_scales else 1.0
        if zero_scales:
            self.zero.override_loss_scale(scale)
        totals = torch.zeros(3, device=self.ranks.device)
        for number in range(self.passes):
            # A rank with fewer micro-batches than others takes part once more, with weight 0.
            counts = number < len(batch)
            loss, sums = summed_loss(self.engine(*batch[number if counts else 0]), beta)
            loss = loss * (self.loss_factor if counts else 0.0)
            self.engine.set_gradient_accumulation_boundary(number == self.passes - 1)
            scaled = self.scaler.scale(loss) if self.zero is None else loss
            self.engine.backward(scaled, scale_wrt_gas=False)
            if counts:
                totals += sums
        if self.model.likelihood.is_adaptive:
            self.model.observe(self.ranks.sum(totals[0].clone()) / self.batch_size)
        if zero_scales:
            self.zero.override_loss_scale(scale / self.ranks.world_size)
            # This rank's parts of the whole gradient; the norm, which decides, is that of all ranks' parts.
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

    def snapshot(self, progress: dict[str, Any]) -> TrainingState:
        model, optimizer = dict[str, Any](), dict[str, Any]()
        ema: dict[str, Any] = {} if self.ema is None else dict(self.ema.state_dict())
        updated = bool(self.adam.state)  # not before the first update, which fp16 may skip
        for name, parameter in self.model.named_parameters():
            model[name] = self.storage.weight(parameter)
            if updated:
                optimizer[f"step.{name}"] = self.storage.updates().clone()
                for key in zero_state.STATES:
                    optimizer[f"{key}.{name}"] = self.storage.state(parameter, key)
            if name in self.ema_shards:
                ema[name] = zero_state.from_shards(parameter, self.ema_shards[name])
        model.update(self.model.named_buffers())
        if self.ema_shards:
            ema.update(self.model.named_buffers())
        tensors = {"model": model, "optimizer": optimizer} | ({"ema": ema} if ema else {})
        state = {**progress, "loss_scale": self.scaler.state_dict()}
        return TrainingState(tensors if self.ranks.is_first else {}, state)

    def restore(self, state: TrainingState) -> None:
        weights, states = state.tensors["model"], state.tensors["optimizer"]
        for name, parameter in self.model.named_parameters():
            self.storage.put_weight(parameter, weights[name])
            if f"step.{name}" in states:
                parts = {key: states[f"{key}.{name}"] for key in ("step", *zero_state.STATES)}
                self.storage.put_state(parameter, parts)
            if name in self.ema_shards:
                whole = state.tensors["ema"][name]
                self.ema_shards[name].copy_(zero_state.shard_of(parameter, whole))
        self.storage.settle()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(weights[name])
        self._restore_rest(state)

    def _initialize(self) -> tuple[Any, Any]:
        """Returns DeepSpeed's engine and its ZeRO optimizer, which is None in stage 0."""
        deepspeed = _import_deepspeed(self.ranks.device)
        if not dist.is_initialized():
            # A rank that is alone has no process group, and DeepSpeed needs one.
            backend = "nccl" if self.ranks.device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        index = self.ranks.device.index or 0
        os.environ.setdefault("LOCAL_RANK", str(index))  # DeepSpeed asserts that it is set
        engine, optimizer, _, _ = deepspeed.initialize(
            # DeepSpeed would take LOCAL_RANK as the device, which may exceed the visible GPUs.
            args=SimpleNamespace(device_rank=index),
            model=_Autocast(self.model, self.precision, self.ranks.device),
            optimizer=self.adam,
            config={
                # DeepSpeed uses these two in its reports alone; batches and accumulation are ours.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                # In stage 0, in which DeepSpeed does not report the norm, _before_update clips.
                "gradient_clipping": (self.clip_norm or 0.0) if self.stage else 0.0,
                # DeepSpeed's own linear layer would replace torch's in the whole process.
                "zero_optimization": {"stage": self.stage, "memory_efficient_linear": False},
            },
        )
        return engine, optimizer if self.stage else None

    def _before_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Stage 0: unscales, measures and clips the gradient, which is whole on every rank by now."""
        if self.zero is not None:
            return
        gradients = self._gradients()
        if self.scaler.is_enabled():
            precision.overflow(gradients, self.ranks.world_size)
            torch._foreach_div_(gradients, self.scaler.get_scale() / self.ranks.world_size)
        self.norm = self._clip(gradients)
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
    """Wraps the model for DeepSpeed."""

    def __init__(self, model: Cvae, name: str, device: torch.device):
        super().__init__()
        self.model, self.name, self.device = model, name, device

    def forward(self, *micro: Any) -> Elbo:
        with precision.autocast(self.name, self.device):
            elbo: Elbo = self.model(*micro)
        return elbo


def _import_deepspeed(device: torch.device) -> ModuleType:
    """Imports the package without its output, except errors."""
    # With this set, it searches for no other accelerator and warns of nothing.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with _hidden("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that newer versions of torch have replaced.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # An all-reduce for inference on CPUs, which DeepSpeed would compile at first use: nothing here calls it,
    # and compute nodes have neither a compiler nor a home to write to.
    # On a GPU the table is left alone: it is made at first use, by probing every operation with a warning each.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Makes importing `package` fail: DeepSpeed's autotuner would spend seconds on MLflow, which it never uses."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
