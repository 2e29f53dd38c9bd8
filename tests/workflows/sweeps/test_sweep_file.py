"""Sweep files: every mistake is reported in one line before anything starts."""

from pathlib import Path

import pytest
import yaml

from cvae.config import yaml_model
from cvae.errors import UserError
from tests.conftest import PROJECT_ROOT, tiny_experiment
from workflows.sweeps.driver import param_space, searcher
from workflows.sweeps.sweep_file import Sweep, load_sweep, with_values

GRID = {"model.latent_dim": {"grid": [2, 4]}, "seed": {"seeds": 3}}


def sweep_file(folder: Path, space: object, **keys: object) -> Path:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_experiment()))
    file = folder / "sweep.yaml"
    tree = {"name": "s", "experiment": str(folder / "tiny.yaml"), "space": space, **keys}
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def load(folder: Path, space: object, *overrides: str, **keys: object) -> object:
    return load_sweep(sweep_file(folder, space, **keys), list(overrides), folder)


@pytest.mark.parametrize(
    ("space", "keys", "message"),
    [
        (
            {"model.latent_dm": {"grid": [1]}},
            {},
            "sweep.yaml:4: space.model.latent_dm: .*latent_dim",
        ),
        ({"model.conv": {"grid": [1]}}, {}, "did you mean model.conv.width"),
        ({"model.fusion": {"grid": ["concat", "ad"]}}, {}, "'ad': should be .* did you mean add"),
        ({"model.latent_dim": {"grid": [4, -1]}}, {}, "sweep.yaml:4.*-1: should be greater than 0"),
        ({"model.latent_dim": {"grid": [4], "choice": [2]}}, {}, "give one of grid, choice"),
        ({"model.latent_dim": {}}, {}, "give one of grid, choice"),
        ({"model.latent_dim": {"seeds": 2}}, {}, "seeds is for the key seed"),
        ({"optimizer.lr": {"loguniform": [1e-2, 1e-4]}}, {}, "the first must be the smaller"),
        (
            {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
            {},
            "search.name must be random or optuna",
        ),
        ({"optimizer.lr": {"loguniform": [0, 1]}}, {"search": {"name": "random"}}, "above 0"),
        (GRID, {"search": {"name": "optuna"}}, "optuna draws, it has no grid; use choice"),
        (GRID, {"search": {"samples": 2}}, "samples is for random"),
        (GRID, {"scheduler": {"name": "pbt"}}, "needs scheduler.mutate"),
        (GRID, {"scheduler": {"name": "pbt", "mutate": ["seed"]}}, "mutate"),
        (GRID, {"schedular": {}}, "schedular.*did you mean scheduler"),
        (GRID, {"values": {"model.latent_dim": 3}}, "it is fixed among values"),
        (GRID, {"values": {"model.x": 3}}, "sweep.yaml:.*values.model.x: the experiment has no"),
        (GRID, {"values": {"model.latent_dim ": 3}}, "values.model.latent_dim : the experiment"),
        ({}, {}, "space"),
        ({"optimizer.lr": {"uniform": [True, "3"]}}, {}, "uniform.0.* = True: should be a valid"),
        ({"optimizer.lr": {"uniform": [0.1, 0.2, 0.3]}}, {}, "should have at most 2 items"),
        ({"optimizer.lr": {"uniform": 1}}, {}, "uniform = 1: should be a valid tuple"),
        ({"seed": {"seeds": 10**12}}, {}, "less than or equal to 2147483647"),
        ({"seed": {"seeds": 20_000}}, {}, "20,000 trials; a sweep has at most 10,000"),
        ({"seed": {"grid": list(range(1001))}}, {}, "at most 1000 items"),
        (GRID, {"experiment": "x" * 300}, "File name too long"),
        (GRID, {"name": "x" * 300}, "at most 200 characters"),
        (GRID, {"name": "../x"}, "should be letters, digits"),
        (GRID, {"values": {"x" * 5000: 3}}, "the experiment has no such key"),
        ({"model.latent_dim": {"grid": ["9" * 5000]}}, {}, "should be a valid integer"),
        ({"model.latent_dim": {"grid": [[[[[1]]]]]}}, {}, "should be a valid integer"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, space: object, keys: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, space, **keys)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= len(str(tmp_path)) + 400


def test_overrides_reach_the_sweep_or_the_experiment_and_pin_keys(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, {**GRID, "optimizer.lr": {"grid": [1e-3]}})
    words = ["mode=max", "training.epochs=2", "model.latent_dim=8"]
    loaded = load_sweep(file, words, tmp_path)
    assert loaded.sweep.mode == "max"
    assert loaded.experiment.training.epochs == 2
    assert loaded.experiment.model.latent_dim == 8
    assert list(loaded.sweep.space) == ["seed", "optimizer.lr"]
    assert loaded.sweep.n_trials == 3
    with pytest.raises(UserError, match=r"use launch\.py"):
        load_sweep(file, ["model.latent_dim=8", "seed=1", "optimizer.lr=1"], tmp_path)


def test_impossible_combinations_are_reported_but_not_refused(tmp_path: Path) -> None:
    space = {
        "model.backbone": {"grid": ["mlp", "conv"]},
        "model.latent": {"grid": ["vector", "spatial"]},
    }
    loaded = load_sweep(sweep_file(tmp_path, space), [], tmp_path)
    assert loaded.sweep.n_trials == 4
    assert len(loaded.impossible) == 1
    assert "'mlp', model.latent = 'spatial'" in loaded.impossible[0]
    with pytest.raises(UserError, match="needs feature maps"):
        with_values(loaded.experiment, {"model.backbone": "mlp", "model.latent": "spatial"})


def test_draws_stay_in_their_ranges_and_whole_numbers_whole(tmp_path: Path) -> None:
    space = {
        "model.latent_dim": {"uniform": [2, 4]},
        "optimizer.lr": {"loguniform": [1e-4, 1e-2]},
        "model.beta": {"uniform": [0.5, 2]},
    }
    search = {"name": "random", "samples": 5}
    loaded = load_sweep(sweep_file(tmp_path, space, search=search), [], tmp_path)
    domains = param_space(loaded.sweep, loaded.experiment)
    sizes = {domains["model.latent_dim"].sample() for _ in range(100)}
    assert sizes == {2, 3, 4}
    assert all(isinstance(size, int) for size in sizes)
    rates = [domains["optimizer.lr"].sample() for _ in range(200)]
    assert 1e-4 <= min(rates) < 1e-3 < max(rates) <= 1e-2
    for _ in range(20):
        with_values(loaded.experiment, {key: domain.sample() for key, domain in domains.items()})


def test_the_mode_is_the_metrics_better_end_unless_it_is_given(tmp_path: Path) -> None:
    def mode(**keys: object) -> str:
        return yaml_model.load(sweep_file(tmp_path, GRID, **keys), Sweep).mode

    assert mode() == mode(metric="val/loss") == mode(metric="val/kl") == "min"
    assert mode(metric="val/text_gain") == "max"
    assert mode(metric="val/text_gain", mode="min") == "min"


@pytest.mark.parametrize("file", sorted((PROJECT_ROOT / "configs/sweeps").glob("*.yaml")))
def test_the_shipped_sweeps_are_right(file: Path) -> None:
    loaded = load_sweep(file, [], PROJECT_ROOT)
    assert loaded.impossible == []
    assert loaded.sweep.n_trials >= 10
    searcher(loaded.sweep)
    param_space(loaded.sweep, loaded.experiment)


def test_a_sweep_reads_back_what_was_dumped(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, GRID), [], tmp_path).sweep
    (tmp_path / "dumped.yaml").write_text(yaml_model.dump(sweep, "x"))
    assert yaml_model.load(tmp_path / "dumped.yaml", Sweep) == sweep
