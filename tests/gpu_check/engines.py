"""Collectives, and DeepSpeed beside DDP: the same curve whatever adds the gradients up."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cvae.distributed.ranks import Ranks, connect
from tests.gpu_check import runs
from tests.gpu_check.curves import curve, deviation
from tests.gpu_check.findings import Finding, judged, needs, skipped
from tests.gpu_check.setting import Setting, allow_fp16_on_a_cpu

_STEPS = 50


def collectives(setting: Setting) -> Iterator[Finding]:
    """A process group of one, and of as many as there are GPUs (of two on a CPU)."""
    experiment = setting.experiment("conv")
    with connect() as ranks:
        plain = curve(experiment, ranks, _STEPS).losses
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            values = torch.arange(1.0, 1001.0, device=ranks.device)
            dist.all_reduce(values)
            total = float(values.sum())
            yield judged(
                f"{backend}, 1 rank: all-reduce",
                total == 500500.0,
                f"1 to 1,000 add up to {total:,.0f}",
                "500,500",
            )
            joined = Ranks(0, 1, ranks.device, dist.new_group(backend="gloo"))
            wrapped = curve(experiment, joined, _STEPS, _with_ddp).losses
            off = deviation(plain, wrapped)
            yield judged(
                f"{backend}, 1 rank: DDP beside the bare model",
                off <= 1e-5,
                f"{off:.1e} apart after {_STEPS} steps",
                "at most 1e-5: a sum over one rank changes nothing",
                deviation=off,
            )
        finally:
            dist.destroy_process_group()
    world_size = torch.cuda.device_count() if setting.has_gpu else 2
    if world_size < 2:
        yield skipped(f"{backend}, more ranks", "needs more than one GPU")
        return
    run = runs.new_run(
        "ranks", setting.experiment("conv", max_steps=_STEPS, log_every=1, precision="fp32")
    )
    runs.finish(runs.start(run, world_size))
    several = [line["metrics"]["train/loss"] for line in runs.lines(run, "step")]
    off = deviation(plain, several)
    yield judged(
        f"{backend}, {world_size} ranks beside 1",
        off <= 1e-3,
        f"{off:.1e} apart over {_STEPS} steps",
        "at most 1e-3: only the order of sums differs",
        deviation=off,
    )


def _with_ddp(engine: Any) -> None:
    """As DdpEngine does with more than one rank."""
    engine.parallel = DistributedDataParallel(engine.model, gradient_as_bucket_view=True)
    engine.parallel.broadcast_buffers = False


def deepspeed(setting: Setting) -> Iterator[Finding]:
    needs("deepspeed")
    # In fp16 both leave the same updates out, those that overflow at the first loss scales.
    names = ["fp32", "fp16"]
    if not setting.has_gpu:
        allow_fp16_on_a_cpu()
    with connect() as ranks:
        for name in names:
            ddp = curve(setting.experiment("conv", precision=name), ranks, _STEPS)
            limit = 1e-4 if ddp.engine.precision == "fp32" else 1e-2
            for stage in range(4):
                chosen = {"engine": "deepspeed", "deepspeed": {"zero_stage": stage}}
                found = curve(setting.experiment("conv", precision=name, **chosen), ranks, _STEPS)
                off = deviation(ddp.losses, found.losses)
                yield judged(
                    f"ZeRO {stage}, {found.engine.precision}, 1 rank, beside DDP",
                    off <= limit,
                    f"{off:.1e} apart over {_STEPS} steps, {1e3 * found.step_s:.2f} ms a step",
                    f"at most {limit:.0e}: the order of sums; DDP takes {1e3 * ddp.step_s:.2f} ms",
                    deviation=off,
                    step_s=found.step_s,
                    ddp_step_s=ddp.step_s,
                )
