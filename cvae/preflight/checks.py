"""What must hold before the first step, as judgements on plain facts that the ranks have gathered."""

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

_CLOCK_WARNING_S, _CLOCK_ERROR_S = 1.0, 60.0
# Below that, gradients that take longer than a second are the network's fault.
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
    """What one rank knows. Sizes in bytes; what belongs to a host is told by its first rank alone."""

    rank: int
    host: str
    gpu: Gpu | None
    free_memory: int
    """Of the GPU; without one, of the host."""
    clock: float
    """Unix seconds at one moment that all ranks share, but for some milliseconds."""
    idle_gpus: int = 0
    """Devices of NVIDIA's driver on a host where PyTorch has no GPU."""
    torch: str = ""
    cuda: str | None = None
    free_disk: int | None = None
    write_error: str | None = None
    flock: bool = True
    """Whether the file system of the run's folder supports it there."""
    sees_folder: bool = True
    """Whether the file that rank 0 made is here too."""
    code: str | None = None
    code_root: str = ""
    submitted_code: str | None = None
    """The snapshot that the job was to run; None outside of jobs."""
    packages: dict[str, str | None] | None = None
    data: str | None = None


class Need(NamedTuple):
    """What a run takes at least, in bytes. 0: not known."""

    memory: int = 0
    """Of a rank: weights, gradients, Adam's two moments, averaged weights. Activations come on top."""
    disk: int = 0
    """What its checkpoints will take beyond those that are there."""
    gradient: int = 0
    begun: bool = False
    """Whether it was training before: better to go on without room for a checkpoint than not to go on."""


class Network(Plain):
    """An all-reduce over all ranks."""

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


Findings = Iterator[Finding]


def judge(facts: Sequence[Facts], need: Need, folder: str) -> list[Finding]:
    """Errors first. facts: in order of rank. folder: where the run writes."""
    found = [finding for check in _CHECKS for finding in check(facts, need, folder)]
    return sorted(dict.fromkeys(found), key=lambda finding: finding.level)


def judge_network(network: Network, need: Need) -> list[Finding]:
    seconds = need.gradient / network.bytes_per_s
    if network.bytes_per_s >= _SLOW_NETWORK or seconds < _SLOW_GRADIENT_S:
        return []
    speed = f"all-reduce runs at {network.bytes_per_s / 1e9:.2g} GB/s"
    text = f"{speed}: a step's gradients ({size(need.gradient)}) take {seconds:.1f} s"
    return [Finding(level="warning", text=f"{text}; is there a faster network interface?")]


def size(n: float) -> str:
    """ "3.2 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.1f} GB"


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a PyTorch that is built for these architectures has kernels for a GPU of that capability.

    Machine code runs on its own capability and later minors, but for those marked a; PTX on all later ones.
    """
    for target in built_for:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", target)
        if found is None:
            continue
        kind, mark = found[1], found[4]
        own = (int(found[2]), int(found[3]))
        if own == capability or (kind == "compute" and not mark and own <= capability):
            return True
        if kind == "sm" and mark != "a" and own[0] == capability[0] and own <= capability:
            return True
    return False


