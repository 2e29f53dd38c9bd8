"""Looks at every node before the first step: seconds that may save days in the queue.

The ranks gather plain facts, all judge them alike (preflight_checks.py), and an all-reduce over every rank shows
that the network works and how fast.
"""

import contextlib
import os
import shutil
import signal
import socket
import statistics
import sys
import time
import uuid
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
from cvae.preflight.checks import (
    Facts,
    Finding,
    Gpu,
    Need,
    Network,
    Plain,
    judge,
    judge_network,
)
from cvae.run import code_snapshot
from cvae.run.provenance import package_versions

EXPERIMENT_FILE, REPORT_FILE = "experiment.yaml", "report.json"
_LARGEST_TEST = 64 * 2**20  # bytes
_TEST_S = 0.2
# Network file systems show what other hosts have written late.
_LAG_S = 3.0
_ALONE_S = 240


class Report(Plain):
    facts: list[Facts]
    findings: list[Finding]
    network: Network | None
    """None with one rank, and where an error was found before."""
    seconds: float

    def texts(self, level: str) -> list[str]:
        return [finding.text for finding in self.findings if finding.level == level]

    def line(self) -> dict[str, Any]:
        """The fields of the journal's line."""
        offset = self.facts[0].clock
        hosts = {
            fact.host: {
                "free_disk": fact.free_disk,
                "free_memory": fact.free_memory,
                "clock_offset_s": round(fact.clock - offset, 3),
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
    """The same report on all ranks; raises UserError with all that is wrong. data: the digest.

    folder: where the run writes its checkpoints.
    """
    report = look(folder, ranks, need, data)
    if errors := report.texts("error"):
        raise UserError("; ".join(errors))
    return report


def look(folder: Path, ranks: Ranks, need: Need, data: str | None) -> Report:
    began = time.monotonic()
    need = ranks.tell(
        need
    )  # a network file system may show each host another number of checkpoints
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
    sharing = [1, 1, 1]  # of Adam's two moments, of gradients, of weights
    if experiment.training.engine == "deepspeed":
        stage = experiment.training.deepspeed.zero_stage
        sharing = [world_size if stage >= least else 1 for least in (1, 2, 3)]
    moments, gradients, own = sharing
    there = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
    # Besides those that are kept: the best, and the one that is being written.
    most = (experiment.checkpoint.keep + 2) * (3 * weights + averaged)
    return Need(
        memory=2 * weights // moments + weights // gradients + weights // own + averaged,
        disk=max(0, most - there),
        gradient=weights,
        begun=begun,
    )


def alone(folder: Path) -> None:
    """Just this, as a job: rank 0 leaves its report in the folder.

    With the folder's experiment, if there is one, for what it needs and for its data. Raises UserError where
    those are not as that experiment needs them.
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
            with torch.device("meta"):
                model = build_model(
                    experiment.model, data.image_shape, data.condition_dim, experiment.seed
                )
            nothing = folder / "checkpoints"
            need = need_of(experiment, model, ranks.world_size, nothing, begun=False)
            digest = data.digest
        report = look(folder, ranks, need, digest)
        if ranks.is_first:
            write_atomically(folder / REPORT_FILE, report.model_dump_json())
        ranks.any(False)


def _gather(folder: Path, ranks: Ranks, data: str | None) -> list[Facts]:
    mark = folder / f".preflight-{ranks.tell(uuid.uuid4().hex)}"
    facts: dict[str, Any] = {"rank": ranks.rank, "host": _host(), "torch": torch.__version__}
    facts |= {"cuda": torch.version.cuda, "data": data, **_device_facts(ranks.device)}
    if ranks.is_first:
        facts["write_error"] = _write(mark)
    ranks.any(False)
    facts["clock"] = time.time()
    if ranks.is_first or os.environ.get("LOCAL_RANK") == "0":
        facts |= _host_facts(folder)
    if not ranks.is_first and "packages" in facts:
        own = mark.with_name(f"{mark.name}-{ranks.rank}")
        facts["write_error"] = _write(own)
        facts["sees_folder"] = _is_there(mark)
        _remove(own)
    gathered = ranks.gather(Facts(**facts).model_dump_json())
    if ranks.is_first:
        _remove(mark)
    return [Facts.model_validate_json(text) for text in gathered]


def _device_facts(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        idle = len(list(Path("/dev").glob("nvidia[0-9]*")))
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            idle = 0  # the user's own wish
        return {"gpu": None, "idle_gpus": idle, "free_memory": memory(device).free}
    name, id, capability = describe(device)
    assert capability is not None
    gpu = Gpu(name=name, id=id, capability=capability, built_for=torch.cuda.get_arch_list())
    return {"gpu": gpu, "free_memory": memory(device).free}


def _host_facts(folder: Path) -> dict[str, Any]:
    code = code_snapshot.read()
    python = ".".join(map(str, sys.version_info[:3]))
    submitted = os.environ.get("CVAE_CODE")
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = None  # the attempt to write tells why
    try:
        flock = has_flock(folder)
    except OSError:
        flock = True  # not known; the attempt to write tells why
    return {
        "free_disk": free,
        "flock": flock,
        "code": code.source,
        "code_root": str(code.root),
        "submitted_code": None if submitted is None else str(Path(submitted).resolve()),
        "packages": {"python": python, **package_versions()},
    }


def _write(file: Path) -> str | None:
    """What stands in the way, if anything."""
    try:
        file.write_bytes(b"preflight")
        return None
    except OSError as error:
        return str(error.strerror)


def _remove(file: Path) -> None:
    # A file system that is read-only says so even where nothing is.
    with contextlib.suppress(OSError):
        file.unlink()


def _is_there(file: Path) -> bool:
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
    # The slowest rank's word; all get the same.
    times = torch.tensor([-latency, -seconds], dtype=torch.float64, device=ranks.device)
    latency, seconds = (-ranks.min(times)).tolist()
    return Network(latency_s=latency, bytes=bytes, seconds=seconds)


def _all_reduce(ranks: Ranks, bytes: int) -> float:
    values = torch.zeros(bytes // 4, device=ranks.device)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    ranks.any(False)
    began = time.perf_counter()
    ranks.sum(values)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _host() -> str:
    return socket.gethostname()
