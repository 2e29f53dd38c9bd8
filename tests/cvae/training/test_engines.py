"""DDP and DeepSpeed's ZeRO stages follow one curve and share checkpoints. tests/studies/engine_curves.py."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cvae.config.experiment import Experiment
from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.models.cvae import build_model
from cvae.training import deepspeed_engine
from cvae.training.engine import build_engine
from tests.conftest import tiny_experiment, write_store
from tests.helpers import ranks
from tests.studies import engine_curves
from tests.studies.engine_curves import identical, job, plain

_STAGES = ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Twelve steps of every engine, in one stretch and in two, on three ranks; and ends on one rank.

    Ten images over three ranks, three at once: shares of 3, 3 and 4, so that one rank makes two passes.
    """
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVAE_HOME", str(folder))
        write_store(folder, captioned=False)
        options: dict[str, Any] = {"likelihood": "optimal_gaussian", "micro_batch_size": 3}
        jobs = []
        for engine in ("DDP", *_STAGES):
            experiment = plain(engine, **options)
            jobs.append(job(engine, 0, 12, experiment, save=engine))
            jobs.append(job(f"{engine} half", 0, 6, experiment, save=f"{engine} half"))
            jobs.append(job(f"{engine} fp16", 0, 12, _overflowing(engine), spoil=_SPOILT))
        for before, after in [*zip(_STAGES, _STAGES, strict=True), *_MOVES]:
            name = f"{before} > {after}"
            jobs.append(job(name, 6, 12, plain(after, **options), load=f"{before} half", save=name))
        results = engine_curves.run_jobs(folder, 3, jobs)
        alone = [
            job(f"{engine} alone", 6, 12, plain(engine, **options), load=f"{engine} half")
            for engine in _STAGES
        ]
        alone += [
            job(f"{engine} fp16 alone", 0, 12, _overflowing(engine), spoil=_SPOILT_ALONE)
            for engine in ("DDP", *_STAGES)
        ]
        output = results["output"]
        results |= engine_curves.run_jobs(folder, 1, alone)
        results["output"] = output + results["output"]
    return folder, results


def _overflowing(engine: str) -> dict[str, Any]:
    experiment = plain(engine, precision="fp16", micro_batch_size=3)
    experiment["model"]["beta"] = 100.0
    experiment["optimizer"]["lr"] = 3e-3
    return experiment


_INF = float("inf")
# What a number of the first and the last rank's gradient becomes: one's own sum has overflowed and the other's has
# not; theirs have in opposite directions; only the sum of both is beyond fp16; it is not quite.
_SPOILT = {6: (_INF, 0.0), 8: (_INF, -_INF), 9: (4e4, 4e4), 10: (3e4, 3e4)}
_SPOILT_ALONE = {6: (_INF,), 8: (float("nan"),), 9: (8e4,), 10: (6e4,)}
_FINITE = [step in (5, 7, 10, 11) for step in range(12)]
_MOVES = [("DDP", "ZeRO 2"), ("ZeRO 2", "DDP"), ("ZeRO 3", "ZeRO 1"), ("ZeRO 1", "ZeRO 3")]


@pytest.mark.parametrize("stage", _STAGES)
def test_every_stage_follows_ddp(trained: tuple[Path, dict[str, Any]], stage: str) -> None:
    ddp, zero = trained[1]["DDP"], trained[1][stage]
    assert zero["losses"] == pytest.approx(ddp["losses"], rel=1e-4)
    assert zero["norms"] == pytest.approx(ddp["norms"], rel=1e-4)  # before clipping, which is on
    assert min(ddp["norms"]) > 5
    assert zero["val"] == pytest.approx(ddp["val"], abs=1e-3)  # of the averaged weights


@pytest.mark.parametrize("stage", _STAGES)
def test_each_overflow_costs_one_update_and_half_the_scale(
    trained: tuple[Path, dict[str, Any]], stage: str
) -> None:
    ddp, zero = trained[1]["DDP fp16"], trained[1][f"{stage} fp16"]
    assert ddp["norms"][0] == zero["norms"][0] == float("inf")
    norms = [np.nan_to_num(one["norms"], nan=np.inf, posinf=np.inf) for one in (ddp, zero)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)  # inf - inf is inf to DeepSpeed
    assert zero["losses"] == pytest.approx(ddp["losses"], rel=1e-3)
    assert zero["state"] == ddp["state"]
    assert zero["state"]["loss_scale"]["scale"] == 2**8


