"""Measures how far DDP and the ZeRO stages deviate from one loss curve, also after resuming; prints tables.

Several trainings share the same processes (each rank runs `python -m tests.studies.engine_curves ranks FOLDER`),
because starting processes would take longer than training.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cvae.config.experiment import Experiment
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import open_data
from cvae.data.feed import micro_batches
from cvae.distributed import precision
from cvae.distributed.ranks import Ranks, connect
from cvae.evaluation.elbo import evaluate_elbo
from cvae.models.cvae import build_model
from cvae.run.checkpoint import TrainingState
from cvae.training.engine import build_engine
from cvae.training.optimization import kl_weight, learning_rate
from tests.conftest import tiny_experiment, write_store
from tests.helpers import ranks as processes

_MATRIX = ("DDP", "ZeRO 1", "ZeRO 3")
_ENGINES = {"DDP": None, "ZeRO 0": 0, "ZeRO 1": 1, "ZeRO 2": 2, "ZeRO 3": 3}


def plain(engine: str, likelihood: str = "bernoulli", **training: Any) -> dict[str, Any]:
    """Returns the tiny experiment with an engine of _ENGINES, averaged weights and clipped gradients."""
    stage = _ENGINES[engine]
    chosen: dict[str, Any] = {"engine": "ddp"}
    if stage is not None:
        chosen = {"engine": "deepspeed", "deepspeed": {"zero_stage": stage}}
    options = {"epochs": 1000, "ema_decay": 0.9, "precision": "fp32", **chosen, **training}
    experiment = tiny_experiment(**options)
    experiment["optimizer"] |= {"clip_norm": 5.0, "warmup_steps": 5, "weight_decay": 0.01}
    experiment["model"]["beta_warmup_steps"] = 7
    experiment["model"]["likelihood"] = likelihood
    return experiment


def job(
    name: str, start: int, stop: int, experiment: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Returns a job of run_jobs: training from step `start` to `stop`.

    more: `load` and `save`, names of saved states; `spoil`, {step: values that replace one number of the gradient
    on the first and on the last rank}, scaled and before the ranks' gradients are averaged.
    """
    return {"name": name, "start": start, "stop": stop, "experiment": experiment, **more}


