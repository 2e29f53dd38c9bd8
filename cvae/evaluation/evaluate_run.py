"""Evaluates runs by groups of metrics; called once in every rank's process."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

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
            advance: Callable[[float], object] = _ignore
            if ranks.is_first:
                share = -(-len(split) // ranks.world_size)
                advance = _ProgressFile(progress_file, f"{run.name}: {group}", share)
            start = time.monotonic()
            subject = EvaluationInput(trained, split, ranks, advance)
            metrics = _GROUPS[group](subject, request, writer)
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


def _elbo(subject: EvaluationInput, request: EvaluationRequest, writer: Journal | None) -> Metrics:
    experiment, data = subject.trained.experiment, subject.trained.data
    metrics = evaluate_elbo(subject.model, data, subject.split, experiment, subject.ranks)
    # The loss weighs kl by beta; the bound does not.
    return {**metrics, "neg_elbo": metrics["recon_loss"] + metrics["kl"]}


def _reconstruction(
    subject: EvaluationInput, request: EvaluationRequest, writer: Journal | None
) -> Metrics:
    metrics, extremes = evaluate_reconstruction(subject)
    if writer is not None and extremes is not None and request.split == "val":
        run, step = subject.trained.run, subject.trained.step
        assert run is not None
        run.pictures.mkdir(exist_ok=True)
        path = run.pictures / f"extremes-{step:08}.png"
        pictures.write_png(extremes, path)
        writer.append("picture", step=step, key="extremes", path=str(path.relative_to(run.path)))
    return metrics


def _fid(subject: EvaluationInput, request: EvaluationRequest, writer: Journal | None) -> Metrics:
    assert request.inception is not None
    device = subject.ranks.device
    network = Inception(Path(request.inception), device, request.inception_sha256)
    return evaluate_frechet(subject, network, "fid")


def _on_first_rank(
    subject: EvaluationInput, names: tuple[str, str], measure: Callable[[], tuple[float, float]]
) -> Metrics:
    """Returns two metrics that rank 0 measures alone; NaN if the weights are not finite."""
    values = (math.nan, math.nan)
    if subject.ranks.is_first and is_finite(subject.model):
        values = measure()
    return dict(zip(names, subject.ranks.tell(values), strict=True))


def _classifier(
    subject: EvaluationInput, request: EvaluationRequest, writer: Journal | None
) -> Metrics:
    def measure() -> tuple[float, float]:
        classifier, accuracy = judge_samples(subject.trained, _ignore)
        return accuracy.overall, classifier.real_accuracy

    return _on_first_rank(subject, ("sample_accuracy", "classifier_real_accuracy"), measure)


def _captions(
    subject: EvaluationInput, request: EvaluationRequest, writer: Journal | None
) -> Metrics:
    def measure() -> tuple[float, float]:
        match = caption_match(subject.trained, subject.split)
        return match.share, match.chance

    return _on_first_rank(subject, ("caption_match", "caption_match_chance"), measure)


_GROUPS: dict[str, Callable[[EvaluationInput, EvaluationRequest, Journal | None], Metrics]] = {
    "elbo": _elbo,
    "iwae": lambda subject, request, _: evaluate_iwae(subject, request.iwae_samples),
    "active_units": lambda subject, *_: active_units(subject),
    "reconstruction": _reconstruction,
    "frechet": lambda subject, *_: evaluate_frechet(subject, RandomFeatures(), "frechet_r64"),
    "fid": _fid,
    "classifier": _classifier,
    "probe": lambda subject, *_: probe(subject),
    "captions": _captions,
}


def _ignore(images: float) -> None:
    pass


class _ProgressFile:
    """Counts rank 0's images of a group in a file that the command reads."""

    def __init__(self, file: Path, group: str, total: int):
        self.file, self.content = file, {"what": group, "total": total}
        self.done = self.written_at = 0.0
        self(0)

    def __call__(self, images: float) -> None:
        self.done += images
        if time.monotonic() - self.written_at > _WRITE_EVERY_S:
            self.written_at = time.monotonic()
            # An evaluation does not fail because of its progress bar.
            with suppress(OSError):
                write_atomically(self.file, json.dumps({**self.content, "done": round(self.done)}))
