"""The checks, the most important first, each with the seconds that it takes on an H100."""

from typing import NamedTuple


class Check(NamedTuple):
    name: str
    target: str
    """module:function in this package."""
    seconds: int
    what: str
    arguments: tuple[str, ...] = ()


_ALL = (
    Check("device", "device:device", 10, "PyTorch has code for this GPU, and it computes"),
    Check("arithmetic", "numerics:arithmetic", 12, "fp32 is fp32: TF32 is on only if asked for"),
    Check("losses-conv", "numerics:losses", 15, "50 steps in each precision", ("conv",)),
    Check("losses-resnet", "numerics:losses", 25, "50 steps in each precision", ("resnet",)),
    Check("losses-ldm", "numerics:losses", 45, "50 steps in each precision", ("ldm",)),
    Check("not-finite", "safety:not_finite", 25, "a NaN ends the run at its step, unsaved"),
    Check("resume", "resume:resume", 45, "killed, resumed: the same bits"),
    Check("compile", "numerics:compiled", 40, "training.compile on and off"),
)
CHECKS = {check.name: check for check in _ALL}
