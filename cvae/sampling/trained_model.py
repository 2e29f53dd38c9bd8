"""A trained model as an object that draws: captions or classes in, images out."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from cvae.config.experiment import Experiment
from cvae.data import draws
from cvae.data.experiment_data import ExperimentData, open_data
from cvae.data.store import Precision, TextEncoderEntry
from cvae.data.text_encoder import TextEncoder, load_encoder
from cvae.errors import UserError, did_you_mean
from cvae.models.backbone import ImageShape
from cvae.models.cvae import Cvae
from cvae.progress import progress_bar
from cvae.run.directory import RunDirectory
from cvae.sampling import inference
from cvae.sampling.inference import Images, Vectors

Prompts = Sequence[str | int] | None
# A server predicts in several threads.
_LOADING = threading.Lock()


@lru_cache(maxsize=2)
def _load_encoder_once(source: str, precision: Precision, sha256: str) -> TextEncoder:
    """Returns load_encoder()'s result, shared by all models and seeds that use this encoder.

    sha256: of the expected weights, so that another encoder under the same name is loaded anew.
    """
    return load_encoder(source, precision)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in eval mode, with everything that gives its prompts a meaning.

    `prompts` are captions for a captioned model, class numbers or names for a labelled one, and None for
    an unconditional one. Every method that takes them raises UserError for an empty caption, an unknown
    class, or prompts that the model does not take. Drawing needs no prepared data.
    """

    name: str
    experiment: Experiment
    model: Cvae
    step: int  # number of optimizer steps that led to the weights
    classes: list[str]  # class names of labelled data, by number; empty for captioned data
    encoder_source: str | None
    """The argument of load_encoder: a name, or the folder of an exported copy."""
    encoder_entry: TextEncoderEntry | None  # describes the encoder that prepared the captions
    data_digest: str
    run: RunDirectory | None  # None for an exported model
    seed: int  # seed of the noise; the experiment's unless replaced

    @property
    def device(self) -> torch.device:
        return inference.device_of(self.model)

    @property
    def image_shape(self) -> ImageShape:
        """C, H, W."""
        return self.model.shape

    @cached_property
    def data(self) -> ExperimentData:
        """The prepared data, opened at first use. Raises UserError if this machine does not have them."""
        need = f"{self.name} draws from prompts without its data, but this needs its data"
        try:
            data = open_data(self.experiment)
        except UserError as error:
            raise UserError(f"{need}: {error}", error.hint, **error.values) from None
        if data.digest != self.data_digest:
            raise UserError(
                f"{need}, and {data.store.path} holds others (digest {data.digest[:12]}, expected"
                f" {self.data_digest[:12]})"
            )
        return data

    def last_start(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the last "start" line of the run's journal, {} if there is none.

        Raises UserError if it names other data than are prepared here.
        """
        starts = (line for line in reversed(lines) if line["kind"] == "start")
        start: dict[str, Any] = next(starts, {})
        digest = start.get("data_digest", self.data_digest)
        if digest != self.data_digest:
            raise UserError(
                f"{self.name} was trained on other data than {self.data.store.path} holds now (digest"
                f" {digest[:12]}, now {self.data_digest[:12]})"
            )
        return start

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The frozen encoder that prepared the captions; loaded at first use, once per process.

        Raises UserError if its name now belongs to another encoder, whose vectors mean nothing to the model.
        """
        name, entry = self.experiment.data.text_encoder, self.encoder_entry
        assert name is not None
        assert self.encoder_source is not None
        assert entry is not None
        with _LOADING:
            encoder = _load_encoder_once(self.encoder_source, entry.precision, entry.hash)
        if self.run is None:  # an exported copy knows neither its name nor minilm's shorter limit
            encoder = replace(encoder, name=name, max_tokens=entry.max_tokens)
        if difference := encoder.difference(entry):
            raise UserError(
                f"text encoder {name!r} is not the one that prepared the captions of {self.name}:"
                f" {difference}"
            )
        return encoder

    def draw(self, prompts: Prompts, count: int) -> Images:
        """Returns uint8 (M, count, C, H, W): `count` images for each of M prompts; M is 1 without condition.

        The result is the same at every call. Column j uses the same noise in every row, so that rows differ
        by the prompt alone. For other images replace the seed: ``dataclasses.replace(model, seed=1)``.
        """
        return np.concatenate(list(self.draw_parts(prompts, count)))

    def draw_parts(self, prompts: Prompts, count: int) -> Iterator[Images]:
        """Yields the rows of draw() a few at a time, (m, count, C, H, W), as they are computed."""
        if count < 1:
            raise UserError(f"cannot draw {count} images of a prompt; the minimum is 1")
        condition, noise = self.condition(prompts), self.noise(count)
        if condition is None:
            yield inference.sample(self.model, noise, None)[None]
            return
        rows = max(1, inference.images_at_once(self.model) // count)
        with progress_bar(len(condition) * count, "image", "images", delay=2) as bar:
            for start in range(0, len(condition), rows):
                part = condition[start : start + rows]
                yield inference.sample_rows(self.model, part, noise, bar.update)

    def encode(self, images: Images, prompts: Prompts = None) -> Vectors:
        """Returns μ of q(z|x,c), float32 (B, *latent_shape), for uint8 images (B, C, H, W) and B prompts."""
        self._check_images(images)
        return inference.encode(self.model, images, self._condition_of(len(images), prompts))

    def decode(self, latent: Vectors, prompts: Prompts = None) -> Images:
        """Returns the mean images, uint8 (B, C, H, W), for z (B, *latent_shape) and B prompts."""
        return inference.decode(self.model, latent, self._condition_of(len(latent), prompts))

    def reconstruct(self, images: Images, prompts: Prompts = None) -> Images:
        """Encodes and decodes uint8 images (B, C, H, W) with B prompts; returns images of the same shape."""
        self._check_images(images)
        return inference.reconstruct(self.model, images, self._condition_of(len(images), prompts))

    def condition(self, prompts: Prompts) -> Vectors | None:
        """Returns the condition vectors of M prompts, (M, condition_dim), or None for an unconditional model.

        Warns about captions that are longer than the encoder reads.
        """
        kind = self.experiment.model.condition
        if kind == "none":
            if prompts is not None:
                raise UserError(f"{self.name} was trained without a condition: it takes no prompts")
            return None
        if prompts is None or isinstance(prompts, str) or not len(prompts):
            plural = "captions" if kind == "text" else "classes"
            raise UserError(f"{self.name} draws from {plural}; give a list of them")
        if kind == "label":
            one_hot = np.eye(len(self.classes), dtype=np.float32)
            return one_hot[[self.class_number(prompt) for prompt in prompts]]
        captions = _clean_captions(prompts)
        self._warn_of_long(captions)
        return self.text_encoder.encode(captions)

    def labels(self, prompts: Sequence[str | int]) -> list[str]:
        """Returns the prompts for people to read: captions unchanged, classes by name."""
        if self.experiment.model.condition == "label":
            return [self.classes[self.class_number(prompt)] for prompt in prompts]
        return [str(prompt) for prompt in prompts]

    def class_number(self, prompt: str | int) -> int:
        """Returns the number of the class that `prompt` names or numbers, ignoring case.

        Raises UserError for an unknown class, with the most similar name.
        """
        names = [name.casefold() for name in self.classes]
        wanted = str(prompt).strip().casefold()
        if wanted in names:
            return names.index(wanted)
        if wanted.isdecimal() and int(wanted) < len(names):
            return int(wanted)
        hint = did_you_mean(wanted, self.classes) or f"; its classes are {', '.join(self.classes)}"
        raise UserError(f"{prompt!r} is no class of {self.experiment.data.name}{hint}")

    def noise(self, count: int) -> Vectors:
        """Returns standard normal noise (count, *latent_shape), the same at every call."""
        return draws.sample_noise(self.seed, count, self.model.latent_shape)

    def _condition_of(self, n_rows: int, prompts: Prompts) -> Vectors | None:
        condition = self.condition(prompts)
        if condition is not None and len(condition) != n_rows:
            raise UserError(f"{n_rows} rows need {n_rows} prompts, not {len(condition)}")
        return condition

    def _check_images(self, images: Images) -> None:
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise UserError(
                f"{self.name} takes uint8 images (B, {expected}), not {images.dtype} {images.shape}"
            )

    def _warn_of_long(self, captions: list[str]) -> None:
        limit = self.text_encoder.max_tokens
        long = np.flatnonzero(self.text_encoder.token_counts(captions) > limit)
        if len(long):
            shown = ", ".join(f"“{captions[n][:24]}…”" for n in long[:3])
            more = f" and {len(long) - 3} more" if len(long) > 3 else ""
            warnings.warn(
                f"the text encoder reads only the first {limit} tokens of {shown}{more}",
                stacklevel=3,
            )


def _clean_captions(prompts: Sequence[str | int]) -> list[str]:
    """Returns the captions with single spaces. Raises UserError for one that is empty or not valid text."""
    captions = [" ".join(str(prompt).split()) for prompt in prompts]
    for number, caption in enumerate(captions, 1):
        fault = "empty; say what to draw" if not caption else ""
        if any("\ud800" <= letter <= "\udfff" for letter in caption):
            fault = "not valid UTF-8"
        if fault:
            raise UserError(f"caption {number} of {len(captions)} is {fault}")
    return captions
