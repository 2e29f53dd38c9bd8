"""Evaluates trained runs: likelihoods, reconstructions, samples; on as many ranks as training.

    python workflows/evaluate.py RUN [RUN …] [--split val|train] [--metrics GROUP …] [--iwae-samples K]
                                 [--inception FILE] [--nodes N --gpus G] [--cluster NAME] [--time TIME]

RUN is a run's name, its folder, or "latest". Each run is measured at its best checkpoint. The metrics are
written to the run's journal and to MLflow, once per checkpoint: a repeated command measures only what is
missing. Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cvae import command_line
from cvae.command_line import Parser, positive
from cvae.data.store import open_store
from cvae.errors import UserError
from cvae.evaluation.metric_groups import (
    EvaluationRequest,
    fitting_groups,
    likelihood_note,
    metric_prefix,
)
from cvae.files.checksums import sha256_of_file
from cvae.metrics import METRIC_GROUPS, unit
from cvae.progress import progress_bar
from cvae.run import journal
from cvae.run.code_snapshot import CodeSnapshot
from cvae.run.directory import RunDirectory
from slurm import cluster_file
from slurm.attempts import Cause
from slurm.cluster_file import Place, Placement, TimeLimit
from slurm.commands import JobState
from slurm.executors import Job
from slurm.job_state import Submission
from workflows.jobs.job_options import add_job_options
from workflows.jobs.submission import job_environment
from workflows.jobs.waiting import run_and_wait
from workflows.terminal.formatting import aligned, table

EVALUATE = "cvae.evaluation.evaluate_run:evaluate_runs"


def parser() -> Parser:
    parser = Parser(
        prog="evaluate.py", description="Evaluates trained runs at their best checkpoints."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names, folders, or latest")
    parser.add_argument("--split", choices=["val", "train"], default="val")
    groups = "; ".join(f"{name}: {meaning}" for name, meaning in METRIC_GROUPS.items())
    parser.add_argument(
        "--metrics", nargs="+", metavar="GROUP", help=f"default: all that fit a run. {groups}"
    )
    parser.add_argument(
        "--iwae-samples", type=positive, default=64, metavar="K", help="draws of z an image (64)"
    )
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="TorchScript network, for fid"
    )
    add_job_options(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    requested = cluster_file.split(options.nodes, options.gpus or options.nodes)
    if options.inception is not None and not options.inception.is_file():
        raise UserError(f"--inception {options.inception}: no such file")
    runs = [RunDirectory.open(name) for name in dict.fromkeys(options.runs)]
    requests = _requests(runs, options)
    from workflows.jobs.plan import locate  # imports torch, which takes seconds

    place, placement, facts = locate(requested, options.cluster, False, TimeLimit(options.time))
    print(aligned([("evaluate", ", ".join(run.name for run in runs)), *facts]), flush=True)
    status = _evaluate(requests, place, placement, requested.world_size)
    if status:
        return status
    for run in runs:
        _sync(run)
    print(_results(runs, requests))
    if any({"elbo", "iwae"} & set(request.groups) for request in requests):
        likelihoods = dict.fromkeys(run.experiment().model.likelihood for run in runs)
        print(f"note: {likelihood_note(likelihoods)}")
    return 0


def _requests(runs: list[RunDirectory], options: Any) -> list[EvaluationRequest]:
    inception = digest = None
    if options.inception is not None:
        inception, digest = str(options.inception.resolve()), sha256_of_file(options.inception)
    requests = []
    for run in runs:
        experiment = run.experiment()
        data = experiment.data
        labelled = open_store(data.name, data.image_size).manifest.classes is not None
        groups = fitting_groups(experiment, labelled, options.metrics, inception, options.split)
        if not any(run.checkpoints.glob("step-*")):
            raise UserError(f"{run.name} has no checkpoint yet: there is nothing to evaluate")
        requests.append(
            EvaluationRequest(
                str(run.path), options.split, groups, options.iwae_samples, inception, digest
            )
        )
    return requests


def _evaluate(
    requests: list[EvaluationRequest], place: Place, placement: Placement, gpus: int
) -> int:
    """Evaluates all runs in one job and returns the exit status; finished groups survive a failure."""
    folder = RunDirectory(Path(requests[0].run)).logs / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    progress = _Progress(folder / "progress.json")
    arguments = ([asdict(request) for request in requests], progress.file)
    environment = job_environment(CodeSnapshot().write())
    job = Job("evaluate", folder, EVALUATE, arguments, environment)
    try:
        result = run_and_wait(
            *(job, place, placement, gpus, progress.show),
            is_complete=lambda: all(map(_is_measured, requests)),
            kept="what was measured is kept",
        )
    finally:
        progress.bar.close()
    if result.state.slurm_state == "COMPLETED" or (
        result.failure is None and all(map(_is_measured, requests))
    ):
        return 0
    if result.failure is not None and result.failure.end.cause is Cause.BAD_INPUT:
        raise UserError(result.failure.end.message)
    print(f"{result.submission.where} failed: {result.cause}; log: {result.log}")
    return 1


def _is_measured(request: EvaluationRequest) -> bool:
    """Returns whether the run has all requested groups, at one checkpoint."""
    measured: dict[int, set[str]] = {}
    for line in journal.read(RunDirectory(Path(request.run)).journal_file)[0]:
        if line["kind"] == "evaluation":
            measured.setdefault(line["step"], set()).add(line["key"])
    requested = {request.key(group) for group in request.groups}
    return any(requested <= keys for keys in measured.values())


class _Progress:
    """Shows the images that rank 0 has finished, as its file says."""

    def __init__(self, file: Path):
        self.file = file
        file.unlink(missing_ok=True)
        self.task = "starts"
        self.bar = progress_bar(0, "image", self.task)

    def show(self, submission: Submission, state: JobState) -> None:
        if not self.file.exists():
            return
        progress = json.loads(self.file.read_text())
        if progress["what"] != self.task:
            self.bar.close()
            self.task = progress["what"]
            self.bar = progress_bar(progress["total"], "image", self.task)
        self.bar.update(progress["done"] - self.bar.n)


def _sync(run: RunDirectory) -> None:
    from cvae.tracking import mlflow_mirror

    try:
        mlflow_mirror.sync(run.path, lambda lines: None)
    except UserError as error:
        print(f"note: {error}; later: python workflows/runs.py sync {run.name}")


def _results(runs: list[RunDirectory], requests: list[EvaluationRequest]) -> str:
    """Returns a table with a row per metric and a column per run."""
    start = f"{metric_prefix(requests[0].split)}/"
    columns: list[dict[str, float]] = []
    for run, request in zip(runs, requests, strict=True):
        lines = [x for x in journal.read(run.journal_file)[0] if x["kind"] == "evaluation"]
        keys = {request.key(group) for group in request.groups}
        metrics: dict[str, float] = {}
        # Two keys may share a metric's name, as FIDs by two networks do: the requested one counts.
        for line in sorted(lines, key=lambda x: (x["step"], x["key"] in keys)):
            metrics |= {k: v for k, v in line["metrics"].items() if k.startswith(start)}
        columns.append(metrics)
    names = dict.fromkeys(name for metrics in columns for name in metrics)
    rows = [
        [name, *(_value(metrics, name) for metrics in columns), unit(name)]
        for name in names
        if not name.endswith("_se")
    ]
    header = ["metric", *(run.name for run in runs), "unit"]
    return table(header, rows, right=[run.name for run in runs])


def _value(metrics: dict[str, float], name: str) -> str:
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None:
        return "–"
    text = f"{value:.5g}" if math.isfinite(value) else str(value)
    return text if error is None else f"{text} ± {error:.2g}"


if __name__ == "__main__":
    command_line.run(main)
