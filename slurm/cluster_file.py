"""The cluster file: where a job runs. Nothing in it changes a result (rule 1 of the design)."""

import os
import re
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from cvae.config import yaml_model
from cvae.config.yaml_model import Strict
from cvae.errors import UserError, cut
from cvae.files.paths import PROJECT_ROOT
from slurm.commands import Slurm

CLUSTERS = PROJECT_ROOT / "configs" / "clusters"


def _printable(text: str, allowed: str = "") -> str:
    odd = next((letter for letter in text if not (letter.isprintable() or letter in allowed)), None)
    if odd is not None:
        raise ValueError(f"should not hold the character {odd!r}")
    return text


def _line(text: str) -> str:
    """Accepts what reaches sbatch as a line of its own and is not taken for an option."""
    if not _printable(text).strip():
        raise ValueError("should not be empty; leave the key out, or write null")
    if text.startswith("-"):
        raise ValueError("should not begin with a dash")
    return text


def _word(text: str) -> str:
    if any(letter.isspace() for letter in _line(text)):
        raise ValueError("should be one word, without spaces")
    return text


def _variable(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise ValueError("should be a variable's name: letters, digits and _, no digit first")
    return name


# SLURM has 16 bits for CPUs, for the seconds of the signal and, by default, for nodes.
_MOST_16 = 65_533
Positive = Annotated[int, Field(gt=0, le=10**7)]
Small = Annotated[int, Field(gt=0, le=_MOST_16)]
Word = Annotated[str, AfterValidator(_word)]
Line = Annotated[str, AfterValidator(_line)]
# A block of several shell lines is as harmless as several entries.
ShellLines = Annotated[str, AfterValidator(lambda text: _printable(text, allowed="\n\t"))]
Variable = Annotated[str, AfterValidator(_variable)]
Value = Annotated[str, AfterValidator(lambda text: _printable(text, allowed="\t"))]
_LOCAL_KEYS = {"executor", "gpus_per_node", "env", "max_restarts", "start_s", "watchdog_s"}


class Placement(NamedTuple):
    """How many ranks run on each of how many hosts."""

    nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        return f"{count(self.nodes, 'node')} × {self.ranks_per_node} = {count(self.world_size, 'rank')}"


class ClusterConfig(Strict):
    executor: Literal["slurm", "local"] = Field(description="slurm: sbatch; local: this machine")
    slurm_conf: Line | None = Field(None, description="its slurm.conf; null: that of this host")
    partition: Word | None = Field(None, description="null: the cluster's default partition")
    account: Word | None = Field(None, description="who pays, if the site requires it")
    qos: Word | None = Field(None, description="quality of service, if the site requires it")
    constraint: Word | None = Field(None, description="node features, such as v100&32gb")
    nodes: Small | None = Field(None, description="most nodes of a job; null: as sinfo says")
    gpus_per_node: Small | None = Field(None, description="most GPUs of a node; null: all of them")
    gpu_type: Word | None = Field(None, description="type in SLURM's GRES, such as v100")
    cpus_per_gpu: Small | None = Field(None, description="cores per rank; null: the GPU's share")
    mem_per_gpu_gb: Positive | None = Field(None, description="null: the partition's default")
    time_limit_min: Positive | None = Field(None, description="null: the partition's own limit")
    grace_s: Small = Field(120, description="seconds before the time limit when the ranks save")
    max_restarts: int = Field(
        3, ge=0, le=10**6, description="restarts after a crash without a new checkpoint"
    )
    start_s: Positive | None = Field(
        None,
        description="seconds in which all ranks must have met, or none begins; null: 5 minutes and 30 s"
        " more for each node, as all read Python's files at once, perhaps from a cold file system",
    )
    watchdog_s: Positive | None = Field(
        None,
        description="seconds without a sign of life, or a step, of a rank after which the attempt ends;"
        " null: 2 minutes and 2 s more for each node, so that a file server may fail over",
    )
    exclusive: bool = Field(False, description="whole nodes, shared with nobody")
    tflops_per_gpu: float | None = Field(
        None,
        gt=0,
        description="of training on one GPU, measured by benchmark.py as loop/FLOP/s; predicts durations",
    )
    inside_gbyte_s: float = Field(50, gt=0, description="of the links inside a node, GB/s one way")
    between_gbit_s: float = Field(100, gt=0, description="of a node's link to others, Gb/s one way")
    setup: list[ShellLines] = Field(
        [],
        description="shell lines before srun, e.g. `module load cuda`; a failing one ends the job",
    )
    env: dict[Variable, Value] = Field({}, description="variables that setup does not override")

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "ClusterConfig":
        foreign = sorted(self.model_fields_set - _LOCAL_KEYS)
        if self.executor == "local" and foreign:
            raise ValueError(f"executor = 'local' has no {', '.join(foreign)}")
        # SLURM sends its signal up to a minute early.
        if self.time_limit_min is not None and self.grace_s + 60 >= 60 * self.time_limit_min:
            raise ValueError(
                f"grace_s = {self.grace_s} must be at least a minute shorter than"
                f" time_limit_min = {self.time_limit_min}"
            )
        if re.search(r"[:,()=]", self.gpu_type or ""):
            raise ValueError(f"gpu_type = {self.gpu_type!r} should be the type alone, as v100")
        return self

    def patience(self, nodes: int) -> dict[str, str]:
        """Returns the environment variables that set how long the ranks wait for each other."""
        start_s, watchdog_s = self.start_s or 300 + 30 * nodes, self.watchdog_s or 120 + 2 * nodes
        return {"CVAE_START_S": str(start_s), "CVAE_WATCHDOG_S": str(watchdog_s)}

    def slurm(self) -> Slurm:
        return Slurm(self.slurm_conf)


class Place(NamedTuple):
    """A cluster by its name, and why it was chosen."""

    name: str
    config: ClusterConfig
    why: str


def choose(name: str | None) -> Place:
    """Returns the named cluster; without a name SLURM if its controller answers, else this machine.

    Raises UserError if there is no such cluster, or its file is wrong.
    """
    if name is not None:
        return Place(name, load(name), "requested")
    # sbatch alone proves nothing: its package may be installed where there is no cluster.
    if Slurm(None).answers():
        return Place("slurm", load("slurm"), "a SLURM controller responds")
    return Place("local", load("local"), "no SLURM controller responds")


def load(name: str) -> ClusterConfig:
    path = CLUSTERS / f"{name}.yaml"
    if not os.path.isfile(path):
        names = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
        raise UserError(
            f"--cluster {cut(name, 100)}: no such cluster in {CLUSTERS}; there are {names}"
        )
    return yaml_model.load(path, ClusterConfig)


def split(nodes: int, gpus: int) -> Placement:
    """Returns a placement of `gpus` ranks in total. Raises UserError if they do not divide over the nodes."""
    if gpus % nodes:
        below, above = gpus - gpus % nodes, gpus + nodes - gpus % nodes
        near = " or ".join(f"--gpus {number}" for number in (below, above) if number)
        raise UserError(
            f"--gpus {gpus} is the total and does not divide over --nodes {nodes}; try {near}"
        )
    return Placement(nodes, gpus // nodes)


class TimeLimit(NamedTuple):
    """How long a job may run, in minutes."""

    requested: int | None = None  # By --time; it has precedence over the cluster file
    short: int | None = None
    """The most if nothing is requested: SLURM fills gaps with short jobs, and no user waits long."""

    def of(self, place: Place, partition_min: int | None = None, where: str = "") -> int | None:
        """Returns the limit, None for none. partition_min: that of the partition, which `where` names.

        Raises UserError if it exceeds that of the partition, or leaves no time to save.
        """
        config = place.config
        wanted = self.requested or config.time_limit_min
        # SLURM sends its signal up to a minute early.
        least = config.grace_s // 60 + 2
        if self.requested and self.requested < least:
            raise UserError(
                f"--time {self.requested}: grace_s = {config.grace_s} of cluster {place.name} must be at"
                f" least a minute shorter; request {least} minutes or more"
            )
        if wanted is not None and partition_min is not None and wanted > partition_min:
            name = "--time" if self.requested else "time_limit_min ="
            raise UserError(f"{name} {wanted}: {where} allows {partition_min} minutes")
        limit = wanted or partition_min
        if self.requested or self.short is None:
            return limit
        short = max(self.short, least)
        return short if limit is None else min(limit, short)


UNLIMITED = TimeLimit()


def fit(place: Place, requested: Placement, time: TimeLimit = UNLIMITED) -> ClusterConfig:
    """Returns the config of a SLURM cluster with its gaps filled by what SLURM says of the partition.

    Raises UserError if SLURM does not answer, or the cluster is smaller than requested.
    """
    config, slurm = place.config, place.config.slurm()
    slurm.require(place.name)
    sizes = slurm.node_sizes(config.partition, config.gpu_type)
    where = f"cluster {place.name}, partition {sizes[0].partition}"
    ranks = requested.ranks_per_node
    per_node = max(min(size.gpus, config.gpus_per_node or size.gpus) for size in sizes)
    if ranks > per_node:
        hint = _hint(requested, per_node)
        raise UserError(
            f"{ranks} GPUs on each node are requested; {where} has {per_node} on a node{hint}"
        )
    suitable = [size for size in sizes if size.gpus >= ranks]
    most = min(len(suitable), config.nodes or len(suitable))
    if requested.nodes > most:
        kind = f" with {ranks} GPUs" if len(suitable) < len(sizes) else ""
        raise UserError(
            f"--nodes {requested.nodes} are requested; {where} has {count(most, 'node')}{kind}"
        )
    share = max(1, min(size.cpus // size.gpus for size in suitable))
    limit_min = time.of(place, sizes[0].time_limit_min, where)
    return config.model_copy(
        update={"cpus_per_gpu": config.cpus_per_gpu or share, "time_limit_min": limit_min}
    )


def _hint(requested: Placement, per_node: int) -> str:
    nodes = -(-requested.world_size // per_node) if per_node else 0
    if nodes <= requested.nodes or requested.world_size % nodes:
        return ""
    return f"; try --nodes {nodes} --gpus {requested.world_size}"


def fit_here(config: ClusterConfig, requested: Placement) -> tuple[Placement, str]:
    """Returns as many of the requested ranks as this machine holds, on one node, and what they run on.

    By rule 2 of the design fewer ranks give the same result. One rank per GPU or, without GPUs, per core.
    """
    gpus = gpus_here()
    slots = gpus or len(os.sched_getaffinity(0))
    most = min(requested.world_size, slots, config.gpus_per_node or slots)
    return Placement(1, most), count(most, "GPU") if gpus else f"CPU, {count(slots, 'core')}"


def gpus_here() -> int:
    """Returns the number of GPUs that PyTorch sees and may use."""
    import torch  # takes seconds: not before the request has been checked

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def count(number: int, noun: str) -> str:
    """Returns e.g. "1 node" or "2,000 nodes"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
