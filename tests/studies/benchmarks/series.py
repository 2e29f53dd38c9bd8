"""The measurements of one experiment, and their rows."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm import tqdm

from cvae.config.experiment import DeepSpeed, Experiment
from cvae.run.directory import RunDirectory
from slurm.cluster_file import Placement
from tests.studies.benchmarks.contestants import BARE
from tests.studies.benchmarks.results import Row, ratio
from tests.studies.benchmarks.rounds import Bench
from tests.studies.benchmarks.starts import bare_start

_RATE = "images_per_second"
_UNITS = {_RATE: "images/s", "data_wait_share": "of the time", "seconds": "s", "peak memory": "GiB"}
_ALONE = Placement(1, 1)


@dataclass
class Series:
    """Each method measures once and notes it in `values`, by names of the form contestant/metric."""

    bench: Bench
    experiment: Experiment
    run: RunDirectory
    placement: Placement
    values: "defaultdict[str, list[float]]" = field(default_factory=lambda: defaultdict(list))
    work: dict[str, Any] = field(default_factory=dict)
    """Operations per image and the machine's peaks, from the last bare step."""

    def contestant(self, name: str) -> None:
        measured = self.bench.contestant(name, self.run)
        self.values[f"{name}/{_RATE}"].append(measured[_RATE])
        self.values[f"{name}/peak memory"].append(measured["peak_memory_bytes"] / 2**30)
        if name == BARE:
            self.work = measured

    def loop(self) -> None:
        self._loop("loop", self.experiment, _ALONE)

    def mirrored(self) -> None:
        """Measures the loop with as many points as the experiment asks for, copied to MLflow."""
        self._loop("loop with MLflow", self.experiment, _ALONE, mirrored=True)

    def checkpoint(self) -> None:
        measured = self.bench.loop(self.experiment, _ALONE, self.work[_RATE], saves=True)
        self.values["checkpoint stall/seconds"].append(measured["checkpoint_stall_s"])
        step_s = self.experiment.training.global_batch_size / measured[_RATE]
        self.values["a step/seconds"].append(step_s)

    def launch(self) -> None:
        took = self.bench.launch(self.run, self.placement)
        self.values["launch to first step/seconds"].append(took)
        self.values["bare start/seconds"].append(bare_start(self.bench.place, self.placement))

    def scaled(self, kind: str, placement: Placement) -> None:
        """Measures the loop on several ranks; on a CPU each has one thread.

        kind: strong (the same global batch), weak (the same batch per rank), or ZeRO 1 (strong, by DeepSpeed).
        """
        ranks, training = placement.world_size, self.experiment.training
        update: dict[str, Any] = {}
        if kind == "weak":
            update = {"global_batch_size": ranks * training.global_batch_size}
        if kind == "ZeRO 1":
            update = {"engine": "deepspeed", "deepspeed": DeepSpeed(zero_stage=1)}
        made = self.experiment.model_copy(update={"training": training.model_copy(update=update)})
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self._loop(f"{kind} {ranks} ranks", made, placement, env=env)

    def _loop(self, name: str, experiment: Experiment, placement: Placement, **how: Any) -> None:
        measured = self.bench.loop(experiment, placement, self.work[_RATE], **how)
        for key, value in measured.items():
            self.values[f"{name}/{key}"].append(value)


