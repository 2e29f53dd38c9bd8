"""What must stop a run: numbers that are not finite."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from cvae.config.experiment import Experiment
from cvae.data.draws import BatchOrder
from cvae.data.store import store_path
from cvae.distributed.ranks import Ranks, connect
from cvae.training import train as training
from cvae.training.train import train
from tests.gpu_check import runs
from tests.gpu_check.curves import curve, first_batch
from tests.gpu_check.findings import Finding, Skip, judged
from tests.gpu_check.setting import Setting, allow_fp16_on_a_cpu, write_store

_STEPS, _EVERY = 60, 5
_HUGE = 36  # a scale of so many powers of two; the first is 16


def not_finite(setting: Setting) -> Iterator[Finding]:
    """One image's caption vectors hold a NaN; the step that meets it is known beforehand."""
    for name in setting.precisions():
        options: dict[str, Any] = {"precision": name, "max_steps": _STEPS, "log_every": 20}
        # Large enough that the image is met once in the run's first epoch, in the middle.
        clean = setting.experiment("conv", narrow=True, **options)
        data = clean.data.model_copy(update={"name": "spoiled"})
        spoiled = clean.model_copy(update={"data": data})
        batch_size = clean.training.global_batch_size
        root = store_path("spoiled", data.image_size)
        expected = 23
        if not root.exists():
            count = batch_size * _STEPS
            victim = int(_order(clean.seed, count, batch_size).batch(expected - 1).indices[-1])
            write_store(root, data.image_size, setting.text_dim, (count, 32), spoiled=victim)
        run = runs.new_run(f"spoiled-{name}", spoiled, _EVERY)
        outcome = train(run.path, mirrored=False)
        saved = sorted(run.checkpoints.glob("step-*"))
        yield judged(
            f"{name}: the step is named",
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
            f"{name}: no checkpoint has it",
            not bad and newest == (expected - 1) // _EVERY * _EVERY,
            f"{len(saved)} checkpoints, the last of step {newest}, {len(bad)} not finite",
            f"all finite, the last of step {(expected - 1) // _EVERY * _EVERY}",
        )
        if name == setting.precisions()[0]:
            run = runs.new_run(f"clean-{name}", clean, _EVERY)
            outcome = train(run.path, mirrored=False)
            yield judged(
                f"{name}: without it (control)",
                outcome.status == "finished" and _is_finite(runs.last_checkpoint(run)),
                f"{outcome.status} at step {outcome.step}",
                f"finished at step {_STEPS}",
            )


def _order(seed: int, count: int, batch_size: int) -> BatchOrder:
    return BatchOrder(seed, np.arange(count), batch_size, (1,))


def _is_finite(folder: Path) -> bool:
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    return all(math.isfinite(float(tensor.float().abs().sum())) for tensor in tensors)


def overflow(setting: Setting) -> Iterator[Finding]:
    """fp16's loss scaling, on the GPU; in the small size by autocast on the CPU, which can do it, slowly."""
    if not setting.has_gpu:
        allow_fp16_on_a_cpu()
    elif reason := setting.why_not("fp16"):
        raise Skip(reason)
    experiment = setting.experiment("conv", precision="fp16")
    with connect() as ranks:
        yield from _skipped_updates(experiment, ranks)
        yield _small_gradients(experiment, ranks)
    yield from _endless(setting)


def _skipped_updates(experiment: Experiment, ranks: Ranks) -> Iterator[Finding]:
    """Beginning with a scale that is far too large."""
    seen: list[tuple[float, bool]] = []

    def begin(engine: Any) -> None:
        state = engine.scaler.state_dict()
        engine.scaler.load_state_dict({**state, "scale": 2.0**_HUGE})
        whole = engine.step

        def step(*arguments: Any) -> Any:
            before = [value.clone() for value in engine.model.state_dict().values()]
            sums = whole(*arguments)
            after = engine.model.state_dict().values()
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            seen.append((engine.scaler.get_scale(), same))
            return sums

        engine.step = step

    found = curve(experiment, ranks, 40, begin)
    scales = [2.0**_HUGE, *(scale for scale, _ in seen)]
    fell = [later < earlier for earlier, later in itertools.pairwise(scales)]
    yield judged(
        f"a scale of 2^{_HUGE}: updates that overflow are left out",
        fell[0] and not all(fell) and fell == [same for _, same in seen],
        f"{sum(fell)} of {len(fell)} left out, at last at a scale of 2^{math.log2(scales[-1]):.0f}",
        "weights stay as they are, bit for bit, in the steps that halve the scale, and in no other",
        skips=sum(fell),
    )
    yield judged(
        "the losses stay finite",
        all(map(math.isfinite, found.losses)),
        f"{found.losses[0]:.1f} to {found.losses[-1]:.1f} nats",
        "finite",
    )


def _small_gradients(experiment: Experiment, ranks: Ranks) -> Finding:
    """How small a loss may be before fp16 loses its gradient: scaling by 2^16 must reach 2^16 further."""
    reach = {"with": 0, "without": 0}

    def look(engine: Any) -> None:
        micro = first_batch(experiment, engine, ranks)
        for name in reach:
            exact: float | None = None
            for power in range(0, 64, 2):
                loss, _ = engine.objective(micro, torch.tensor(1.0))
                loss = loss * 2.0**-power
                scaled = engine.scaler.scale(loss) if name == "with" else loss
                torch.autograd.backward(scaled)
                scale = engine.scaler.get_scale() if name == "with" else 1.0
                gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
                norm = float(torch.nn.utils.get_total_norm(gradients)) / scale * 2.0**power
                engine.adam.zero_grad()
                if not math.isfinite(norm):
                    continue  # an overflow
                exact = exact or norm
                if norm < 0.5 * exact:
                    break
                reach[name] = power

    curve(experiment, ranks, 1, look)
    further = reach["with"] - reach["without"]
    return judged(
        "small gradients: loss scaling beside none (control)",
        12 <= further <= 20,
        f"a loss may be 2^{further} smaller before half of its gradient is lost",
        "2^16, the first scale, within 2^4",
        further=further,
    )


def _endless(setting: Setting) -> Iterator[Finding]:
    """Gradients that never are finite while the loss is: the run must end and say why."""
    run = runs.new_run(
        "endless",
        setting.experiment("conv", narrow=True, precision="fp16", max_steps=200, log_every=1),
        _EVERY,
    )
    build = training.build_model

    def spoiled(*arguments: Any) -> Any:
        model = build(*arguments)
        next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
        return model

    training.build_model = spoiled
    try:
        outcome = train(run.path, mirrored=False)
    finally:
        training.build_model = build
    bad = [folder.name for folder in run.checkpoints.glob("step-*") if not _is_finite(folder)]
    yield judged(
        "a gradient that overflows at every step",
        outcome.status == "failed" and 45 <= outcome.step <= 60 and not bad,
        f"{outcome.status} at step {outcome.step}: {outcome.reason[:90]}; {len(bad)} checkpoints not finite",
        "failed after 50 in a row, every checkpoint finite",
        step=outcome.step,
    )
