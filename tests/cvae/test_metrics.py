"""Every metric that is reported has an entry in the registry, and every entry describes a reported metric."""

import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cvae.evaluation.evaluate_run import evaluate_runs
from cvae.evaluation.metric_groups import EvaluationRequest, fitting_groups
from cvae.files.checksums import sha256_of_file
from cvae.metrics import METRIC_GROUPS, METRICS, better, find, unit
from cvae.run import journal
from cvae.training.system_metrics import gpu_metrics
from cvae.training.train import train
from tests.conftest import PROJECT_ROOT, tiny_experiment
from tests.helpers.ranks import new_run


class TwoFeatures(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images[:, :, :8].float().mean(dim=(2, 3))[:, :2]


def reported_by_gpus(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=50),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=1, used=1, total=2),
        nvmlDeviceGetPowerUsage=lambda handle: 1000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return set(gpu_metrics(torch.device("cuda")))


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Restores the handlers that train() replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("tiny_store", "tiny_captioned_store", "default_signals")
def test_every_reported_metric_has_an_entry_and_every_entry_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inception = tmp_path / "inception.pt"
    torch.jit.script(TwoFeatures()).save(str(inception))
    reported: set[str] = set()
    for captioned in (False, True):
        run = new_run(f"captioned-{captioned}", tiny_experiment(captioned, epochs=1))
        train(run.path, mirrored=False)
        for split in ("val", "train"):
            groups = fitting_groups(run.experiment(), not captioned, None, str(inception), split)
            digest = sha256_of_file(inception)
            request = EvaluationRequest(str(run.path), split, groups, 3, str(inception), digest)
            evaluate_runs([asdict(request)], tmp_path / "progress")
        for line in journal.read(run.journal_file)[0]:
            reported |= line.get("metrics", {}).keys()
    reported |= reported_by_gpus(monkeypatch)
    sweep = (PROJECT_ROOT / "workflows" / "sweeps" / "mlflow_parent.py").read_text()
    reported |= set(re.findall(r'"(trials/\w+)"', sweep))

    assert [name for name in sorted(reported) if find(name) is None] == []
    in_use = {find(name) for name in reported}
    assert [metric.name for metric in METRICS if metric not in in_use] == []
    prefixes = {(find(name), name.split("/")[0].removesuffix("_train")) for name in reported}
    listed = {(metric, prefix) for metric in METRICS for prefix in metric.prefixes.split()}
    assert listed == prefixes


def test_entries_are_whole() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert {*METRIC_GROUPS, "training", "system", "sweep"} == {m.group for m in METRICS}
    assert all(metric.meaning and not metric.meaning.endswith(".") for metric in METRICS)
    assert {metric.better for metric in METRICS} == {"lower", "higher", None}


def test_a_name_is_found_with_and_without_its_prefix() -> None:
    assert find("best/val/loss") == find("eval_train/loss") == find("loss") is not None
    assert (unit("eval/iwae_64"), unit("iwae_64_bits_per_dim")) == (
        "nats per image",
        "bits per dimension",
    )
    assert (better("val/text_gain"), better("eval/kl"), better("val/text_gain_se")) == (
        "higher",
        None,
        None,
    )
    assert find("train/psnr") is None
    assert find("val/unheard_of") is None
