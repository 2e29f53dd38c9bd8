import math

import numpy as np
import pandas as pd
import pytest

from analysis.intervals import (
    changed_keys,
    compare,
    importance,
    interval,
    paired_difference,
    summary,
)


@pytest.mark.parametrize(("n", "repetitions"), [(3, 2000), (5, 2000), (10, 300), (20, 300)])
def test_95_percent_intervals_cover_95_percent(n: int, repetitions: int) -> None:
    generator = np.random.default_rng(n)
    result = [interval(generator.normal(3.0, 2.0, n)) for _ in range(repetitions)]
    coverage = np.mean([low <= 3.0 <= high for _, low, high, _ in result])
    assert 0.92 <= coverage <= 0.98


def test_skewed_data_are_covered_by_resampling() -> None:
    generator = np.random.default_rng(0)
    result = [interval(generator.exponential(1.0, 15)) for _ in range(300)]
    assert np.mean([low <= 1.0 <= high for _, low, high, _ in result]) >= 0.9


def test_small_intervals_are_students() -> None:
    # t(0.975, 2) = 4.302653 from a table.
    result = interval([1.0, 2.0, 3.0])
    half = 4.302653 * 1 / math.sqrt(3)
    assert (result.mean, result.low, result.high) == pytest.approx(
        (2, 2 - half, 2 + half), rel=1e-6
    )
    assert not result.decided


def test_one_value_has_no_interval_and_equal_ones_no_width() -> None:
    alone = paired_difference([5.0], [3.0])
    assert alone.mean == -2
    assert math.isnan(alone.low)
    assert not alone.decided
    assert math.isnan(summary([4.0]).se)
    assert interval([2.0] * 12)[:3] == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_have_no_mean(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        summary([1.0, bad])
    with pytest.raises(ValueError, match="finite"):
        paired_difference([1.0, 2.0], [1.0, bad])


def grid(effects: dict[str, float], n_seeds: int = 4) -> pd.DataFrame:
    """Returns runs of fusions in two backbones, whose losses differ by far more than those of the fusions."""
    generator = np.random.default_rng(1)
    rows = []
    for backbone, level in (("conv", 400.0), ("ldm", 900.0)):
        for seed in range(n_seeds):
            for fusion, effect in effects.items():
                loss = level + 20 * seed + effect + generator.normal(0, 0.1)
                rows.append(
                    {
                        "status": "finished",
                        "seed": seed,
                        "model.fusion": fusion,
                        "model.backbone": backbone,
                        "training.log_every": generator.integers(100),
                        "val/loss": loss,
                    }
                )
    return pd.DataFrame(rows, index=[f"run{n}" for n in range(len(rows))])


def test_compare_finds_an_effect_among_seeds_that_differ_more() -> None:
    runs = grid({"concat": 0.0, "add": 3.0})
    result = compare(runs, "model.fusion", "val/loss")
    assert result["setting"].tolist() == [
        "mean over 2 settings",
        "model.backbone=conv",
        "model.backbone=ldm",
    ]
    assert result["difference"].to_numpy() == pytest.approx(3.0, abs=0.3)
    assert result["seeds"].tolist() == [4, 4, 4]
    assert result["verdict"].tolist() == ["higher"] * 3
    nothing = compare(grid({"concat": 0.0, "add": 0.0}), "model.fusion", "val/loss")
    assert "not decided" in nothing["verdict"].tolist()


def test_compare_leaves_out_what_failed_is_not_finite_or_has_no_partner() -> None:
    runs = grid({"concat": 0.0, "add": 3.0})
    add, conv = runs["model.fusion"] == "add", runs["model.backbone"] == "conv"
    runs.loc[add & conv & (runs["seed"] == 0), ["status", "val/loss"]] = ["failed", 1e9]
    runs.loc[add & conv & (runs["seed"] == 1), "val/loss"] = math.inf
    runs = runs[~(~add & conv & (runs["seed"] == 2))]
    result = compare(runs, "model.fusion", "val/loss").set_index("setting")
    assert result.loc["model.backbone=conv", "seeds"] == 1
    assert result.loc["model.backbone=conv", "verdict"] == "one seed"
    assert math.isnan(result.loc["model.backbone=conv", "low"])
    # The mean over settings takes the one seed that both have, and does not mix their levels.
    assert result.loc["mean over 2 settings", "seeds"] == 1
    assert result.loc["mean over 2 settings", "difference"] == pytest.approx(3.0, abs=0.3)


def test_keys_without_effect_separate_no_runs() -> None:
    assert changed_keys(grid({"concat": 0.0, "add": 3.0})) == [
        "model.fusion",
        "model.backbone",
        "seed",
    ]


def test_the_key_that_matters_is_the_important_one() -> None:
    result = importance(grid({"concat": 0.0, "add": 3.0}), "val/loss")
    assert result.idxmax() == "model.backbone"
    assert result.sum() == pytest.approx(1)
    assert importance(grid({"concat": 0.0}, n_seeds=1), "val/loss").empty
