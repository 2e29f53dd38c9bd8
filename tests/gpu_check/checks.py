"""The checks, the most important first, each with the seconds that it may take on an H100."""

from typing import NamedTuple


class Check(NamedTuple):
    name: str
    target: str
    """module:function in this package."""
    seconds: int
    what: str
    arguments: tuple[str, ...] = ()


_ALL = (
    Check("device", "device:device", 6, "PyTorch has code for this GPU, and it computes"),
    Check("arithmetic", "numerics:arithmetic", 10, "fp32 is fp32: TF32 is on only if asked for"),
    Check("losses-conv", "numerics:losses", 15, "50 steps in each precision", ("conv",)),
    Check("losses-resnet", "numerics:losses", 25, "50 steps in each precision", ("resnet",)),
    Check("losses-ldm", "numerics:losses", 45, "50 steps in each precision", ("ldm",)),
    Check("not-finite", "safety:not_finite", 20, "a NaN ends the run at its step, unsaved"),
    Check("overflow", "safety:overflow", 15, "loss scaling in fp16"),
    Check("resume", "resume:resume", 30, "killed and resumed: the same bits"),
    Check("contexts", "contexts:contexts", 20, "one CUDA context for each rank"),
    Check("collectives", "engines:collectives", 25, "NCCL, or gloo on a CPU"),
    Check("peaks", "speed:peaks", 15, "what the device reaches"),
    Check("speed", "speed:speed", 50, "the loop beside the bare step", ("pixels",)),
    Check("deepspeed", "engines:deepspeed", 45, "ZeRO 0 to 3 beside DDP"),
    Check("largest", "largest:largest", 45, "the largest batches that fit"),
    Check("compile", "numerics:compiled", 30, "training.compile on and off"),
    Check("speed-large", "speed:speed", 45, "the same with large images", ("large_pixels",)),
    Check("published", "peers:published", 50, "the paper's loop"),
)
CHECKS = {check.name: check for check in _ALL}
