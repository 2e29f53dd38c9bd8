"""Learning rate and beta as pure functions of the step: nothing to save, nothing to resume."""

import math

from cvae.config.experiment import Model, Optimizer


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """The rate of the update number `step`, counted from 0, of total_steps.

    Linear warm-up over warmup_steps, then constant, linear or half a cosine (Loshchilov & Hutter 2017,
    eq. 5, without restarts); the last two reach 0 just after the last step.
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
    """beta of the update number `step`, counted from 0: a straight line from 0 over beta_warmup_steps.

    Bowman et al. 2016, section 3.1; Sønderby et al. 2016, section 2.3.
    """
    if step < model.beta_warmup_steps:
        return model.beta * (step + 1) / model.beta_warmup_steps
    return model.beta
