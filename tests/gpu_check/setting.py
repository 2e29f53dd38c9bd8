"""What all checks share: their size, their data made on the spot, their experiments."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from tests.gpu_check.findings import Skip

BACKBONES = ("conv", "resnet", "ldm")


@dataclass(frozen=True)
class Setting:
    """small: the size for a CPU. home: $CVAE_HOME of the checks, thrown away with them."""

    small: bool
    home: Path

    @property
    def pixels(self) -> int:
        return 16 if self.small else 64

    @property
    def large_pixels(self) -> int:
        return 32 if self.small else 256

    @property
    def text_dim(self) -> int:
        return 12 if self.small else 768

    @cached_property
    def has_gpu(self) -> bool:
        import torch

        return torch.cuda.is_available()

    @cached_property
    def capability(self) -> tuple[int, int]:
        """Of the GPU; (0, 0) without one."""
        import torch

        return torch.cuda.get_device_capability() if self.has_gpu else (0, 0)

    def needs_gpu(self) -> None:
        if not self.has_gpu:
            raise Skip("needs a GPU")

    def why_not(self, precision: str) -> str | None:
        """Returns what is missing for a precision; None if it can be used."""
        if not knows("precision", precision):
            return f"training.precision has no value {precision}"
        if precision == "tf32" and self.capability < (8, 0):
            return "needs a GPU of compute capability 8.0"
        if precision == "bf16" and self.has_gpu and self.capability < (8, 0):
            return "needs a GPU of compute capability 8.0"
        if precision == "fp16" and not self.has_gpu:
            return "needs a GPU"
        return None

    def precisions(self) -> list[str]:
        """All that this device can do, the reference first."""
        return [name for name in ("fp32", "tf32", "bf16", "fp16") if self.why_not(name) is None]

    def experiment(
        self,
        backbone: str = "conv",
        pixels: int | None = None,
        narrow: bool = False,
        **changes: Any,
    ) -> Any:
        """Returns an Experiment of the published sizes, or of tiny ones. changes: keys of `training`.

        narrow: a conv model whose checkpoints are small. Its data are there afterwards.
        """
        from cvae.config.experiment import Experiment

        pixels = pixels or self.pixels
        batch_size = 8 if self.small else {"ldm": 16}.get(backbone, 128)
        tree: dict[str, Any] = {
            "name": "gpu_check",
            "data": {
                "name": self._store(pixels),
                "image_size": pixels,
                "text_encoder": "toy",
            },
            "model": {
                "backbone": backbone,
                "condition": "text",
                "latent_dim": 4 if backbone == "ldm" or self.small else 128,
                "likelihood": "gaussian",
            },
            "optimizer": {"lr": 1e-3 if self.small else 1e-4},
            "training": {"epochs": 1e6, "global_batch_size": batch_size, "precision": "fp32"},
        }
        if self.small:
            tree["model"] |= {
                "conv": {"width": 4},
                "resnet": {"width": 4, "blocks": 1},
                "ldm": {
                    "block_out_channels": [8, 8],
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                },
            }
        elif narrow:
            tree["model"]["conv"] = {"width": 16}
            tree["training"]["global_batch_size"] = 16
        tree["training"] |= {"eval_every": 10**9, "log_every": 10**9, **changes}
        return Experiment.model_validate(tree)

    def _store(self, pixels: int) -> str:
        name = "structured"
        root = self.home / "data" / f"{name}-{pixels}"
        if not (root / "manifest.json").exists():
            # 40 MB at the most.
            counts = (96, 32) if self.small else {64: (1024, 256)}.get(pixels, (64, 32))
            write_store(root, pixels, self.text_dim, counts)
        return name


def knows(key: str, value: str | None = None) -> bool:
    """Whether the experiment's schema has this key of `training`, with this value among its literals."""
    from cvae.config.experiment import Training

    field = Training.model_fields.get(key)
    return field is not None and (value is None or value in get_args(field.annotation))


def allow_fp16_on_a_cpu() -> None:
    """In this process. The product refuses it because it is slow; the arithmetic is there."""
    from cvae.distributed import precision

    precision.resolve = lambda wanted, device: wanted


def write_store(
    root: Path, pixels: int, text_dim: int, counts: tuple[int, int], spoiled: int | None = None
) -> None:
    """Writes a prepared store of coloured squares; two captions tell each image's colours.

    A store of that name must not be there. spoiled: a training image whose captions' vectors hold a NaN.
    """
    from tests.helpers.stores import write_manifest

    generator = np.random.default_rng(7)
    tell = generator.standard_normal((48, text_dim)).astype(np.float32) / np.sqrt(np.float32(48))
    for split, count in zip(("train", "val"), counts, strict=True):
        folder = root / split
        (folder / "text").mkdir(parents=True)
        colours, images = squares(generator, count, pixels)
        np.save(folder / "images.npy", images)
        np.save(folder / "ids.npy", np.arange(count))
        np.save(folder / "caption_offsets.npy", 2 * np.arange(count + 1))
        captions = [f"{split} caption {number}" for number in range(2 * count)]
        (folder / "captions.json").write_text(json.dumps(captions))
        vectors = (colours.reshape(count, 48) @ tell).repeat(2, axis=0)
        vectors += 0.1 * generator.standard_normal(vectors.shape).astype(np.float32)
        if split == "train" and spoiled is not None:
            vectors[2 * spoiled : 2 * spoiled + 2, 3] = np.nan
        np.save(folder / "text" / "toy.npy", vectors)
    sizes = {
        split: (count, 2 * count) for split, count in zip(("train", "val"), counts, strict=True)
    }
    write_manifest(root, (3, pixels), sizes, None, text_dim)


def squares(
    generator: np.random.Generator, count: int, pixels: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Returns colours (N, 3, 4, 4) in [0, 1] and images of them with a little noise, uint8 (N, 3, H, W)."""
    colours = generator.random((count, 3, 4, 4), np.float32)
    images = (200 * colours).astype(np.uint8).repeat(pixels // 4, 2).repeat(pixels // 4, 3)
    images += generator.integers(0, 40, images.shape, np.uint8)
    return colours, images


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
