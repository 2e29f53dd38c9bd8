"""A run is a function of (experiment, seed): not of ranks, accumulation, kills or signals."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvae.distributed import precision
from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.run import checkpoint
from cvae.run.directory import RunDirectory
from cvae.training import train as training
from cvae.training.optimization import update_average
from cvae.training.train import TrainingResult, train
from tests.conftest import PROJECT_ROOT, tiny_experiment, write_store
from tests.helpers import ranks


@pytest.fixture(autouse=True)
def default_signals() -> object:
    """train() takes SIGTERM for itself; give it back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def alone(name: str, plain: dict[str, object]) -> RunDirectory:
    run = ranks.new_run(name, plain)
    assert train(run.path, mirrored=False).status == "finished"
    return run


def assert_same_curve(one: RunDirectory, other: RunDirectory) -> None:
    np.testing.assert_allclose(ranks.losses(one), ranks.losses(other), rtol=1e-4)
    for a, b in zip(ranks.lines(one, "epoch"), ranks.lines(other, "epoch"), strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-4)


def with_every_option(plain: dict[str, Any]) -> dict[str, Any]:
    """What carries state of its own, or weighs the loss by the step, in one captioned experiment."""
    model = {
        "fusion": "film",
        "prior": "text",
        "likelihood": "optimal_gaussian",
        "beta_warmup_steps": 7,
        "free_bits": 0.05,
        "standardize_condition": True,
    }
    return {
        **plain,
        "data": {**plain["data"], "fraction": 0.6},
        "model": {**plain["model"], **model},
    }


@pytest.mark.usefixtures("tiny_store", "tiny_captioned_store")
def test_ranks_and_accumulation_follow_one_curve() -> None:
    """Ten images over three ranks: uneven shares, and one of them is cut in two."""
    kinds = {
        "labels": tiny_experiment(),
        "captions": tiny_experiment(captioned=True),
        "every-option": with_every_option(tiny_experiment(captioned=True)),
    }
    halves = {"micro_batch_size": 3}
    accumulated = {
        kind: {**plain, "training": {**plain["training"], **halves}}
        for kind, plain in kinds.items()
    }
    threes = {kind: ranks.new_run(f"three-{kind}", plain) for kind, plain in accumulated.items()}
    first, *others = threes.values()
    ranks.train(first, 3, *others)
    for kind, plain in kinds.items():
        one = alone(f"one-{kind}", plain)
        assert ranks.steps(one) == list(range(1, 13 if kind == "every-option" else 21))
        assert [line["epoch"] for line in ranks.lines(one, "epoch")] == [1, 2, 3, 4]
        assert_same_curve(one, alone(f"accumulated-{kind}", accumulated[kind]))
        assert ranks.lines(threes[kind], "start")[0]["world_size"] == 3
        assert_same_curve(one, threes[kind])


def test_learning_happens(tiny_store: Path) -> None:
    run = alone("learns", tiny_experiment(epochs=40))
    val = [line["metrics"]["val/loss"] for line in ranks.lines(run, "epoch")]
    assert val[-1] < 0.8 * val[0]
    saved = [line for line in ranks.lines(run, "checkpoint") if line["best"]]
    assert saved[-1]["step"] == 5 * (1 + int(np.argmin(val)))


