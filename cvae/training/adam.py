"""The one optimizer, the same under every engine."""

import torch
from torch import nn

from cvae.config.experiment import Optimizer


def build_adam(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=True,
    )
