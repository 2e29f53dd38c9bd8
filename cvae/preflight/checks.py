"""Judges the facts that the ranks have gathered before the first step."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

# How the operating system reports a full disk.
_FULL = os.strerror(errno.ENOSPC)
_SAME_PACKAGES = "install the same on all nodes, best in one environment on a shared file system"
_CLOCK_WARNING_S, _CLOCK_ERROR_S = 1.0, 60.0
# A network that is slower is reported if a gradient takes longer than a second.
_SLOW_NETWORK, _SLOW_GRADIENT_S = 1e9, 1.0


class Plain(BaseModel):
    """Travels between ranks and into files as JSON."""

    model_config = ConfigDict(frozen=True)


class Gpu(Plain):
    name: str
    id: str
    capability: tuple[int, int]
    built_for: list[str]
    """torch.cuda.get_arch_list(): sm_70 is machine code, compute_70 what the driver can still compile."""


class Facts(Plain):
    """The facts of one rank; sizes in bytes. Those from free_disk on are reported by a host's first rank alone."""

    rank: int
    host: str
    gpu: Gpu | None
    free_memory: int
    """Of the GPU; without one, of the host."""
    clock: float
    """Unix seconds at a moment that all ranks share within milliseconds."""
    idle_gpus: int = 0
    """The number of devices of NVIDIA's driver on a host on which PyTorch has no GPU."""
    torch: str = ""
    cuda: str | None = None
    data: str | None = None
    free_disk: int | None = None
    write_error: str | None = None
    flock: bool = True
    """Whether the file system of the run's folder supports flock on this host."""
    sees_folder: bool = True
    """Whether the file that rank 0 made is visible on this host."""
    code: str | None = None
    code_root: str = ""
    submitted_code: str | None = None
    """The snapshot that the job was to run; None outside of jobs."""
    packages: dict[str, str | None] | None = None


class Need(NamedTuple):
    """A run's needs in bytes at least; 0 if unknown."""

    memory: int = 0
    """Of a rank: weights, gradients, Adam's two moments, averaged weights. Activations come on top."""
    disk: int = 0
    """Of its checkpoints, beyond those that exist."""
    gradient: int = 0
    begun: bool = False
    """Whether it was training before: it had better go on without room for a checkpoint than not at all."""


class Network(Plain):
    """The measured all-reduce over all ranks."""

    latency_s: float
    bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds

    def __str__(self) -> str:
        return (
            f"{1e3 * self.latency_s:.2f} ms for 8 bytes,"
            f" {self.seconds:.3f} s for {size(self.bytes)}: {self.bytes_per_s / 1e9:.2g} GB/s"
        )


class Finding(Plain):
    level: Literal["error", "warning"]
    text: str


def judge(facts: Sequence[Facts], need: Need, folder: str) -> list[Finding]:
    """Returns the findings, errors first. facts: in order of rank. folder: the run writes there."""
    found: dict[Finding, None] = {}
    for fact in facts:
        found |= dict.fromkeys(_judge_gpu(fact, facts))
        found |= dict.fromkeys(_judge_host(fact, facts[0]))
        found |= dict.fromkeys(_judge_resources(fact, facts, need, folder))
    return sorted(found, key=lambda finding: finding.level)


def judge_network(network: Network, need: Need) -> list[Finding]:
    seconds = need.gradient / network.bytes_per_s
    if network.bytes_per_s >= _SLOW_NETWORK or seconds < _SLOW_GRADIENT_S:
        return []
    text = (
        f"all-reduce runs at {network.bytes_per_s / 1e9:.2g} GB/s: a step's gradients ({size(need.gradient)})"
        f" take {seconds:.1f} s; is there a faster network interface?"
    )
    return [Finding(level="warning", text=text)]


def size(n: float) -> str:
    """Returns a number of bytes as "3.2 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.1f} GB"


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Returns whether a PyTorch built for these architectures has kernels for a GPU of that capability.

    Machine code runs on its own capability and later minors, but for those marked a; PTX on all later ones.
    """
    for target in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", target)
        if match is None:
            continue
        kind, major, minor, mark = match.groups()
        own = (int(major), int(minor))
        if own == capability or (kind == "compute" and not mark and own <= capability):
            return True
        if kind == "sm" and mark != "a" and own[0] == capability[0] and own <= capability:
            return True
    return False


def _error(text: str) -> Finding:
    return Finding(level="error", text=text)


def _warning(text: str) -> Finding:
    return Finding(level="warning", text=text)


