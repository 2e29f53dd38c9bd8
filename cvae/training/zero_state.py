"""Where each ZeRO stage keeps weights and optimizer state, and how whole tensors get out of it and in.

Every function here is called by all ranks together, parameter by parameter in the same order. A tensor that
is gathered is whole on rank 0 and None elsewhere: no rank but the one that writes ever holds two of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

STATES = ("exp_avg", "exp_avg_sq")


class Storage(Protocol):
    def weight(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole weight on rank 0."""

    def state(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        """exp_avg or exp_avg_sq of the whole parameter on rank 0."""

    def updates(self) -> Tensor:
        """How many updates there were: Adam's `step`."""

    def put_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Sets this rank's part from the whole weight."""

    def put_state(self, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        """The same for Adam's state; states: step and STATES, whole."""

    def settle(self) -> None:
        """Called once after the last weight was put."""


class Whole:
    """Stage 0: every rank holds everything."""

    def __init__(self, adam: Optimizer, zero: Any):
        self.adam = adam

    def weight(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.detach()

    def state(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        value: Tensor = self.adam.state[parameter][key]
        return value

    def updates(self) -> Tensor:
        return _step_of(self.adam)

    def put_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        parameter.data.copy_(weight)

    def put_state(self, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        self.adam.state[parameter] = {
            key: value.to(parameter.device, copy=True) for key, value in states.items()
        }

    def settle(self) -> None:
        pass


class Flat:
    """Stages 1 and 2: weights are whole; each rank updates one stretch of them, laid end to end."""

    def __init__(self, adam: Optimizer, zero: Any):
        self.adam, self.zero = adam, zero

    def weight(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.detach()

    def state(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if (fragment := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            (stretch,) = self.zero.single_partition_of_fp32_groups
            own = fragment.hp_fragment_address
            there = fragment.lp_fragment_address
            whole.narrow(0, there.start, there.numel).copy_(
                self.adam.state[stretch][key].narrow(0, own.start, own.numel)
            )
        # As integers: adding zeros keeps every bit, also of -0.0.
        dist.reduce(whole.view(torch.int32), dst=0)
        return whole.view_as(parameter) if dist.get_rank() == 0 else None

    def updates(self) -> Tensor:
        return _step_of(self.adam)

    def put_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        parameter.data.copy_(weight)

    def put_state(self, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        (stretch,) = self.zero.single_partition_of_fp32_groups
        kept = _ensure_state(self.adam, stretch, states["step"])
        if (fragment := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            own, there = fragment.hp_fragment_address, fragment.lp_fragment_address
            for key in STATES:
                part = states[key].flatten().narrow(0, there.start, there.numel)
                kept[key].narrow(0, own.start, own.numel).copy_(part)

    def settle(self) -> None:
        self.zero.refresh_fp32_params()


class Sharded:
    """Stage 3: each rank holds an equal shard of every parameter, the last one padded."""

    def __init__(self, adam: Optimizer, zero: Any):
        self.adam, self.zero = adam, zero

    def weight(self, parameter: nn.Parameter) -> Tensor | None:
        return gather_shards(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]

    def state(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        from deepspeed.utils import safe_get_local_optimizer_state

        return gather_shards(parameter, safe_get_local_optimizer_state(parameter, key))

    def updates(self) -> Tensor:
        return _step_of(self.adam)

    def put_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(weight)

    def put_state(self, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for stretch in self.zero.fp32_partitioned_groups_flat:
            _ensure_state(self.adam, stretch, states["step"])
        for key in STATES:
            safe_set_local_optimizer_state(parameter, shard_of(parameter, states[key]), key)

    def settle(self) -> None:
        self.zero.refresh_fp32_params()


STORAGE: dict[int, Callable[[Optimizer, Any], Storage]] = {0: Whole, 1: Flat, 2: Flat, 3: Sharded}


def shard_of(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, padded with zeros; (ds_tensor.numel(),)."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = min(size * dist.get_rank(), whole.numel())
    part = whole.flatten()[start : start + size]
    shard = torch.zeros(size, device=parameter.device)
    shard[: part.numel()].copy_(part)
    return shard


def gather_shards(parameter: nn.Parameter, shard: Tensor) -> Tensor | None:
    """The whole tensor on rank 0 from every rank's shard."""
    shard = shard.detach().flatten().contiguous()
    first = dist.get_rank() == 0
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())] if first else None
    dist.gather(shard, parts, dst=0)
    return _joined(parameter, torch.cat(parts)) if parts is not None else None


def share_shards(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """The whole tensor on every rank from every rank's shard."""
    shard = shard.detach().flatten().contiguous()
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)
    return _joined(parameter, torch.cat(parts))


def _joined(parameter: nn.Parameter, padded: Tensor) -> Tensor:
    shape, numel = parameter.ds_shape, parameter.ds_numel  # type: ignore[attr-defined]
    return padded[:numel].view(shape)


def _ensure_state(adam: Optimizer, stretch: Tensor, step: Tensor) -> dict[str, Tensor]:
    """Adam's state of a stretch of weights, zero where there was none, with `step` set."""
    state: dict[str, Tensor] = adam.state[stretch]
    for key in STATES:
        if key not in state:
            state[key] = torch.zeros_like(stretch)
    state["step"] = step.to(stretch.device, copy=True)
    return state


def _step_of(adam: Optimizer) -> Tensor:
    step: Tensor = next(iter(adam.state.values()))["step"]
    return step
