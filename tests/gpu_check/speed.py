"""The training loop beside the bare step, beside diffusers' autoencoder and beside the device's own limits."""

import json
from collections.abc import Iterator
from typing import Any

import torch

from cvae.config.experiment import Experiment
from cvae.data.experiment_data import open_data
from cvae.distributed import precision
from cvae.distributed.ranks import Ranks, connect
from cvae.training.train import train
from tests.gpu_check import clock, runs
from tests.gpu_check.curves import curve
from tests.gpu_check.findings import Finding, judged, measured, skipped
from tests.gpu_check.setting import Setting
from tests.studies.benchmarks import timing
from tests.studies.benchmarks.contestants import Subject, bare
from tests.studies.benchmarks.peers import diffusers_fp32, diffusers_same
from tests.studies.benchmarks.rounds import rates
from workflows.jobs.scaling_model import flops_per_image, meta_model

# By backbone and image size; ldm's fit on a V100 of 16 GB.
_BATCH = {
    ("conv", 64): 128,
    ("resnet", 64): 128,
    ("ldm", 64): 32,
    ("conv", 256): 64,
    ("ldm", 256): 4,
}
_POINTS, _FIRST_POINTS = 10, 2


def peaks(setting: Setting) -> Iterator[Finding]:
    """What a large matrix product and a 3×3 convolution with its backward pass reach in each precision."""
    with connect() as ranks:
        for name in setting.precisions():
            # The engine makes the precision's settings for the whole process.
            curve(setting.experiment("conv", precision=name), ranks, 1)
            for what, flops in _peaks(setting, name, ranks).items():
                shown = _flops(flops)
                yield measured(f"{name}: {what.replace('_', ' ')}", shown, flops=flops)


def speed(setting: Setting, size: str) -> Iterator[Finding]:
    """size: the attribute of Setting that says how large the images are."""
    pixels: int = getattr(setting, size)
    seconds = 0.5 if setting.small else 2.0
    with connect() as ranks:
        reached: dict[str, float] = {}
        for backbone in ("conv", "ldm", "resnet"):
            if not setting.small and (backbone, pixels) not in _BATCH:
                continue
            if setting.small and size == "large_pixels" and backbone == "resnet":
                continue
            options: dict[str, Any] = {"precision": "auto"}
            if not setting.small:
                options["global_batch_size"] = _BATCH[backbone, pixels]
            experiment = setting.experiment(backbone, pixels, **options)
            name = precision.resolve("auto", ranks.device)
            reached = reached or _peaks(setting, name, ranks)
            try:
                yield from _speed(experiment, ranks, f"{backbone} {pixels}²", reached, seconds)
            except ModuleNotFoundError as error:
                yield skipped(f"{backbone} {pixels}²", f"needs the package {error.name}")