def run_jobs(
    folder: Path, world_size: int, jobs: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Trains the jobs on real ranks; returns {name: {"losses", "norms", "val", …}} and the ranks' "output"."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    file = folder / "results.json"
    file.unlink(missing_ok=True)
    arguments = ["-m", "tests.studies.engine_curves", "ranks", str(folder)]
    outputs = processes.finish(processes.start_python(arguments, world_size), patience_s=900)
    assert file.exists(), "\n".join(outputs)
    results = json.loads(file.read_text())
    results["output"] = "".join(outputs)
    return results


def _rank(folder: Path) -> None:
    results = {}
    with connect() as ranks:
        for one in json.loads((folder / "jobs.json").read_text()):
            results[one["name"]] = _train(folder, one, ranks)
        if ranks.is_first:
            (folder / "results.json").write_text(json.dumps(results))


def _train(folder: Path, task: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    experiment = Experiment.model_validate(task["experiment"])
    # A CPU computes fp16 slowly, with the same loss scale, which is the subject here.
    precision.resolve = lambda wanted, device: wanted
    training = experiment.training
    data = open_data(experiment)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    engine = build_engine(model, experiment, ranks)
    if "load" in task:
        engine.restore(load(folder / task["load"]))
    batch_size = training.global_batch_size
    order = BatchOrder(experiment.seed, data.train_rows, batch_size, model.latent_shape)
    losses, norms = [], []

    def batch(step: int) -> Any:
        share = ranks.share(batch_size)
        return micro_batches(
            data, data.train, order.batch(step), share, training.micro_batch_size, ranks.device
        )

    engine.settle(batch(task["start"]))
    spoilt: list[float] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        if not spoilt:
            return None
        gradient = gradient.clone()
        gradient.view(-1)[0] = spoilt.pop()
        return gradient

    if "spoil" in task:
        next(model.parameters()).register_hook(spoil)
    for step in range(task["start"], task["stop"]):
        lr = learning_rate(experiment.optimizer, step, 1000)
        for rank, value in zip(
            (0, ranks.world_size - 1), task.get("spoil", {}).get(str(step), ()), strict=False
        ):
            spoilt[:] = [value] if ranks.rank == rank else spoilt
        sums = engine.step(batch(step), lr, kl_weight(experiment.model, step))
        losses.append(float(ranks.sum(sums[:3].clone())[2]))
        norms.append(float(sums[3]))
    val = evaluate_elbo(engine.eval_model, data, data.val, experiment, ranks)
    snapshot = engine.snapshot({"step": task["stop"]})
    if "save" in task and ranks.is_first:
        for part, tensors in snapshot.tensors.items():
            save_file(tensors, folder / f"{task['save']}.{part}.safetensors")
        (folder / f"{task['save']}.json").write_text(json.dumps(snapshot.state))
    weights = b"".join(
        _bits(w).cpu().numpy().tobytes() for w in engine.eval_model.state_dict().values()
    )
    own = [np.isfinite(norms).tolist(), snapshot.state, hashlib.sha256(weights).hexdigest()]
    return {
        "losses": losses,
        "norms": norms,
        "val": val["loss"],
        "state": snapshot.state,
        "agree": len(set(ranks.gather(json.dumps(own)))) == 1,
    }


def load(path: Path) -> TrainingState:
    parts = {
        file.name.split(".")[1]: file for file in path.parent.glob(f"{path.name}.*.safetensors")
    }
    state = json.loads(Path(f"{path}.json").read_text())
    return TrainingState({part: load_file(file) for part, file in parts.items()}, state)


def deviation(one: list[float], other: list[float]) -> float:
    """Returns the largest relative difference of two curves."""
    assert len(one) == len(other)
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def identical(folder: Path, one: str, other: str) -> bool:
    """Whether two saved states hold the same bits."""
    mine, theirs = load(folder / one).tensors, load(folder / other).tensors
    return all(
        torch.equal(_bits(value), _bits(theirs[part][name]))
        for part, tensors in mine.items()
        for name, value in tensors.items()
    )


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)


def curves_table(folder: Path, worlds: tuple[int, ...] = (1, 2, 4, 8)) -> Iterator[str]:
    """Largest relative deviation from DDP's curve on one rank over 100 steps."""
    yield f"| ranks | accumulation | {' | '.join(_ENGINES)} |"
    yield "|" + "---|" * (2 + len(_ENGINES))
    reference: list[float] = []
    for world_size in worlds:
        jobs = [
            job(f"{engine}/{parts}", 0, 100, _batch_of_64(engine, world_size, parts))
            for parts in (1, 4)
            for engine in _ENGINES
        ]
        results = run_jobs(folder, world_size, jobs)
        reference = reference or results["DDP/1"]["losses"]
        for parts in (1, 4):
            cells = [
                f"{deviation(reference, results[f'{engine}/{parts}']['losses']):.1e}"
                for engine in _ENGINES
            ]
            yield f"| {world_size} | {parts} | {' | '.join(cells)} |"


def resume_table(folder: Path) -> Iterator[str]:
    """50 steps, a checkpoint, 50 more, compared with 100 steps of the first engine."""
    results: dict[str, dict[str, Any]] = {}
    for world_size in (2, 4):
        jobs = []
        for engine in _ENGINES:
            experiment = _batch_of_64(engine, world_size, 1)
            full, half = f"{engine}/{world_size}/full", f"{engine}/{world_size}/half"
            jobs.append(job(full, 0, 100, experiment, save=full.replace("/", "-")))
            jobs.append(job(half, 0, 50, experiment, save=half.replace("/", "-")))
        results |= run_jobs(folder, world_size, jobs)
    moves = [(engine, engine, *worlds) for engine in _MATRIX for worlds in ((2, 2), (2, 1), (4, 2))]
    moves += [("DDP", "ZeRO 2", 2, 2), ("ZeRO 2", "DDP", 2, 2)]
    for world_size in (1, 2):
        jobs = []
        for before, after, wrote, reads in moves:
            if reads == world_size:
                experiment = _batch_of_64(after, world_size, 1)
                name, half = f"{before}>{after}/{wrote}>{reads}", f"{before}-{wrote}-half"
                saved = name.replace("/", "-")
                jobs.append(job(name, 50, 100, experiment, load=half, save=saved))
        results |= run_jobs(folder, world_size, jobs)
    yield "| from | to | ranks | largest deviation after | weights and Adam's state |"
    yield "|---|---|---|---|---|"
    for before, after, wrote, reads in moves:
        name, full = f"{before}>{after}/{wrote}>{reads}", f"{before}/{wrote}/full"
        apart = deviation(results[full]["losses"][50:], results[name]["losses"])
        same = identical(folder, full.replace("/", "-"), name.replace("/", "-"))
        bits = "bit-identical" if same else "alike"
        yield f"| {before} | {after} | {wrote} → {reads} | {apart:.1e} | {bits} |"


def _batch_of_64(engine: str, world_size: int, parts: int) -> dict[str, Any]:
    micro = 64 // world_size // parts
    return plain(engine, global_batch_size=64, micro_batch_size=micro)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.studies.engine_curves", description=__doc__
    )
    parser.add_argument("tables", nargs="*", help="curves, resume (default: both)")
    return parser


def _main() -> None:
    tables = {"curves": curves_table, "resume": resume_table}
    chosen = parser().parse_args().tables
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"CVAE_HOME": home, "OMP_NUM_THREADS": "1"}
        write_store(Path(home), captioned=False, sizes=(200, 21))
        for table in [tables[name] for name in chosen] or tables.values():
            print(f"\n{table.__doc__}\n")
            for line in table(Path(home)):
                print(line, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ranks"]:
        _rank(Path(sys.argv[2]))
    else:
        _main()
