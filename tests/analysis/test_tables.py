import json
import math
import shutil
from pathlib import Path

import pytest

import analysis
from cvae.errors import UserError
from cvae.files.paths import sweeps_dir
from cvae.run.journal import Journal
from tests.conftest import tiny_experiment
from tests.helpers.ranks import new_run
from tests.helpers.trained_runs import make_journal


def test_a_row_says_what_a_run_was_and_how_it_went(home: Path) -> None:
    run = make_journal("one", [9.0, 7.0, 8.0])
    journal = Journal(run.journal_file)
    for step, value in ((10, 1.0), (20, 2.0)):
        journal.append("evaluation", step=step, key="val/iwae-64", metrics={"eval/iwae_64": value})
    journal.close()
    row = analysis.runs("tiny").loc["one"]
    assert (row["status"], row["best_step"], row["val/loss"], row["val/kl"]) == (
        "finished",
        20,
        7.0,
        5.0,
    )
    assert (row["step"], row["train/loss"], row["eval/iwae_64"]) == (30, 9.0, 2.0)
    assert (row["model.latent_dim"], row["model.mlp.hidden_dim"], row["seed"]) == (4, 32, 0)
    assert (row["world_size"], row["hosts"], row["epoch"]) == (2, 2, 6.0)
    assert row["train_images"] == 30 * 10 / 6
    assert row["gpu_hours"] == pytest.approx(row["seconds"] * 2 / 3600)
    assert row["packages"] == {"torch": "2.13.0"}


