"""A trained model as something to draw with: captions or classes in, images out.

For example, with a run or with a folder that workflows/export.py wrote:

    from cvae.sampling.sampler import load

    model = load("runs/demo")
    images = model.draw(["a red bus on a street"], 8)  # uint8 (1, 8, C, H, W)
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cvae.config.experiment import Experiment, load_experiment
from cvae.data import draws
from cvae.data.experiment_data import ExperimentData, open_data
from cvae.data.store import Precision, TextEncoderEntry
from cvae.data.text_encoder import TextEncoder, load_encoder
from cvae.errors import UserError, did_you_mean
from cvae.models.backbone import ImageShape
from cvae.models.cvae import Cvae, build_model
from cvae.progress import progress_bar
from cvae.run import checkpoint
from cvae.run.directory import RunDirectory
from cvae.sampling import export_format, inference
from cvae.sampling.export_format import ExportedModel
from cvae.sampling.inference import Images, Vectors

# A server predicts in several threads.
_LOADING = threading.Lock()


@lru_cache(maxsize=2)
def _loaded(source: str, precision: Precision, sha256: str) -> TextEncoder:
    """load_encoder(), once for all models and seeds of an encoder. sha256: of the weights that are expected there,
    so that another encoder that takes the place of the first is loaded anew."""
    return load_encoder(source, precision)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, in eval mode, with what its prompts mean. Drawing needs no prepared data.

    Everywhere below `prompts` are captions for a captioned model, class numbers or names for a labelled
    one, and None for one without condition; UserError is raised for an empty caption, an unknown class
    and for prompts of another kind than the model's.
    """

    name: str
    experiment: Experiment
    model: Cvae
    step: int
    """Optimizer steps behind the weights."""
    classes: list[str]
    """Names of the classes of labelled data, by number; empty for captioned data."""
    encoder_source: str | None
    """What load_encoder takes: a name, or an exported folder's copy."""
    encoder_entry: TextEncoderEntry | None
    """The encoder that prepared the captions."""
    data_digest: str
    run: RunDirectory | None
    """None for an exported model."""
    seed: int
    """Of the noise that is drawn from; the experiment's unless replaced."""

    @property
    def device(self) -> torch.device:
        return inference.device_of(self.model)

    @property
    def image_shape(self) -> ImageShape:
        """C, H, W."""
        return self.model.shape

    @cached_property
    def data(self) -> ExperimentData:
        """The prepared data; opened at first use. Raises UserError where they are not on this machine."""
        try:
            data = open_data(self.experiment)
        except UserError as error:
            raise UserError(
                f"{self.name} draws what it is asked for, but this needs its data: {error}"
            ) from None
        if data.digest != self.data_digest:
            raise UserError(
                f"{self.name} draws what it is asked for, but this needs its data, and {data.store.path}"
                f" holds others (digest {data.digest[:12]}, not {self.data_digest[:12]})"
            )
        return data

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The frozen encoder that prepared the captions; loaded at first use, once in a process.

        Raises UserError where another one has its name by now: its vectors would mean nothing here.
        """
        name = self.experiment.data.text_encoder
        assert name is not None
        assert self.encoder_source is not None
        assert self.encoder_entry is not None
        with _LOADING:
            encoder = _loaded(
                self.encoder_source, self.encoder_entry.precision, self.encoder_entry.hash
            )
        if self.run is None:  # a copy knows neither its name nor minilm's shorter limit
            encoder = replace(encoder, name=name, max_tokens=self.encoder_entry.max_tokens)
        if difference := encoder.difference(self.encoder_entry):
            raise UserError(
                f"text encoder {name!r} is not the one that prepared the captions of {self.name}:"
                f" {difference}"
            )
        return encoder

    def draw(self, prompts: Sequence[str | int] | None, count: int) -> Images:
        """uint8 (M, count, C, H, W): `count` images for each of M prompts; M is 1 without condition.

        The same at every call. Column j has the same noise in every row, so that rows differ by the
        prompt alone. Another seed draws others: ``dataclasses.replace(model, seed=1)``.
        """
        return np.concatenate(list(self.draw_parts(prompts, count)))

    def draw_parts(self, prompts: Sequence[str | int] | None, count: int) -> Iterator[Images]:
        """draw() in parts of a few rows, (m, count, C, H, W), as they are done."""
        if count < 1:
            raise UserError(f"{count} images of a prompt cannot be drawn; 1 is the least")
        condition, noise = self.condition(prompts), self.noise(count)
        if condition is None:
            yield inference.sample(self.model, noise, None)[None]
            return
        rows = max(1, inference.images_at_once(self.model) // count)
        with progress_bar(len(condition) * count, "image", "images", delay=2) as bar:
            for start in range(0, len(condition), rows):
                part = condition[start : start + rows]
                yield inference.sample_rows(self.model, part, noise, bar.update)

    def encode(self, images: Images, prompts: Sequence[str | int] | None = None) -> Vectors:
        """μ of q(z|x,c), float32 (B, *latent_shape), for uint8 images (B, C, H, W) and B prompts."""
        return inference.encode(self.model, *self._inputs(self._checked(images), prompts))

    def decode(self, latent: Vectors, prompts: Sequence[str | int] | None = None) -> Images:
        """Mean images, uint8 (B, C, H, W), for z (B, *latent_shape) and B prompts."""
        return inference.decode(self.model, *self._inputs(latent, prompts))

    def reconstruct(self, images: Images, prompts: Sequence[str | int] | None = None) -> Images:
        """uint8 images (B, C, H, W) through the model and back, given B prompts."""
        return inference.reconstruct(self.model, *self._inputs(self._checked(images), prompts))

    def condition(self, prompts: Sequence[str | int] | None) -> Vectors | None:
        """What the model is told for each prompt: (M, condition_dim); None without condition.

        Warns of captions longer than the encoder reads.
        """
        wanted = self.experiment.model.condition
        if wanted == "none":
            if prompts is None:
                return None
            raise UserError(f"{self.name} was trained without a condition: it takes no captions")
        if prompts is None or isinstance(prompts, str) or not len(prompts):
            what = "captions" if wanted == "text" else "classes"
            raise UserError(f"{self.name} draws from {what}; give a list of them")
        if wanted == "label":
            one_hot = np.eye(len(self.classes), dtype=np.float32)
            return one_hot[[self.class_number(prompt) for prompt in prompts]]
        captions = [" ".join(str(prompt).split()) for prompt in prompts]
        for number, caption in enumerate(captions, 1):
            which = f"caption {number} of {len(captions)}"
            if not caption:
                raise UserError(f"{which} is empty; say what is to be drawn")
            if any("\ud800" <= letter <= "\udfff" for letter in caption):
                raise UserError(f"{which} is not valid UTF-8")
        limit = self.text_encoder.max_tokens
        long = np.flatnonzero(self.text_encoder.token_counts(captions) > limit)
        if len(long):
            shown = ", ".join(f"“{captions[n][:24]}…”" for n in long[:3])
            more = f" and {len(long) - 3} more" if len(long) > 3 else ""
            warnings.warn(
                f"the text encoder reads {limit} tokens; what follows them is not drawn in {shown}{more}",
                stacklevel=2,
            )
        return self.text_encoder.encode(captions)

    def labels(self, prompts: Sequence[str | int]) -> list[str]:
        """The prompts as people read them: captions as they are, classes by name."""
        if self.experiment.model.condition == "label":
            return [self.classes[self.class_number(prompt)] for prompt in prompts]
        return [str(prompt) for prompt in prompts]

    def class_number(self, prompt: str | int) -> int:
        """Number of the class of that number or name. Raises UserError, with the nearest name."""
        names = [name.casefold() for name in self.classes]
        wanted = str(prompt).strip().casefold()
        if wanted in names:
            return names.index(wanted)
        if wanted.isdecimal() and int(wanted) < len(names):
            return int(wanted)
        near = did_you_mean(wanted, self.classes) or f"; its classes are {', '.join(self.classes)}"
        raise UserError(f"{prompt!r} is no class of {self.experiment.data.name}{near}")

    def noise(self, count: int) -> Vectors:
        """(count, *latent_shape) standard normal, the same at every call."""
        return draws.sample_noise(self.seed, count, self.model.latent_shape)

    def _inputs(
        self, arrays: NDArray[Any], prompts: Sequence[str | int] | None
    ) -> tuple[NDArray[Any], Vectors | None]:
        condition = self.condition(prompts)
        if condition is not None and len(condition) != len(arrays):
            raise UserError(f"{len(arrays)} rows need as many prompts, not {len(condition)}")
        return arrays, condition

    def _checked(self, images: Images) -> Images:
        wanted = ", ".join(map(str, self.image_shape))
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise UserError(
                f"{self.name} takes uint8 images (B, {wanted}), not {images.dtype} {images.shape}"
            )
        return images


def load(name: str | Path, device: torch.device | None = None) -> TrainedModel:
    """Opens a run (its name, its folder, or "latest") or a folder that workflows/export.py wrote.

    device: the GPU if there is one, else the CPU. Raises UserError where it is neither, or damaged.
    """
    return open_found(export_format.locate(str(name)), device)


def open_found(place: RunDirectory | Path, device: torch.device | None = None) -> TrainedModel:
    """load() for what locate() has found."""
    if isinstance(place, RunDirectory):
        return load_run(place, device)
    return load_export(place, device)


def load_run(run: RunDirectory, device: torch.device | None = None) -> TrainedModel:
    """Opens a run with the (averaged, where kept) weights of its best intact checkpoint.

    Raises UserError where there is no checkpoint yet or where the run's data are not prepared here.
    """
    experiment = run.experiment()
    weights, step = checkpoint.load_weights(run.checkpoints, warnings.warn)
    data = open_data(experiment)
    store, encoder = data.store, experiment.data.text_encoder
    return TrainedModel(
        name=run.name,
        experiment=experiment,
        model=_model(experiment, data.image_shape, data.condition_dim, weights, device, store.path),
        step=step,
        classes=store.manifest.classes or [],
        encoder_source=encoder,
        encoder_entry=store.manifest.text_encoders[encoder] if encoder else None,
        data_digest=data.digest,
        run=run,
        seed=experiment.seed,
    )


def load_export(folder: Path, device: torch.device | None = None) -> TrainedModel:
    """Opens a folder that workflows/export.py wrote; every file is checked against its sha256.

    Raises UserError where something is missing, was changed, or is no exported model.
    """
    exported = export_format.read(folder)
    experiment = load_experiment(folder / export_format.EXPERIMENT)
    file = folder / export_format.WEIGHTS
    try:
        weights = load_file(file)
    except (SafetensorError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file} is damaged: {str(error)[:150]}") from None
    _check_fit(folder, exported, experiment)
    encoder, shape, width = exported.text_encoder, exported.image_shape, exported.condition_dim
    # A run's own model/, as MLflow has it, holds no copy: there its name has to do.
    copy = folder / export_format.TEXT_ENCODER
    return TrainedModel(
        name=exported.name,
        experiment=experiment,
        model=_model(experiment, shape, width, weights, device, folder),
        step=exported.step,
        classes=exported.classes,
        encoder_source=(str(copy) if copy.is_dir() else encoder.name) if encoder else None,
        encoder_entry=encoder.entry if encoder else None,
        data_digest=exported.data.digest,
        run=None,
        seed=experiment.seed,
    )


def _check_fit(folder: Path, exported: ExportedModel, experiment: Experiment) -> None:
    """Raises UserError unless what config.json says of the model is what its experiment needs."""
    encoder, size = exported.text_encoder, experiment.data.image_size
    wanted = {
        "text": encoder.entry.dim if encoder else 0,
        "label": len(exported.classes),
        "none": exported.condition_dim,
    }[experiment.model.condition]
    if (
        exported.condition_dim != wanted
        or exported.image_shape[1:] != (size, size)
        or (experiment.model.condition == "text" and experiment.data.text_encoder is None)
    ):
        file = folder / export_format.CONFIG
        raise UserError(f"{file} is damaged: its sizes are not those of {export_format.EXPERIMENT}")


def _model(
    experiment: Experiment,
    shape: ImageShape,
    condition_dim: int,
    weights: dict[str, Tensor],
    device: torch.device | None,
    made_for: Path,
) -> Cvae:
    """The model with these weights. Raises UserError if they are not its own: other names, shapes, types, or
    values that are not finite."""
    # Without memory at first: sizes that do not fit may be beyond all measure.
    with torch.device("meta"):
        expected = build_model(experiment.model, shape, condition_dim, experiment.seed).state_dict()
    if reason := _misfit(weights, expected):
        raise UserError(
            f"{experiment.name}: the weights do not fit {made_for} ({reason}): its data were prepared"
            " differently, or they are damaged or of another version of the project"
        )
    model = build_model(experiment.model, shape, condition_dim, experiment.seed)
    model.load_state_dict(weights)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    return model


def _misfit(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Why these cannot be the weights of a model that has the expected ones; None if they can."""
    for name in sorted(weights.keys() ^ expected.keys()):
        return f"{name[:80]} is {'missing' if name in expected else 'not of this model'}"
    for name, tensor in weights.items():
        here, there = (
            f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (tensor, expected[name])
        )
        if here != there:
            return f"{name} is {here} instead of {there}"
        if not torch.isfinite(tensor).all():
            return f"{name} has values that are not finite"
    return None
