"""What must stop a run: numbers that are not finite."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from cvae.data.order import BatchOrder
from cvae.data.store import store_path
from cvae.training.train import train
from tests.gpu_check import runs
from tests.gpu_check.findings import Finding, judged
from tests.gpu_check.setting import Setting, write_store

_STEPS, _EVERY = 60, 5


def not_finite(setting: Setting) -> Iterator[Finding]:
    """One image's caption vectors hold a NaN; the step that meets it is known beforehand."""
    for precision in setting.precisions():
        options: dict[str, Any] = {"precision": precision, "max_steps": _STEPS, "log_every": 20}
        # Large enough that the image is met once in the run's first epoch, in the middle.
        clean = setting.experiment("conv", **options)
        data = clean.data.model_copy(update={"name": "spoiled"})
        spoiled = clean.model_copy(update={"data": data})
        batch_size = clean.training.global_batch_size
        root = store_path("spoiled", data.image_size)
        expected = 23
        if not root.exists():
            count = batch_size * _STEPS
            victim = int(_order(clean.seed, count, batch_size).batch(expected - 1).indices[-1])
            write_store(root, data.image_size, setting.text_dim, (count, 32), spoiled=victim)
        run = runs.new_run(f"spoiled-{precision}", spoiled, _EVERY)
        outcome = train(run.path, mirrored=False)
        saved = sorted(run.checkpoints.glob("step-*"))
        yield judged(
            f"{precision}: the step is named",
            outcome.status == "failed"
            and outcome.step == expected
            and "not finite" in outcome.reason,
            f"{outcome.status} at step {outcome.step}: {outcome.reason[:80]}",
            f"step {expected}, where the image with a NaN is drawn",
            step=outcome.step,
        )
        bad = [folder.name for folder in saved if not _is_finite(folder)]
        newest = int(saved[-1].name.partition("-")[2]) if saved else 0
        yield judged(
            f"{precision}: no checkpoint has it",
            not bad and newest == (expected - 1) // _EVERY * _EVERY,
            f"{len(saved)} checkpoints, the last of step {newest}, {len(bad)} not finite",
            f"all finite, the last of step {(expected - 1) // _EVERY * _EVERY}",
        )
        if precision == setting.precisions()[0]:
            run = runs.new_run(f"clean-{precision}", clean, _EVERY)
            outcome = train(run.path, mirrored=False)
            yield judged(
                f"{precision}: without it (control)",
                outcome.status == "finished" and _is_finite(runs.last_checkpoint(run)),
                f"{outcome.status} at step {outcome.step}",
                f"finished at step {_STEPS}",
            )


def _order(seed: int, count: int, batch_size: int) -> BatchOrder:
    return BatchOrder(seed, np.arange(count), batch_size, (1,))


def _is_finite(folder: Path) -> bool:
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    return all(math.isfinite(float(tensor.float().abs().sum())) for tensor in tensors)
