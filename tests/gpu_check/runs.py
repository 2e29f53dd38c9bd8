"""Runs of the training loop in processes of their own, as a job starts them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cvae.config.experiment import Experiment
from cvae.run import journal
from cvae.run.directory import RunDirectory
from tests.helpers.rank_processes import Processes, start_python


def new_run(name: str, experiment: Experiment, every_steps: int | None = None) -> RunDirectory:
    """Makes a run's folder. every_steps: between two checkpoints."""
    checkpoint = experiment.checkpoint.model_copy(update={"every_steps": every_steps, "keep": 5})
    return RunDirectory.create(name, experiment.model_copy(update={"checkpoint": checkpoint}))


def start(run: RunDirectory, world_size: int = 1) -> Processes:
    """Starts a process for each rank."""
    return start_python(["-m", "tests.gpu_check.train_run", str(run.path)], world_size)


def finish(processes: Processes) -> list[str]:
    """Waits for the ranks and returns what each printed; RuntimeError with its last line if one fails."""
    said = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        if process.returncode != 0:
            print(text)
            last = (text.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"a training ended with status {process.returncode}: {last}")
    return said


def kill(processes: Processes) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()


def wait_until(run: RunDirectory, processes: Processes, reached: Callable[[], bool]) -> None:
    """Waits until `reached`; RuntimeError if a rank ends before."""
    while not reached():
        if any(process.poll() is not None for process in processes):
            finish(processes)
            raise RuntimeError(f"{run.name} ended before it could be stopped")
        time.sleep(0.005)


def lines(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    if not run.journal_file.exists():
        return []
    return [line for line in journal.read(run.journal_file)[0] if line["kind"] == kind]


def last_checkpoint(run: RunDirectory) -> Path:
    return sorted(run.checkpoints.glob("step-*"))[-1]


def differing(one: Path, other: Path) -> tuple[int, int]:
    """Returns how many tensors of two checkpoints differ in at least one bit, and how many there are."""
    differ = total = 0
    for file in sorted(one.glob("*.safetensors")):
        mine, theirs = load_file(file), load_file(other / file.name)
        if mine.keys() != theirs.keys():
            raise RuntimeError(f"{file.name}: other tensors in {other.name}")
        total += len(mine)
        differ += sum(not _same_bits(value, theirs[name]) for name, value in mine.items())
    return differ, total


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = (value.contiguous().flatten().view(torch.uint8) for value in (one, other))
    return torch.equal(*bits)