@pytest.mark.parametrize(("world_size", "moments", "steps"), [(1, [60, 160], 300), (3, [60], 200)])
def test_killed_and_resumed_is_bit_identical(
    home: Path, world_size: int, moments: list[int], steps: int
) -> None:
    captioned = world_size == 1
    write_store(home, captioned)
    plain = tiny_experiment(captioned, epochs=1000, eval_every=20, ema_decay=0.9)
    plain["training"]["max_steps"] = steps
    plain["checkpoint"] = {"every_steps": 20}
    if captioned:
        plain = with_every_option(plain)
        plain["model"]["backbone"] = "mlp"
    killed, undisturbed = (ranks.new_run(name, plain) for name in ("killed", "undisturbed"))
    for moment in moments:
        processes = ranks.start(killed, world_size)
        ranks.wait_for_step(killed, moment)
        for process in processes:
            process.kill()
        ranks.finish(processes)
        assert not ranks.lines(killed, "end")
    if world_size == 1:
        for run in (killed, undisturbed):
            train(run.path, mirrored=False)
    else:
        ranks.train(killed, world_size, undisturbed)
    resumed_at = [line["step"] for line in ranks.lines(killed, "start")][1:]
    assert all(at >= moment - 40 for at, moment in zip(resumed_at, moments, strict=True))
    assert ranks.weights(killed) == ranks.weights(undisturbed)
    assert ranks.steps(killed) == ranks.steps(undisturbed) == list(range(1, steps + 1))
    assert ranks.losses(killed) == ranks.losses(undisturbed)


def test_a_signal_to_one_rank_stops_and_saves_all(tiny_store: Path) -> None:
    plain = tiny_experiment(epochs=120, eval_every=1000)
    undisturbed = alone("undisturbed", plain)
    run = ranks.new_run("signalled", plain)
    processes = ranks.start(run, 2)
    ranks.wait_for_step(run, 20)
    processes[1].send_signal(signal.SIGTERM)
    outputs = ranks.finish(processes)
    end = ranks.lines(run, "end")[-1]
    assert end["status"] == "stopped"
    assert "SIGTERM" in end["reason"]
    assert all(f"step={end['step']}" in text for text in outputs)
    assert ranks.lines(run, "checkpoint")[-1]["step"] == end["step"] < 600
    assert train(run.path, mirrored=False).status == "finished"  # now on one rank
    assert ranks.lines(run, "start")[-1]["step"] == end["step"]
    assert_same_curve(undisturbed, run)


def test_nan_stops_all_ranks_and_names_the_step(tiny_store: Path) -> None:
    """So does a batch without an image for some of them."""
    plain = {**tiny_experiment(epochs=40, log_every=7), "optimizer": {"lr": 1e30}}
    run = ranks.new_run("nan", plain)
    crowded = ranks.new_run("crowded", tiny_experiment(global_batch_size=1))
    outputs = ranks.train(run, 2, crowded)
    assert all("leaves some of 2 ranks without an image" in text for text in outputs)
    assert "Traceback" not in "".join(outputs)
    outcome = ranks.lines(run, "end")[-1]
    assert outcome["status"] == "failed"
    assert f"not finite at step {outcome['step']}" in outcome["reason"]
    assert all("status='failed'" in text for text in outputs)
    # The step is the first one, whichever was the last to be logged.
    assert 1 < outcome["step"] <= 14
    finite = [step for step in ranks.lines(run, "step") if step["step"] < outcome["step"]]
    assert all(np.isfinite(line["metrics"]["train/loss"]) for line in finite)


