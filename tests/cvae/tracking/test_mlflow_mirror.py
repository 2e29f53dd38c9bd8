"""The mirror against the real MLflow with an SQLite file; test_mlflow_server.py has it with a server."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from analysis import mlflow_runs
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.journal import Journal
from cvae.tracking import mlflow_mirror, mlflow_state
from cvae.tracking.mlflow_mirror import behind, last_log_line, start_mirror, sync

mlflow_mirror.prepare_mlflow()

from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from cvae.tracking.mlflow_push import Pusher  # noqa: E402
from cvae.tracking.mlflow_store import NOTE  # noqa: E402
from tests.helpers.mlflow_runs import COMMAND, START, Run, each_once, images, points  # noqa: E402
from tests.helpers.waiting import until  # noqa: E402
from workflows.jobs.run_facts import open_mlflow  # noqa: E402


@pytest.fixture(scope="module")
def two_at_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Run]]:
    """Two runs mirrored at the same time into an SQLite file that was not there before."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CVAE_HOME", str(home))
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        runs = Run(home, "first"), Run(home, "second")
        mirrors = [start_mirror(run.path) for run in runs]
        for run in runs:
            run.steps(*range(1, 51))
            run.journal.append("step", step=51, metrics={"train/loss": math.nan})
            run.journal.append("epoch", step=50, epoch=0.5, metrics={"val/loss": 2.5})
            usage = {"system/cpu_utilization_percentage": 99.0}
            run.journal.append("system", step=50, metrics=usage)
            run.picture(25)
            run.picture(50)
            (run.path / "weights").mkdir()
            (run.path / "weights" / "model.safetensors").write_bytes(b"weights")
            run.journal.append("artifact", path="weights", artifact_path="weights")
            run.end()
        assert [mirror.finish(180) for mirror in mirrors] == [0, 0], runs[0].log + runs[1].log
        yield runs