def test_pauses_do_not_count(home: Path) -> None:
    run = make_journal("one", [9.0], status="stopped")
    lines = [json.loads(line) for line in run.journal_file.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["time"] = 1000.0 + number
    again = [{**line, "time": line["time"] + 3600} for line in lines]
    again[-1]["status"] = "finished"
    run.journal_file.write_text("".join(json.dumps(line) + "\n" for line in lines + again))
    row = analysis.runs(names=["one"]).iloc[0]
    assert row["seconds"] == 2 * (len(lines) - 1)
    assert row["status"] == "finished"


def test_runs_that_failed_or_go_on_are_rows_like_all_others(home: Path) -> None:
    make_journal("good", [5.0])
    make_journal("failed", [math.nan], status="failed")
    make_journal("going", [6.0], status=None)
    make_journal("nothing", [], status=None)
    new_run("unbegun", tiny_experiment())
    frame = analysis.runs("tiny")
    assert frame["status"].to_dict() == {
        "good": "finished",
        "failed": "failed",
        "going": "unfinished",
        "nothing": "unfinished",
        "unbegun": "unfinished",
    }
    assert frame.loc["failed", "reason"] == "<b>no</b>"
    assert math.isnan(frame.loc["failed", "val/loss"])


def test_curves_are_tidy_whatever_a_journal_went_through(home: Path) -> None:
    make_journal("good", [5.0, 4.0])
    # JSON has no nan: the journal writes text, and the quick way of reading must not trip over it.
    make_journal("odd", [math.inf, math.nan])
    damaged = make_journal("damaged", [5.0])
    with open(damaged.journal_file, "a") as file:
        file.write('{"kind": "step", "st\n{"half a li')
    frame = analysis.curves(analysis.runs("tiny"), ["val/loss", "train/loss"])
    assert list(frame.columns) == ["run", "metric", "step", "epoch", "time", "value"]
    good = frame[(frame["run"] == "good") & (frame["metric"] == "val/loss")]
    assert good[["step", "epoch", "value"]].to_numpy().tolist() == [[10, 2, 5], [20, 4, 4]]
    odd = frame[(frame["run"] == "odd") & (frame["metric"] == "val/loss")]["value"].tolist()
    assert odd[0] == math.inf
    assert math.isnan(odd[1])
    assert len(frame[frame["run"] == "damaged"]) == 3
    assert len(analysis.curves(analysis.runs("tiny"))) == 12 + 12 + 6


def test_the_cache_is_of_the_journal_as_it_is(home: Path) -> None:
    run = make_journal("one", [5.0], status=None)
    frame = analysis.runs("tiny")
    first = analysis.curves(frame)
    (file,) = (home / ".analysis").iterdir()
    stamp = file.stat().st_mtime_ns
    assert analysis.curves(frame).equals(first)
    assert file.stat().st_mtime_ns == stamp
    journal = Journal(run.journal_file)
    journal.append("step", step=99, metrics={"train/loss": 1.0})
    journal.close()
    assert len(analysis.curves(frame)) == len(first) + 1
    file.write_bytes(b"damaged")
    assert len(analysis.curves(frame)) == len(first) + 1
    shutil.rmtree(home / ".analysis")
    (home / ".analysis").write_text("in the way")
    assert len(analysis.curves(frame)) == len(first) + 1


def test_the_trials_of_a_sweep(home: Path) -> None:
    make_journal("a", [5.0])
    make_journal("b", [4.0], status="stopped")
    make_journal("other", [1.0])
    folder = sweeps_dir() / "grid"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text("")
    trials = [("a", "finished"), ("b", "stopped early"), ("c", "queued")]
    entries = [{"index": n, "run": run, "status": status} for n, (run, status) in enumerate(trials)]
    (folder / "trials.json").write_text(json.dumps(entries))
    frame = analysis.runs(sweep="grid")
    assert frame["trial"].to_dict() == {"a": 0, "b": 1, "c": 2}
    assert frame["status"].tolist() == ["finished", "stopped", "unfinished"]
    assert frame.loc["b", "reason"] == "stopped early by the sweep"
    assert analysis.runs(sweep="latest").index.tolist() == ["a", "b", "c"]


def test_unknown_names_offer_the_nearest(home: Path) -> None:
    make_journal("baseline", [5.0])
    for arguments, message in (
        ({"experiment": "tyny"}, "no run of such an experiment in .*did you mean tiny"),
        ({"names": ["baselin"]}, "no such run in .*did you mean baseline"),
        ({"sweep": "grid"}, "grid: no such sweep"),
        ({}, "which runs"),
    ):
        with pytest.raises(UserError, match=message):
            analysis.runs(**arguments)  # type: ignore[arg-type]


def test_an_unknown_metric_or_key_offers_the_nearest(home: Path) -> None:
    make_journal("one", [5.0, 4.0])
    make_journal("two", [5.0, 4.0])
    frame = analysis.runs("tiny")
    for call, message in (
        (lambda: analysis.curves(frame, ["val/los"]), r"val/los: none .* did you mean val/loss"),
        (lambda: analysis.curves(frame, ["val/loss", "zzz"]), r"zzz: none .* they have train/kl"),
        (lambda: analysis.compare(frame, "model.fusoin", "val/loss"), "did you mean model.fusion"),
        (lambda: analysis.compare(frame, "model.fusion", "val/los"), "did you mean val/loss"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert "verdict" in analysis.compare(frame, "model.fusion", "val/loss").columns
    # A run that has measured nothing yet knows no name.
    new_run("new", tiny_experiment())
    assert analysis.curves(analysis.runs(names=["new"]), ["val/loss"]).empty


def test_a_key_that_an_older_version_did_not_know_had_its_default(home: Path) -> None:
    old, new = make_journal("old", [5.0]), make_journal("new", [4.0])
    lines = old.experiment_file.read_text().splitlines(keepends=True)
    old.experiment_file.write_text("".join(line for line in lines if "compile:" not in line))
    frame = analysis.runs("tiny")
    assert frame["training.compile"].tolist() == [False, False]
    assert analysis.changed_keys(frame) == []
    # Null is a value like any other.
    text = new.experiment_file.read_text()
    new.experiment_file.write_text(text.replace("max_steps: null", "max_steps: 7"))
    assert analysis.changed_keys(analysis.runs("tiny")) == ["training.max_steps"]