def _judge_gpu(fact: Facts, facts: Sequence[Facts]) -> Iterator[Finding]:
    gpu, host = fact.gpu, fact.host
    if gpu is None:
        if fact.idle_gpus:
            why = "is a build for CPUs" if fact.cuda is None else "cannot use the driver"
            idle = f"there are {fact.idle_gpus} GPUs, but PyTorch {fact.torch} {why}"
            yield _warning(f"{host}: {idle}: training on the CPU")
        return
    users = [x.rank for x in facts if x.gpu and (x.host, x.gpu.id) == (host, gpu.id)]
    if fact.rank != users[0]:
        yield _error(
            f"{host}: ranks {users[0]} and {fact.rank} have the same GPU; each needs one of its own: use fewer"
            " ranks per node or more nodes"
        )
    models = {x.gpu.name: f"{x.gpu.name} on {x.host}" for x in facts if x.gpu}
    if len(models) > 1:
        text = f"different GPUs: {', '.join(models.values())}"
        yield _warning(f"{text}; every step waits for the slowest")
    if not runs_on(gpu.capability, gpu.built_for):
        old = gpu.capability < (7, 5)
        build = "a build for CUDA 12.6, as torch 2.10 has (`+cu126`)" if old else "a newer PyTorch"
        yield _error(
            f"{host}: PyTorch {fact.torch} (CUDA {fact.cuda}) has no code for {gpu.name}, which is"
            f" sm_{''.join(map(str, gpu.capability))}: it is built for {' '.join(gpu.built_for)}; install {build}"
        )


def _judge_host(fact: Facts, first: Facts) -> Iterator[Finding]:
    """Compares a host with the first one."""
    remedies = dict.fromkeys(fact.packages or {}, _SAME_PACKAGES)
    own, wanted = dict(fact.packages or {}), dict(first.packages or {})
    remedies["data"] = "prepare once, on a file system that all nodes share"
    own["data"], wanted["data"] = fact.data, first.data
    if fact.submitted_code not in (None, fact.code_root):
        yield _error(
            f"{fact.host} runs the code of {fact.code_root} instead of the submitted {fact.submitted_code}: keep"
            " the cluster file's setup from changing PYTHONPATH"
        )
    elif fact.code is not None:
        remedies["code"] = (
            f"{fact.code_root} must hold the code of {first.host}'s {first.code_root}"
        )
        own["code"], wanted["code"] = fact.code, first.code
    for name, remedy in remedies.items():
        if own[name] != wanted.get(name):
            versions = [str(each.get(name))[:12] for each in (own, wanted)]
            yield _error(
                f"{fact.host} has {name} {versions[0]}, {first.host} {versions[1]}: {remedy}"
            )
    off = fact.clock - first.clock
    if abs(off) >= _CLOCK_WARNING_S:
        order = "ahead of" if off > 0 else "behind"
        text = f"{fact.host}: its clock is {abs(off):.0f} s {order} that of {first.host}; start its NTP service"
        yield _error(text) if abs(off) >= _CLOCK_ERROR_S else _warning(text)


def _judge_resources(
    fact: Facts, facts: Sequence[Facts], need: Need, folder: str
) -> Iterator[Finding]:
    first, host = facts[0], fact.host
    # A run that has begun may meet an earlier attempt of its own, about to end.
    lack = _warning if need.begun else _error
    # Ranks without a GPU share their host's memory, and the first of them reports it.
    sharing = [fact] if fact.gpu else [x for x in facts if x.host == host]
    memory = need.memory * len(sharing)
    if fact is sharing[0] and fact.free_memory < memory:
        owner = f"GPU of rank {fact.rank}" if fact.gpu else "memory"
        yield lack(
            f"{host}: {owner} has {size(fact.free_memory)} free; weights, gradients and Adam's state alone take"
            f" {size(memory)}: end what else runs there, or use a smaller model or training.engine=deepspeed with"
            " training.deepspeed.zero_stage=3 on more GPUs"
        )
    # All nodes share one file system: the first that finds it full reports it.
    full = [x for x in facts if x.write_error == _FULL]
    short = [x for x in facts if x.free_disk is not None and x.free_disk < need.disk]
    if fact in full[:1]:
        yield lack(f"{host}: the disk of {folder} is full: make room")
    elif fact in short[:1] and not full:
        yield lack(
            f"{host}: {size(fact.free_disk or 0)} are free in {folder}; the run's checkpoints take"
            f" {size(need.disk)} more: make room, or lower checkpoint.keep"
        )
    if fact.write_error not in (None, _FULL):
        yield _error(
            f"{host}: {folder} cannot be written: {fact.write_error}; the run's folder must be writable on every"
            " node"
        )
    elif not fact.sees_folder and first.write_error is None:
        yield _error(
            f"{host}: {folder} is not the folder that {first.host} has under that name; CVAE_HOME must be on a"
            " file system that all nodes share"
        )
    if not fact.flock:
        yield _warning(
            f"{host}: the file system of {folder} does not support flock; the locks used instead do not hold"
            " between hosts with flock and hosts without: mount it with locks (Lustre: -o flock)"
        )