def series(
    bench: Bench,
    name: str,
    experiment: Experiment,
    peers: Sequence[str],
    placement: Placement,
    groups: Sequence[str],
    rounds: int,
    bar: "tqdm[Any]",
) -> Iterator[list[Row]]:
    """Yields all rows so far after each round, and sets the bar's total. groups: of GROUPS."""
    one = Series(bench, experiment, bench.write(experiment), placement)
    scaled = _scaling(placement)
    in_group: dict[str, list[Callable[[], None]]] = {
        "loop": [one.loop],
        "peers": [partial(one.contestant, peer) for peer in peers],
        "mlflow": [one.mirrored],
        "checkpoint": [one.checkpoint],
        "launch": [one.launch],
        "scaling": [
            partial(one.scaled, "strong", scaled[0]),
            *(
                partial(one.scaled, kind, some)
                for some in scaled[1:]
                for kind in ("strong", "weak")
            ),
        ]
        if scaled
        else [],
    }
    training = experiment.training
    # DeepSpeed's engine has no compiled step to compare.
    if scaled and training.engine == "ddp" and not training.compile:
        in_group["scaling"].append(partial(one.scaled, "ZeRO 1", scaled[-1]))
    # The bare step predicts how long the others take; peers and MLflow are compared with the loop.
    if {"peers", "mlflow"} & set(groups):
        groups = ["loop", *groups]
    taken: list[Callable[[], None]] = [
        partial(one.contestant, BARE),
        *(take for group in dict.fromkeys(groups) for take in in_group[group]),
    ]
    bar.reset(total=rounds * len(taken))
    for _ in range(rounds):
        for take in taken:
            take()
            bar.update()
        yield _rows(name, one, scaled)


def _scaling(placement: Placement) -> list[Placement]:
    """Returns 1, 2, 4 … ranks of one node, then 2, 4 … whole nodes; nothing for a single rank."""
    if placement.world_size == 1:
        return []
    nodes, here = placement
    return [Placement(1, n) for n in _doubled(here)] + [
        Placement(n, here) for n in _doubled(nodes)[1:]
    ]


def _doubled(most: int) -> list[int]:
    """Returns 1, 2, 4 … and `most`."""
    return sorted({2**n for n in range(most.bit_length()) if 2**n < most} | {most})


def _rows(name: str, one: Series, scaled: list[Placement]) -> list[Row]:
    rows = [Row(name, key, list(each), _unit(key)) for key, each in one.values.items()]
    by_name = {row.measured: row for row in rows}

    def compare(over: str, under: str, called: str) -> None:
        if over in by_name and under in by_name:
            ratio(rows, by_name[over], by_name[under], called)

    alone = ("strong", "weak", "ZeRO", "loop")
    others = [key.removesuffix(f"/{_RATE}") for key in one.values if key.endswith(f"/{_RATE}")]
    for other in others:
        if not other.startswith(alone):
            compare(f"loop/{_RATE}", f"{other}/{_RATE}", f"loop:{other}")
    compare(f"loop with MLflow/{_RATE}", f"loop/{_RATE}", "loop with MLflow:loop")
    compare("checkpoint stall/seconds", "a step/seconds", "checkpoint stall:a step")
    compare("launch to first step/seconds", "bare start/seconds", "launch to first step:bare start")
    for kind in ("strong", "weak"):
        for ranks in (placement.world_size for placement in scaled[1:]):
            compare(
                f"{kind} {ranks} ranks/{_RATE}",
                f"strong 1 ranks/{_RATE}",
                f"{kind}: {ranks} ranks over 1",
            )
    if scaled:
        ranks = scaled[-1].world_size
        zero, ddp = (f"{kind} {ranks} ranks/{_RATE}" for kind in ("ZeRO 1", "strong"))
        compare(zero, ddp, f"ZeRO 1:DDP {ranks} ranks")
    return rows + _shares(name, one, by_name.get(f"loop/{_RATE}", by_name[f"{BARE}/{_RATE}"]))


def _shares(name: str, one: Series, rate: Row) -> list[Row]:
    """Returns the rate in operations, and as shares of the machine's peaks."""
    who = rate.measured.partition("/")[0]
    done = one.work["flops_per_image"] * rate.median
    rows = [Row(name, f"{who}/FLOP/s", [done], "FLOP/s")]
    for kind, peak in one.work["peaks"].items():
        rows.append(Row(name, f"{kind} peak {one.work['precision']}", [peak], "FLOP/s"))
        rows.append(Row(name, f"{who}/share of {kind} peak", [done / peak], ""))
    return rows


def _unit(key: str) -> str:
    return _UNITS.get(key.rpartition("/")[2], "")
