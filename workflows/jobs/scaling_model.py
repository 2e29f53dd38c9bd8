"""A model of scale: how long a step takes on many GPUs, from one GPU's rate and the links between them."""

from typing import TYPE_CHECKING, NamedTuple

from cvae.config.experiment import Experiment
from slurm.cluster_file import ClusterConfig, Placement
from workflows.terminal.formatting import duration

if TYPE_CHECKING:  # torch: seconds
    from cvae.models.backbone import ImageShape

# DDP adds up gradients in buckets of so many bytes, the last layers' first: all but the last bucket may travel
# while the backward pass goes on.
_BUCKET_BYTES = 25 * 2**20
# Of a step's operations: the backward pass has two products for each of the forward's one.
_FORWARD_SHARE = 1 / 3


class Expected(NamedTuple):
    images_per_second: float
    """Of all ranks together."""
    efficiency: float
    """Beside as many ranks that need not talk."""


def expect(
    placement: Placement,
    batch_size: int,
    images_per_second: float,
    gradient_bytes: float,
    inside_bytes_s: float,
    between_bytes_s: float,
) -> Expected:
    """One step of data-parallel training.

    images_per_second: of one rank alone. inside, between: bytes a second that the links of a node's ranks, and
    those of two nodes, carry one way. In a ring of W ranks each link carries 2 (W − 1) / W of the gradient
    (Patarasuk and Yuan 2009, section 3), at the pace of the slowest. It hides behind the backward pass but for the
    last bucket.
    """
    ranks = placement.world_size
    compute = -(-batch_size // ranks) / images_per_second
    slowest = between_bytes_s if placement.nodes > 1 else inside_bytes_s
    talk = 2 * (ranks - 1) / ranks * gradient_bytes / slowest
    last = min(1.0, _BUCKET_BYTES / gradient_bytes) * talk
    backward = (1 - _FORWARD_SHARE) * compute
    step = compute - backward + max(backward, talk - last) + last
    return Expected(batch_size / step, compute / step)


def expected_fact(
    config: ClusterConfig,
    placement: Placement,
    experiment: Experiment,
    shape: "ImageShape",
    condition_dim: int,
    total_steps: int,
) -> str | None:
    """For the plan; None where the cluster's file does not say how quick its GPUs are."""
    if config.tflops_per_gpu is None:
        return None
    parameters, operations = work(experiment, shape, condition_dim)
    batch_size = experiment.training.global_batch_size
    found = expect(
        placement,
        batch_size,
        config.tflops_per_gpu * 1e12 / operations,
        4 * parameters,
        config.inside_gbyte_s * 1e9,
        config.between_gbit_s * 1e9 / 8,
    )
    seconds = total_steps * batch_size / found.images_per_second
    gpu_hours = seconds / 3600 * placement.world_size
    return (
        f"{found.images_per_second:,.0f} images/s, {duration(seconds)}, {gpu_hours:,.1f} GPU hours"
        f" (a model: GPUs at {config.tflops_per_gpu:g} TFLOP/s, {found.efficiency:.0%} parallel efficiency)"
    )


def work(experiment: Experiment, shape: "ImageShape", condition_dim: int) -> tuple[int, float]:
    """Parameters, and floating point operations an image of a training step, counted without computing."""
    import torch

    from cvae.models.cvae import build_model
    from cvae.models.flops import flops

    with torch.device("meta"):
        model = build_model(experiment.model, shape, condition_dim, experiment.seed)
        images = torch.zeros(1, *shape, dtype=torch.uint8)
        condition = torch.zeros(1, condition_dim) if condition_dim else None
        noise = torch.zeros(1, *model.latent_shape)

        def step() -> None:
            elbo = model(images, condition, noise)
            torch.autograd.backward((elbo.recon_loss + elbo.kl_penalty).sum())

        return model.n_parameters(), flops(step)
