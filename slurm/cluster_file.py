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


def _one_line(text: str) -> str:
    """A value that reaches sbatch in a line of its own, and is no option of it."""
    _no_controls(text)
    if not text.strip():
        raise ValueError("should not be empty; leave the key out, or write null")
    if text.startswith("-"):
        raise ValueError("should not begin with a dash")
    return text


def _word(text: str) -> str:
    if any(letter.isspace() for letter in _one_line(text)):
        raise ValueError("should be one word, without spaces")
    return text


def _no_controls(text: str, but: str = "") -> str:
    odd = next((x for x in text if (not x.isprintable() and x != " ") and x not in but), None)
    if odd is not None:
        raise ValueError(f"should not hold the character {odd!r}")
    return text


def _variable(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise ValueError("should be a variable's name: letters, digits and _, no digit first")
    return name


# Numbers as far as SLURM counts: 16 bits for CPUs, for the signal's seconds and, by default, for nodes.
_MOST_16 = 65_533
Positive = Annotated[int, Field(gt=0, le=10**7)]
Small = Annotated[int, Field(gt=0, le=_MOST_16)]
Word = Annotated[str, AfterValidator(_word)]
Line = Annotated[str, AfterValidator(_one_line)]
# A block of several shell lines is as harmless as several entries.
ShellLines = Annotated[str, AfterValidator(lambda text: _no_controls(text, but="\n\t"))]
Variable = Annotated[str, AfterValidator(_variable)]
Value = Annotated[str, AfterValidator(lambda text: _no_controls(text, but="\t"))]
_LOCAL_KEYS = {"executor", "gpus_per_node", "env", "max_restarts", "start_s", "watchdog_s"}


class Placement(NamedTuple):
    """How many ranks, and over how many hosts they are spread."""

    nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        return f"{count(self.nodes, 'node')} × {self.ranks_per_node} = {count(self.world_size, 'rank')}"


class ClusterConfig(Strict):
    executor: Literal["slurm", "local"] = Field(
        description="slurm: through sbatch; local: processes of this machine"
    )
    slurm_conf: Line | None = Field(
        None, description="slurm.conf of this cluster, where SLURM's commands do not know it"
    )
    partition: Word | None = Field(None, description="null: the cluster's default partition")
    account: Word | None = Field(None, description="who pays, where the site asks")
    qos: Word | None = Field(None, description="quality of service, where the site asks")
    constraint: Word | None = Field(None, description="node features, as v100&32gb")
    nodes: Small | None = Field(None, description="most nodes of a job; null: ask sinfo")
    gpus_per_node: Small | None = Field(
        None, description="most GPUs of a node; null: ask sinfo (local: as many as there are)"
    )
    gpu_type: Word | None = Field(None, description="type in SLURM's GRES, as v100")
    cpus_per_gpu: Small | None = Field(
        None, description="cores per rank; null: the GPU's share of its node's cores"
    )
    mem_per_gpu_gb: Positive | None = Field(None, description="null: the partition's default")
    time_limit_min: Positive | None = Field(None, description="null: the partition's own limit")
    grace_s: Small = Field(
        120, description="seconds before the time limit at which the ranks are told to save"
    )
    max_restarts: int = Field(
        3,
        ge=0,
        le=10**6,
        description="how often a run that crashed is tried again without a new checkpoint",
    )
    start_s: Positive | None = Field(
        None,
        description="all ranks must have met within so long, or none begins; null: 5 minutes and 30 s"
        " more for each node, as they all read Python's files at once, perhaps from a cold file system",
    )
    watchdog_s: Positive | None = Field(
        None,
        description="a rank that is not heard of, or makes no step, for so long ends the job's try;"
        " null: 2 minutes and 2 s more for each node, so that a file server may fail over",
    )
    exclusive: bool = Field(False, description="whole nodes, shared with nobody")
    tflops_per_gpu: float | None = Field(
        None,
        gt=0,
        description="what training reaches on one GPU, as benchmark.py measures it (loop/FLOP/s); with"
        " it the plan tells how long a run should take",
    )
    inside_gbyte_s: float = Field(50, gt=0, description="of the links inside a node, GB/s one way")
    between_gbit_s: float = Field(100, gt=0, description="of a node's link to others, Gb/s one way")
    setup: list[ShellLines] = Field(
        [],
        description="shell lines before srun, as `module load cuda/12.6`; a line that fails ends the job",
    )
    env: dict[Variable, Value] = Field(
        {}, description="environment variables of the ranks, which setup does not override"
    )

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
        """Returns how long the ranks wait for each other, as the environment tells it to them."""
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
    """The named cluster; without a name SLURM where it answers, else this machine.

    Raises UserError where there is no such cluster, or where its file is wrong.
    """
    if name is not None:
        return Place(name, load(name), "asked for")
    # sbatch alone proves nothing: its package may be installed where no cluster is.
    if Slurm(None).answers():
        return Place("slurm", load("slurm"), "SLURM answers here")
    return Place("local", load("local"), "no SLURM answers here")


def load(name: str) -> ClusterConfig:
    path = CLUSTERS / f"{name}.yaml"
    if not os.path.isfile(path):
        there = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
        raise UserError(
            f"--cluster {cut(name, 100)}: no such cluster in {CLUSTERS}; there are {there}"
        )
    return yaml_model.load(path, ClusterConfig)


def split(nodes: int, gpus: int) -> Placement:
    """Raises UserError where `gpus`, the total, does not divide over the nodes."""
    if gpus % nodes:
        below, above = gpus - gpus % nodes, gpus + nodes - gpus % nodes
        near = " or ".join(f"--gpus {n}" for n in (below, above) if n)
        raise UserError(
            f"--gpus {gpus} is the total and does not divide over --nodes {nodes}; try {near}"
        )
    return Placement(nodes, gpus // nodes)


class TimeLimit(NamedTuple):
    """How long a job may run, in minutes."""

    asked: int | None = None
    """By --time; it goes before the cluster file's."""
    short: int | None = None
    """If nothing is asked, no more than this: SLURM fills gaps with short jobs, and no user waits long."""

    def of(self, place: Place, partitions: int | None = None, where: str = "") -> int | None:
        """Returns the limit, None for none. partitions: the partition's own, which is called `where`.

        Raises UserError if the partition has less, or if a job could not be told to save before its end.
        """
        config = place.config
        wanted = self.asked or config.time_limit_min
        name = "--time" if self.asked else "time_limit_min ="
        # SLURM sends its signal up to a minute early.
        least = config.grace_s // 60 + 2
        if self.asked and self.asked < least:
            raise UserError(
                f"--time {self.asked}: grace_s = {config.grace_s} of cluster {place.name} must be at least"
                f" a minute shorter; ask for {least} minutes or more"
            )
        if wanted is not None and partitions is not None and wanted > partitions:
            raise UserError(f"{name} {wanted}: {where} allows {partitions} minutes")
        limit = wanted or partitions
        if self.asked or self.short is None:
            return limit
        short = max(self.short, least)
        return short if limit is None else min(limit, short)


UNASKED = TimeLimit()


def fit(place: Place, asked: Placement, time: TimeLimit = UNASKED) -> ClusterConfig:
    """The SLURM cluster's file, its gaps filled by what SLURM says of the partition.

    Raises UserError where SLURM does not answer, or where the cluster is smaller than what is asked.
    """
    config, slurm = place.config, place.config.slurm()
    slurm.require(place.name)
    sizes = slurm.node_sizes(config.partition, config.gpu_type)
    where = f"cluster {place.name}, partition {sizes[0].partition}"
    limit = config.gpus_per_node
    per_node = max(min(size.gpus, limit or size.gpus) for size in sizes)
    if asked.ranks_per_node > per_node:
        raise UserError(
            f"{asked.ranks_per_node} GPUs on each node are asked;"
            f" {where} has {per_node} on a node{_hint(asked, per_node)}"
        )
    suitable = [size for size in sizes if size.gpus >= asked.ranks_per_node]
    most = min(len(suitable), config.nodes or len(suitable))
    if asked.nodes > most:
        kind = f" with {asked.ranks_per_node} GPUs" if len(suitable) < len(sizes) else ""
        raise UserError(f"--nodes {asked.nodes} are asked; {where} has {count(most, 'node')}{kind}")
    limit_min = time.of(place, sizes[0].time_limit_min, where)
    share = min(size.cpus // size.gpus for size in suitable)
    return config.model_copy(
        update={
            "cpus_per_gpu": config.cpus_per_gpu or max(1, share),
            "time_limit_min": limit_min,
        }
    )


def _hint(asked: Placement, per_node: int) -> str:
    nodes = -(-asked.world_size // per_node) if per_node else 0
    if nodes <= asked.nodes or asked.world_size % nodes:
        return ""
    return f"; try --nodes {nodes} --gpus {asked.world_size}"


def fit_here(config: ClusterConfig, asked: Placement) -> tuple[Placement, str]:
    """As many of the asked ranks as this machine holds, on one node; and what they run on.

    By rule 2 of the design fewer ranks give the same result. One rank per GPU; without GPUs, one per core.
    """
    gpus = gpus_here()
    holds = gpus or len(os.sched_getaffinity(0))
    most = min(asked.world_size, holds, config.gpus_per_node or holds)
    return Placement(1, most), count(most, "GPU") if gpus else f"CPU, {count(holds, 'core')}"


def gpus_here() -> int:
    """GPUs that PyTorch sees and may use."""
    import torch  # seconds: not before what is asked has been checked

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
