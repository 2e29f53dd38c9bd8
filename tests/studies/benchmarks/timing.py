"""Measures one process: steps per second, memory, and the machine's peaks."""

import resource
import time
from collections.abc import Callable

import torch
from torch import nn

from cvae.distributed import precision
from cvae.models.cvae import flops

Step = Callable[[], object]
_WARM_UP = 4  # allocations, threads' start, compilation
_MATRIX = {"cuda": 8192, "cpu": 2048}
_MAPS = {"cuda": (64, 256, 64), "cpu": (16, 128, 64)}  # batch, channels, height and width
_PEAK_S = 1.5


def steps_per_second(step: Step, seconds: float, device: torch.device, multiple: int = 1) -> float:
    """Returns the rate after some warm-up steps. multiple: the number of counted steps is a multiple of this."""
    for _ in range(max(_WARM_UP, multiple)):
        step()
    _wait(device)
    began, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - began < seconds:
        for _ in range(multiple):
            step()
        done += multiple
        # A GPU's queue would run ahead of the clock.
        if device.type == "cuda" and done % 8 == 0:
            _wait(device)
    _wait(device)
    return done / (time.perf_counter() - began)


def peak_memory(device: torch.device) -> int:
    """Returns the peak in bytes: of the GPU's allocator, or of this process and its largest child."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return 1024 * sum(resource.getrusage(kind).ru_maxrss for kind in kinds)


def peaks(name: str, device: torch.device) -> dict[str, float]:
    """Returns the FLOP/s of a large matrix product, and of a 3×3 convolution with its backward pass."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    size = _MATRIX[device.type]
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    batch, channels, side = _MAPS[device.type]
    convolution = nn.Conv2d(channels, channels, 3, padding=1).to(device)
    maps = torch.randn(batch, channels, side, side, device=device, requires_grad=True)

    def product() -> None:
        torch.mm(left, right)

    def convolve() -> None:
        with precision.autocast(name, device):
            output = convolution(maps)
        torch.autograd.backward(output, torch.ones_like(output))

    product_flops = 2 * size**3
    convolve_flops = flops(convolve)
    return {
        "matrix_product": product_flops * steps_per_second(product, _PEAK_S, device),
        "convolution": convolve_flops * steps_per_second(convolve, _PEAK_S, device),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
