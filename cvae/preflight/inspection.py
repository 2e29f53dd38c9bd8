"""Inspects every node before the first step: seconds that may save days in the queue.

The ranks gather plain facts, all judge them alike (checks.py), and an all-reduce over every rank shows that the
network works and how fast.
"""

import os
import shutil
import signal
import socket
import statistics
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cvae.config.experiment import Experiment, load_experiment
from cvae.data.experiment_data import open_data
from cvae.distributed.device import describe, memory
from cvae.distributed.ranks import Ranks, connect
from cvae.errors import UserError
from cvae.files.file_lock import has_flock
from cvae.files.paths import write_atomically
from cvae.models.cvae import Cvae, build_model
from cvae.preflight.checks import Facts, Finding, Gpu, Need, Network, Plain, judge, judge_network
from cvae.run import code_snapshot
from cvae.run.provenance import package_versions

EXPERIMENT_FILE, REPORT_FILE = "experiment.yaml", "report.json"
_LARGEST_TEST = 64 * 2**20  # bytes
_TEST_S = 0.2
# Network file systems show late what other hosts have written.
_LAG_S = 3.0
_ALONE_S = 240


class Report(Plain):
    facts: list[Facts]
    findings: list[Finding]
    network: Network | None
    """None with one rank, and if an error was found before."""
    seconds: float

    def texts(self, level: str) -> list[str]:
        return [finding.text for finding in self.findings if finding.level == level]

    def line(self) -> dict[str, Any]:
        """Returns the fields of the journal's line."""
        hosts = {
            fact.host: {
                "free_disk": fact.free_disk,
                "free_memory": fact.free_memory,
                "clock_offset_s": round(fact.clock - self.facts[0].clock, 3),
            }
            for fact in reversed(self.facts)
        }
        return {
            "seconds": round(self.seconds, 3),
            "hosts": hosts,
            "all_reduce": None if self.network is None else self.network.model_dump(),
            "warnings": self.texts("warning"),
        }


def check(folder: Path, ranks: Ranks, need: Need, data: str | None) -> Report:
    """Returns inspect()'s report; raises UserError with all errors in it."""
    report = inspect(folder, ranks, need, data)
    if errors := report.texts("error"):
        raise UserError("; ".join(errors))
    return report


def inspect(folder: Path, ranks: Ranks, need: Need, data: str | None) -> Report:
    """Returns the same report on all ranks. folder: the run writes there. data: the digest of this rank's data."""
    began = time.monotonic()
    need = ranks.tell(
        need
    )  # hosts may see different numbers of checkpoints on a network file system
    facts = _gather(folder, ranks, data)
    findings = judge(facts, need, str(folder))
    network = None
    if ranks.world_size > 1 and all(finding.level == "warning" for finding in findings):
        network = _measure(ranks, need.gradient or _LARGEST_TEST)
        findings += judge_network(network, need)
    seconds = time.monotonic() - began
    return Report(facts=facts, findings=findings, network=network, seconds=seconds)


def need_of(
    experiment: Experiment, model: Cvae, world_size: int, checkpoints: Path, begun: bool
) -> Need:
    weights = 4 * model.n_parameters()
    averaged = weights if experiment.training.ema_decay is not None else 0
    stage = 0
    if experiment.training.engine == "deepspeed":
        stage = experiment.training.deepspeed.zero_stage
    # ZeRO shares out Adam's two moments from stage 1 on, gradients from 2 on and weights from 3 on.
    moments, gradients, own = (world_size if stage >= least else 1 for least in (1, 2, 3))
    existing = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
    # Besides those that are kept: the best, and the one that is being written.
    most = (experiment.checkpoint.keep + 2) * (3 * weights + averaged)
    return Need(
        memory=2 * weights // moments + weights // gradients + weights // own + averaged,
        disk=max(0, most - existing),
        gradient=weights,
        begun=begun,
    )


