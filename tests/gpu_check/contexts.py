"""One CUDA context for each rank, on its own GPU: others cost hundreds of megabytes and break exclusive mode."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from tests.gpu_check import runs
from tests.gpu_check.findings import Finding, Skip, judged
from tests.gpu_check.setting import Setting

_STEPS = 200


def contexts(setting: Setting) -> Iterator[Finding]:
    """This process opens no context: it asks NVML, or nvidia-smi, whose processes are on which GPU."""
    setting.needs_gpu()
    count = torch.cuda.device_count()
    # The control: a process that asks about every GPU, as a careless metric would, is seen on every GPU.
    code = "import time, torch\nfor index in range(torch.cuda.device_count()):\n torch.cuda.mem_get_info(index)\n"
    careless = subprocess.Popen([sys.executable, "-c", f"{code}time.sleep(60)"])
    try:
        seen = _until(lambda: _places([careless.pid]), lambda found: len(found) == count)
    finally:
        careless.kill()
        careless.wait()
    if not seen:
        raise Skip("needs a driver that lists this machine's processes; it does not list ours")
    yield judged(
        "a process that asks about every GPU (control)",
        len(seen) == count,
        f"is seen on {len(seen)} of {count} GPUs",
        "all of them: each question opens a context",
    )
    run = runs.new_run("contexts", setting.experiment("conv", precision="auto", log_every=1))
    processes = runs.start(run, count)
    try:
        runs.wait_until(run, processes, lambda: len(runs.lines(run, "step")) >= _STEPS)
        points = len(runs.lines(run, "system"))
        pids = [process.pid for process in processes]
        places = _places(pids)
    finally:
        runs.kill(processes)
    yield judged(
        f"{count} ranks in training, after {points} points of the system's metrics",
        points > 0
        and sorted(pid for pid, _ in places) == sorted(pids)
        and len({gpu for _, gpu in places}) == count,
        f"{len(places)} contexts on {len({gpu for _, gpu in places})} GPUs",
        f"{count} on {count}: one for each rank, each on a GPU of its own",
        contexts=len(places),
    )


def _until(
    look: Callable[[], list[tuple[int, str]]], enough: Callable[[list[tuple[int, str]]], bool]
) -> list[tuple[int, str]]:
    deadline = time.monotonic() + 20
    while True:
        found = look()
        if enough(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _places(pids: list[int]) -> list[tuple[int, str]]:
    """Returns (process, GPU) for every context that these processes have."""
    try:
        import pynvml
    except ModuleNotFoundError:
        found = _by_nvidia_smi()
    else:
        pynvml.nvmlInit()
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                found.append((int(process.pid), str(index)))
    return [place for place in found if place[0] in pids]


def _by_nvidia_smi() -> list[tuple[int, str]]:
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        raise Skip("needs nvidia-ml-py or nvidia-smi") from None
    rows = [line.split(",") for line in said.splitlines() if line.count(",") == 1]
    return [(int(pid), gpu.strip()) for pid, gpu in rows if pid.strip().isdigit()]
