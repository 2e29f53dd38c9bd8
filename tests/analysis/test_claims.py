from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.claims import judge


def run(name: str, seed: int, loss: float, **keys: Any) -> dict[str, Any]:
    plain = {
        "run": name,
        "status": "finished",
        "step": 100,
        "train_images": 50,
        "seed": seed,
        "val/loss": loss,
        "data.name": "coco",
        "data.image_size": 64,
        "data.fraction": 0.3,
        "data.val": "val",
        "model.condition": "text",
        "model.backbone": "conv",
        "model.fusion": "concat",
        "model.likelihood": "gaussian",
        "model.beta": 1.0,
        "training.epochs": 20,
    }
    return plain | {name.replace("_", ".", 1): value for name, value in keys.items()}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return judge(pd.DataFrame(rows).set_index("run"))["verdict"].tolist()


def pairs(n_seeds: int, key: str, values: tuple[Any, Any], effect: float) -> list[dict[str, Any]]:
    """Runs with the first value, and with the second, whose loss is higher by about the effect."""
    noise = np.random.default_rng(0).normal(0, 0.1, n_seeds)
    rows = []
    for seed in range(n_seeds):
        base = 400 + 10 * seed
        rows.append(run(f"a{seed}", seed, base, **{key: values[0]}))
        rows.append(run(f"b{seed}", seed, base + effect + noise[seed], **{key: values[1]}))
    return rows


def test_each_way_that_a_comparison_can_end() -> None:
    for values, effect, verdict in (
        (("concat", "add"), 5.0, "supported"),
        (("add", "concat"), 5.0, "contradicted"),
        (("concat", "add"), 0.0, "not decided"),
    ):
        found = verdicts(pairs(4, "model_fusion", values, effect))
        assert found == ["not tested", verdict, *["not tested"] * 4]
    assert verdicts(pairs(1, "model_fusion", ("concat", "add"), 5.0))[1] == "one seed"


def test_no_better_is_a_claim_about_one_side() -> None:
    for effect, verdict in ((5.0, "supported"), (0.0, "not decided"), (-5.0, "contradicted")):
        assert verdicts(pairs(4, "model_backbone", ("conv", "resnet"), effect))[2] == verdict


def test_losses_of_different_meaning_are_never_compared() -> None:
    rows = pairs(4, "model_fusion", ("concat", "add"), 5.0)
    for row in rows[1::2]:
        row["model.likelihood"] = "bernoulli"
    assert verdicts(rows)[1] == "not tested"


def test_failed_and_infinite_runs_decide_nothing() -> None:
    rows = pairs(4, "model_fusion", ("concat", "add"), 5.0)
    for row in rows[1::2]:
        row["status"] = "failed"
    assert verdicts(rows)[1] == "not tested"
    for row in rows[1::2]:
        row |= {"status": "finished", "val/loss": float("inf")}
    assert verdicts(rows)[1] == "not tested"


def test_the_small_ldm_and_more_data() -> None:
    rows = []
    for seed in range(3):
        rows.append(run(f"conv{seed}", seed, 400 + seed))
        small = {"model_backbone": "ldm", "data_fraction": 0.05}
        rows.append(run(f"small{seed}", seed, 420 + 1.1 * seed, **small))
        large = {"model_backbone": "ldm", "data_fraction": 1.0}
        rows.append(run(f"large{seed}", seed, 380 + 1.2 * seed, **large))
    assert verdicts(rows)[3:5] == ["supported", "supported"]


def test_fashion_mnist() -> None:
    rows = []
    for seed in range(5):
        for condition, probe in (("label", 0.4), ("none", 0.8)):
            row = run(f"{condition}{seed}", seed, 237.0, data_name="fashion_mnist")
            row |= {
                "model.condition": condition,
                "eval/linear_probe": probe + 0.01 * seed * (probe > 0.5),
            }
            row |= {
                "eval/sample_accuracy": 0.8 + 0.001 * seed,
                "eval/classifier_real_accuracy": 0.91,
            }
            rows.append(row)
    frame = judge(pd.DataFrame(rows).set_index("run"))
    assert frame["verdict"].tolist()[0] == "supported"
    assert frame["verdict"].tolist()[5] == "supported"
    assert frame["effect"][5] == pytest.approx(0.702)
    assert "80.2 % of samples, 91.0 % of real images" in frame["why"][5]
    assert "50 training images" in frame["setting"][0]
