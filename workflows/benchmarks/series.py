"""The measurements of one experiment, and the rows that they make."""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from cvae.config import Experiment
from slurm.cluster import Placement
from workflows.benchmarks.contestants import BARE
from workflows.benchmarks.results import Row, ratio
from workflows.benchmarks.rounds import Bench
from workflows.benchmarks.starts import bare_start

Values = defaultdict[str, list[float]]
_RATE = "images_per_second"
_UNITS = {_RATE: "images/s", "data_wait_share": "of the time", "seconds": "s", "peak memory": "GiB"}


def series(
    bench: Bench,
    name: str,
    experiment: Experiment,
    peers: list[str],
    placement: Placement,
    rounds: int,
    bar: "tqdm[Any]",
) -> Iterator[list[Row]]:
    """Yields all rows so far after each round. The bar gets its total here."""
    scaled = _scaling(placement)
    bar.reset(total=rounds * (4 + len(peers) + 2 * len(scaled)) + 1)
    run = bench.write(experiment)
    values: Values = defaultdict(list)
    work: dict[str, Any] = {}
    for _ in range(rounds):
        work = bench.contestant(BARE, run)
        _note(values, BARE, work)
        bar.update()
        rate = work[_RATE]
        alone = Placement(1, 1)
        for key, value in bench.loop(experiment, alone, rate).items():
            values[f"loop/{key}"].append(value)
        bar.update()
        values["launch to first step/seconds"].append(bench.launch(run, placement))
        bar.update()
        values["bare start/seconds"].append(bare_start(bench.place, placement))
        bar.update()
        for peer in peers:
            _note(values, peer, bench.contestant(peer, run))
            bar.update()
        for ranks in scaled:
            _scale(values, bench, experiment, ranks, rate)
            bar.update(2)
        yield _rows(name, values, work, scaled)
    values["checkpoint stall/seconds"].append(
        bench.loop(experiment, Placement(1, 1), work[_RATE], saves=True)["checkpoint_stall_s"]
    )
    bar.update()
    yield _rows(name, values, work, scaled)


def _scaling(placement: Placement) -> list[Placement]:
    """1, 2, 4 … ranks of one node, then 2, 4 … whole nodes; none for a single rank."""
    if placement.world_size == 1:
        return []
    nodes, here = placement
    return [Placement(1, n) for n in _doubled(here)] + [
        Placement(n, here) for n in _doubled(nodes)[1:]
    ]


def _doubled(most: int) -> list[int]:
    """1, 2, 4 … and `most`."""
    return sorted({2**n for n in range(most.bit_length()) if 2**n < most} | {most})


def _scale(
    values: Values, bench: Bench, experiment: Experiment, placement: Placement, rate: float
) -> None:
    """Strong: the same global batch. Weak: as many images a rank. On a CPU each rank has one thread."""
    ranks = placement.world_size
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    training = experiment.training
    wide = training.model_copy(update={"global_batch_size": ranks * training.global_batch_size})
    for kind, made in (
        ("strong", experiment),
        ("weak", experiment.model_copy(update={"training": wide})),
    ):
        found = bench.loop(made, placement, rate, env=env)
        values[f"{kind} {ranks} ranks/{_RATE}"].append(found[_RATE])


def _note(values: Values, name: str, told: dict[str, Any]) -> None:
    values[f"{name}/{_RATE}"].append(told[_RATE])
    values[f"{name}/peak memory"].append(told["peak_memory_bytes"] / 2**30)


def _rows(name: str, values: Values, work: dict[str, Any], scaled: list[Placement]) -> list[Row]:
    rows = [Row(name, key, list(found), _unit(key)) for key, found in values.items()]
    by_name = {row.measured: row for row in rows}
    loop = by_name[f"loop/{_RATE}"]
    for other in [key.removesuffix(f"/{_RATE}") for key in values if key.endswith(_RATE)]:
        if other != "loop" and not other.startswith(("strong", "weak")):
            ratio(rows, loop, by_name[f"{other}/{_RATE}"], f"loop:{other}")
    start = by_name["bare start/seconds"]
    launched = by_name["launch to first step/seconds"]
    ratio(rows, launched, start, "launch to first step:bare start")
    done = work["flops_per_image"] * loop.median
    rows.append(Row(name, "loop/FLOP/s", [done], "FLOP/s"))
    for kind, peak in work["peaks"].items():
        rows.append(Row(name, f"{kind} peak {work['precision']}", [peak], "FLOP/s"))
        rows.append(Row(name, f"loop/share of {kind} peak", [done / peak], ""))
    for kind in ("strong", "weak"):
        for placement in scaled[1:]:
            ranks = placement.world_size
            one, many = (by_name[f"{kind} {n} ranks/{_RATE}"] for n in (1, ranks))
            ratio(rows, many, one, f"{kind}: {ranks} ranks over 1")
    return rows


def _unit(key: str) -> str:
    return _UNITS.get(key.rpartition("/")[2], "")
