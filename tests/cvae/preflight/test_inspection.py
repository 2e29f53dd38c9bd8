"""Preflight: judgements on facts that no machine here has, and real folders, ranks and runs."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from cvae.config.experiment import Experiment
from cvae.distributed.ranks import check_same_device, connect
from cvae.errors import UserError
from cvae.preflight import inspection
from cvae.preflight.checks import Facts, Gpu, Need, Network, judge, judge_network, runs_on
from cvae.training.train import train
from tests.conftest import tiny_experiment
from tests.helpers import ranks as local_ranks

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
NEED = Need(memory=10 * 10**9, disk=5 * 10**9, gradient=10**9)
V100 = Gpu(name="Tesla V100", id="?", capability=(7, 0), built_for=CUDA_12_6)


def ranks_of(node: str, first: int, **more: Any) -> list[Facts]:
    """Two ranks of a node with two V100s."""
    host = {
        "free_disk": 10**12,
        "code": "c0de",
        "code_root": "/home/code/1",
        "submitted_code": "/home/code/1",
        "packages": {"python": "3.11.2", "torch": "2.10.0"},
    }
    common = {"host": node, "free_memory": 31 * 10**9, "clock": 1e9, "torch": "2.10.0+cu126"}
    common |= {"cuda": "12.6", "data": "d161", **more}
    return [
        Facts(**{"rank": first, "gpu": V100.model_copy(update={"id": "GPU-0"})} | host | common),
        Facts(**{"rank": first + 1, "gpu": V100.model_copy(update={"id": "GPU-1"})} | common),
    ]


def verdict(need: Need = NEED, **more: Any) -> list[tuple[str, str]]:
    """Two nodes, of which the second differs."""
    facts = ranks_of("node1", 0) + ranks_of("node2", 2, **more)
    return [(finding.level, finding.text) for finding in judge(facts, need, "/home/runs/x")]


def test_equal_nodes_pass() -> None:
    assert verdict() == []


CUDA_13_BUILD = {
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "gpu": V100.model_copy(update={"built_for": CUDA_13}),
}


@pytest.mark.parametrize(
    ("difference", "level", "text"),
    [
        (CUDA_13_BUILD, "error", r"node2: .*no code for Tesla V100, which is sm_70.*CUDA 12\.6"),
        ({"gpu": V100}, "error", r"node2: ranks 2 and 3 have the same GPU"),
        (
            {"packages": {"python": "3.11.2", "torch": "2.13.0"}},
            "error",
            r"node2 has torch 2\.13\.0, node1 2\.10\.0",
        ),
        ({"code": "0ther"}, "error", r"node2 has code 0ther, node1 c0de: .*must hold the code"),
        (
            {"code_root": "/home/checkout"},
            "error",
            r"node2 runs the code of /home/checkout instead of the submitted /home/code/1",
        ),
        ({"data": "07e7"}, "error", r"node2 has data 07e7, node1 d161: prepare once"),
        ({"data": None}, "error", r"node2 has data None, node1 d161"),
        ({"free_disk": 10**9}, "error", r"node2: 1\.0 GB are free .* take 5\.0 GB more"),
        ({"write_error": "Permission denied"}, "error", r"node2: .*cannot be written: Permission"),
        ({"write_error": "No space left on device"}, "error", r"node2: .* is full"),
        ({"sees_folder": False}, "error", r"node2: .* is not the folder that node1 has"),
        (
            {"flock": False},
            "warning",
            r"node2: the file system of /home/runs/x does not support flock",
        ),
        ({"free_memory": 2 * 10**9}, "error", r"node2: GPU of rank 2 has 2\.0 GB free.*10\.0 GB"),
        ({"clock": 1e9 + 3}, "warning", r"node2: its clock is 3 s ahead of that of node1"),
        ({"clock": 1e9 - 600}, "error", r"node2: its clock is 600 s behind"),
        (
            {"gpu": V100.model_copy(update={"name": "P100", "capability": (6, 0)})},
            "warning",
            r"different GPUs: Tesla V100 on node1, P100 on node2",
        ),
    ],
)
def test_every_finding_names_the_node(difference: dict[str, Any], level: str, text: str) -> None:
    findings = [finding for finding in verdict(**difference) if re.search(text, finding[1])]
    assert [finding[0] for finding in findings] == [level] * len(findings) != []
    assert all("\n" not in finding[1] for finding in verdict(**difference))


def test_a_run_that_has_begun_goes_on_without_room_for_a_checkpoint() -> None:
    begun = NEED._replace(begun=True)
    for lack in ({"free_disk": 0}, {"write_error": "No space left on device"}, {"free_memory": 0}):
        assert {level for level, _ in verdict(begun, **lack)} == {"warning"}
    assert verdict(begun, write_error="Read-only file system")[0][0] == "error"


def test_ranks_without_gpus_share_their_hosts_memory() -> None:
    facts = [Facts(rank=n, host="a", gpu=None, free_memory=19, clock=0) for n in range(2)]
    assert judge(facts, Need(memory=9), "x") == []
    [finding] = judge(facts, Need(memory=10), "x")
    assert "take 20 bytes" in finding.text
    assert judge([facts[0].model_copy(update={"idle_gpus": 4})], Need(), "x")[0].level == "warning"


@pytest.mark.parametrize(
    ("capability", "built_for", "expected"),
    [
        ((7, 0), CUDA_13, False),
        ((7, 0), CUDA_12_6, True),
        ((8, 9), CUDA_12_6, True),  # sm_86 is of the same major
        ((8, 0), ["sm_86"], False),
        ((12, 0), CUDA_12_6, False),
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # the driver compiles compute_120
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120a"], False),
    ],
)
def test_what_a_build_runs_on(
    capability: tuple[int, int], built_for: list[str], expected: bool
) -> None:
    assert runs_on(capability, built_for) == expected


def test_a_slow_network_is_reported() -> None:
    slow = Network(latency_s=0.001, bytes=10**6, seconds=0.01)
    [finding] = judge_network(slow, NEED)
    assert finding.text.startswith(
        "all-reduce runs at 0.1 GB/s: a step's gradients (1.0 GB) take 10.0"
    )
    assert judge_network(slow, NEED._replace(gradient=10**6)) == []
    assert judge_network(slow.model_copy(update={"seconds": 0.0001}), NEED) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a small file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "mounted"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_or_read_only_ends_the_run_before_its_first_step(
    tiny_store: Path, mounted: Path
) -> None:
    run = local_ranks.new_run("x", tiny_experiment(epochs=1))
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(mounted)
    with pytest.raises(UserError, match=r"6\d\.\d kB are free"):
        train(run.path, mirrored=False)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        train(run.path, mirrored=False)
    assert local_ranks.lines(run, "start") == []


def test_a_run_tells_what_its_preflight_saw_and_that_its_code_has_changed(tiny_store: Path) -> None:
    run = local_ranks.new_run("x", tiny_experiment(epochs=1))
    assert train(run.path, mirrored=False).status == "finished"
    [line] = local_ranks.lines(run, "preflight")
    [(_, host)] = line["hosts"].items()
    assert host["free_disk"] > 0 < host["free_memory"]
    assert list(run.path.rglob(".preflight*")) == []

    [first] = (start["code"] for start in local_ranks.lines(run, "start"))
    train(run.path, mirrored=False)
    assert local_ranks.lines(run, "notice") == []
    run.journal_file.write_text(run.journal_file.read_text().replace(first, "0" * 64))
    train(run.path, mirrored=False)
    [notice] = local_ranks.lines(run, "notice")
    assert notice["message"] == f"from step 5 with other code: {first[:12]}, until then {'0' * 12}"


def test_the_need_grows_with_the_model_and_shrinks_with_what_is_shared(tiny_store: Path) -> None:
    from cvae.data.experiment_data import open_data
    from cvae.models.cvae import build_model

    plain = Experiment.model_validate(tiny_experiment(engine="deepspeed", ema_decay=0.9))
    data = open_data(plain)
    model = build_model(plain.model, data.image_shape, data.condition_dim, 0)
    weights = 4 * model.n_parameters()

    def need(stage: int) -> Need:
        training = plain.training.model_copy(
            update={"deepspeed": plain.training.deepspeed.model_copy(update={"zero_stage": stage})}
        )
        experiment = plain.model_copy(update={"training": training})
        return inspection.need_of(experiment, model, 2, tiny_store / "no checkpoints", False)

    # Weights, gradients, two moments, averaged weights.
    assert [need(stage).memory / weights for stage in range(4)] == [5, 4, 3.5, 3]
    assert need(1).disk == (3 + 2) * 4 * weights
    there = tiny_store / "no checkpoints"
    there.mkdir()
    (there / "one").write_bytes(bytes(weights))
    assert need(1).disk == (3 + 2) * 4 * weights - weights


@pytest.mark.parametrize("kinds", [("cuda", "cpu"), ("cuda", "cuda")])
def test_ranks_with_and_without_gpus_do_not_wait_for_each_other(kinds: tuple[str, str]) -> None:
    # Before NCCL here and gloo there, which would meet never.
    store = HashStore()

    def meet(rank: int) -> str:
        try:
            check_same_device(store, rank, 2, kinds[rank])
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as both:
        outputs = list(both.map(meet, range(2)))
    assert [bool(text) for text in outputs] == [kinds[0] != kinds[1]] * 2
    assert all(
        text.startswith(f"{socket.gethostname()}: PyTorch sees no GPU") for text in outputs if text
    )


def test_two_ranks_that_differ(tmp_path: Path) -> None:
    outputs = local_ranks.finish(
        local_ranks.start_python(["-m", "tests.cvae.preflight.test_inspection", str(tmp_path)], 2)
    )
    for text in outputs:
        printed = [line[2:] for line in text.splitlines() if line.startswith("> ")]
        first, second, network = printed
        assert first.endswith(": no rope on rank 1")
        assert "has data digest 1" in second
        facts = json.loads(network)
        assert facts["latency_s"] < facts["seconds"]
        assert facts["bytes"] == 4_000_000
    assert list(tmp_path.iterdir()) == []


def _as_rank(folder: Path) -> None:
    with connect() as ranks:

        def refuse() -> None:
            if ranks.rank == 1:
                raise UserError("no rope on rank 1")

        try:
            ranks.everywhere(refuse)
        except UserError as error:
            print(f"> {error}")
        try:
            inspection.check(folder, ranks, Need(), f"digest {ranks.rank}")
        except UserError as error:
            print(f"> {error}")
        report = inspection.check(folder, ranks, Need(gradient=4_000_000), "digest")
        assert report.network is not None
        print(f"> {report.network.model_dump_json()}", flush=True)
        ranks.any(False)


if __name__ == "__main__":
    _as_rank(Path(sys.argv[1]))
