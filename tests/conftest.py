"""What tests of every folder share: a home of their own, and a tiny prepared store in it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.stores import write_manifest

# Tiny models gain nothing from a second thread, and on a busy machine the threads' barriers, which spin, make
# them twenty times slower. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# They start ranks, jobs, sweeps or servers. They come first: what takes long begins early, so that no worker is
# left with it at the end.
_INTEGRATION = (
    "tests/test_gpu_check.py",
    "tests/cvae/training/test_engines.py",
    "tests/cvae/training/test_train.py",
    "tests/workflows/sweeps/test_killed_sweep.py",
    "tests/workflows/test_launch.py",
    "tests/workflows/sweeps/test_sweep.py",
    "tests/studies/test_benchmark.py",
    "tests/cvae/tracking/test_mlflow_mirror.py",
    "tests/cvae/tracking/test_mlflow_server.py",
    "tests/cvae/training/test_compile.py",
    "tests/cvae/evaluation/test_evaluate_run.py",
    "tests/cvae/preparation/test_coco_parts.py",
    "tests/workflows/jobs/test_prepare_job.py",
    "tests/cvae/test_metrics.py",
    "tests/test_fuzz.py",
    "tests/workflows/test_code_snapshot.py",
    "tests/slurm/test_local_jobs.py",
    "tests/workflows/test_evaluate.py",
    "tests/cvae/distributed/test_watchdog.py",
    "tests/analysis/test_mlflow_runs.py",
)

PROJECT_ROOT = Path(__file__).resolve().parent.parent
TEXT_DIM = 12


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return _INTEGRATION.index(file) if file in _INTEGRATION else len(_INTEGRATION)

    items.sort(key=place)
    for item in items:
        if place(item) < len(_INTEGRATION):
            item.add_marker(pytest.mark.integration)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $CVAE_HOME: nothing that a test makes lands in the project."""
    monkeypatch.setenv("CVAE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def tiny_store(home: Path) -> Path:
    """data/tiny-16: grey 16×16 squares of three classes, 50 for training and 21 for evaluation."""
    return write_store(home, captioned=False)


@pytest.fixture
def tiny_captioned_store(home: Path) -> Path:
    """data/tinytext-16: the same with captions, one to three an image, encoded by "toy"."""
    return write_store(home, captioned=True)


def write_store(home: Path, captioned: bool, sizes: tuple[int, int] = (50, 21)) -> Path:
    generator = np.random.default_rng(7)
    root = home / "data" / ("tinytext-16" if captioned else "tiny-16")
    counts = {}
    for name, count in zip(("train", "val"), sizes, strict=True):
        folder = root / name
        folder.mkdir(parents=True)
        labels = generator.integers(0, 3, count)
        images = generator.integers(0, 40, (count, 1, 16, 16)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[0, 4 * label : 4 * label + 5, 3:9] += 190
        np.save(folder / "images.npy", images)
        np.save(folder / "ids.npy", np.arange(count))
        captions = 0
        if captioned:
            offsets = np.concatenate([[0], np.cumsum(generator.integers(1, 4, count))])
            captions = int(offsets[-1])
            np.save(folder / "caption_offsets.npy", offsets)
            texts = [f"{name} caption {n}" for n in range(captions)]
            (folder / "captions.json").write_text(json.dumps(texts))
            (folder / "text").mkdir()
            embeddings = generator.standard_normal((captions, TEXT_DIM)).astype(np.float32)
            np.save(folder / "text" / "toy.npy", embeddings)
        else:
            np.save(folder / "labels.npy", labels)
        counts[name] = (count, captions)
    classes = None if captioned else ["low", "middle", "high"]
    write_manifest(root, (1, 16), counts, classes, TEXT_DIM if captioned else None)
    return root


def tiny_experiment(captioned: bool = False, **training: object) -> dict[str, Any]:
    """The plain data of an experiment on the tiny store; training: keys of that block."""
    return {
        "name": "tiny",
        "data": {
            "name": "tinytext" if captioned else "tiny",
            "image_size": 16,
            "text_encoder": "toy" if captioned else None,
        },
        "model": {
            "backbone": "conv" if captioned else "mlp",
            "condition": "text" if captioned else "label",
            "latent_dim": 4,
            "likelihood": "gaussian" if captioned else "bernoulli",
            "mlp": {"hidden_dim": 32},
            "conv": {"width": 4},
        },
        "optimizer": {"lr": 1e-3},
        "training": {"epochs": 4, "global_batch_size": 10, "log_every": 1, **training},
    }
