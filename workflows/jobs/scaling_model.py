"""Predicts the speed of training on many GPUs from one GPU's speed and the links between GPUs."""

from typing import TYPE_CHECKING, NamedTuple

from cvae.config.experiment import Experiment
from slurm.cluster_file import ClusterConfig, Placement
from workflows.terminal.formatting import duration

if TYPE_CHECKING:  # torch takes seconds to import
    from cvae.models.backbone import ImageShape
    from cvae.models.cvae import Cvae

# DDP reduces gradients in buckets of this size, the last layers' first: all but the last bucket can travel
# during the backward pass.
_BUCKET_BYTES = 25 * 2**20
# Of a step's operations: the backward pass has two products for each one of the forward pass.
_FORWARD_SHARE = 1 / 3


class Expected(NamedTuple):
    images_per_second: float
    """Of all ranks together."""
    efficiency: float
    """Relative to as many ranks without communication."""


def expect(
    placement: Placement,
    batch_size: int,
    images_per_second: float,
    gradient_bytes: float,
    inside_bytes_s: float,
    between_bytes_s: float,
) -> Expected:
    """Returns the expected speed of data-parallel training.

    images_per_second: of one rank alone. inside, between: bytes per second, one way, of the links within a node
    and of those between nodes. In a ring of W ranks each link carries 2 (W − 1) / W of the gradient (Patarasuk
    and Yuan 2009, section 3), and the slowest link sets the pace. All but the last bucket overlaps with the
    backward pass.
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
    config: ClusterConfig, placement: Placement, model: "Cvae", batch_size: int, total_steps: int
) -> str | None:
    """Returns the expected speed and duration; None if the cluster file does not give tflops_per_gpu."""
    if config.tflops_per_gpu is None:
        return None
    expected = expect(
        placement,
        batch_size,
        config.tflops_per_gpu * 1e12 / flops_per_image(model),
        4 * model.n_parameters(),
        config.inside_gbyte_s * 1e9,
        config.between_gbit_s * 1e9 / 8,
    )
    seconds = total_steps * batch_size / expected.images_per_second
    gpu_hours = seconds / 3600 * placement.world_size
    return (
        f"{expected.images_per_second:,.0f} images/s, {duration(seconds)}, {gpu_hours:,.1f} GPU hours"
        f" (a model: GPUs at {config.tflops_per_gpu:g} TFLOP/s, {expected.efficiency:.0%} parallel efficiency)"
    )


def meta_model(experiment: Experiment, shape: "ImageShape", condition_dim: int) -> "Cvae":
    """Returns the experiment's model on PyTorch's meta device: shapes without memory or computation."""
    import torch

    from cvae.models.cvae import build_model

    with torch.device("meta"):
        return build_model(experiment.model, shape, condition_dim, experiment.seed)


def flops_per_image(model: "Cvae") -> float:
    """Returns the floating point operations of a training step, per image. model: see meta_model()."""
    import torch

    from cvae.models.cvae import flops

    with torch.device("meta"):
        images = torch.zeros(1, *model.shape, dtype=torch.uint8)
        condition = torch.zeros(1, model.condition_dim) if model.condition_dim else None
        noise = torch.zeros(1, *model.latent_shape)

        def step() -> None:
            elbo = model(images, condition, noise)
            torch.autograd.backward((elbo.recon_loss + elbo.kl_penalty).sum())

        return flops(step)
