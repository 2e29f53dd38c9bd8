"""Killed and resumed: the same bits as undisturbed."""

import shutil
from collections.abc import Iterator
from typing import Any

import torch

from cvae.config import yaml_model
from cvae.run.directory import RunDirectory
from tests.gpu_check import runs
from tests.gpu_check.findings import Finding, judged, skipped
from tests.gpu_check.setting import Setting, knows


def resume(setting: Setting) -> Iterator[Finding]:
    """One rank; on a machine with more GPUs all of them, too."""
    worlds = [1]
    if torch.cuda.device_count() > 1:
        worlds.append(torch.cuda.device_count())
    for world_size in worlds:
        yield from _resume(setting, world_size)


def _resume(setting: Setting, world_size: int) -> Iterator[Finding]:
    """Two runs side by side, one of them killed without warning; then its copies go on."""
    total, every = (60, 6) if setting.small else (600, 60)
    options: dict[str, Any] = {"max_steps": total, "log_every": 1, "ema_decay": 0.9}
    options["precision"] = "auto"
    if not knows("deterministic"):
        yield skipped("training.deterministic", "the schema has no such key: without it")
    else:
        options["deterministic"] = True
    experiment = setting.experiment("conv", narrow=True, **options)
    undisturbed, killed = (
        runs.new_run(f"{name}-{world_size}", experiment, every)
        for name in ("undisturbed", "killed")
    )
    whole, half = runs.start(undisturbed, world_size), runs.start(killed, world_size)
    runs.wait_until(killed, half, lambda: len(runs.lines(killed, "checkpoint")) >= 1)
    runs.kill(half)
    runs.finish(whole)
    killed_at = max(line["step"] for line in runs.lines(killed, "step"))
    other = _with_another_seed(killed)
    going_on = [runs.start(run, world_size) for run in (killed, other)]
    for processes in going_on:
        runs.finish(processes)
    resumed_at = runs.lines(killed, "start")[-1]["step"]
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    yield judged(
        f"{ranks}: it was killed in the middle and went on from a checkpoint",
        0 < resumed_at <= killed_at < total and resumed_at % every == 0,
        f"killed after step {killed_at}, resumed at {resumed_at} of {total}",
        "SIGKILL after the first checkpoint",
        killed_at=killed_at,
        resumed_at=resumed_at,
    )
    precision = runs.lines(killed, "start")[-1]["precision"]
    last = [runs.last_checkpoint(run) for run in (undisturbed, killed, other)]
    differ, tensors = runs.differing(last[0], last[1])
    yield judged(
        f"{ranks}, {precision}: resumed beside undisturbed",
        differ == 0 and last[0].name == last[1].name == f"step-{total:08d}",
        f"{differ} of {tensors} tensors differ (weights, averages, Adam's state)",
        "none, bit for bit",
        differ=differ,
        tensors=tensors,
    )
    curves = [
        [line["metrics"]["train/loss"] for line in runs.lines(run, "step")]
        for run in (undisturbed, killed)
    ]
    yield judged(
        f"{ranks}: the journals' losses",
        curves[0] == curves[1] and len(curves[0]) == total,
        f"{len(curves[1])} points, {'equal' if curves[0] == curves[1] else 'not equal'}",
        f"{total} points, each once, equal",
    )
    differ, tensors = runs.differing(last[0], last[2])
    yield judged(
        f"{ranks}: resumed with another seed (control)",
        differ > 0,
        f"{differ} of {tensors} tensors differ",
        "some: else the comparison would see nothing",
        differ=differ,
    )


def _with_another_seed(run: RunDirectory) -> RunDirectory:
    """Returns a copy of a run whose further batches and noise are others."""
    copy = RunDirectory(run.path.with_name(f"{run.name}-seed"))
    shutil.copytree(run.path, copy.path, symlinks=True)
    experiment = run.experiment()
    changed = experiment.model_copy(update={"seed": experiment.seed + 1})
    copy.experiment_file.write_text(yaml_model.dump(changed, "Another seed."))
    return copy
