"""What training.precision and training.deterministic set, on devices that no machine here has."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from cvae.config.experiment import Experiment, Training
from cvae.distributed import precision
from cvae.distributed.device import Device
from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.models.cvae import build_model
from cvae.training import train as training
from cvae.training.engine import build_engine
from cvae.training.rates import Meter
from tests.conftest import tiny_experiment
from tests.helpers import ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
V100 = Device("Tesla V100", "GPU-0", (7, 0))
A100 = Device("NVIDIA A100", "GPU-0", (8, 0))
_SWITCHES = (
    (torch.backends.cuda.matmul, "allow_tf32"),
    *((torch.backends.cudnn, name) for name in ("allow_tf32", "deterministic", "benchmark")),
)


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Gives PyTorch's switches back as they were."""
    before = [getattr(owner, name) for owner, name in _SWITCHES]
    strict = torch.are_deterministic_algorithms_enabled()
    environment = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    for (owner, name), value in zip(_SWITCHES, before, strict=True):
        setattr(owner, name, value)
    torch.use_deterministic_algorithms(strict)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if environment is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = environment


def on(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "describe", lambda asked: device)


def options(**chosen: object) -> Training:
    return Training.model_validate({"epochs": 1, "global_batch_size": 1, **chosen})


@pytest.mark.parametrize(
    ("device", "wanted", "expected"),
    [
        (V100, "auto", "fp16"),
        (A100, "auto", "bf16"),
        (V100, "fp32", "fp32"),
        (A100, "fp32", "fp32"),
        (A100, "tf32", "tf32"),
        (V100, "bf16", "bf16"),
    ],
)
def test_what_a_gpu_computes_in(
    device: Device, wanted: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(device, monkeypatch)
    assert precision.resolve(wanted, GPU) == expected


def test_a_device_without_the_precision_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.resolve("auto", CPU) == "fp32"
    for wanted in ("fp16", "tf32"):
        with pytest.raises(UserError, match=f"'{wanted}' needs a GPU; on a CPU use fp32 or bf16"):
            precision.resolve(wanted, CPU)
        # What was trained elsewhere can be measured here.
        assert precision.resolve_to_measure(wanted, CPU) == "fp32"
    on(V100, monkeypatch)
    wanted = "tf32' needs a GPU of compute capability 8.0 or more (A100 and later), and Tesla V100 has 7.0"
    with pytest.raises(UserError, match=re.escape(wanted)):
        precision.resolve("tf32", GPU)


@pytest.mark.parametrize(
    ("wanted", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False), ("auto", False)]
)
def test_tf32_is_used_everywhere_or_nowhere(
    wanted: str, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(A100, monkeypatch)
    precision.establish(options(precision=wanted), GPU)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_deterministic_is_set_before_cuda_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    on(A100, monkeypatch)
    precision.establish(options(deterministic=True), GPU)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    precision.establish(options(), GPU)  # another run, evaluated by the same process
    assert not torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_engine_sets_the_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment.model_validate(tiny_experiment(precision="fp32"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's own default
    build_engine(
        build_model(experiment.model, (1, 16, 16), 3, 0), experiment, Ranks(0, 1, CPU, None)
    )
    assert not torch.backends.cudnn.allow_tf32


def test_a_deterministic_run_trains_and_evaluates(
    tiny_captioned_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    connect = training.connect

    def noting() -> AbstractContextManager[Ranks]:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return connect()

    monkeypatch.setattr(training, "connect", noting)
    runs = [
        ranks.new_run(f"run-{chosen}", tiny_experiment(True, max_steps=6, deterministic=chosen))
        for chosen in (False, True)
    ]
    for run in runs:
        assert training.train(run.path, mirrored=False).status == "finished"
    assert seen == [None, ":4096:8"]
    # On a CPU every run is deterministic: the switch changes nothing.
    assert ranks.losses(runs[0]) == ranks.losses(runs[1])


@pytest.mark.parametrize(("resolved", "bad"), [("bf16", 3), ("fp32", 3), ("fp16", None)])
def test_a_gradient_that_is_not_finite_is_watched_but_for_fp16(
    resolved: str, bad: int | None
) -> None:
    """By what auto has become on this device; the loss scale of fp16 alone expects an overflow."""
    experiment = Experiment.model_validate(tiny_experiment(precision="auto"))
    model = build_model(experiment.model, (1, 16, 16), 3, 0)
    # The type alone: no number of the meter lies on a GPU.
    gpu_rank = Ranks(0, 1, GPU, None)
    meter = Meter(model, experiment, gpu_rank, resolved, total_steps=9)
    sums = torch.tensor([1.0, 1.0, 1.0, float("nan")])
    meter.note(3, sums)
    meter.read(3, sums)
    assert meter.bad_step == bad


def test_skipped_updates_are_counted_over_intervals() -> None:
    experiment = Experiment.model_validate(tiny_experiment())
    model = build_model(experiment.model, (1, 16, 16), 3, 0)
    meter = Meter(model, experiment, Ranks(0, 1, CPU, None), "fp16", total_steps=999)
    made, skipped = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, float("inf")])
    step = 0
    for count, last, bad in [
        (30, skipped, None),
        (18, made, None),
        (40, skipped, None),
        (9, skipped, 100),
    ]:
        for _ in range(count):
            step += 1
            meter.note(step, skipped)
        step += 1
        meter.note(step, last)
        assert ("grad_norm" in meter.read(step, last)) == (last is made)
        assert meter.bad_step == bad
