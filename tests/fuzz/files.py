"""Experiment, cluster and sweep files, and overrides."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cvae.config import yaml_model
from cvae.config.experiment import Experiment, load_experiment
from cvae.data.store import store_path
from cvae.files.paths import PROJECT_ROOT
from cvae.run.directory import RunDirectory, telling_name
from slurm.cluster_file import ClusterConfig
from tests.fuzz import odd
from tests.fuzz.frame import Case, target
from workflows.sweeps.sweep_file import Sweep, load_sweep, with_values

# A file's name, with what we put before and behind it.
_LONGEST_FILE = 255


def _read(folder: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(file.read_text()) for file in sorted(folder.glob("*.yaml"))]


def _shipped(folder: str, cache: dict[str, list[dict[str, Any]]] = {}) -> list[dict[str, Any]]:  # noqa: B006
    if folder not in cache:
        cache[folder] = _read(PROJECT_ROOT / "configs" / folder)
    return cache[folder]


class _Made(NamedTuple):
    file: Path
    overrides: list[str]
    shown: str


def _made(draw: random.Random, folder: Path, kind: str, model: type[yaml_model.Strict]) -> _Made:
    """Writes a file that is like one of those in configs/<kind>, and makes overrides."""
    tree = yaml.safe_load(yaml.safe_dump(draw.choice(_shipped(kind))))
    keys = list(yaml_model.known_keys(model))
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        odd.mutate(draw, tree, keys)
    own = keys if model is not Sweep else [*keys, *yaml_model.leaf_keys(Experiment)]
    overrides = [
        f"{draw.choice([*own, 'x', '', '.', 'a.b.c', 'model.x', '+seed', 'k' * 300])}={odd.value(draw)}"
        for _ in range(draw.choice([0, 0, 0, 1, 2]))
    ]
    content = odd.damage(draw, odd.text_of(tree))
    file = folder / "made.yaml"
    file.write_bytes(content)
    return _Made(file, overrides, f"{content[:3000]!r} {[word[:300] for word in overrides]}")


@target("experiments")
def experiments(draw: random.Random, folder: Path) -> Case:
    file, overrides, shown = _made(draw, folder, "", Experiment)

    def read() -> None:
        experiment = load_experiment(file, overrides)
        (folder / "again.yaml").write_text(yaml_model.dump(experiment, "again"), "utf-8")
        assert load_experiment(folder / "again.yaml") == experiment, "another one after a dump"
        assert experiment.total_steps(118_287) < 2**63, "more steps than any machine counts"
        store = store_path(experiment.data.name, experiment.data.image_size)
        assert store.parent.name == "data", f"a store at {store}"
        assert len(f".{store.name}.building".encode()) <= _LONGEST_FILE, (
            "a store's name is too long"
        )
        name = telling_name(experiment.name, dict(word.partition("=")[::2] for word in overrides))
        run = RunDirectory.create(name, experiment, folder)
        assert run.experiment() == experiment, "another one in the run's folder"

    return Case(shown, read)


@target("models")
def models(draw: random.Random, folder: Path) -> Case:
    """Sizes at the schema's limits: no model overflows, or takes long to describe."""
    import torch
    from diffusers import AutoencoderKL  # noqa: F401  # seconds, which are not the case's

    from cvae.models.cvae import Cvae

    limits = {
        "data.image_size": (16, 4096, 8192),
        "model.latent_dim": (1, 2**20),
        "model.mlp.hidden_dim": (1, 2**20),
        "model.conv.width": (1, 64, 2**16),
        "model.resnet.width": (1, 64, 2**16),
        "model.resnet.blocks": (1, 32),
        "model.ldm.layers_per_block": (1, 32),
        "model.ldm.block_out_channels": (
            "[32]",
            f"[{', '.join(['65536'] * 8)}]",
            "[128, 256, 512, 512]",
        ),
        "model.fusion": ("concat", "add", "film"),
        "model.latent": ("vector", "spatial"),
        "model.prior": ("standard", "text"),
        "model.backbone": ("mlp", "conv", "resnet", "ldm"),
    }
    overrides = [f"{key}={draw.choice(values)}" for key, values in limits.items()]

    def read() -> None:
        _build(load_experiment(PROJECT_ROOT / "configs" / "coco_baseline.yaml", overrides))

    def _build(experiment: Experiment) -> None:
        size = experiment.data.image_size
        with torch.device("meta"):
            model = Cvae(experiment.model, (3, size, size), 768)
        assert model.n_parameters() > 0, "a model without weights"

    return Case(str(overrides), read)


@target("clusters")
def clusters(draw: random.Random, folder: Path) -> Case:
    file, _, shown = _made(draw, folder, "clusters", ClusterConfig)

    def read() -> None:
        config = yaml_model.load(file, ClusterConfig)
        words = (config.partition, config.account, config.qos, config.constraint, config.gpu_type)
        for word in (*words, config.slurm_conf):
            assert word is None or (word.isprintable() and not word.startswith("-")), f"{word!r}"
        for name, text in config.env.items():
            assert name.isidentifier(), f"an environment variable {name!r}"
            assert "\0" not in text, "a NUL in the environment"

    return Case(shown, read)


@target("sweeps")
def sweeps(draw: random.Random, folder: Path) -> Case:
    file, overrides, shown = _made(draw, folder, "sweeps", Sweep)

    def read() -> None:
        loaded = load_sweep(file, overrides, PROJECT_ROOT)
        assert loaded.sweep.n_trials < 1_000_000, "more trials than anybody runs"
        first = {
            key: space.examples()[0]
            for key, space in loaded.sweep.space.items()
            if space.examples() and not loaded.impossible
        }
        with_values(loaded.experiment, first)

    return Case(shown, read)
