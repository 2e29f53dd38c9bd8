from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.claims import CLAIMS, MARGIN, judge, judge_one, no_better
from analysis.intervals import MEANING, config_keys, interval
from analysis.run_folders import with_defaults


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
        "data.text_encoder": "minilm",
        "model.condition": "text",
        "model.backbone": "conv",
        "model.fusion": "concat",
        "model.likelihood": "gaussian",
        "model.beta": 1.0,
        "training.epochs": 20,
    }
    given = {name.replace("_", ".", 1): value for name, value in keys.items()}
    return with_defaults(plain | given)


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).set_index("run")


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    return judge(table(rows))["verdict"].tolist()


def pairs(n_seeds: int, key: str, values: tuple[Any, Any], effect: float) -> list[dict[str, Any]]:
    """Returns runs with the first value and with the second, whose losses are higher by about the effect."""
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
        judged = verdicts(pairs(4, "model_fusion", values, effect))
        assert judged == ["not tested", verdict, *["not tested"] * 4]
    assert verdicts(pairs(1, "model_fusion", ("concat", "add"), 5.0))[1] == "one seed"


def test_no_better_is_a_claim_about_one_side_with_a_margin() -> None:
    for effect, verdict in (
        (10.0, "supported"),
        (0.0, "supported"),
        (-MARGIN + 1, "supported"),
        (-MARGIN, "not decided"),
        (-MARGIN - 1, "contradicted"),
    ):
        assert verdicts(pairs(4, "model_backbone", ("conv", "resnet"), effect))[2] == verdict
    why = judge(table(pairs(4, "model_backbone", ("conv", "resnet"), 0.0)))["why"][2]
    assert why.startswith("equivalent: one-sided 95 % bounds")
    assert "margin ±5 nats" in why


def share(verdict: str, effect: float, n_seeds: int, repetitions: int = 400) -> float:
    """Returns how often "no better" gets a verdict if the differences of seeds vary by 4 nats."""
    generator = np.random.default_rng(n_seeds)
    drawn = generator.normal(effect, 4.0, (repetitions, n_seeds))
    judged = [no_better(interval(x, level=0.90), MARGIN)[0] for x in drawn]
    return judged.count(verdict) / repetitions


def test_a_tie_is_supported_by_seeds_enough_and_an_effect_is_not() -> None:
    assert share("supported", 0.0, 9) > 0.8
    assert share("supported", 0.0, 2) < 0.5
    assert share("supported", 0.0, 12, 100) > 0.9  # by resampling
    # At the margin the test errs in 5 % of cases, beyond it hardly ever.
    assert share("supported", -MARGIN, 5) < 0.1
    assert share("supported", -2 * MARGIN, 5) == 0
    assert share("contradicted", -2 * MARGIN, 9) > 0.8
    assert share("contradicted", -MARGIN, 5) < 0.1


def test_losses_of_different_meaning_are_never_compared() -> None:
    rows = pairs(4, "model_fusion", ("concat", "add"), 5.0)
    for row in rows[1::2]:
        row["model.likelihood"] = "bernoulli"
    assert verdicts(rows)[1] == "not comparable"


def evidence(claim: int) -> tuple[list[dict[str, Any]], set[str]]:
    """Returns runs of four seeds that decide a claim, the two systems by turns, and the keys that may differ."""
    ldm = {"model_backbone": "ldm"}
    both: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {
        0: ({"model_condition": "none"}, {"model_condition": "label"}),
        1: ({"model_fusion": "add"}, {"model_fusion": "concat"}),
        2: ({}, {"model_backbone": "resnet"}),
        3: ({}, {**ldm, "data_fraction": 0.05}),
        4: ({**ldm, "data_fraction": 0.05}, {**ldm, "data_fraction": 1.0}),
        5: ({"model_condition": "label"}, {"model_condition": "label"}),
    }
    free = {"model.condition", "model.fusion", "model.backbone", "seed"}
    free |= {"data.fraction"} if claim > 2 else set()
    free |= {"model.latent", "model.latent_dim"} if claim == 3 else set()
    rows = []
    for seed in range(4):
        for number, keys in enumerate(both[claim]):
            name = {"data_name": "fashion_mnist"} if claim in (0, 5) else {}
            row = run(f"{'ab'[number]}{seed}", seed, 400 + 9 * seed - 7 * number, **keys, **name)
            row |= {"eval/linear_probe": 0.8 - 0.3 * number + 0.01 * seed * number}
            row |= {"eval/sample_accuracy": 0.8 + 0.001 * seed}
            rows.append(row | {"eval/classifier_real_accuracy": 0.9, "data_digest": "d" * 64})
    return rows, free


@pytest.mark.parametrize("claim", range(len(CLAIMS)))
def test_runs_that_differ_in_another_key_are_not_averaged(claim: int) -> None:
    rows, free = evidence(claim)
    assert judge(table(rows))["verdict"][claim] in ("supported", "contradicted")
    whole = table(rows)
    keys = [
        key
        for key in [*config_keys(whole), "data_digest"]
        if key not in free | {"data.name"}  # which chooses the runs that a claim is about
        and key not in ("training.log_every", "training.micro_batch_size", "training.engine")
        and not key.startswith(("checkpoint.", "training.deepspeed."))
        # Each of two backbones has its own options, and those of others change nothing.
        and (key.count(".") < 2 or (claim == 4 and key.startswith("model.ldm")))
    ]
    assert len(keys) > 20
    # Changed in one of two systems, half of the seeds or one run, by turns, since each takes a while.
    for key, changed in zip(keys, cycle((range(1, 8, 2), range(4), range(7, 8))), strict=False):
        frame = whole.astype(object)
        frame[key] = ["other" if n in changed else value for n, value in enumerate(frame[key])]
        row = judge_one(CLAIMS[claim], frame)
        if row["verdict"] in ("supported", "contradicted"):
            # The runs that still have a partner in their setting are a smaller set of alike runs.
            alone = claim < 3 and (len(changed) == 1 or key in MEANING)
            assert (alone, row["seeds"]) == (True, 3 if len(changed) == 1 else 2), key
        elif row["verdict"] != "not tested":  # the run is not about the claim any more
            assert (row["verdict"], key in row["why"]) == ("not comparable", True), row


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
