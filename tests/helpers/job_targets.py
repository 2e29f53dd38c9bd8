"""Functions that jobs of tests run in their ranks, without a model and without torch, so that they start fast."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from cvae.errors import UserError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Result(NamedTuple):
    status: str


def report(folder: Path) -> None:
    facts = {name: os.environ.get(name) for name in (*VARIABLES, "COLOUR", "CUDA_VISIBLE_DEVICES")}
    facts["MLFLOW_TRACKING_URI"] = os.environ.get("MLFLOW_TRACKING_URI")
    facts["cpus"] = os.environ.get("SLURM_CPUS_PER_TASK")
    facts["session"] = str(os.getsid(0))
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(facts))


def wait(folder: Path) -> None:
    """Waits for SIGTERM; then takes a moment to save."""
    stopped: list[Any] = []
    signal.signal(signal.SIGTERM, lambda *arguments: stopped.append(arguments))
    rank = os.environ["RANK"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    deadline = time.monotonic() + 120  # in case the test has failed
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    (folder / f"saved-{rank}").touch()


def sleep(folder: Path) -> None:
    """Dies of SIGTERM without saving."""
    (folder / f"pid-{os.environ['RANK']}").touch()
    time.sleep(120)


def last_dies(folder: Path) -> None:
    """Kills the last rank with SIGKILL, like the kernel's out-of-memory killer; the others would wait for it."""
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)


def refuse(folder: Path) -> None:
    raise UserError("the rope\nis too short")


def second_raises(folder: Path) -> None:
    """Fails in rank 1; rank 0 reports the consequence a little earlier by its own clock."""
    if os.environ["RANK"] == "0":
        raise RuntimeError("gloo: Connection closed by peer")
    time.sleep(0.3)
    raise ValueError("the cause")


def unhappy(folder: Path) -> Result:
    return Result("failed")


def stumble(folder: Path) -> None:
    """Gets one step further at each attempt, and dies in the first two."""
    done = len(list(folder.glob("step-*")))
    (folder / f"step-{done}").write_text(os.environ.get("CVAE_RESTARTED", ""))
    if done < 2:
        os._exit(1)


def segfault(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hoard(folder: Path) -> None:
    """Allocates more memory than this process may have."""
    import resource

    import torch

    torch.zeros(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, resource.RLIM_INFINITY))
    torch.zeros(4 * 2**30)


def note(argument: str, reason: str, message: str, restarts: bool) -> None:
    with (Path(argument) / "noted").open("a") as file:
        file.write(f"{reason}, restarts {restarts}\n")
