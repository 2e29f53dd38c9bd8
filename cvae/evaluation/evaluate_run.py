"""Evaluates runs by groups of metrics; called once in every rank's process."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, TypeVar

from cvae.distributed import precision
from cvae.distributed.ranks import Ranks, connect
from cvae.errors import UserError
from cvae.evaluation.caption_match import caption_match
from cvae.evaluation.classifier import judge_samples
from cvae.evaluation.elbo import evaluate_elbo
from cvae.evaluation.evaluation_input import EvaluationInput
from cvae.evaluation.frechet import Inception, RandomFeatures, evaluate_frechet
from cvae.evaluation.iwae import evaluate_iwae
from cvae.evaluation.latents import active_units, probe
from cvae.evaluation.metric_groups import EvaluationRequest, metric_prefix
from cvae.evaluation.reconstruction import evaluate_reconstruction
from cvae.files.paths import write_atomically
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.run.training_lock import exclusively
from cvae.sampling import pictures
from cvae.sampling.inference import is_finite
from cvae.sampling.sampler import load_run

T = TypeVar("T")
_WRITE_EVERY_S = 1.0


def evaluate_runs(requests: Sequence[Mapping[str, Any]], progress_file: Path) -> None:
    """Measures each EvaluationRequest and writes the metrics to the run's journal, once per checkpoint.

    The ranks find each other by torch's environment variables. Rank 0 writes its progress to
    `progress_file`. Raises UserError if a run has no checkpoint, is being trained, or was trained on other
    data.
    """
    parsed = [EvaluationRequest(**request) for request in requests]
    for request in parsed:
        with suppress(UserError):  # an unreadable experiment.yaml is reported below
            precision.before_cuda(RunDirectory(Path(request.run)).experiment().training)
    with connect() as ranks:
        for request in parsed:
            run = RunDirectory(Path(request.run))
            with exclusively(run, ranks):
                _evaluate(run, request, ranks, progress_file)


def _evaluate(
    run: RunDirectory, request: EvaluationRequest, ranks: Ranks, progress_file: Path
) -> None:
    trained = ranks.everywhere(lambda: load_run(run, ranks.device))
    precision.establish(trained.experiment.training, ranks.device, measures=True)
    lines = journal.read(run.journal_file)[0]
    trained.last_start(lines)  # raises UserError if it was trained on other data
    split = trained.data.val if request.split == "val" else trained.data.train
    known_keys = {
        line["key"]
        for line in lines
        if line["kind"] == "evaluation" and line["step"] == trained.step
    }
    with ExitStack() as stack:
        writer = stack.enter_context(closing(Journal(run.journal_file))) if ranks.is_first else None
        for group in request.groups:
            key = request.key(group)
            if key in known_keys:
                continue
            share = -(-len(split) // ranks.world_size)
            progress = _ProgressFile(progress_file, f"{run.name}: {group}", share)
            advance = progress.advance if ranks.is_first else _ignore
            advance(0)
            start = time.monotonic()
            subject = EvaluationInput(trained, split, ranks, advance, writer)
            metrics = _GROUPS[group](subject, request)
            prefix = metric_prefix(request.split)
            if writer is not None:
                writer.append(
                    "evaluation",
                    step=trained.step,
                    key=key,
                    split=request.split,
                    metrics={f"{prefix}/{name}": value for name, value in metrics.items()},
                    seconds=round(time.monotonic() - start, 2),
                    world_size=ranks.world_size,
                )


Metrics = dict[str, float]


def _elbo(subject: EvaluationInput) -> Metrics:
    experiment, data = subject.trained.experiment, subject.trained.data
    metrics = evaluate_elbo(subject.model, data, subject.split, experiment, subject.ranks)
    # The loss weighs kl by beta; the bound does not.
    return {**metrics, "neg_elbo": metrics["recon_loss"] + metrics["kl"]}


def _reconstruction(subject: EvaluationInput) -> Metrics:
    metrics, extremes = evaluate_reconstruction(subject)
    trained, writer = subject.trained, subject.writer
    if writer is not None and extremes is not None and subject.split is trained.data.val:
        assert trained.run is not None
        folder = trained.run.pictures
        folder.mkdir(exist_ok=True)
        file = folder / f"extremes-{trained.step:08}.png"
        pictures.write_png(extremes, file)
        path = str(file.relative_to(trained.run.path))
        writer.append("picture", step=trained.step, key="extremes", path=path)
    return metrics


def _fid(subject: EvaluationInput, request: EvaluationRequest) -> Metrics:
    assert request.inception is not None
    device = subject.ranks.device
    network = Inception(Path(request.inception), device, request.inception_sha256)
    return evaluate_frechet(subject, network, "fid")


def _classifier(subject: EvaluationInput) -> Metrics:
    accuracy = _on_first_rank(subject, lambda: judge_samples(subject.trained, _ignore))
    return {
        "sample_accuracy": accuracy.overall if accuracy else math.nan,
        "classifier_real_accuracy": accuracy.real if accuracy else math.nan,
    }


def _captions(subject: EvaluationInput) -> Metrics:
    match = _on_first_rank(subject, lambda: caption_match(subject.trained, subject.split))
    return {
        "caption_match": match.share if match else math.nan,
        "caption_match_chance": match.chance if match else math.nan,
    }


def _on_first_rank(subject: EvaluationInput, measure: Callable[[], T]) -> T | None:
    """Returns on every rank what rank 0 measures alone; None if the weights are not finite."""
    value = measure() if subject.ranks.is_first and is_finite(subject.model) else None
    return subject.ranks.tell(value)


_GROUPS: dict[str, Callable[[EvaluationInput, EvaluationRequest], Metrics]] = {
    "elbo": lambda subject, _: _elbo(subject),
    "iwae": lambda subject, request: evaluate_iwae(subject, request.iwae_samples),
    "active_units": lambda subject, _: active_units(subject),
    "reconstruction": lambda subject, _: _reconstruction(subject),
    "frechet": lambda subject, _: evaluate_frechet(subject, RandomFeatures(), "frechet_r64"),
    "fid": _fid,
    "classifier": lambda subject, _: _classifier(subject),
    "probe": lambda subject, _: probe(subject),
    "captions": lambda subject, _: _captions(subject),
}


def _ignore(images: float) -> None:
    pass


class _ProgressFile:
    """Counts rank 0's images of a group in a file that the command reads."""

    def __init__(self, file: Path, group: str, total: int):
        self.file, self.content = file, {"what": group, "total": total}
        self.done = self.written_at = 0.0

    def advance(self, images: float) -> None:
        self.done += images
        if time.monotonic() - self.written_at > _WRITE_EVERY_S:
            self.written_at = time.monotonic()
            # An evaluation does not fail because of its progress bar.
            with suppress(OSError):
                write_atomically(self.file, json.dumps({**self.content, "done": round(self.done)}))
