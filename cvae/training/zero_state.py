"""Weights and optimizer state under each ZeRO stage, gathered to whole tensors and set from them.

All ranks call these functions together, parameter by parameter in the same order. A gathered tensor is whole on
rank 0 and None elsewhere: only the rank that writes ever holds two of them.

DeepSpeed's own safe_get_full_* would give whole tensors to every rank, and turn -0.0 into 0.0 in stages 1 and 2.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

STATES = ("exp_avg", "exp_avg_sq")


class Whole:
    """Stage 0: every rank holds everything."""

    def __init__(self, adam: Optimizer, zero: Any):
        """zero: DeepSpeed's ZeRO optimizer; None in stage 0."""
        self.adam, self.zero = adam, zero

    def weight(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns the whole weight on rank 0."""
        return parameter.detach()

    def state(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        """Returns exp_avg or exp_avg_sq of the whole parameter on rank 0."""
        value: Tensor = self.adam.state[parameter][key]
        return value

    def updates(self) -> Tensor:
        """Returns the number of updates so far: Adam's `step`."""
        step: Tensor = next(iter(self.adam.state.values()))["step"]
        return step

    def put_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Sets this rank's part from the whole weight."""
        parameter.data.copy_(weight)

    def put_state(self, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        """Sets this rank's part of Adam's state from whole ones; states: step and STATES."""
        self.adam.state[parameter] = {
            key: value.to(parameter.device, copy=True) for key, value in states.items()
        }

    def settle(self) -> None:
        """Takes over the weights that were put; called once after the last."""

    def _stretch_state(self, stretch: Tensor, step: Tensor) -> dict[str, Tensor]:
        """Returns Adam's state of a stretch of weights, zero if it was new, with `step` set."""
        state: dict[str, Tensor] = self.adam.state[stretch]
        for key in STATES:
            if key not in state:
                state[key] = torch.zeros_like(stretch)
        state["step"] = step.to(stretch.device, copy=True)
        return state


class Flat(Whole):
    """Stages 1 and 2: weights are whole; each rank updates one stretch of them, laid end to end."""

    def state(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if (fragment := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            (stretch,) = self.zero.single_partition_of_fp32_groups
            inside, target = fragment.hp_fragment_address, fragment.lp_fragment_address
            part = self.adam.state[stretch][key].narrow(0, inside.start, inside.numel)
            whole.narrow(0, target.start, target.numel).copy_(part)
        # As integers: adding zeros keeps every bit, also of -0.0.
        dist.reduce(whole.view(torch.int32), dst=0)
        return whole.view_as(parameter) if dist.get_rank() == 0 else None

    def put_state(self, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        (stretch,) = self.zero.single_partition_of_fp32_groups
        state = self._stretch_state(stretch, states["step"])
        if (fragment := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            inside, source = fragment.hp_fragment_address, fragment.lp_fragment_address
            for key in STATES:
                part = states[key].flatten().narrow(0, source.start, source.numel)
                state[key].narrow(0, inside.start, inside.numel).copy_(part)

    def settle(self) -> None:
        self.zero.refresh_fp32_params()


class Sharded(Flat):
    """Stage 3: each rank holds an equal shard of every parameter, the last one padded."""

    def weight(self, parameter: nn.Parameter) -> Tensor | None:
        return from_shards(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]

    def state(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        from deepspeed.utils import safe_get_local_optimizer_state

        return from_shards(parameter, safe_get_local_optimizer_state(parameter, key))

    def put_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(weight)

    def put_state(self, parameter: nn.Parameter, states: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for stretch in self.zero.fp32_partitioned_groups_flat:
            self._stretch_state(stretch, states["step"])
        for key in STATES:
            safe_set_local_optimizer_state(parameter, shard_of(parameter, states[key]), key)


STORAGE: dict[int, type[Whole]] = {0: Whole, 1: Flat, 2: Flat, 3: Sharded}


def shard_of(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Returns this rank's shard of a whole tensor, padded with zeros; (ds_tensor.numel(),)."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = min(size * dist.get_rank(), whole.numel())
    part = whole.flatten()[start : start + size]
    shard = torch.zeros(size, device=parameter.device)
    shard[: part.numel()].copy_(part)
    return shard


def from_shards(parameter: nn.Parameter, shard: Tensor, everywhere: bool = False) -> Tensor | None:
    """Returns the whole tensor from every rank's shard: on rank 0, or `everywhere`; None elsewhere."""
    shard = shard.detach().flatten().contiguous()
    receives = everywhere or dist.get_rank() == 0
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())] if receives else None
    if everywhere:
        dist.all_gather(parts, shard)
    else:
        dist.gather(shard, parts, dst=0)
    if parts is None:
        return None
    shape, numel = parameter.ds_shape, parameter.ds_numel  # type: ignore[attr-defined]
    return torch.cat(parts)[:numel].view(shape)
