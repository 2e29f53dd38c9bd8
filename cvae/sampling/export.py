"""Writes a run's best model as a folder that draws anywhere; export_format.py describes the folder."""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
from cvae.sampling import export_format
from cvae.sampling.export_format import ExportedEncoder, ExportedModel
from cvae.sampling.grids import labelled_grid
from cvae.sampling.model_card import model_card
from cvae.sampling.pictures import write_png
from cvae.sampling.sampler import load_run
from cvae.sampling.trained_model import TrainedModel

# Rows and columns of the card's picture: fewer of a large model, which takes minutes on a CPU.
_SAMPLES, _FEW, _LARGE = 8, 4, 50_000_000
_MEASURES_OF_PICTURES = (
    "caption_match",
    "chance",
    "sample_accuracy",
    "classifier_real_accuracy",
)


def export_run(run: RunDirectory, folder: Path) -> ExportedModel:
    """Writes the run's best model to `folder`, which appears whole or not at all.

    Raises UserError if the folder is not empty or cannot be written (disk full, no permission), if the run
    has no checkpoint, or if its data or its text encoder are missing or have changed.
    """
    export_format.check_target(folder)
    trained = load_run(run)
    if trained.encoder_entry is not None:
        _ = trained.text_encoder  # raises UserError if it is not the run's own
    exported = _describe(run, trained)
    with _whole(folder) as new_folder:
        _write_weights(run, trained, new_folder)
        if exported.text_encoder is not None:
            _copy_encoder(exported.text_encoder, new_folder / export_format.TEXT_ENCODER)
        count = _FEW if trained.model.n_parameters() > _LARGE else _SAMPLES
        prompts = _prompts(trained, count)
        write_png(_sample_grid(trained, prompts, count), new_folder / export_format.SAMPLES)
        _write_config(exported, new_folder)
        card = model_card(exported, trained.experiment, trained.model, prompts[:2])
        write_atomically(new_folder / export_format.CARD, card)
    return exported


def write_model(run: RunDirectory, folder: Path) -> None:
    """Writes the run's best model for MLflow: as exported, but without text encoder, samples and card.

    folder: the run's own model/, which is replaced. Raises OSError if it cannot be written, UserError like
    export_run.
    """
    trained = load_run(run, torch.device("cpu"))
    with whole_folder(folder, "training", older=lambda _: True) as new_folder:
        _write_weights(run, trained, new_folder)
        _write_config(_describe(run, trained), new_folder)


def _write_weights(run: RunDirectory, trained: TrainedModel, folder: Path) -> None:
    shutil.copy(run.experiment_file, folder / export_format.EXPERIMENT)
    weights = {name: tensor.cpu() for name, tensor in trained.model.state_dict().items()}
    write_weights(weights, folder / export_format.WEIGHTS, from_pytorch=True)


