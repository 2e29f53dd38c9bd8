"""Some steps of the product's own engine, and what they gave."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cvae.config.experiment import Experiment
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import open_data
from cvae.data.feed import MicroBatch, micro_batches
from cvae.distributed.ranks import Ranks
from cvae.models.cvae import build_model
from cvae.training.engine import Engine, build_engine
from cvae.training.optimization import kl_weight, learning_rate


class Curve(NamedTuple):
    losses: list[float]
    """Over the global batch, in nats an image."""
    norms: list[float]
    """Of the whole gradient before clipping."""
    engine: Engine
    settling_s: float
    """Before the first step: compilation, DDP's buckets."""
    step_s: float
    """Median of the second half's steps."""


def curve(
    experiment: Experiment,
    ranks: Ranks,
    steps: int,
    before: Callable[[Engine], object] = lambda engine: None,
) -> Curve:
    """Trains for so many steps from the experiment's first weights. before: is shown the new engine."""
    data = open_data(experiment)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    engine = build_engine(model, experiment, ranks)
    before(engine)
    batch_size = experiment.training.global_batch_size
    order = BatchOrder(experiment.seed, data.train_rows, batch_size, model.latent_shape)
    share, micro = ranks.share(batch_size), experiment.training.micro_batch_size

    def batch(step: int) -> Any:
        return micro_batches(data, data.train, order.batch(step), share, micro, ranks.device)

    began = time.perf_counter()
    engine.settle(batch(0))
    wait(ranks.device)
    settling_s = time.perf_counter() - began
    losses, norms, times = [], [], []
    for step in range(steps):
        micros = batch(step)
        wait(ranks.device)
        began = time.perf_counter()
        lr = learning_rate(experiment.optimizer, step, 10**6)
        sums = engine.step(micros, lr, kl_weight(experiment.model, step))
        wait(ranks.device)
        times.append(time.perf_counter() - began)
        losses.append(float(ranks.sum(sums[:3].clone())[2]))
        norms.append(float(sums[3]))
    middle = sorted(times[steps // 2 :])[(steps - steps // 2) // 2]
    return Curve(losses, norms, engine, settling_s, middle)


def first_batch(experiment: Experiment, engine: Engine, ranks: Ranks) -> MicroBatch:
    """Returns the run's first batch, whole."""
    data, model = open_data(experiment), engine.eval_model
    batch_size = experiment.training.global_batch_size
    order = BatchOrder(experiment.seed, data.train_rows, batch_size, model.latent_shape)
    whole = slice(0, batch_size)
    return micro_batches(data, data.train, order.batch(0), whole, None, ranks.device)[0]


def deviation(one: list[float], other: list[float]) -> float:
    """Returns the largest relative difference; infinite if a value is not finite."""
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
    return worst if worst == worst else float("inf")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
