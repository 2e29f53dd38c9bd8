"""Whether this PyTorch can compute on this GPU at all."""

from collections.abc import Iterator

import torch

from tests.gpu_check.findings import Finding, judged, measured
from tests.gpu_check.setting import Setting


def device(setting: Setting) -> Iterator[Finding]:
    if not setting.has_gpu:
        yield measured("", "no GPU: every check runs on the CPU, in the small size")
        return
    from cvae.preflight.checks import runs_on

    built_for = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield judged(
            f"GPU {index}: this PyTorch has code for it",
            runs_on((major, minor), built_for),
            f"sm_{major}{minor}",
            f"built for {' '.join(built_for)}",
        )
        left = torch.arange(64 * 64, dtype=torch.float64).reshape(64, 64).div(997).sin()
        there = left.to(f"cuda:{index}")
        off = float((there @ there.T).cpu().sub(left @ left.T).abs().max())
        yield judged(
            f"GPU {index}: a matrix product in fp64",
            off < 1e-12,
            f"differs from the CPU's by {off:.1e}",
            "at most 1e-12: 64 products of numbers below 1",
            deviation=off,
        )
