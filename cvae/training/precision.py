"""The dtype policy, in one place.

Weights, optimizer state, reductions, KL and likelihood are fp32. Only the matrix products and convolutions
of encoder and decoder run in the precision chosen here, by autocast.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cvae.errors import UserError

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(wanted: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 for training.precision on this device.

    auto: bf16 where the hardware has it, fp16 with loss scaling on older GPUs, fp32 on CPUs. By compute
    capability: torch.cuda.is_bf16_supported() is true on a V100 too, through slow emulation.
    Raises UserError for fp16 on a CPU.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("training.precision = 'fp16' needs a GPU; on a CPU use fp32 or bf16")
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_HALF[precision])
