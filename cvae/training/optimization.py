"""The optimizer, its learning rate, beta, and averaged weights: the same under every engine.

Learning rate and beta are pure functions of the step: there is nothing to save and nothing to resume.
"""

import math

import torch
from torch import nn

from cvae.config.experiment import Model, Optimizer


def build_adam(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=True,
    )


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """Returns the learning rate of the update number `step`, counted from 0, of total_steps.

    It warms up linearly over warmup_steps; then it is constant, linear or half a cosine (Loshchilov & Hutter
    2017, eq. 5, without restarts). The last two reach 0 just after the last step.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    span = max(1, total_steps - optimizer.warmup_steps)
    progress = min(1.0, (step - optimizer.warmup_steps) / span)
    if optimizer.schedule == "cosine":
        return optimizer.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if optimizer.schedule == "linear":
        return optimizer.lr * (1 - progress)
    return optimizer.lr


def kl_weight(model: Model, step: int) -> float:
    """Returns beta of the update number `step`, counted from 0: it rises linearly over beta_warmup_steps.

    Bowman et al. 2016, section 3.1; Sønderby et al. 2016, section 2.3.
    """
    if step < model.beta_warmup_steps:
        return model.beta * (step + 1) / model.beta_warmup_steps
    return model.beta


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Sets average ← decay · average + (1 − decay) · model, and copies the buffers."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    copy_buffers(average, model)


def copy_buffers(target: nn.Module, source: nn.Module) -> None:
    for copy, original in zip(target.buffers(), source.buffers(), strict=True):
        copy.copy_(original)
