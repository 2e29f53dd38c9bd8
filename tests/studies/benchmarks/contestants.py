"""What is measured beside the training loop, each as a job of its own on the machine that trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cvae.config.experiment import Experiment, load_experiment
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import ExperimentData, open_data
from cvae.data.feed import MicroBatch, micro_batches
from cvae.distributed import precision
from cvae.distributed.ranks import connect
from cvae.files.paths import write_atomically
from cvae.models.cvae import build_model
from cvae.training.optimization import build_adam
from tests.studies.benchmarks import timing
from workflows.jobs.scaling_model import flops_per_image, meta_model


class Subject(NamedTuple):
    """The task that a contestant gets."""

    experiment: Experiment
    data: ExperimentData
    precision: str
    device: torch.device
    coco: Path | None
    """An official MS COCO download, for contestants that read JPEGs."""


class Contest(NamedTuple):
    """One contestant's loop, ready to run."""

    step: timing.Step
    batch_size: int
    multiple: int = 1
    """The number of timed steps is a multiple of this."""


def measure(name: str, experiment: str, seconds: float, coco: Path | None, result: Path) -> None:
    """Writes images_per_second and peak_memory_bytes to `result`; for the bare step also its FLOPs and peaks."""
    from tests.studies.benchmarks.peers import PEERS

    plan = load_experiment(Path(experiment))
    with connect() as ranks:
        chosen = precision.establish(plan.training, ranks.device)
        subject = Subject(plan, open_data(plan), chosen, ranks.device, coco)
        build: Callable[[Subject], Contest] = bare if name == BARE else PEERS[name].build
        contest = build(subject)
        rate = timing.steps_per_second(contest.step, seconds, ranks.device, contest.multiple)
        measured: dict[str, Any] = {
            "images_per_second": rate * contest.batch_size,
            "peak_memory_bytes": timing.peak_memory(ranks.device),
        }
        if name == BARE:
            data = subject.data
            model = meta_model(plan, data.image_shape, data.condition_dim)
            measured["flops_per_image"] = flops_per_image(model)
            measured["peaks"] = timing.peaks(chosen, ranks.device)
            measured["precision"] = chosen
    write_atomically(result, json.dumps(measured))


BARE = "bare step"


def bare(subject: Subject) -> Contest:
    """Returns forward, backward and Adam on one resident batch in the same precision: the model's own limit."""
    experiment, data, device = subject.experiment, subject.data, subject.device
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    optimizer = build_adam(model.to(device), experiment.optimizer)
    forward = torch.compile(model, dynamic=False) if experiment.training.compile else model
    batch_size = experiment.training.global_batch_size
    batches = resident(subject, model.latent_shape)

    def step() -> None:
        for batch in batches:
            with precision.autocast(subject.precision, device):
                elbo = forward(*batch)
            torch.autograd.backward((elbo.recon_loss + elbo.kl_penalty).sum() / batch_size)
        optimizer.step()
        optimizer.zero_grad()

    return Contest(step, batch_size)


def resident(subject: Subject, latent_shape: tuple[int, ...]) -> list[MicroBatch]:
    """Returns the run's first batch, on the device."""
    experiment, data = subject.experiment, subject.data
    batch_size = experiment.training.global_batch_size
    order = BatchOrder(experiment.seed, data.train_rows, batch_size, latent_shape)
    micro = experiment.training.micro_batch_size
    share = slice(0, batch_size)
    return micro_batches(data, data.train, order.batch(0), share, micro, subject.device)
