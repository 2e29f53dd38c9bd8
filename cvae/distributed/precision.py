"""Chooses dtypes and kernels.

Weights, optimizer state, reductions, KL and likelihood are fp32. Only the matrix products and convolutions
of encoder and decoder run in the precision chosen here, by autocast or as TF32.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cvae.config.experiment import Training
from cvae.distributed.device import describe
from cvae.errors import UserError

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The first GPUs with bf16 and TF32 in hardware: A100 and its contemporaries.
_AMPERE = (8, 0)


def resolve(requested: str, device: torch.device) -> str:
    """Returns fp32, tf32, bf16 or fp16 for training.precision on this device.

    auto: bf16 if the hardware has it, fp16 with loss scaling on older GPUs, fp32 on CPUs. The compute capability
    decides: torch.cuda.is_bf16_supported() is true on a V100 too, through slow emulation.
    Raises UserError for fp16 on a CPU, and for tf32 on a device without it.
    """
    name, _, capability = describe(device)
    if capability is None:
        if requested in ("fp16", "tf32"):
            raise UserError(
                f"training.precision = '{requested}' needs a GPU; on a CPU use fp32 or bf16"
            )
        return "fp32" if requested == "auto" else requested
    if requested == "tf32" and capability < _AMPERE:
        has = ".".join(map(str, capability))
        raise UserError(
            "training.precision = 'tf32' needs a GPU of compute capability 8.0 or more (A100 and later), and"
            f" {name} has {has}; use fp16 or fp32"
        )
    if requested != "auto":
        return requested
    return "bf16" if capability >= _AMPERE else "fp16"


def resolve_to_measure(requested: str, device: torch.device) -> str:
    """Returns the same, but fp32 on a device without the run's precision, as a CPU lacks fp16."""
    try:
        return resolve(requested, device)
    except UserError:
        return "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    if precision not in _HALF:
        return nullcontext()
    return torch.autocast(device.type, dtype=_HALF[precision])


def overflow(gradients: list[Tensor], parts: int = 1) -> None:
    """Turns fp32 gradients beyond fp16's range into inf, so that the loss scaler skips this update.

    gradients: summed over the ranks, still scaled, and divided by `parts`. On one rank fp16 itself overflows
    at this point; each of many ranks has a smaller sum, and would make an update that one rank skips.
    """
    # fp32 ends at 2^128, fp16 at 2^16. Smaller numbers come back unchanged.
    factor = 2.0**112 * parts
    torch._foreach_mul_(gradients, factor)
    torch._foreach_mul_(gradients, 1 / factor)


def before_cuda(training: Training) -> None:
    """Sets the variable that cuBLAS reads only once; called before this process uses a GPU."""
    if training.deterministic:
        # With a workspace of fixed size cuBLAS adds up in one order ("Results reproducibility" in its manual).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def establish(training: Training, device: torch.device, measures: bool = False) -> str:
    """Sets PyTorch's switches for this process as the experiment requires; returns the resolved precision.

    Outside of autocast, as in drawing and most measures, everything is fp32 on every GPU unless tf32 was chosen:
    by default PyTorch would use TF32 in convolutions alone, and numbers would depend on the GPU's generation.
    measures: for an evaluation, which uses resolve_to_measure, and warns of an operation without a deterministic
    form instead of refusing it.
    """
    precision = (resolve_to_measure if measures else resolve)(training.precision, device)
    before_cuda(training)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.use_deterministic_algorithms(training.deterministic, warn_only=measures)
    torch.backends.cudnn.deterministic = training.deterministic
    # Keeps the fastest of cuDNN's algorithms for each new shape, which depends on the moment.
    torch.backends.cudnn.benchmark = not training.deterministic and device.type == "cuda"
    return precision
