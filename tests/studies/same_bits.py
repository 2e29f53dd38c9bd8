"""Compares ten short runs of this checkout with the same runs of another commit, to the last bit.

Both train on the tests' tiny data, on CPUs, by launch.py. Compared are every point's losses, gradient norms and
other metrics but those of speed, all evaluations, and the tensors of every checkpoint. Exits with 1 if any differ.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.numpy import load_file

from tests.conftest import PROJECT_ROOT, tiny_experiment, write_store

SPEED = ("second", "wait", "memory", "share")
ALL = {
    "training.eval_every": 2,
    "training.ema_decay": 0.9,
    "optimizer.clip_norm": 1.0,
    "optimizer.warmup_steps": 3,
}
ZERO = {
    stage: {"training.engine": "deepspeed", "training.deepspeed.zero_stage": stage}
    for stage in (1, 2, 3)
}
RESNET = {"model.backbone": "resnet", "model.resnet.width": 4, "model.resnet.blocks": 1}
LDM = {
    "model.backbone": "ldm",
    "model.fusion": "add",
    "model.ldm.block_out_channels": "[8, 8]",
    "model.ldm.layers_per_block": 1,
    "model.ldm.norm_num_groups": 4,
}
SPATIAL = {"model.latent": "spatial", "model.likelihood": "optimal_gaussian"}


class Short(NamedTuple):
    """A short run: its data, its ranks, and the keys that differ from the tests' tiny experiment."""

    captioned: bool
    ranks: int
    keys: dict[str, Any]


RUNS = {
    "mlp": Short(False, 1, {}),
    "mlp, 2 ranks": Short(False, 2, {}),
    "mlp, ZeRO 2, 2 ranks": Short(False, 2, ZERO[2]),
    "conv, film, text prior, 2 ranks": Short(
        True, 2, {"model.fusion": "film", "model.prior": "text"}
    ),
    "conv, accumulation, 2 ranks": Short(True, 2, {"training.micro_batch_size": 2}),
    "conv, ZeRO 1, 2 ranks": Short(True, 2, ZERO[1]),
    "conv, ZeRO 3, 2 ranks": Short(True, 2, ZERO[3]),
    "resnet": Short(True, 1, RESNET),
    "resnet, spatial, 2 ranks": Short(True, 2, {**RESNET, **SPATIAL}),
    "ldm, add": Short(True, 1, LDM),
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.studies.same_bits", description=__doc__)
    parser.add_argument("commit", help="the commit to compare with, such as HEAD~1")
    return parser


def main(commit: str) -> int:
    print(
        f"| run | points | tensor files | compared with {commit} |\n|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "checkout"
        git = ["git", "-C", str(PROJECT_ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(other), commit], check=True)
        try:
            homes = {checkout: _home(Path(folder)) for checkout in (PROJECT_ROOT, other)}
            same = [_is_same(name, short, homes) for name, short in RUNS.items()]
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    return 0 if all(same) else 1


def _home(folder: Path) -> Path:
    """Makes a $CVAE_HOME with both tiny stores and an experiment for each."""
    home = Path(tempfile.mkdtemp(dir=folder))
    for captioned in (False, True):
        write_store(home, captioned)
        (home / f"{captioned}.yaml").write_text(yaml.safe_dump(tiny_experiment(captioned)))
    return home


def _is_same(name: str, short: Short, homes: dict[Path, Path]) -> bool:
    """Trains a run in both checkouts, prints its row and returns whether all of it is identical."""
    (points, tensors), (other_points, other_tensors) = (
        _facts(_train(name, short, checkout, home)) for checkout, home in homes.items()
    )
    verdicts = [
        f"{what} differ"
        for what, is_same in (
            ("points", points == other_points),
            ("tensors", tensors == other_tensors),
        )
        if not is_same
    ]
    verdict = ", ".join(verdicts) or "identical"
    print(f"| {name} | {len(points)} | {len(tensors)} | {verdict} |", flush=True)
    return not verdicts


def _train(name: str, short: Short, checkout: Path, home: Path) -> Path:
    """Returns the run's folder."""
    run = "-".join(name.replace(",", "").split())
    values = [f"{key}={value}" for key, value in {**ALL, **short.keys}.items()]
    options = ["--gpus", str(short.ranks), "--cluster", "local", "--name", run]
    file = home / f"{short.captioned}.yaml"
    paths = {"CVAE_HOME": str(home), "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "workflows/launch.py", str(file), *values, *options],
        cwd=checkout,
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} in {checkout}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return home / "runs" / run


def _facts(run: Path) -> tuple[list[Any], dict[str, str]]:
    """Returns the points of the journal, and a hash of each file of tensors."""
    lines = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    points = [
        (line["step"], {k: v for k, v in line["metrics"].items() if not any(s in k for s in SPEED)})
        for line in lines
        if line["kind"] in ("step", "epoch")
    ]
    hashes = {}
    for file in sorted((run / "checkpoints").glob("step-*/*.safetensors")):
        tensors = load_file(file)
        content = b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))
        hashes[f"{file.parent.name}/{file.name}"] = hashlib.sha256(content).hexdigest()
    return points, hashes


if __name__ == "__main__":
    sys.exit(main(parser().parse_args().commit))
