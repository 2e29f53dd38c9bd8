"""Measures how fast training is, compared with its own limit and with other loops, on the machine that trains.

    python -m tests.studies.benchmark [EXPERIMENT …] [key=value …] [--nodes N --gpus G] [--cluster NAME]
                                  [--against PEER …] [--coco DIR] [--only WHAT …]
                                  [--rounds K] [--seconds S] [--out DIR]
    python -m tests.studies.benchmark preparation --coco DIR

Every round measures each contestant once, in a process of its own; tables give the median over rounds, and
ratios taken round by round. `loop` is the real training loop, `bare step` forward, backward and Adam on one
resident batch. Results go to DIR/benchmark.md and .csv (after every round) and to MLflow's experiment "benchmark".
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvae import command_line
from cvae.command_line import Parser, files_and_overrides, positive
from cvae.config.experiment import Experiment, load_experiment
from cvae.errors import UserError, did_you_mean
from cvae.files import paths
from cvae.files.output_folder import check_folder
from cvae.run.directory import free_name
from slurm import cluster_file
from slurm.cluster_file import Place, Placement
from tests.helpers.growing_folder import growing_folder
from tests.studies.benchmarks import GROUPS, PREPARATION
from workflows.jobs.job_options import add_job_options
from workflows.terminal.formatting import aligned

if TYPE_CHECKING:
    from tqdm import tqdm

_DEFAULT = [str(paths.PROJECT_ROOT / "configs" / "demo.yaml")]
_MADE_BY = "benchmark.py"
_PEERS = ["published", "tutorial", "diffusers", "diffusers-same"]


def parser() -> Parser:
    parser = Parser(
        prog="benchmark.py",
        description="Measures the speed of training, compared with other loops.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="EXPERIMENT | key=value",
        help="experiment files (default: the demo), and values that replace theirs, like"
        " training.precision=bf16; the word preparation measures decoding and encoding",
    )
    add_job_options(parser)
    parser.add_argument(
        "--against", nargs="*", metavar="PEER", help=f"default: all that fit; {', '.join(_PEERS)}"
    )
    parser.add_argument(
        "--coco",
        type=Path,
        metavar="DIR",
        help="an official download, whose JPEGs `published` reads",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=GROUPS,
        default=GROUPS,
        metavar="WHAT",
        help=f"in addition to the bare step; default: all of {', '.join(GROUPS)}",
    )
    parser.add_argument("--rounds", type=positive, default=5, metavar="K")
    parser.add_argument("--seconds", type=positive, default=8, metavar="S", help="a measurement")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: reports/benchmark-<time>")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    files, overrides = files_and_overrides(options.words)
    prepares = PREPARATION in files
    experiments = {
        Path(file).stem: load_experiment(Path(file), overrides)
        for file in files or _DEFAULT
        if file != PREPARATION
    }
    placement = cluster_file.split(options.nodes, options.gpus or options.nodes)
    coco: Path | None = options.coco
    if coco is not None and not (coco / "annotations").is_dir():
        raise UserError(
            f"--coco {coco}: has no folder annotations; give an official MS COCO download"
        )
    if prepares and coco is None:
        raise UserError("preparation reads JPEGs: give --coco DIR, an official download")
    peers = {name: _peers(made, options.against, coco) for name, made in experiments.items()}
    out = check_folder(
        options.out or Path("reports") / free_name("benchmark", Path("reports")),
        _MADE_BY,
        _is_older,
    )
    from workflows.jobs.plan import locate  # torch: seconds

    place, placement, facts = locate(
        placement, options.cluster, False, cluster_file.TimeLimit(options.time)
    )
    measured = [*experiments, *([PREPARATION] if prepares else [])]
    print(aligned([("benchmark", ", ".join(measured)), *facts]), flush=True)
    command = shlex.join(["python", "-m", "tests.studies.benchmark", *arguments])
    with growing_folder(out, _MADE_BY, _is_older):
        _measure(experiments, peers, prepares, place, placement, options, out, command)
    print((out / "benchmark.md").read_text())
    print(out / "benchmark.md")
    return 0


def _is_older(folder: Path) -> bool:
    """Whether the folder holds only results of a version that left no marker."""
    names = {entry.name for entry in folder.iterdir()}
    return bool(names) and names <= {"benchmark.md", "benchmark.csv"}


def _peers(experiment: Experiment, wanted: list[str] | None, coco: Path | None) -> list[str]:
    from tests.studies.benchmarks.peers import PEERS

    for name in wanted or []:
        if name not in PEERS:
            raise UserError(f"--against {name}: no such peer{did_you_mean(name, list(PEERS))}")
    if "published" in (wanted or []) and coco is None:
        raise UserError("--against published reads JPEGs: give --coco DIR, an official download")
    return [
        name
        for name, peer in PEERS.items()
        if peer.fits(experiment)
        and (wanted is None or name in wanted)
        and (coco is not None or not peer.needs_coco)
    ]


def _measure(
    experiments: dict[str, Experiment],
    peers: dict[str, list[str]],
    prepares: bool,
    place: Place,
    placement: Placement,
    options: argparse.Namespace,
    out: Path,
    command: str,
) -> None:
    from cvae.progress import progress_bar
    from tests.studies.benchmarks import preparation, results
    from tests.studies.benchmarks.rounds import Bench
    from tests.studies.benchmarks.series import series

    machine = f"{results.this_machine()}; {place.why}" if place.name else results.this_machine()
    for leftover in out.glob(".jobs-*"):  # of an earlier benchmark that failed
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=".jobs-", dir=out))
    # The jobs have working folders of their own.
    coco = options.coco and options.coco.resolve()
    bench = Bench(place, scratch, options.seconds, coco)
    only, rounds = options.only, options.rounds
    measures: dict[str, Callable[[tqdm[Any]], Iterator[list[results.Row]]]] = {
        name: partial(series, bench, name, made, peers[name], placement, only, rounds)
        for name, made in experiments.items()
    }
    if prepares:
        measures[PREPARATION] = partial(preparation.rows, bench, rounds)
    rows: list[results.Row] = []
    for name, measure in measures.items():
        with progress_bar(0, "measurement", name) as bar:
            for so_far in measure(bar):
                results.write([*rows, *so_far], out, machine, command)
            rows += so_far
    # Only after success: the jobs' logs explain a failure.
    # (A mirror of MLflow's may just be writing its last line.)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        results.to_mlflow(rows, out, machine, command)
    except Exception as error:  # the table is there; MLflow may be away
        print(f"note: not written to MLflow: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    command_line.run(main)
