"""Writes a run's best model as a folder that draws anywhere; export_format.py describes it."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError

from cvae.data.encoder_files import WEIGHTS as ENCODER_WEIGHTS
from cvae.data.encoder_files import encoder_folder
from cvae.data.store import SplitManifest
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.files.output_folder import MARKER, whole_folder
from cvae.files.paths import write_atomically
from cvae.files.weights_file import write_weights
from cvae.progress import progress_bar
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.sampling.export_format import (
    CARD,
    CONFIG,
    EXPERIMENT,
    EXPORTED_BY,
    SAMPLES,
    TEXT_ENCODER,
    WEIGHTS,
    DataFacts,
    ExportedEncoder,
    ExportedModel,
    Provenance,
    SplitFacts,
    check_target,
    plain_name,
)
from cvae.sampling.grids import labelled_grid
from cvae.sampling.model_card import model_card
from cvae.sampling.pictures import write_png
from cvae.sampling.sampler import load_run
from cvae.sampling.trained_model import TrainedModel

# Samples for the card: of a large model fewer, which on a CPU take minutes.
_SAMPLES, _FEW, _LARGE = 8, 4, 50_000_000


def export_run(run: RunDirectory, folder: Path) -> ExportedModel:
    """Writes the run's best model to `folder`, which appears whole or not at all.

    Raises UserError where the folder is not empty or cannot be written (disk full, no permission), where
    the run has no checkpoint, and where its data or its text encoder are not here, or are others by now.
    """
    check_target(folder)
    trained = load_run(run)
    if trained.encoder_entry is not None:
        _ = trained.text_encoder  # refuses one that is not the run's own
    exported = _facts(run, trained)
    with _whole(folder) as nascent:
        _write_weights(run, trained, nascent)
        if exported.text_encoder is not None:
            _copy_encoder(exported.text_encoder, nascent / TEXT_ENCODER)
        count = _FEW if trained.model.n_parameters() > _LARGE else _SAMPLES
        prompts = _prompts(trained, count)
        write_png(_sample_grid(trained, prompts, count), nascent / SAMPLES)
        _seal(exported, nascent)
        card = model_card(exported, trained.experiment, trained.model, prompts[:2])
        write_atomically(nascent / CARD, card)
    return exported


def write_model(run: RunDirectory, folder: Path) -> None:
    """The run's best model as MLflow gets it: as exported, but without text encoder, samples and card.

    folder: the run's own model/, which is replaced. Raises OSError if it cannot be written, UserError as
    export_run.
    """
    trained = load_run(run, torch.device("cpu"))
    with whole_folder(folder, "training", older=lambda _: True) as nascent:
        _write_weights(run, trained, nascent)
        _seal(_facts(run, trained), nascent)


def _write_weights(run: RunDirectory, trained: TrainedModel, folder: Path) -> None:
    shutil.copy(run.experiment_file, folder / EXPERIMENT)
    weights = {name: tensor.cpu() for name, tensor in trained.model.state_dict().items()}
    write_weights(weights, folder / WEIGHTS, from_pytorch=True)


def _seal(exported: ExportedModel, folder: Path) -> None:
    """Writes config.json, with the checksums of the files that are there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)
    total = sum(file.stat().st_size for file in files)
    with progress_bar(total, "B", "checksums", delay=2) as bar:
        digests = {
            str(file.relative_to(folder)): sha256_of_file(file, bar.update) for file in files
        }
    write_atomically(folder / CONFIG, exported.to_json(digests))


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """As whole_folder, but a full disk, for which safetensors has an error of its own, is a UserError."""
    try:
        with whole_folder(folder, EXPORTED_BY) as nascent:
            yield nascent
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{folder} cannot be written: {reason}") from None


def _copy_encoder(encoder: ExportedEncoder, folder: Path) -> None:
    """The files that make the encoder, as published; its weights as safetensors in any case."""
    source = encoder_folder(encoder.name)
    folder.mkdir()
    weights = next(source / name for name in ENCODER_WEIGHTS if (source / name).is_file())
    sizes = {name: (source / name).stat().st_size for name in (*encoder.entry.files, weights.name)}
    with progress_bar(sum(sizes.values()), "B", "text encoder", delay=2) as bar:
        for name, size in sizes.items():
            if name.endswith(".bin"):
                # A pickle: read without running what is in it, and left behind.
                tensors = torch.load(source / name, map_location="cpu", weights_only=True)
                whole = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
                write_weights(whole, folder / WEIGHTS, from_pytorch=True)
                encoder.entry.hash = sha256_of_file(folder / WEIGHTS)
            else:
                shutil.copyfile(source / name, folder / name)
            bar.update(size)
    # Whose it is, and under which licence it may be passed on.
    for file in (*source.glob("README.md"), *source.glob("LICENSE*")):
        shutil.copyfile(file, folder / file.name)


