"""Whole evaluations of tiny runs, on real ranks."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cvae.config.experiment import Experiment
from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.evaluation.caption_match import caption_match
from cvae.evaluation.evaluate_run import _GROUPS, evaluate_runs
from cvae.evaluation.evaluation_input import EvaluationInput
from cvae.evaluation.latents import active_units
from cvae.evaluation.metric_groups import EvaluationRequest, fitting_groups
from cvae.files.checksums import sha256_of_file
from cvae.metrics import METRIC_GROUPS
from cvae.run.directory import RunDirectory
from cvae.sampling import sampler
from cvae.sampling.sampler import load_run
from tests.conftest import tiny_experiment
from tests.helpers.ranks import finish, lines, start_python
from tests.helpers.trained_runs import make_run, make_run_on_other_data, save_weights


def request(
    run: RunDirectory, groups: list[str] | None = None, split: str = "val"
) -> EvaluationRequest:
    labelled = run.experiment().data.name == "tiny"
    groups = fitting_groups(run.experiment(), labelled, groups, None)
    return EvaluationRequest(str(run.path), split, groups, 5, None)


def measured(run: RunDirectory) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in lines(run, "evaluation"):
        found |= line["metrics"]
    return found


def evaluate_on(world_size: int, runs: list[RunDirectory], folder: Path) -> list[dict[str, float]]:
    """All in the same processes: starting them takes longer than evaluating."""
    requests = json.dumps([asdict(request(run)) for run in runs])
    code = (
        "import json, sys; from pathlib import Path\n"
        "from cvae.evaluation.evaluate_run import _GROUPS, evaluate_runs\n"
        "evaluate_runs(json.loads(sys.argv[1]), Path(sys.argv[2]))"
    )
    output = finish(start_python(["-c", code, requests, str(folder / "progress")], world_size))
    assert all(lines(run, "evaluation") for run in runs), "\n".join(output)
    return [measured(run) for run in runs]


def test_one_and_three_ranks_find_one_number(
    tiny_store: Path, tiny_captioned_store: Path, tmp_path: Path
) -> None:
    found = []
    for world_size in (1, 3):
        runs = [make_run(f"{kind}-{world_size}", kind == "text") for kind in ("label", "text")]
        found.append(evaluate_on(world_size, runs, tmp_path))
    common = {"eval/loss", "eval/iwae_5", "eval/psnr", "eval/frechet_r64_samples"}
    own = ({"eval/linear_probe", "eval/sample_accuracy"}, {"eval/text_gain", "eval/caption_match"})
    for alone, names in zip(found[0], own, strict=True):
        assert common | names <= set(alone)
        assert all(math.isfinite(value) for value in alone.values())
    for several in found[1:]:
        for alone, together in zip(found[0], several, strict=True):
            # A gain and Fréchet's distance are differences of larger numbers.
            assert together == pytest.approx(alone, rel=2e-6, abs=1e-6)


def test_a_checkpoint_is_measured_once(tiny_store: Path, tmp_path: Path) -> None:
    run = make_run()
    requests = [asdict(request(run, ["elbo", "reconstruction"]))]
    evaluate_runs(requests, tmp_path / "progress")
    before = run.journal_file.read_bytes()
    evaluate_runs(requests, tmp_path / "progress")
    assert run.journal_file.read_bytes() == before
    evaluate_runs([asdict(request(run, ["elbo", "iwae"]))], tmp_path / "progress")
    keys = [line["key"] for line in lines(run, "evaluation")]
    assert keys == ["val/elbo", "val/reconstruction", "val/iwae-5"]
    assert {line["step"] for line in lines(run, "evaluation")} == {7}
    evaluate_runs([asdict(request(run, ["elbo"], split="train"))], tmp_path / "progress")
    assert lines(run, "evaluation")[-1]["metrics"]["eval_train/loss"] > 0


def test_a_second_inception_network_gives_its_own_distance(
    tiny_store: Path, tmp_path: Path
) -> None:
    run = make_run()

    class Brightness(torch.nn.Module):
        def __init__(self, scale: float):
            super().__init__()
            self.scale = scale

        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return images[:, :, :8].float().mean(dim=(2, 3))[:, :2] * self.scale

    file = tmp_path / "inception.pt"
    found = []
    for scale in (1.0, 3.0):
        torch.jit.script(Brightness(scale)).save(str(file))
        fid_request = replace(request(run, []), groups=["fid"], inception=str(file))
        fid_request = replace(fid_request, inception_sha256=sha256_of_file(file))
        for _ in range(2):
            evaluate_runs([asdict(fid_request)], tmp_path / "progress")
        found.append(lines(run, "evaluation")[-1]["metrics"]["eval/fid_samples"])
    assert found[1] == pytest.approx(9 * found[0], rel=1e-3)
    assert len(lines(run, "evaluation")) == 2
    file.write_bytes(b"another")
    with pytest.raises(UserError, match=r"inception\.pt: has changed since"):
        evaluate_runs(
            [asdict(replace(fid_request, iwae_samples=6, split="train"))], tmp_path / "progress"
        )


def test_another_split_is_really_another(tiny_captioned_store: Path, tmp_path: Path) -> None:
    run = make_run(captioned=True)
    trained = load_run(run, torch.device("cpu"))
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    by_split = {
        split: caption_match(trained, split).scenes.captions
        for split in (trained.data.val, trained.data.train)
    }
    assert all(text.startswith("train") for text in by_split[trained.data.train])
    subject = EvaluationInput(trained, trained.data.train, ranks, lambda images: None)
    found = _GROUPS["captions"](subject, request(run, ["captions"], "train"))
    assert found["caption_match_chance"] == 1 / 32  # val has 21 images, train 50
    labelled = Experiment.model_validate(tiny_experiment())
    assert "classifier" not in fitting_groups(labelled, True, None, None, "train")
    with pytest.raises(UserError, match="judges samples"):
        fitting_groups(labelled, True, ["classifier"], None, "train")


def test_extremes_are_the_worst_and_the_best(tiny_store: Path, tmp_path: Path) -> None:
    run = make_run()
    evaluate_runs([asdict(request(run, ["reconstruction"]))], tmp_path / "progress")
    (line,) = lines(run, "picture")
    assert (line["key"], line["path"]) == ("extremes", "pictures/extremes-00000007.png")
    assert (run.path / line["path"]).stat().st_size > 1000


def test_units_that_say_nothing_of_the_image_are_not_active(tiny_store: Path) -> None:
    trained = load_run(make_run(), torch.device("cpu"))
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    subject = EvaluationInput(trained, trained.data.train, ranks, lambda images: None)
    encode = trained.model.encode

    def with_two_active(images: torch.Tensor, condition: torch.Tensor | None):  # type: ignore[no-untyped-def]
        moments = encode(images, condition)
        mean = torch.zeros_like(moments.mean)
        # What varies, what is large and the same for all, and what varies too little.
        mean[:, 0], mean[:, 1] = images.mean((1, 2, 3)) * 100, 5.0
        mean[:, 2], mean[:, 3] = images[:, 0, 9, 4] * 9, images[:, 0, 9, 4] * 0.1
        return moments._replace(mean=mean)

    trained.model.encode = with_two_active  # type: ignore[method-assign]
    assert active_units(subject) == {"active_units": 2.0}


def test_groups_that_do_not_fit_are_refused() -> None:
    labelled = Experiment.model_validate(tiny_experiment())
    captioned = Experiment.model_validate(tiny_experiment(captioned=True))
    assert set(METRIC_GROUPS) - set(fitting_groups(labelled, True, None, None)) == {
        "fid",
        "captions",
    }
    assert "captions" in fitting_groups(captioned, False, None, None)
    assert fitting_groups(labelled, True, ["iwae", "elbo"], None) == ["elbo", "iwae"]
    for experiment, group, message in (
        (labelled, "iwea", "no group of metrics 'iwea'.*iwae"),
        (labelled, "fid", "needs a TorchScript Inception network"),
        (labelled, "captions", "draws from captions"),
        (captioned, "probe", "needs labels"),
    ):
        with pytest.raises(UserError, match=message):
            fitting_groups(experiment, experiment is labelled, [group], None)


def test_a_run_on_other_data_is_not_judged_by_these(tiny_store: Path, tmp_path: Path) -> None:
    run = make_run_on_other_data()
    with pytest.raises(UserError, match="was trained on other data"):
        evaluate_runs([asdict(request(run, ["elbo"]))], tmp_path / "progress")


@pytest.mark.parametrize("captioned", [False, True])
def test_numbers_that_are_not_finite_are_reported_as_such(
    captioned: bool,
    tiny_store: Path,
    tiny_captioned_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(captioned=captioned)
    trained = load_run(run, torch.device("cpu"))
    weights = {name: tensor * np.nan for name, tensor in trained.model.state_dict().items()}
    save_weights(run, weights, step=9)
    with pytest.raises(UserError, match="values that are not finite"):
        load_run(run, torch.device("cpu"))
    # Weights that are finite may give such numbers too.
    monkeypatch.setattr(sampler, "_misfit", lambda *_: None)
    evaluate_runs([asdict(request(run))], tmp_path / "progress")
    # A picture of NaN is black: it must not be judged as one.
    known = {name for name, value in measured(run).items() if not math.isnan(value)}
    assert known <= {"eval/linear_probe_chance"}
    assert {"eval/loss", "eval/iwae_5", "eval/frechet_r64_samples"} <= set(measured(run))
