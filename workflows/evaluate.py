"""Evaluates trained runs: likelihoods, reconstructions, samples; on as many ranks as training has.

    python workflows/evaluate.py RUN [RUN …] [--split val|train] [--metrics GROUP …] [--iwae-samples K]
                                 [--inception FILE] [--nodes N --gpus G] [--cluster NAME] [--time TIME]

RUN is a run's name, its folder, or "latest". Each is measured at its best checkpoint. What is found goes to the
run's journal and to MLflow, once a checkpoint: asked again, only what is missing is measured. Exit status: 0 done,
1 failed, 2 bad input, 130 interrupted.
"""

import json
import math
import time
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
from slurm import cluster_file, job_state
from slurm.cluster_file import Place, Placement, TimeLimit
from slurm.executors import Job
from slurm.failure_diagnosis import first_failure
from slurm.job_state import Submission
from workflows.jobs.job_options import add_time
from workflows.jobs.submission import job_environment, submitted
from workflows.terminal.formatting import aligned, shown, table

EVALUATE = "cvae.evaluation.evaluate_run:evaluate_runs"
_POLL_S = {"slurm": 3.0, "local": 0.5}


def parser() -> Parser:
    parser = Parser(
        prog="evaluate.py", description="Evaluates trained runs at their best checkpoints."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names, folders, or latest")
    parser.add_argument("--split", choices=["val", "train"], default="val")
    groups = "; ".join(f"{name}: {what}" for name, what in METRIC_GROUPS.items())
    parser.add_argument(
        "--metrics", nargs="+", metavar="GROUP", help=f"default: all that fit a run. {groups}"
    )
    parser.add_argument(
        "--iwae-samples", type=positive, default=64, metavar="K", help="draws of z an image (64)"
    )
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="TorchScript network, for fid"
    )
    parser.add_argument("--nodes", type=positive, default=1, metavar="N")
    parser.add_argument("--gpus", type=positive, metavar="G", help="in total (default: one a node)")
    parser.add_argument("--cluster", metavar="NAME", help="configs/clusters/NAME.yaml")
    add_time(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    asked = cluster_file.split(options.nodes, options.gpus or options.nodes)
    if options.inception is not None and not options.inception.is_file():
        raise UserError(f"--inception {options.inception}: no such file")
    runs = [RunDirectory.open(name) for name in dict.fromkeys(options.runs)]
    requests = _requests(runs, options)
    from workflows.jobs.plan import locate  # torch: seconds

    place, placement, facts = locate(asked, options.cluster, False, TimeLimit(options.time))
    print(aligned([("evaluate", ", ".join(run.name for run in runs)), *facts]), flush=True)
    status = _run(requests, place, placement, asked.world_size)
    if status:
        return status
    for run in runs:
        _tell_mlflow(run)
    print(_results(runs, requests))
    if any({"elbo", "iwae"} & set(asked.groups) for asked in requests):
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


def _run(requests: list[EvaluationRequest], place: Place, placement: Placement, gpus: int) -> int:
    """Evaluates all in one job; the status of it. Where it fails the finished groups are kept."""
    folder = RunDirectory(Path(requests[0].run)).logs / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    progress.unlink(missing_ok=True)
    environment = job_environment(CodeSnapshot().write())
    arguments = ([asdict(request) for request in requests], progress)
    job = Job("evaluate", folder, EVALUATE, arguments, environment)
    with submitted(job, place, placement, gpus, kept="what was measured is kept") as submission:
        word = _wait(submission, progress)
    failure = first_failure(folder, submission.job_id)
    if word == "COMPLETED" or (failure is None and all(map(_is_measured, requests))):
        return 0
    if failure is not None and failure.bad_input:
        raise UserError(failure.how)
    why = str(failure) if failure else f"it ended as {word}"
    print(f"{submission.where} failed: {why}; log: {shown(failure.log if failure else folder)}")
    return 1


def _is_measured(request: EvaluationRequest) -> bool:
    """Whether the run has all that was asked for, at one checkpoint."""
    found: dict[int, set[str]] = {}
    for line in journal.read(RunDirectory(Path(request.run)).journal_file)[0]:
        if line["kind"] == "evaluation":
            found.setdefault(line["step"], set()).add(line["key"])
    wanted = {request.key(group) for group in request.groups}
    return any(wanted <= keys for keys in found.values())


def _wait(submission: Submission, progress: Path) -> str:
    """Shows rank 0's images until the job has ended; the queue's word for how."""
    what, bar = "starts", progress_bar(0, "image", "starts")
    try:
        while True:
            state = job_state.look(submission)
            said = json.loads(progress.read_text()) if progress.exists() else None
            if said is not None and said["what"] != what:
                bar.close()
                what, bar = said["what"], progress_bar(said["total"], "image", said["what"])
            if said is not None:
                bar.update(said["done"] - bar.n)
            if state.phase == "ended":
                return state.slurm_state
            time.sleep(_POLL_S[submission.executor])
    finally:
        bar.close()


def _tell_mlflow(run: RunDirectory) -> None:
    from cvae.tracking import mlflow_mirror

    try:
        mlflow_mirror.sync(run.path, lambda lines: None)
    except UserError as error:
        print(f"note: {error}; later: python workflows/runs.py sync {run.name}")


def _results(runs: list[RunDirectory], requests: list[EvaluationRequest]) -> str:
    """A line a metric, a column a run."""
    start = f"{metric_prefix(requests[0].split)}/"
    found: list[dict[str, float]] = []
    for run, asked in zip(runs, requests, strict=True):
        lines = [x for x in journal.read(run.journal_file)[0] if x["kind"] == "evaluation"]
        wanted = {asked.key(group) for group in asked.groups}
        metrics: dict[str, float] = {}
        # Two keys may have one name of a metric, as FIDs by two networks: the one that was asked for counts.
        for line in sorted(lines, key=lambda x: (x["step"], x["key"] in wanted)):
            metrics |= {k: v for k, v in line["metrics"].items() if k.startswith(start)}
        found.append(metrics)
    names = list(dict.fromkeys(name for metrics in found for name in metrics))
    rows = [
        [name, *(_value(metrics, name) for metrics in found), unit(name)]
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