def _write_config(exported: ExportedModel, folder: Path) -> None:
    """Writes config.json with the checksums of the files in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)
    total = sum(file.stat().st_size for file in files)
    with progress_bar(total, "B", "checksums", delay=2) as bar:
        digests = {
            str(file.relative_to(folder)): sha256_of_file(file, bar.update) for file in files
        }
    write_atomically(folder / export_format.CONFIG, exported.to_json(digests))


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """whole_folder, with a UserError if the disk is full, for which safetensors has an error of its own."""
    try:
        with whole_folder(folder, export_format.EXPORTED_BY) as new_folder:
            yield new_folder
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{folder} cannot be written: {reason}") from None


def _copy_encoder(encoder: ExportedEncoder, folder: Path) -> None:
    """Copies the files of the encoder, with its weights as safetensors, its README.md and its licence."""
    source = encoder_folder(encoder.name)
    folder.mkdir()
    weights = next(source / name for name in ENCODER_WEIGHTS if (source / name).is_file())
    sizes = {name: (source / name).stat().st_size for name in (*encoder.entry.files, weights.name)}
    with progress_bar(sum(sizes.values()), "B", "text encoder", delay=2) as bar:
        for name, size in sizes.items():
            if name.endswith(".bin"):
                # A pickle: weights_only reads its tensors without running its code.
                tensors = torch.load(source / name, map_location="cpu", weights_only=True)
                whole = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
                write_weights(whole, folder / export_format.WEIGHTS, from_pytorch=True)
                encoder.entry.hash = sha256_of_file(folder / export_format.WEIGHTS)
            else:
                shutil.copyfile(source / name, folder / name)
            bar.update(size)
    for file in (*source.glob("README.md"), *source.glob("LICENSE*")):
        shutil.copyfile(file, folder / file.name)


def _prompts(trained: TrainedModel, count: int) -> list[str]:
    """Returns all classes, or `count` captions of val, or nothing for an unconditional model."""
    if trained.experiment.model.condition != "text":
        return trained.classes if trained.experiment.model.condition == "label" else []
    val = trained.data.val
    captions = (val.caption(index) for index in range(min(100, len(val))))
    return list(dict.fromkeys(captions))[:count]


def _sample_grid(trained: TrainedModel, prompts: list[str], count: int) -> Image:
    """Returns samples without real images, which would need their owners' licence."""
    if prompts:
        return labelled_grid(trained.draw(prompts, count), trained.labels(prompts))
    drawn = trained.draw(None, count**2)
    return labelled_grid(drawn.reshape(count, count, *trained.image_shape))


def _describe(run: RunDirectory, trained: TrainedModel) -> ExportedModel:
    """Returns config.json's contents. Raises UserError if the run was trained on other data than are here."""
    lines = journal.read(run.journal_file)[0]
    data, experiment, entry = trained.data, trained.experiment, trained.encoder_entry
    start = trained.last_start(lines)
    encoder = None
    if entry is not None:
        assert experiment.data.text_encoder is not None
        encoder = ExportedEncoder(name=experiment.data.text_encoder, entry=entry.model_copy())
    splits = data.store.manifest.splits
    return ExportedModel(
        name=export_format.plain_name(run.name),
        step=trained.step,
        image_shape=data.image_shape,
        condition_dim=data.condition_dim,
        classes=trained.classes if experiment.model.condition == "label" else [],
        text_encoder=encoder,
        metrics=_metrics(run, lines, trained.step),
        data=export_format.DataFacts(
            dataset=data.store.manifest.dataset,
            digest=data.digest,
            train=_split(experiment.data.train, splits),
            trained_on=len(data.train_rows),
            val=_split(experiment.data.val, splits),
        ),
        provenance=export_format.Provenance(
            packages=start.get("packages", {}),
            commands=[_without_folders(str(line.get("command", ""))) for line in run.submissions()],
            hosts=len(set(start["hosts"])) if "hosts" in start else None,
            **{name: start.get(name) for name in _AS_IN_THE_JOURNAL},
        ),
    )


_AS_IN_THE_JOURNAL = ("commit", "uncommitted_changes", "world_size", "device", "precision")


def _split(name: str, splits: Mapping[str, SplitManifest]) -> export_format.SplitFacts:
    split = splits[name]
    facts = split.model_dump(include={"images", "captions", "source"})
    return export_format.SplitFacts(name=name, skipped=len(split.skipped), **facts)


def _without_folders(command: str) -> str:
    """Returns the command without the folders of the machine that it ran on, which are private."""
    return re.sub(r"(^|[\s=])/\S*/", r"\1", command)


def _metrics(run: RunDirectory, lines: Sequence[dict[str, Any]], step: int) -> dict[str, float]:
    """Returns the finite metrics of that step: those of training, and those that pictures came with."""
    metrics: dict[str, float] = {}
    for line in lines:
        if line["kind"] == "epoch" and line["step"] == step:
            metrics |= line["metrics"]
    for file in (run.pictures / "caption_match.json", run.pictures / "classes.json"):
        facts = json.loads(file.read_text()) if file.is_file() else {}
        if facts.get("step") == step:
            metrics |= {name: facts[name] for name in _MEASURES_OF_PICTURES if name in facts}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