@pytest.fixture
def home(two_at_once: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own with a store that is ready: making one takes seconds."""
    there = two_at_once[0].path.parent.parent / "mlflow.db"
    with sqlite3.connect(there) as source, sqlite3.connect(tmp_path / "mlflow.db") as copy:
        source.backup(copy)
    monkeypatch.setenv("CVAE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_two_runs_that_start_at_once_on_a_fresh_store(two_at_once: tuple[Run, Run]) -> None:
    first, second = two_at_once
    home = first.path.parent.parent
    # No warning of MLflow's: beside a bar, as of runs.py sync, it would break that.
    lines = re.sub(r"(?m)^[\d-]+ [\d:,]+ ", "", first.log + second.log).splitlines()
    at_work = ["loading MLflow", f"mirroring to sqlite:///{home / 'mlflow.db'}"]
    assert sorted(lines) == sorted([*at_work, *at_work, f"making the store {home / 'mlflow.db'}"])
    assert last_log_line(first.path) in lines
    assert first.run_id != second.run_id
    others = [
        ("system/cpu_utilization_percentage", 50),
        ("train/loss", 51),
        ("val/loss", 50),
    ]
    for run in two_at_once:
        assert points(home / "mlflow.db", run) == sorted(each_once(*range(1, 51)) + others)
    assert not (home / "mlflow.db.new").exists()


def test_what_mlflow_shows_of_a_run(two_at_once: tuple[Run, Run]) -> None:
    run = two_at_once[0]
    client = MlflowClient(f"sqlite:///{run.path.parent.parent / 'mlflow.db'}")
    shown = client.get_run(run.run_id)
    assert client.get_experiment(shown.info.experiment_id).name == "toy experiment"
    assert shown.info.run_name == "first"
    assert shown.info.status == "FINISHED"
    lines = [json.loads(line) for line in (run.path / "journal.jsonl").read_text().splitlines()]
    assert shown.info.start_time == round(lines[0]["time"] * 1000)
    assert shown.info.end_time == round(lines[-1]["time"] * 1000)
    assert shown.data.params == {
        "name": "toy experiment",
        "seed": "1",
        "model.backbone": "mlp",
        "model.latent_dim": "20",
        "model.condition": "null",
        "optimizer.lr": "0.001",
        "optimizer.betas": "[0.9, 0.999]",
    }
    tags = shown.data.tags
    assert tags["mlflow.source.git.commit"] == "0123abc"
    assert tags["hosts"] == "node1, node2"
    assert tags["end_reason"] == "finished"
    assert (tags["world_size"], tags["device"], tags["job_id"]) == ("2", "cpu", "17")
    assert (tags["data_name"], tags["data_digest"]) == ("scenes", "d" * 64)
    assert json.loads(tags["packages"]) == {"torch": "2.13.0"}
    assert tags["command"] == f"python {COMMAND}"
    # One indented line: nothing in a command can leave its block.
    assert "\n\n    python workflows/launch.py '``` # <b>x</b>' --gpus 2\n\n" in tags[NOTE]
    assert "- `val/bits_per_dim`: −ELBO, constants included (bits per dimension)" in tags[NOTE]
    loss = client.get_metric_history(run.run_id, "train/loss")
    assert [point.timestamp for point in loss][:2] == [round(x["time"] * 1000) for x in lines[1:3]]
    assert math.isnan(loss[-1].value)
    (dataset,) = shown.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("scenes", "d" * 36)
    assert "manifest.json" in dataset.dataset.source
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    (model,) = client.list_artifacts(run.run_id, "weights")
    assert model.path == "weights/model.safetensors"


def test_pictures_are_named_as_mlflow_names_them(two_at_once: tuple[Run, Run]) -> None:
    """The slider in MLflow's UI goes by the names, and the format of the names is MLflow's own."""
    run, other = two_at_once
    client = MlflowClient(f"sqlite:///{run.path.parent.parent / 'mlflow.db'}")
    for step in (25, 50):
        with Image.open(other.path / "pictures" / f"samples-{step}.png") as image:
            client.log_image(other.run_id, image, key="test/samples", step=step, timestamp=7)

    def general(name: str) -> str:
        name = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", name)
        return re.sub(r"timestamp(.)\d+", r"timestamp\1TIME", name)

    ours, both = images(client, run), images(client, other)
    assert len(ours) == 4
    assert len(both) == 8
    assert {general(name) for name in ours} == {general(name) for name in both}
    theirs = client.get_run(other.run_id).data.tags["mlflow.loggedImages"]
    assert client.get_run(run.run_id).data.tags["mlflow.loggedImages"] == theirs


def push_all(home: str, run_dir: Path) -> None:
    os.environ["CVAE_HOME"] = home
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    Pusher(run_dir).push()


def test_killed_at_any_moment_every_point_and_picture_arrives_once(home: Path) -> None:
    run = Run(home, "killed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["cvae.tracking.mlflow_push", "mlflow.store.tracking.sqlalchemy_store"]
    )
    moments = random.Random(0)
    rounds = cut_off = 0
    while cut_off < 4:  # a fast machine is through before some of the kills and gets more work
        assert rounds < 40, "too fast: never killed on the way"
        for step in range(200 * rounds + 1, 200 * rounds + 201):
            run.steps(step)
            if step % 100 == 0:
                run.picture(step)
        rounds += 1
        before = run.acknowledged
        pushing = context.Process(target=push_all, args=(str(home), run.path))
        pushing.start()
        while pushing.is_alive() and run.acknowledged == before:
            time.sleep(0.002)
        pushing.join(moments.uniform(0, 0.05))
        pushing.kill()
        pushing.join()
        cut_off += behind(run.path) > 0
    push_all(str(home), run.path)
    assert behind(run.path) == 0
    assert points(home / "mlflow.db", run) == each_once(*range(1, 200 * rounds + 1))
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert len(images(client, run)) == 2 * 2 * rounds, "each as it is and as a thumbnail"
    assert len(client.search_runs(["1"], "attributes.run_name = 'killed'")) == 1


def test_a_resumed_run_goes_on_under_its_id(home: Path) -> None:
    run = Run(home, "resumed")
    run.steps(1, 2, 3)
    run.end("stopped")
    Pusher(run.path).push()
    run_id = run.run_id
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "KILLED"
    run.journal.close()
    run.journal = Journal(run.path / "journal.jsonl")
    run.journal.append("start", **{**START, "world_size": 8}, step=2)
    pusher = Pusher(run.path)
    pusher.push()
    assert client.get_run(run_id).info.status == "RUNNING"
    run.steps(3, 4)
    run.end("failed")
    pusher.push()
    shown = client.get_run(run_id)
    assert run.run_id == run_id
    assert (shown.info.status, shown.data.tags["world_size"]) == ("FAILED", "8")
    assert len(shown.inputs.dataset_inputs) == 1
    assert points(home / "mlflow.db", run) == each_once(1, 2, 3, 4)


def test_death_between_making_the_run_and_writing_its_id_down(home: Path) -> None:
    run = Run(home, "forgetful")
    run.steps(1, 2, 3)
    Pusher(run.path).push()
    run_id = run.run_id
    state = json.loads((run.path / "mlflow.json").read_text())
    (run.path / "mlflow.json").write_text(json.dumps({**state, "run_id": None, "offset": 0}))
    Pusher(run.path).push()
    assert run.run_id == run_id
    assert points(home / "mlflow.db", run) == each_once(1, 2, 3)


def test_a_run_deleted_in_mlflow_is_pushed_anew(home: Path) -> None:
    run = Run(home, "deleted")
    run.steps(1, 2)
    Pusher(run.path).push()
    deleted = run.run_id
    MlflowClient(f"sqlite:///{home / 'mlflow.db'}").delete_run(deleted)
    run.steps(3)
    Pusher(run.path).push()
    assert run.run_id != deleted
    assert points(home / "mlflow.db", run) == each_once(1, 2, 3)


def test_a_copy_of_a_run_is_another_run_and_a_moved_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVAE_HOME", str(tmp_path))
    run, copy = Run(tmp_path, "original"), tmp_path / "runs" / "copy"
    run.steps(1, 2)
    state = mlflow_state.load(run.path)
    state.run_id, state.offset = "1", (run.path / "journal.jsonl").stat().st_size
    mlflow_state.save(run.path, state)
    shutil.copytree(run.path, copy)
    (tmp_path / "runs" / "link").symlink_to(run.path)
    assert [behind(folder) for folder in (run.path, tmp_path / "runs" / "link", copy)] == [0, 0, 3]
    anew = mlflow_state.load(copy)
    assert (anew.run_id, anew.offset) == (None, 0)
    assert anew.run_dir_id != state.run_dir_id
    assert mlflow_state.load(run.path) == state
    moved = run.path.rename(tmp_path / "runs" / "moved")
    assert mlflow_state.load(moved).run_id == "1"
    assert mlflow_state.load(copy) == anew


def test_an_older_runs_state_is_still_read(tmp_path: Path) -> None:
    run = Run(tmp_path, "older")
    older = {"tracking_uri": "sqlite:///x", "run_dir_id": "a", "run_id": "1", "offset": 3}
    (run.path / "mlflow.json").write_text(json.dumps(older))
    assert mlflow_state.load(run.path).run_id == "1"


def test_what_mlflow_refuses_holds_up_nothing_else(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(home, "refused")
    run.steps(1, 2)
    run.journal.append("step", step=3, metrics={"train/loss": 1.0, "what?": 1.0})
    run.journal.append("picture", key="samples", step=3, path="pictures/missing.png")
    run.journal.append("picture", key="samples", step=4)
    run.journal.append("artifact", path="missing", artifact_path="model")
    (run.path / "pictures" / "broken.png").write_bytes(b"no picture")
    run.journal.append("picture", key="samples", step=5, path="pictures/broken.png")
    run.steps(6)
    pusher = Pusher(run.path)
    pusher.push()
    assert behind(run.path) == 0
    assert points(home / "mlflow.db", run) == sorted([*each_once(1, 2, 6), ("train/loss", 3)])
    for name in ("what?", "missing.png", "'path'", "missing", "broken.png"):
        assert name in caplog.text


def test_a_point_that_fails_time_and_again_is_left_out(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(home, "unlucky")
    run.steps(1)
    run.journal.append("step", step=2, metrics={"train/odd": 1.0, "train/loss": 1.0})
    run.steps(3)
    log_batch = MlflowClient.log_batch

    def failing(self: MlflowClient, run_id: str, metrics: Any = (), **more: Any) -> None:
        if any(metric.key == "train/odd" for metric in metrics):
            raise MlflowException("no such luck", INTERNAL_ERROR)
        log_batch(self, run_id, metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    pusher = Pusher(run.path)
    for _ in range(9):
        with pytest.raises(MlflowException, match="no such luck"):
            pusher.push()
    pusher.push()
    assert behind(run.path) == 0
    assert points(home / "mlflow.db", run) == sorted([*each_once(1, 3), ("train/loss", 2)])
    assert "MLflow refuses train/odd at step 2: MlflowException: no such luck" in caplog.text


def test_long_params_and_names(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(home, "long")
    (run.path / "experiment.yaml").write_text(f"name: long\nnote: {'x' * 9000}\nempty: ''\n")
    Pusher(run.path).push()
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    params = client.get_run(run.run_id).data.params
    assert params == {"name": "long", "note": "x" * 499 + "…", "empty": ""}
    (run.path / "experiment.yaml").write_text("name: long\nnote: other\nadded: 1\n")
    run.steps(1)
    Pusher(run.path).push()
    assert client.get_run(run.run_id).data.params == {**params, "added": "1"}
    assert "param note was xxx" in caplog.text


def test_a_backlog_goes_fast(home: Path) -> None:
    run = Run(home, "backlog")
    run.steps(*range(3000))
    pusher = Pusher(run.path)
    heard: list[int] = []
    started = time.process_time()
    pusher.push(heard.append)
    assert time.process_time() - started < 5, "0.5 ms a point; one by one it would be 5 ms"
    assert sum(heard) == 3001
    assert len(heard) > 5, "a progress bar needs to hear it as it goes"


def test_a_run_stays_in_its_store(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(home, "faithful")
    Pusher(run.path).push()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:1")
    run.steps(1)
    Pusher(run.path).push()
    assert points(home / "mlflow.db", run) == each_once(1)
    assert "stays in sqlite" in caplog.text
    assert "secret" not in caplog.text


def test_no_password_is_written_down(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:1")
    run = Run(home, "secretive")
    with pytest.raises(UserError, match=r"somebody:\*\*\*@127.0.0.1:1 does not take") as error:
        sync(run.path, lambda lines: None)
    assert "secret" not in str(error.value).replace("secretive", "")
    assert "secret@" not in (run.path / "mlflow.json").read_text()
    assert Pusher(run.path).uri == "http://somebody:secret@127.0.0.1:1"


@pytest.mark.parametrize(
    "uri", ["http://ann:hush/hush@127.0.0.1:9", "mysql+nodriver://ann:hush%40x@h:1/m?password=hush"]
)
def test_no_word_of_a_mirror_holds_a_password(
    home: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = Run(home, "whispering")
    with pytest.raises(UserError, match="does not take the run") as error:
        sync(run.path, lambda lines: None)
    with pytest.raises(UserError, match="does not answer") as refused:
        mlflow_runs.facts(None, [])
    texts = f"{error.value} {refused.value} {open_mlflow()}"
    if uri.startswith("http"):
        mirror, log = start_mirror(run.path), run.path / "logs" / "mlflow.log"
        until(lambda: "mirroring to http://ann:***@" in log.read_text(), 120)
        mirror.finish(2)
    texts += "".join(file.read_text() for file in run.path.rglob("*.[jly]*") if file.is_file())
    assert "hush" not in texts
    assert "***@" in texts


@pytest.mark.parametrize("uri", ["mlruns", "file:///somewhere/mlruns"])
def test_the_file_store_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI={uri}"):
        sync(Run(home, "old").path, lambda lines: None)


def test_a_mirror_outlives_signals_and_ends_with_its_trainer(home: Path) -> None:
    run = Run(home, "orphan")
    trainer = f"""
import os, pathlib, signal, time
from cvae.tracking.mlflow_mirror import start_mirror
mirror = start_mirror(pathlib.Path({str(run.path)!r}))
while not os.path.exists({str(run.path / "mlflow.json")!r}):
    time.sleep(0.1)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    mirror._process.send_signal(number)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run.steps(1, 2)
    assert subprocess.run([sys.executable, "-c", trainer]).returncode == -signal.SIGKILL
    # A lock on its log says whether the mirror still lives.
    for _ in range(600):
        with contextlib.suppress(UserError), mlflow_mirror._lock(run.path, 0.0):
            break
        time.sleep(0.1)
    assert behind(run.path) == 0, run.log
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(run.run_id).info.status == "KILLED"
    assert points(home / "mlflow.db", run) == each_once(1, 2)


def test_trouble_with_the_mirror_is_no_trouble_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert start_mirror(tmp_path / "missing").finish(1) == 0
    run = Run(tmp_path, "unlucky")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert start_mirror(run.path).finish(5) == 1
    assert "no MLflow mirror" in caplog.text


def test_a_home_that_no_uri_can_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("CVAE_HOME", str(tmp_path / "what?"))
    with pytest.raises(UserError, match=r"what\?: MLflow cannot keep its store in a folder with"):
        paths.tracking_uri()