def run_alone(folder: Path) -> None:
    """Inspects the nodes as a job of its own: rank 0 leaves its report in the folder.

    The folder's experiment, if there is one, says what is needed. Raises UserError if its data do not fit.
    """
    # Nodes that do not reach each other would wait for the usual ten minutes.
    signal.alarm(_ALONE_S)
    with connect() as ranks:
        need, digest = Need(), None
        if (folder / EXPERIMENT_FILE).is_file():
            experiment = load_experiment(folder / EXPERIMENT_FILE)
            signal.alarm(0)  # to read the data for the first time may take longer
            data = ranks.everywhere(lambda: open_data(experiment))
            signal.alarm(_ALONE_S)
            sizes = (data.image_shape, data.condition_dim, experiment.seed)
            with torch.device("meta"):
                model = build_model(experiment.model, *sizes)
            no_checkpoints = folder / "checkpoints"
            need = need_of(experiment, model, ranks.world_size, no_checkpoints, begun=False)
            digest = data.digest
        report = inspect(folder, ranks, need, digest)
        if ranks.is_first:
            write_atomically(folder / REPORT_FILE, report.model_dump_json())
        ranks.any(False)


def _gather(folder: Path, ranks: Ranks, data: str | None) -> list[Facts]:
    """Returns every rank's facts. Rank 0 makes a file that every host must see, and each host another."""
    first_on_host = ranks.is_first or os.environ.get("LOCAL_RANK") == "0"
    shared = folder / f".preflight-{ranks.tell(uuid.uuid4().hex)}"
    own = shared if ranks.is_first else shared.with_name(f"{shared.name}-{ranks.rank}")
    facts: dict[str, Any] = {"rank": ranks.rank, "host": socket.gethostname(), "data": data}
    facts |= _device_facts(ranks.device)
    if ranks.is_first:
        facts["write_error"] = _write(own)
    ranks.any(False)
    facts["clock"] = time.time()
    if first_on_host:
        facts |= _host_facts(folder)
    if first_on_host and not ranks.is_first:
        facts |= {"write_error": _write(own), "sees_folder": _appears(shared)}
    gathered = ranks.gather(Facts(**facts))
    with suppress(OSError):  # a read-only file system refuses even if there is no file
        own.unlink()
    return gathered


def _device_facts(device: torch.device) -> dict[str, Any]:
    name, id, capability = describe(device)
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
    if capability is not None:
        built_for = torch.cuda.get_arch_list()
        facts["gpu"] = Gpu(name=name, id=id, capability=capability, built_for=built_for)
    elif os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # the user has not hidden them
        facts["idle_gpus"] = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return {**facts, "free_memory": memory(device).free}


def _host_facts(folder: Path) -> dict[str, Any]:
    code = code_snapshot.read()
    submitted = os.environ.get("CVAE_CODE")
    facts: dict[str, Any] = {
        "code": code.source,
        "code_root": str(code.root),
        "submitted_code": None if submitted is None else str(Path(submitted).resolve()),
        "packages": {"python": ".".join(map(str, sys.version_info[:3])), **package_versions()},
    }
    with suppress(OSError):  # the attempt to write reports why
        facts["free_disk"] = shutil.disk_usage(folder).free
        facts["flock"] = has_flock(folder)
    return facts


def _write(file: Path) -> str | None:
    """Returns why the file cannot be written, or None if it was."""
    try:
        file.write_bytes(b"preflight")
    except OSError as error:
        return str(error.strerror)
    return None


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _LAG_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _measure(ranks: Ranks, gradient: int) -> Network:
    small = [_all_reduce(ranks, 8) for _ in range(12)]
    latency = statistics.median(small[2:])  # connections are made in the first
    trial = min(_all_reduce(ranks, 2**20) for _ in range(2))
    affordable = int(_TEST_S / trial * 2**20)
    bytes = ranks.tell(max(8, min(gradient, _LARGEST_TEST, affordable)))
    seconds = min(_all_reduce(ranks, bytes) for _ in range(2))
    # The slowest rank's times, on all ranks.
    times = torch.tensor([-latency, -seconds], dtype=torch.float64, device=ranks.device)
    latency, seconds = (-ranks.min(times)).tolist()
    return Network(latency_s=latency, bytes=bytes, seconds=seconds)


def _all_reduce(ranks: Ranks, bytes: int) -> float:
    """Returns the seconds that an all-reduce of that many bytes takes."""
    values = torch.zeros(bytes // 4, device=ranks.device)
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    ranks.any(False)
    began = time.perf_counter()
    ranks.sum(values)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began
