"""Measures the time from a launch to the first step, and a bare start: ranks that meet with torch alone.

As a program this is a rank of a bare start, so the imports at its head are only those that such a rank needs.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurm.cluster_file import Place, Placement

_TIMEOUT_S = 300
_POLL_S = 0.1


def launch(home: Path, experiment: Path, place: "Place", placement: "Placement") -> float:
    """Returns the seconds from `launch.py` to the first step's line in the journal; then cancels the run.

    home: a new folder for it. Raises UserError if there is no first step.
    """
    from cvae.errors import UserError
    from cvae.files import paths

    home.mkdir()
    (home / "data").symlink_to(paths.data_dir().resolve())
    env = os.environ | {"CVAE_HOME": str(home)}
    began = time.time()
    where = ["--cluster", place.name] if place.name else []
    ranks = ["--nodes", str(placement.nodes), "--gpus", str(placement.world_size)]
    words = [str(experiment), *ranks, *where, "--name", "launched", "--detach"]
    output = _script("launch.py", words, env)
    journal = home / "runs" / "launched" / "journal.jsonl"
    try:
        while time.time() - began < _TIMEOUT_S:
            text = journal.read_text() if journal.exists() else ""
            if '"kind":"step"' in text:
                return time.time() - began
            if '"kind":"end"' in text:
                break
            time.sleep(_POLL_S)
    finally:
        if journal.parent.exists():
            _script("runs.py", ["cancel", "launched"], env)
    raise UserError(f"a launch of {placement} came to no first step: {output.strip()[-300:]}")


def _script(name: str, words: list[str], env: dict[str, str]) -> str:
    from cvae.files.paths import PROJECT_ROOT

    file = PROJECT_ROOT / "workflows" / name
    done = subprocess.run(
        [sys.executable, str(file), *words], env=env, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def bare_start(place: "Place", placement: "Placement") -> float:
    """Returns the seconds from a bare srun (without SLURM: from starting the processes) until all ranks have met.

    Raises UserError if that fails.
    """
    from cvae.errors import UserError

    began = time.time()
    if place.config.executor == "slurm":
        done = subprocess.run(
            _srun(place, placement),
            env=os.environ | place.config.slurm().environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        out, failed = done.stdout + done.stderr, done.returncode
    else:
        out, failed = _here(placement.world_size)
    met = [line.partition("met ")[2] for line in out.splitlines() if line.startswith("met ")]
    if failed or not met:
        raise UserError(f"a bare start of {placement} failed: {out.strip()[-300:]}")
    return max(map(float, met)) - began


def _srun(place: "Place", placement: "Placement") -> list[str]:
    config = place.config
    options = {"partition": config.partition, "account": config.account, "qos": config.qos}
    gpus = f"{config.gpu_type}:" if config.gpu_type else ""
    return [
        "srun",
        f"--nodes={placement.nodes}",
        f"--ntasks-per-node={placement.ranks_per_node}",
        f"--gpus-per-node={gpus}{placement.ranks_per_node}",
        f"--cpus-per-task={config.cpus_per_gpu or 1}",
        *(f"--{name}={value}" for name, value in options.items() if value),
        *(sys.executable, str(Path(__file__).resolve())),
    ]


def _here(world_size: int) -> tuple[str, int]:
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=os.environ | {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world_size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=_TIMEOUT_S)[0] for rank in ranks]
    return "".join(outputs), max(abs(rank.returncode) for rank in ranks)


def hello() -> None:
    """Joins the other ranks of a bare start and prints the time."""
    import torch
    import torch.distributed as dist

    nodes = os.environ.get("SLURM_JOB_NODELIST")
    first = "127.0.0.1"
    if nodes is not None:
        hosts = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
        first = hosts.split()[0]
    job = int(os.environ.get("SLURM_JOB_ID", os.getppid()))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{first}:{20_000 + job % 20_000}",
        rank=int(os.environ["SLURM_PROCID"]),
        world_size=int(os.environ["SLURM_NTASKS"]),
    )
    dist.all_reduce(torch.ones(1))
    print(f"met {time.time()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    hello()
