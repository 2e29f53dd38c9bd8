"""Compares the model of scale with measurements of two hosts over a throttled link.

Prints Markdown: images per second of two ranks on two hosts of the test cluster, as measured and as
workflows/jobs/scaling_model.py predicts from one rank's rate. Exits with 1 if one is off by more than 15 %.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from cvae.config.experiment import load_experiment
from cvae.files import paths
from slurm import cluster_file as clusters
from slurm.cluster_file import Placement
from tests.conftest import TEXT_DIM, write_store
from tests.studies.benchmarks.rounds import Bench
from tests.testcluster import Cluster
from workflows.jobs.plan import locate
from workflows.jobs.scaling_model import expect, meta_model

_LINKS_MBIT_S = (None, 800, 400, 200, 100)
_ROUNDS, _SECONDS, _MOST_OFF = 3, 5, 0.15
_PER_RANK = 128
_OPTIONS = [
    "data.name=tinytext",
    "data.image_size=16",
    "data.text_encoder=toy",
    "model.conv.width=64",
]


def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="python -m tests.studies.scaling_check", description=__doc__
    )


def main() -> int:
    folder = Path(tempfile.mkdtemp())
    os.environ["CVAE_HOME"] = str(folder)
    write_store(folder, captioned=True, sizes=(512, 21))
    file = paths.PROJECT_ROOT / "configs" / "demo.yaml"
    batch = [f"training.global_batch_size={_PER_RANK * n}" for n in (1, 2)]
    one, two = (load_experiment(file, [*_OPTIONS, "training.precision=fp32", b]) for b in batch)
    cluster = Cluster()
    was_up = not cluster.up()
    place, placement, _ = locate(clusters.split(2, 2), "testcluster", dry=False)
    bench = Bench(place, folder / "jobs", _SECONDS)
    env = {"OMP_NUM_THREADS": "1"}
    alone = statistics.median(
        bench.loop(one, Placement(1, 1), 600.0, env=env)["images_per_second"]
        for _ in range(_ROUNDS)
    )
    n_parameters = meta_model(two, (1, 16, 16), TEXT_DIM).n_parameters()
    worst = 0.0
    print(f"one rank alone: {alone:.1f} images/s; gradient {4 * n_parameters / 1e6:.1f} MB\n")
    print("| link, Mb/s | measured, images/s | predicted | off by |\n|---|---|---|---|")
    try:
        for mbit_s in _LINKS_MBIT_S:
            for node in cluster.nodes:
                node.throttle_link(mbit_s)
            measured = statistics.median(
                bench.loop(two, placement, alone, env=env)["images_per_second"]
                for _ in range(_ROUNDS)
            )
            between = 1e12 if mbit_s is None else mbit_s * 1e6 / 8
            predicted = expect(placement, 2 * _PER_RANK, alone, 4 * n_parameters, 1e12, between)
            off = predicted.images_per_second / measured - 1
            worst = max(worst, abs(off))
            name = "none" if mbit_s is None else mbit_s
            print(
                f"| {name} | {measured:.1f} | {predicted.images_per_second:.1f} | {off:+.0%} |",
                flush=True,
            )
    finally:
        for node in cluster.nodes:
            node.throttle_link(None)
        if not was_up:
            cluster.down()
    return int(worst > _MOST_OFF)


if __name__ == "__main__":
    parser().parse_args()
    sys.exit(main())
