"""training.compile: the same curve from fused operations."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from cvae.config.experiment import Experiment
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import open_data
from cvae.data.feed import micro_batches
from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.models.cvae import build_model
from cvae.training.ddp_engine import _check_compiler
from cvae.training.engine import build_engine
from tests.conftest import tiny_experiment, write_store
from tests.studies import engine_curves
from tests.studies.engine_curves import job, plain


@pytest.mark.skipif(" " in torch.__file__, reason="PyTorch cannot link from a path with a space")
def test_compiled_steps_follow_plain_ones_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten images over two ranks, three at once: micro-batches of two sizes."""
    monkeypatch.setenv("CVAE_HOME", str(tmp_path))
    write_store(tmp_path, captioned=False)
    jobs = [
        job(name, 0, 8, plain("DDP", micro_batch_size=3, compile=compiled))
        for name, compiled in (("plain", False), ("compiled", True))
    ]
    results = engine_curves.run_jobs(tmp_path, 2, jobs)
    assert results["compiled"]["losses"] == pytest.approx(results["plain"]["losses"], rel=1e-5)
    # Other kernels: had nothing been compiled, not a bit would differ.
    assert results["compiled"]["losses"] != results["plain"]["losses"]


@pytest.mark.skipif(" " in torch.__file__, reason="PyTorch cannot link from a path with a space")
def test_another_beta_is_no_other_graph(tiny_store: Path) -> None:
    """As in a warm-up of beta, where each step has its own."""
    experiment = Experiment.model_validate(tiny_experiment(precision="fp32", compile=True))
    data = open_data(experiment)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    engine = build_engine(model, experiment, Ranks(0, 1, torch.device("cpu"), None))
    size = experiment.training.global_batch_size
    order = BatchOrder(experiment.seed, data.train_rows, size, model.latent_shape)
    batch = micro_batches(
        data, data.train, order.batch(0), slice(0, size), None, torch.device("cpu")
    )
    engine.settle(batch)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    losses = [engine.step(batch, 0.0, beta)[2] for beta in (0.0, 0.25, 0.5, 1.0)]
    assert counters["stats"]["unique_graphs"] == before
    assert losses[0] < losses[-1]


def test_a_path_with_a_space_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", "/my trainer/torch/__init__.py")
    with pytest.raises(UserError, match=r"from /my trainer/torch, whose path has a space; install"):
        _check_compiler(torch.device("cpu"))
    _check_compiler(torch.device("cuda"))


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_missing_compiler_is_one_line(
    device: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU too: Triton builds its launchers with the host's C compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=r"training\.compile = true needs a .* compiler on a"):
        _check_compiler(torch.device(device))
    own = tmp_path / "own-compiler"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv(variable, str(own))
    monkeypatch.setattr(torch, "__file__", "/torch/__init__.py")
    _check_compiler(torch.device(device))
