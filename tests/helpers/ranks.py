"""Trains runs on real ranks on this machine, and reads their journals.

Each rank runs `python -m tests.helpers.ranks RUN_PATH PORT [RUN_PATH PORT …]`.
"""

import os
import sys
from pathlib import Path

import psutil

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.run import journal
from cvae.run.directory import RunDirectory
from tests.helpers.rank_processes import Processes, free_port, start_python
from tests.helpers.waiting import until

_PATIENCE_S = 120


def start(run: RunDirectory, world_size: int, *more: RunDirectory) -> Processes:
    """Starts ranks that train `run`, and then `more` runs: starting processes takes longer than training."""
    words = [word for one in (run, *more) for word in (str(one.path), str(free_port()))]
    return start_python(["-m", "tests.helpers.ranks", *words], world_size)


def finish(processes: Processes, patience_s: float = _PATIENCE_S) -> list[str]:
    """Returns what each rank printed. Kills all and raises TimeoutExpired if one takes longer."""
    try:
        return [process.communicate(timeout=patience_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def train(run: RunDirectory, world_size: int, *more: RunDirectory) -> list[str]:
    return finish(start(run, world_size, *more))


def slurm_rank(run: RunDirectory, rank: int) -> psutil.Process:
    """Returns the process of a run's rank that SLURM has started on one of the test cluster's hosts."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            # srun's command line has all of a rank's in it.
            ours = words[1:4] == ["-u", "-m", "submitit.core._submit"] and words[-1] == str(
                run.logs
            )
            if ours and process.environ().get("SLURM_PROCID") == str(rank):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no rank {rank}")


def wait_for_step(run: RunDirectory, step: int) -> None:
    until(lambda: max(steps(run), default=0) >= step, _PATIENCE_S, 0.01)


def steps(run: RunDirectory) -> list[int]:
    return [line["step"] for line in lines(run, "step")]


def losses(run: RunDirectory) -> list[float]:
    return [line["metrics"]["train/loss"] for line in lines(run, "step")]


def lines(run: RunDirectory, kind: str) -> list[dict]:  # type: ignore[type-arg]
    return [line for line in journal.read(run.journal_file)[0] if line["kind"] == kind]


def new_run(name: str, plain: dict[str, object]) -> RunDirectory:
    return RunDirectory.create(name, Experiment.model_validate(plain))


def weights(run: RunDirectory) -> dict[str, bytes]:
    """Returns the content of the last checkpoint's files by name."""
    last = sorted(run.checkpoints.glob("step-*"))[-1]
    return {file.name: file.read_bytes() for file in sorted(last.iterdir())}


if __name__ == "__main__":
    from cvae.training.train import train as train_rank

    try:
        for path, port in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            os.environ["MASTER_PORT"] = port
            print(train_rank(Path(path), mirrored=False))
    except UserError as error:
        sys.exit(f"error: {error}")
