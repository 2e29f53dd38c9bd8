"""Averaged weights: an exponential moving average of a model's parameters, beside them."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · model; buffers are copied."""
    weights: list[Tensor] = list(model.parameters())
    averages: list[Tensor] = list(average.parameters())
    torch._foreach_lerp_(averages, weights, 1 - decay)
    copy_buffers(average, model)


def copy_buffers(target: nn.Module, source: nn.Module) -> None:
    for mine, theirs in zip(target.buffers(), source.buffers(), strict=True):
        mine.copy_(theirs)
