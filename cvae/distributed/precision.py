"""The dtype policy and the choice of kernels, in one place.

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


def resolve(wanted: str, device: torch.device) -> str:
    """Returns fp32, tf32, bf16 or fp16 for training.precision on this device.

    auto: bf16 where the hardware has it, fp16 with loss scaling on older GPUs, fp32 on CPUs. By compute
    capability: torch.cuda.is_bf16_supported() is true on a V100 too, through slow emulation.
    Raises UserError for fp16 on a CPU, and for tf32 on a device that has none.
    """
    name, _, capability = describe(device)
    if capability is None and wanted in ("fp16", "tf32"):
        raise UserError(f"training.precision = '{wanted}' needs a GPU; on a CPU use fp32 or bf16")
    if wanted == "tf32" and capability is not None and capability < _AMPERE:
        has = ".".join(map(str, capability))
        raise UserError(
            "training.precision = 'tf32' needs a GPU of compute capability 8.0 or more (A100 and later), and"
            f" {name} has {has}; use fp16 or fp32"
        )
    if wanted != "auto":
        return wanted
    if capability is None:
        return "fp32"
    return "bf16" if capability >= _AMPERE else "fp16"


def resolve_to_measure(wanted: str, device: torch.device) -> str:
    """Returns the same, but fp32 on a device that lacks what the run was trained in, as a CPU lacks fp16."""
    try:
        return resolve(wanted, device)
    except UserError:
        return "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    if precision not in _HALF:
        return nullcontext()
    return torch.autocast(device.type, dtype=_HALF[precision])


def overflow(gradients: list[Tensor], parts: int = 1) -> None:
    """Makes inf what is beyond fp16 in fp32 gradients, so that the loss scaler skips this update.

    gradients: summed over the ranks, still scaled, and divided by `parts`. On one rank fp16 itself overflows
    there; of many ranks each has a smaller sum, and would make an update that one rank skips.
    """
    # fp32 ends at 2^128, fp16 at 2^16. Numbers that are smaller come back as they were.
    factor = 2.0**112 * parts
    torch._foreach_mul_(gradients, factor)
    torch._foreach_mul_(gradients, 1 / factor)


def before_cuda(training: Training) -> None:
    """Sets what cuBLAS reads only once. Called before this process uses a GPU."""
    if training.deterministic:
        # With a workspace of fixed size cuBLAS adds up in one order ("Results reproducibility" in its manual).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def establish(training: Training, device: torch.device, measures: bool = False) -> str:
    """Sets PyTorch's switches for this process as the experiment says; returns the resolved precision.

    What runs outside of autocast, as drawing and most measures do, is fp32 on every GPU unless tf32 was chosen:
    by default PyTorch would use TF32 in convolutions alone, and numbers would depend on the GPU's generation.
    measures: for an evaluation, whose precision is resolve_to_measure's, and in which an operation that has no
    deterministic form is reported instead of refused.
    """
    precision = (resolve_to_measure if measures else resolve)(training.precision, device)
    before_cuda(training)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.use_deterministic_algorithms(training.deterministic, warn_only=measures)
    torch.backends.cudnn.deterministic = training.deterministic
    # Tries cuDNN's algorithms for each new shape and keeps the fastest: which one that is depends on the moment.
    torch.backends.cudnn.benchmark = not training.deterministic and device.type == "cuda"
    return precision
