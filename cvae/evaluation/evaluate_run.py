"""Evaluates runs by groups of metrics; called once in every rank's process."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cvae.distributed import precision
from cvae.distributed.ranks import Ranks, connect
from cvae.errors import UserError
from cvae.evaluation.caption_match import caption_match
from cvae.evaluation.classifier import reference_classifier
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
from cvae.sampling.inference import is_finite, sample
from cvae.sampling.sampler import load_run
from cvae.sampling.trained_model import TrainedModel

_SAMPLES_PER_CLASS = 200
_TOLD_EVERY_S = 1.0


def evaluate_runs(requests: Sequence[Mapping[str, Any]], progress_file: Path) -> None:
    """Measures what each EvaluationRequest asks for and writes it to the run's journal, once for a checkpoint.

    The ranks find each other by torch's environment variables. progress_file: where rank 0 tells how far it is.
    Raises UserError where a run has no checkpoint, is being trained, or was trained on other data.
    """
    parsed = [EvaluationRequest(**request) for request in requests]
    for asked in parsed:
        with suppress(UserError):  # of an unreadable experiment.yaml, which is reported below
            precision.before_cuda(RunDirectory(Path(asked.run)).experiment().training)
    with connect() as ranks:
        for asked in parsed:
            run = RunDirectory(Path(asked.run))
            with exclusively(run, ranks):
                _evaluate(run, asked, ranks, progress_file)


def _evaluate(
    run: RunDirectory, asked: EvaluationRequest, ranks: Ranks, progress_file: Path
) -> None:
    trained: TrainedModel = ranks.everywhere(lambda: load_run(run, ranks.device))
    precision.establish(trained.experiment.training, ranks.device, measures=True)
    lines = journal.read(run.journal_file)[0]
    _check_data(trained, lines)
    split = trained.data.val if asked.split == "val" else trained.data.train
    known = {line["key"] for line in lines if _is_of(line, trained.step)}
    writer = Journal(run.journal_file) if ranks.is_first else None
    try:
        for group in asked.groups:
            key = asked.key(group)
            if key in known:
                continue
            tell = _Told(progress_file, f"{run.name}: {group}", -(-len(split) // ranks.world_size))
            subject = EvaluationInput(trained, split, ranks, tell if ranks.is_first else _silent)
            began = time.monotonic()
            found = _GROUPS[group](subject, asked, writer)
            told = {f"{metric_prefix(asked.split)}/{name}": value for name, value in found.items()}
            if writer is not None:
                writer.append(
                    "evaluation",
                    step=trained.step,
                    key=key,
                    split=asked.split,
                    metrics=told,
                    seconds=round(time.monotonic() - began, 2),
                    world_size=ranks.world_size,
                )
    finally:
        if writer is not None:
            writer.close()


def _is_of(line: dict[str, Any], step: int) -> bool:
    return bool(line["kind"] == "evaluation" and line["step"] == step)


def _check_data(trained: TrainedModel, lines: list[dict[str, Any]]) -> None:
    starts = [line for line in lines if line["kind"] == "start"]
    before = starts[-1].get("data_digest") if starts else None
    if before not in (None, trained.data_digest):
        raise UserError(
            f"{trained.name} was trained on other data than {trained.data.store.path} holds now (digest"
            f" {str(before)[:12]}, now {trained.data_digest[:12]}): it would be judged by the wrong ones"
        )


def _elbo(
    subject: EvaluationInput, asked: EvaluationRequest, writer: Journal | None
) -> dict[str, float]:
    trained = subject.trained
    found = evaluate_elbo(
        subject.model, trained.data, subject.split, trained.experiment, subject.ranks
    )
    # The loss weighs kl by beta; the bound does not.
    return {**found, "neg_elbo": found["recon_loss"] + found["kl"]}


def _reconstruction(
    subject: EvaluationInput, asked: EvaluationRequest, writer: Journal | None
) -> dict[str, float]:
    found = evaluate_reconstruction(subject)
    if writer is not None and found.extremes is not None and asked.split == "val":
        run, step = subject.trained.run, subject.trained.step
        assert run is not None
        run.pictures.mkdir(exist_ok=True)
        path = run.pictures / f"extremes-{step:08}.png"
        pictures.write_png(found.extremes, path)
        writer.append("picture", step=step, key="extremes", path=str(path.relative_to(run.path)))
    return found.metrics


def _fid(
    subject: EvaluationInput, asked: EvaluationRequest, writer: Journal | None
) -> dict[str, float]:
    assert asked.inception is not None
    network = Inception(Path(asked.inception), subject.ranks.device, asked.inception_sha256)
    return evaluate_frechet(subject, network, "fid")


def _classifier(
    subject: EvaluationInput, asked: EvaluationRequest, writer: Journal | None
) -> dict[str, float]:
    """On rank 0 alone: two thousand samples."""
    found = {"sample_accuracy": math.nan, "classifier_real_accuracy": math.nan}
    if subject.ranks.is_first and is_finite(subject.model):
        trained = subject.trained
        judge = reference_classifier(trained.data, trained.device)
        labels = np.repeat(np.arange(len(trained.classes)), _SAMPLES_PER_CLASS)
        condition = np.eye(len(trained.classes), dtype=np.float32)[labels]
        drawn = sample(trained.model, trained.noise(len(labels)), condition, _silent)
        found = {
            "sample_accuracy": judge.sample_accuracy(drawn, labels).overall,
            "classifier_real_accuracy": judge.real_accuracy,
        }
    return subject.ranks.tell(found)


def _captions(
    subject: EvaluationInput, asked: EvaluationRequest, writer: Journal | None
) -> dict[str, float]:
    """On rank 0 alone: some dozens of drawings."""
    found = {"caption_match": math.nan, "caption_match_chance": math.nan}
    if subject.ranks.is_first and is_finite(subject.model):
        match = caption_match(subject.trained, subject.split)
        found = {"caption_match": match.share, "caption_match_chance": match.chance}
    return subject.ranks.tell(found)


_GROUPS: dict[
    str, Callable[[EvaluationInput, EvaluationRequest, Journal | None], dict[str, float]]
] = {
    "elbo": _elbo,
    "iwae": lambda subject, asked, _: evaluate_iwae(subject, asked.iwae_samples),
    "active_units": lambda subject, asked, _: active_units(subject),
    "reconstruction": _reconstruction,
    "frechet": lambda subject, asked, _: evaluate_frechet(subject, RandomFeatures(), "frechet_r64"),
    "fid": _fid,
    "classifier": _classifier,
    "probe": lambda subject, asked, _: probe(subject),
    "captions": _captions,
}


def _silent(images: float) -> None:
    pass


class _Told:
    """Rank 0's images of a group, in a file that the command reads."""

    def __init__(self, file: Path, what: str, total: int):
        self.file, self.said = file, {"what": what, "total": total}
        self.done = 0.0
        self.when = 0.0
        self(0)

    def __call__(self, images: float) -> None:
        self.done += images
        if time.monotonic() - self.when > _TOLD_EVERY_S:
            self.when = time.monotonic()
            # A bar is not worth an evaluation.
            with suppress(OSError):
                write_atomically(self.file, json.dumps({**self.said, "done": round(self.done)}))