@pytest.mark.parametrize("engine", ["DDP", *_STAGES])
def test_fp16_skips_the_same_updates_on_any_number_of_ranks(
    trained: tuple[Path, dict[str, Any]], engine: str
) -> None:
    """One rank's own overflow costs all of them the update; so does one that only the sum has."""
    three, one = trained[1][f"{engine} fp16"], trained[1][f"{engine} fp16 alone"]
    assert three["agree"]  # about norms, scale and, to the bit, averaged weights
    assert np.isfinite(three["norms"]).tolist() == _FINITE
    assert np.isfinite(one["norms"]).tolist() == _FINITE
    assert one["losses"] == pytest.approx(three["losses"], rel=1e-3)
    assert one["state"] == three["state"]


@pytest.mark.parametrize("stage", _STAGES)
def test_resumed_is_bit_identical(trained: tuple[Path, dict[str, Any]], stage: str) -> None:
    folder, results = trained
    assert results[f"{stage} > {stage}"]["losses"] == results[stage]["losses"][6:]
    assert identical(folder, stage, f"{stage} > {stage}")


@pytest.mark.parametrize(("before", "after"), _MOVES)
def test_a_checkpoint_resumes_under_another_engine(
    trained: tuple[Path, dict[str, Any]], before: str, after: str
) -> None:
    results = trained[1]
    resumed = results[f"{before} > {after}"]
    assert resumed["losses"] == pytest.approx(results["DDP"]["losses"][6:], rel=1e-4)
    assert resumed["val"] == pytest.approx(results["DDP"]["val"], abs=1e-3)


@pytest.mark.parametrize("stage", _STAGES)
def test_three_ranks_resume_as_one(trained: tuple[Path, dict[str, Any]], stage: str) -> None:
    results = trained[1]
    assert results[f"{stage} alone"]["losses"] == pytest.approx(
        results["DDP"]["losses"][6:], rel=1e-4
    )
    assert results[f"{stage} alone"]["val"] == pytest.approx(results["DDP"]["val"], abs=1e-3)


def test_engines_are_silent(trained: tuple[Path, dict[str, Any]]) -> None:
    assert trained[1]["output"] == ""


def test_killed_and_resumed_under_zero_3(home: Path) -> None:
    """The whole loop with its evaluations and pictures, a film of text in a convolutional model."""
    write_store(home, captioned=True)
    zero = {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}}
    experiment = tiny_experiment(captioned=True, ema_decay=0.9, epochs=4, **zero)
    experiment["model"] |= {"fusion": "film", "prior": "text"}
    experiment["checkpoint"] = {"every_steps": 3}
    undisturbed, killed = (ranks.new_run(name, experiment) for name in ("undisturbed", "killed"))
    ranks.train(undisturbed, 2)
    processes = ranks.start(killed, 2)
    ranks.wait_for_step(killed, 12)
    for process in processes:
        process.kill()
    ranks.finish(processes)
    ranks.train(killed, 2)
    starts = ranks.lines(killed, "start")
    assert [line["engine"] for line in starts] == ["deepspeed, ZeRO 3"] * 2
    assert starts[1]["step"] > 0
    assert ranks.lines(killed, "end")[-1]["status"] == "finished"
    assert ranks.weights(killed) == ranks.weights(undisturbed)
    assert ranks.losses(killed) == ranks.losses(undisturbed)
    assert len(list(killed.pictures.iterdir())) == len(list(undisturbed.pictures.iterdir())) > 0


def test_a_missing_deepspeed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    experiment = Experiment.model_validate(plain("ZeRO 1"))
    model = build_model(experiment.model, (1, 16, 16), 3, 0)
    with pytest.raises(UserError, match="needs the package deepspeed, which is not installed"):
        build_engine(model, experiment, Ranks(0, 1, torch.device("cpu"), None))


def test_deepspeed_probes_its_operations_on_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table of operations is made at first use, by a probe and a warning for each."""

    class Operations:
        def __getattr__(self, name: str) -> dict[str, bool]:
            raise AssertionError(f"{name} was asked for")

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(ops=Operations()))
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    deepspeed_engine._import_deepspeed(torch.device("cuda"))