def _prompts(trained: TrainedModel, count: int) -> list[str]:
    """Every class, or `count` captions of val; none without condition."""
    if trained.experiment.model.condition != "text":
        return trained.classes if trained.experiment.model.condition == "label" else []
    val = trained.data.val
    captions = (val.caption(index) for index in range(min(100, len(val))))
    return list(dict.fromkeys(captions))[:count]


def _sample_grid(trained: TrainedModel, prompts: list[str], count: int) -> Image:
    """Samples alone: a real image beside them would need its owner's licence."""
    if prompts:
        return labelled_grid(trained.draw(prompts, count), trained.labels(prompts))
    drawn = trained.draw(None, count**2)
    return labelled_grid(drawn.reshape(count, count, *trained.image_shape))


def _facts(run: RunDirectory, trained: TrainedModel) -> ExportedModel:
    lines = journal.read(run.journal_file)[0]
    data, experiment = trained.data, trained.experiment
    starts = [line for line in lines if line["kind"] == "start"]
    last: dict[str, Any] = starts[-1] if starts else {}
    if last.get("data_digest", data.digest) != data.digest:
        raise UserError(
            f"{run.name} was trained on other data than {data.store.path} holds now (digest"
            f" {last['data_digest'][:12]}, not {data.digest[:12]}): its card would tell of the wrong ones"
        )
    encoder = None
    if trained.encoder_entry is not None:
        assert experiment.data.text_encoder is not None
        encoder = ExportedEncoder(
            name=experiment.data.text_encoder, entry=trained.encoder_entry.model_copy()
        )
    splits = data.store.manifest.splits
    return ExportedModel(
        name=plain_name(run.name),
        step=trained.step,
        image_shape=data.image_shape,
        condition_dim=data.condition_dim,
        classes=trained.classes if experiment.model.condition == "label" else [],
        text_encoder=encoder,
        metrics=_metrics(run, lines, trained.step),
        data=DataFacts(
            dataset=data.store.manifest.dataset,
            digest=data.digest,
            train=_split(experiment.data.train, splits[experiment.data.train]),
            trained_on=len(data.train_rows),
            val=_split(experiment.data.val, splits[experiment.data.val]),
        ),
        provenance=Provenance(
            commit=last.get("commit"),
            uncommitted_changes=last.get("uncommitted_changes"),
            packages=last.get("packages", {}),
            commands=[_without_places(str(line.get("command", ""))) for line in run.submissions()],
            world_size=last.get("world_size"),
            hosts=len(set(last["hosts"])) if "hosts" in last else None,
            device=last.get("device"),
            precision=last.get("precision"),
        ),
    )


def _split(name: str, split: SplitManifest) -> SplitFacts:
    return SplitFacts(
        name=name,
        images=split.images,
        captions=split.captions,
        skipped=len(split.skipped),
        source=split.source,
    )


def _without_places(command: str) -> str:
    """A command without the folders of the machine that it ran on: they are nobody else's business."""
    return re.sub(r"(^|[\s=])/\S*/", r"\1", command)


def _metrics(run: RunDirectory, lines: list[dict[str, Any]], step: int) -> dict[str, float]:
    """What was measured at that step: by training, and by generate.py where it was asked."""
    metrics: dict[str, float] = {}
    for line in lines:
        if line["kind"] == "epoch" and line["step"] == step:
            metrics |= line["metrics"]
    for file in (run.pictures / "caption_match.json", run.pictures / "classes.json"):
        facts = json.loads(file.read_text()) if file.is_file() else {}
        if facts.get("step") == step:
            metrics |= {key: facts[key] for key in _JUDGED if key in facts}
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


_JUDGED = ("caption_match", "chance", "sample_accuracy", "classifier_real_accuracy")