def _gpus(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    having = [fact for fact in facts if fact.gpu is not None]
    for fact in facts:
        if fact.gpu is None and having:
            yield _error(
                f"{fact.host} (rank {fact.rank}): PyTorch sees no GPU there, but one on {having[0].host};"
                " see what nvidia-smi says there, or keep the job away from that node"
            )
        if not having and fact.idle_gpus:
            why = "is a build for CPUs" if fact.cuda is None else "cannot use the driver"
            yield _warning(
                f"{fact.host}: there are {fact.idle_gpus} GPUs, but PyTorch {fact.torch} {why}:"
                " training on the CPU"
            )
    owners: dict[tuple[str, str], Facts] = {}
    for fact in having:
        assert fact.gpu is not None
        first = owners.setdefault((fact.host, fact.gpu.id), fact)
        if first is not fact:
            yield _error(
                f"{fact.host}: ranks {first.rank} and {fact.rank} have the same GPU;"
                " one GPU for each rank is needed: fewer --gpus or more --nodes"
            )
    kinds = {fact.gpu.name: fact.host for fact in having if fact.gpu is not None}
    if len(kinds) > 1:
        told = ", ".join(f"{name} on {host}" for name, host in kinds.items())
        yield _warning(f"different GPUs: {told}; every step waits for the slowest")


def _architecture(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    for fact in facts:
        gpu = fact.gpu
        if gpu is None or runs_on(gpu.capability, gpu.built_for):
            continue
        major, minor = gpu.capability
        old = gpu.capability < (7, 5)
        remedy = "a build for CUDA 12.6, as torch 2.10 has (`+cu126`)" if old else "a newer PyTorch"
        yield _error(
            f"{fact.host}: PyTorch {fact.torch} (CUDA {fact.cuda}) has no code for {gpu.name}, which is"
            f" sm_{major}{minor}: it is built for {' '.join(gpu.built_for)}; install {remedy}"
        )


def _memory(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    for fact in facts:
        # Ranks without a GPU share their host's memory.
        sharing = [x for x in facts if x.host == fact.host] if fact.gpu is None else []
        if fact in sharing[1:]:
            continue
        needed = need.memory * max(1, len(sharing))
        if fact.free_memory < needed:
            of = f"GPU of rank {fact.rank} has" if fact.gpu else "memory has"
            text = (
                f"{fact.host}: {of} {size(fact.free_memory)} free; weights, gradients and Adam's state"
                f" alone take {size(needed)}: end what else runs there, or use a smaller model or"
                " training.engine=deepspeed with training.deepspeed.zero_stage=3 on more GPUs"
            )
            # What runs there may be an earlier try of this very run, about to end.
            yield _warning(text) if need.begun else _error(text)


def _disk(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    short: Literal["error", "warning"] = "warning" if need.begun else "error"
    for fact in facts:
        if fact.write_error == os.strerror(errno.ENOSPC):
            yield Finding(level=short, text=f"{fact.host}: the disk of {folder} is full: make room")
            return  # it is the same file system everywhere
        if fact.write_error is not None:
            yield _error(
                f"{fact.host}: {folder} cannot be written: {fact.write_error};"
                " the run's folder must be writable on every node"
            )
        elif not fact.sees_folder and facts[0].write_error is None:
            yield _error(
                f"{fact.host}: {folder} is not the folder that {facts[0].host} has under that name;"
                " CVAE_HOME must be on a file system that all nodes share"
            )
        elif fact.free_disk is not None and fact.free_disk < need.disk:
            text = (
                f"{fact.host}: {size(fact.free_disk)} are free in {folder}; the run's checkpoints"
                f" take {size(need.disk)} more: make room, or lower checkpoint.keep"
            )
            yield Finding(level=short, text=text)
            return


def _locks(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    lacking = [fact.host for fact in facts if not fact.flock]
    if lacking:
        yield _warning(
            f"{', '.join(lacking)}: the file system of {folder} does not support flock; the locks used instead do"
            " not hold between hosts with flock and hosts without: mount it with locks (Lustre: -o flock)"
        )


def _clock(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    for fact in facts:
        off = fact.clock - facts[0].clock
        if abs(off) < _CLOCK_WARNING_S:
            continue
        ahead = "ahead of" if off > 0 else "behind"
        text = f"{fact.host}: its clock is {abs(off):.0f} s {ahead} that of {facts[0].host}; start its NTP service"
        yield _error(text) if abs(off) >= _CLOCK_ERROR_S else _warning(text)


def _packages(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    first = facts[0]
    for fact in facts:
        if fact.packages is None or first.packages is None:
            continue
        for name, version in fact.packages.items():
            wanted = first.packages.get(name)
            if version != wanted:
                yield _error(
                    f"{fact.host} has {name} {version}, {first.host} {wanted}: install the same on all"
                    " nodes, best in one environment on a shared file system"
                )


def _code(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    first = facts[0]
    for fact in facts:
        if fact.code is None:
            continue
        if fact.submitted_code not in (None, fact.code_root):
            yield _error(
                f"{fact.host} runs the code of {fact.code_root} instead of the submitted"
                f" {fact.submitted_code}: keep the cluster file's setup from changing PYTHONPATH"
            )
        elif fact.code != first.code:
            yield _error(
                f"{fact.host} has other code in {fact.code_root} than {first.host} in {first.code_root}"
                f" ({fact.code[:12]} and {str(first.code)[:12]}): it must be the same on all nodes"
            )


def _data(facts: Sequence[Facts], need: Need, folder: str) -> Findings:
    first = facts[0]
    for fact in facts:
        if fact.data != first.data:
            yield _error(
                f"{fact.host} has other data than {first.host} (digests {str(fact.data)[:12]} and"
                f" {str(first.data)[:12]}): prepare once, on a file system that all nodes share"
            )


def _error(text: str) -> Finding:
    return Finding(level="error", text=text)


def _warning(text: str) -> Finding:
    return Finding(level="warning", text=text)


_CHECKS: tuple[Callable[[Sequence[Facts], Need, str], Findings], ...] = (
    _gpus,
    _architecture,
    _memory,
    _disk,
    _locks,
    _code,
    _packages,
    _data,
    _clock,
)
