"""Describes this rank's own device. A rank asks about no other: CUDA would open a context there."""

from typing import NamedTuple

import torch


class Device(NamedTuple):
    name: str
    """ "cpu" without a GPU."""
    id: str
    """The GPU's UUID, by which two ranks on one GPU are recognised; "cpu" without a GPU."""
    capability: tuple[int, int] | None
    """The compute capability; None without a GPU."""


class Memory(NamedTuple):
    """Bytes of the GPU; without one, of the host."""

    free: int
    total: int


def default_device() -> torch.device:
    """Returns the GPU that this process sees first, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device("cpu", "cpu", None)
    properties = torch.cuda.get_device_properties(device)
    id = str(getattr(properties, "uuid", device))
    return Device(properties.name, id, (properties.major, properties.minor))


def memory(device: torch.device) -> Memory:
    """Returns the device's memory. Raises RuntimeError if the driver refuses to answer."""
    if device.type != "cuda":
        import psutil  # drawing from an exported folder works without it

        host = psutil.virtual_memory()
        return Memory(host.available, host.total)
    return Memory(*torch.cuda.mem_get_info(device))