def _speed(
    experiment: Experiment, ranks: Ranks, label: str, reached: dict[str, float], seconds: float
) -> Iterator[Finding]:
    data, device = open_data(experiment), ranks.device
    name = precision.resolve(experiment.training.precision, device)
    batch_size = experiment.training.global_batch_size
    subject = Subject(experiment, data, name, device, None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = bare(subject).step
    before = clock.rate(step, batch_size, device, seconds)
    loop, waited, stable = _loop(experiment, label, before.median, seconds)
    after = clock.rate(step, batch_size, device, seconds)
    limit = clock.of([before.median, after.median])
    yield measured(
        f"{label}, {name}: the loop",
        f"{loop}, {loop.median / limit.median:.3f} of the bare step",
        f"the bare step: {before}, and after the loop {after}; aim: 0.97",
        loop=loop.median,
        bare=limit.median,
        ratio=loop.median / limit.median,
    )
    yield measured(
        f"{label}, {name}: waiting for data",
        f"{waited:.3%} of the time",
        "aim: below 1 %",
        wait=waited,
    )
    if stable is not None:
        first, last = stable
        room = 4 * max(4 << 20, batch_size * data.train.images[0].nbytes)
        yield judged(
            f"{label}, {name}: memory of the loop",
            last - first <= room,
            f"{first / 2**20:,.1f} MiB, at the end {last / 2**20:,.1f} MiB allocated",
            f"the same within {room / 2**20:.0f} MiB of batches on their way; a leak grows",
            first=first,
            last=last,
        )
        peak = torch.cuda.max_memory_allocated(device)
        yield measured(
            f"{label}, {name}: most memory",
            f"{peak / 2**30:.2f} GiB, {peak / batch_size / 2**20:.1f} MiB an image of {batch_size}",
            peak=peak,
        )
    flops = flops_per_image(meta_model(experiment, data.image_shape, data.condition_dim))
    shares = {what: flops * limit.median / peak for what, peak in reached.items()}
    shares_in_words = ", ".join(
        f"{share:.1%} of a {what.replace('_', ' ')}" for what, share in shares.items()
    )
    yield measured(
        f"{label}, {name}: share of the peak",
        shares_in_words,
        f"{flops / 1e6:,.0f} MFLOP an image; "
        + ", ".join(_flops(peak) for peak in reached.values()),
        flops_per_image=flops,
        **shares,
    )
    if experiment.model.backbone == "ldm":
        del step
        for what, build in {"fp32": diffusers_fp32, name: diffusers_same}.items():
            peer = clock.rate(build(subject).step, batch_size, device, seconds)
            yield measured(
                f"{label}: diffusers' AutoencoderKL in {what}",
                str(peer),
                f"ours in {name} is {limit.median / peer.median:.2f} × as quick",
                diffusers=peer.median,
            )


def _peaks(setting: Setting, name: str, ranks: Ranks) -> dict[str, float]:
    """Measures once in all checks."""
    file = setting.home / f"peaks-{name}.json"
    if not file.exists():
        timing._PEAK_S = 0.1 if setting.small else 0.75
        file.write_text(json.dumps(timing.peaks("fp32" if name == "tf32" else name, ranks.device)))
    found: dict[str, float] = json.loads(file.read_text())
    return found


def _flops(value: float) -> str:
    return f"{value / 1e12:,.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.1f} GFLOP/s"


def _loop(
    experiment: Experiment, label: str, expected: float, seconds: float
) -> tuple[clock.Rate, float, tuple[int, int] | None]:
    """A run of train() for about so long. Returns its rate, the share of waiting, memory early and late."""
    batch_size = experiment.training.global_batch_size
    every = max(1, round(seconds * expected / batch_size / _POINTS))
    changes = {"max_steps": every * _POINTS, "log_every": every}
    training = experiment.training.model_copy(update=changes)
    made = experiment.model_copy(update={"training": training})
    run = runs.new_run(f"loop-{label.replace(' ', '-').replace('²', '')}", made)
    with _Memory() as memory:
        outcome = train(run.path, mirrored=False)
    if outcome.status != "finished":
        raise RuntimeError(f"the loop {outcome.status}: {outcome.reason}")
    points = [line["metrics"] for line in runs.lines(run, "step")]
    # The first point is step 1; those that follow have equally many steps.
    points = points[1 + _FIRST_POINTS :]
    per_second = [point["train/images_per_second"] for point in points]
    return clock.of(per_second), rates(points)["data_wait_share"], memory.early_and_late()


class _Memory:
    """Notes the GPU's allocated bytes whenever the loop's meter reads its numbers."""

    def __enter__(self) -> "_Memory":
        from cvae.training.rates import Meter

        self.seen: list[int] = []
        self.meter, self.read = Meter, Meter.read

        def noted(meter: Any, *arguments: Any) -> Any:
            if torch.cuda.is_available():
                self.seen.append(torch.cuda.memory_allocated())
            return self.read(meter, *arguments)

        Meter.read = noted  # type: ignore[method-assign]
        return self

    def __exit__(self, *raised: object) -> None:
        self.meter.read = self.read  # type: ignore[method-assign]

    def early_and_late(self) -> tuple[int, int] | None:
        """The most in the second third and in the last: batches on their way come and go."""
        third = len(self.seen) // 3
        if third == 0:
            return None
        return max(self.seen[third : 2 * third]), max(self.seen[2 * third :])
