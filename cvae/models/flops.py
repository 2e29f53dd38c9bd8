"""Counts the floating point operations of a training step."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def flops(step: Callable[[], object]) -> int:
    """Floating point operations of matrix products and convolutions in one step, both passes."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