def test_the_last_good_checkpoint_survives_nan(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_experiment(epochs=4)
    rate = training.learning_rate
    monkeypatch.setattr(
        training,
        "learning_rate",
        lambda o, step, n: float("nan") if step == 11 else rate(o, step, n),
    )
    run = ranks.new_run("late", plain)
    outcome = train(run.path, mirrored=False)
    assert outcome.status == "failed"
    assert (
        outcome.step == 13
    )  # the update of step 12 spoilt the weights, the loss of step 13 shows it
    assert "last good checkpoint is step-00000010" in outcome.reason
    monkeypatch.undo()
    monkeypatch.setenv("CVAE_HOME", str(run.path.parent.parent))
    assert train(run.path, mirrored=False) == TrainingResult("finished", 20, "")
    assert_same_curve(alone("undisturbed", plain), run)


def test_an_update_that_spoils_the_weights_is_not_saved(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is due at the very step whose update no loss has shown yet."""
    rate = training.learning_rate
    monkeypatch.setattr(
        training,
        "learning_rate",
        lambda o, step, n: float("nan") if step == 11 else rate(o, step, n),
    )
    run = ranks.new_run("spoilt", {**tiny_experiment(), "checkpoint": {"every_steps": 6}})
    outcome = train(run.path, mirrored=False)
    assert outcome.status == "failed"
    assert "not finite after step 12; the last good checkpoint is step-00000010" in outcome.reason
    assert ranks.lines(run, "checkpoint")[-1]["step"] == 10


def test_fp16_that_overflows_at_every_scale_ends_the_run(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed it ends at the same step, although each stretch alone had skipped fewer updates."""
    # A CPU can do fp16, slowly.
    monkeypatch.setattr(precision, "resolve", lambda wanted, device: wanted)
    plain = tiny_experiment(epochs=100, eval_every=100, log_every=7, precision="fp16")
    plain["model"]["beta"] = 1e30
    plain["checkpoint"] = {"every_steps": 20}
    run = ranks.new_run("overflows", plain)
    for _ in range(2):
        outcome = train(run.path, mirrored=False)
        assert (outcome.status, outcome.step) == ("failed", 50)
        reason = "50 updates in a row were skipped up to step 50; the last good checkpoint is step-00000040"
        assert reason in outcome.reason
        assert [line["step"] for line in ranks.lines(run, "checkpoint")] == [20, 40]
    metrics = [line["metrics"] for line in ranks.lines(run, "step")]
    assert len(metrics) == 1 + 49 // 7
    assert not any("train/grad_norm" in line for line in metrics)
    assert all(np.isfinite(list(line.values())).all() for line in metrics)


def test_a_second_trainer_is_refused(tiny_store: Path) -> None:
    run = ranks.new_run("busy", tiny_experiment(epochs=1200))
    first = ranks.start(run, 1)
    ranks.wait_for_step(run, 3)
    written = len(ranks.lines(run, "start"))
    with pytest.raises(UserError, match="is being trained or evaluated by another process already"):
        train(run.path, mirrored=False)
    assert len(ranks.lines(run, "start")) == written
    assert not ranks.lines(run, "end")
    for process in first:
        process.kill()
    ranks.finish(first)


def test_a_damaged_checkpoint_falls_back_with_a_warning(tiny_store: Path) -> None:
    plain = tiny_experiment()
    undisturbed = alone("undisturbed", plain)
    run = ranks.new_run("damaged", {**plain, "training": {**plain["training"], "max_steps": 15}})  # type: ignore[dict-item]
    train(run.path, mirrored=False)
    run.experiment_file.write_text(undisturbed.experiment_file.read_text())
    newest = run.checkpoints / "step-00000015" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert train(run.path, mirrored=False).status == "finished"
    assert "step-00000015 is damaged" in ranks.lines(run, "notice")[0]["message"]
    assert ranks.lines(run, "start")[-1]["step"] == 10
    assert ranks.weights(run) == ranks.weights(undisturbed)


def test_other_data_are_refused_on_resume(home: Path) -> None:
    store = write_store(home, captioned=False)
    run = ranks.new_run("moved", tiny_experiment(max_steps=5))
    train(run.path, mirrored=False)
    manifest = store / "manifest.json"
    digest = ranks.lines(run, "start")[0]["data_digest"]
    assert digest
    images = store / "train" / "images.npy"
    before = sha256_of_file(images)
    np.save(images, 255 - np.load(images))
    manifest.write_text(manifest.read_text().replace(before, sha256_of_file(images)))
    with pytest.raises(UserError, match="was trained on other data"):
        train(run.path, mirrored=False)
    end = ranks.lines(run, "end")[-1]
    assert end["status"] == "failed"
    assert end["reason"].startswith("moved was trained on other data")


def test_ema_is_the_average_of_the_weights(tiny_store: Path) -> None:
    """One step: ema = decay · initial + (1 − decay) · new."""
    from safetensors.torch import load_file

    from cvae.models.cvae import build_model

    run = alone("ema", tiny_experiment(max_steps=1, ema_decay=0.75))
    initial = build_model(run.experiment().model, (1, 16, 16), 3, 0).state_dict()
    folder = run.checkpoints / "step-00000001"
    new, ema = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    for name, value in ema.items():
        torch.testing.assert_close(value, 0.75 * initial[name] + 0.25 * new[name])


def test_ema_remembers_no_step() -> None:
    """With autograd's record of every update it would take more memory from step to step."""
    average = torch.nn.Linear(2, 2).requires_grad_(False)
    update_average(average, torch.nn.Linear(2, 2), 0.75)
    assert all(weight.grad_fn is None for weight in average.parameters())


def _best(run: RunDirectory) -> int:
    return int((run.checkpoints / "best").readlink().name.removeprefix("step-"))


def test_a_best_checkpoint_that_was_not_written_does_not_count(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the losses 5, 1, 3, 4 the disk was full at 1: the best that there is has 3."""
    losses, write = iter([5.0, 1.0, 3.0, 4.0]), checkpoint.save

    def save(folder: Path, what: checkpoint.TrainingState, keep: int, best: bool) -> Path:
        if what.state["step"] == 10:
            raise OSError(28, "No space left on device")
        return write(folder, what, keep, best)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(training, "evaluate_elbo", lambda *_: {"loss": next(losses)})
    run = alone("full", tiny_experiment())
    assert _best(run) == 15
    state = checkpoint.load_newest(run.checkpoints, pytest.fail)
    assert state is not None
    assert state.state["best_val_loss"] == 3.0


def test_pictures_that_cannot_be_written_cost_no_run(tiny_store: Path) -> None:
    run = ranks.new_run("pictures", tiny_experiment())
    run.pictures.rmdir()
    run.pictures.write_text("a file, in which even root can write no file")
    assert train(run.path, mirrored=False) == TrainingResult("finished", 20, "")
    messages = [line["message"] for line in ranks.lines(run, "notice")]
    assert any("could not be written" in message for message in messages)
    assert "could not be drawn" in messages[-1]


def test_a_run_that_can_never_save_ends_with_one_line(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is bad input, which is not tried again: another attempt would begin at step 0."""

    def save(*arguments: object) -> Path:
        raise OSError(27, "File too large")

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(UserError, match=r"no checkpoint could be written .*File too large"):
        alone("limited", tiny_experiment())


def test_no_step_waits_for_a_vote_of_its_own(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether to stop is asked before a step and answered after it; at the end no question is open."""
    order: list[str] = []
    note = training.Meter.note

    def ask(self: Ranks, flag: bool) -> Callable[[], bool]:
        order.append("asked")

        def answer() -> bool:
            order.append("answered")
            return flag

        return answer

    def noted(self: training.Meter, step: int, sums: torch.Tensor) -> None:
        order.append("step")
        note(self, step, sums)

    monkeypatch.setattr(Ranks, "ask_any", ask)
    monkeypatch.setattr(training.Meter, "note", noted)
    alone("votes", tiny_experiment(epochs=1))
    first = order.index("step") - 1
    assert order[first : first + 15] == ["asked", "step", "answered"] * 5
    assert order.count("asked") == order.count("answered")


def test_a_run_of_an_older_version_goes_on(tiny_store: Path, home: Path) -> None:
    """Two ranks of commit 0e448e0 trained six steps; one rank of that commit went on to step 9 like this."""
    run = RunDirectory(home / "runs" / "old")
    shutil.copytree(PROJECT_ROOT / "tests" / "data" / "run_of_two_ranks", run.path)
    text = run.experiment_file.read_text()
    run.experiment_file.write_text(text.replace("max_steps: 6\n", "max_steps: 9\n"))
    assert train(run.path, mirrored=False).status == "finished"
    losses = [178.82058715820312, 178.45895385742188, 178.5535125732422]
    assert ranks.losses(run)[6:] == pytest.approx(losses, rel=1e-6)
    evaluated = ranks.lines(run, "epoch")[-1]
    assert evaluated["step"] == 9
    assert evaluated["metrics"]["val/loss"] == pytest.approx(
        179.03402095040684, rel=1e-6
    )  # averaged weights
