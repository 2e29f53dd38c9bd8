import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient

from cvae.errors import UserError
from cvae.files.output_folder import MARKER, check_folder
from cvae.progress import progress_bar
from slurm import cluster_file
from slurm.cluster_file import Placement
from tests.conftest import tiny_experiment
from tests.cvae.data.conftest import write_coco
from tests.studies.benchmark import main
from tests.studies.benchmarks import preparation, rounds
from tests.studies.benchmarks.results import Row, frame, markdown, ratio
from tests.studies.benchmarks.rounds import Bench, rates
from tests.studies.benchmarks.series import _scaling


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_UNTIL_MIRRORED_S", 0.0)
    monkeypatch.setattr(rounds, "_POLL_S", 0.1)


@pytest.fixture
def experiment(home: Path) -> Path:
    file = home / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_experiment()))
    return file


def test_a_round_measures_every_contestant_and_tells_mlflow(
    tiny_store: Path, home: Path, experiment: Path
) -> None:
    out = home / "out"
    words = [str(experiment), "--rounds", "1", "--seconds", "1", "--cluster", "local"]
    assert main([*words, "--gpus", "2", "--out", str(out)]) == 0
    with (out / "benchmark.csv").open() as file:
        rows = {row["measured"]: row for row in csv.DictReader(file)}
    for contestant in ("bare step", "loop", "tutorial", "strong 2 ranks", "weak 2 ranks"):
        assert float(rows[f"{contestant}/images_per_second"]["value"]) > 0
    told = float(rows["loop:tutorial"]["value"])
    rate = [float(rows[f"{x}/images_per_second"]["value"]) for x in ("loop", "tutorial")]
    assert told == pytest.approx(rate[0] / rate[1])
    assert 0 < float(rows["loop/share of matrix_product peak"]["value"]) < 1
    for seconds in ("launch to first step", "bare start", "checkpoint stall", "a step"):
        assert float(rows[f"{seconds}/seconds"]["value"]) > 0
    for compared in ("loop with MLflow:loop", "ZeRO 1:DDP 2 ranks", "weak: 2 ranks over 1"):
        assert float(rows[compared]["value"]) > 0
    # The jobs' files go where all went well.
    assert {path.name for path in out.iterdir()} == {MARKER, "benchmark.csv", "benchmark.md"}
    check_folder(out, "benchmark.py")
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    found = client.get_experiment_by_name("benchmark")
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    assert run.data.metrics["tiny/loop:tutorial"] == pytest.approx(told)
    assert not (home / "runs").exists()


def test_bad_input_is_one_line(tiny_store: Path, home: Path, experiment: Path) -> None:
    file = str(experiment)
    (home / "mine").mkdir()
    (home / "mine" / "benchmark.md").write_text("notes")
    (home / "mine" / "thesis.tex").write_text("years of work")
    for arguments, message in (
        ([file, "--against", "tutorail"], "no such peer; did you mean tutorial"),
        ([file, "--against", "published"], "give --coco DIR"),
        ([file, "--coco", str(home)], "has no folder annotations"),
        (["preparation"], "preparation reads JPEGs: give --coco DIR"),
        ([file, "--only", "lop"], "lop"),
        ([file, "--rounds", "0"], "0 is not a whole number above 0"),
        ([file, "trainin.epochs=3"], "trainin"),
        (["none.yaml"], "none.yaml"),
        ([file, "--out", str(home / "mine")], "not made by benchmark.py"),
        ([file, "--out", file], "is a file"),
        ([file, "--out", str(home)], "is not replaced|holds it"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)


def test_a_ratio_is_taken_round_by_round() -> None:
    rows = [Row("a", "x", [2.0, 30.0, 2.0]), Row("a", "y", [1.0, 10.0, 4.0])]
    ratio(rows, *rows, "x:y")
    assert rows[-1].values == [2.0, 3.0, 0.5]
    table = frame(rows)
    assert table.iloc[-1][["value", "lowest", "highest", "runs"]].tolist() == [2.0, 0.5, 3.0, 3]
    assert markdown(table).splitlines()[-1] == "| a | x:y | 2 | 0.5 | 3 | 3 | × |"


def test_rates_are_over_time_not_over_points() -> None:
    """10 images at 10 a second, then 10 at 5 a second."""
    points = [
        {"train/images_per_second": 10.0, "train/data_wait_share": 0.3},
        {"train/images_per_second": 5.0, "train/data_wait_share": 0.0},
    ]
    found = rates(points)
    assert found["images_per_second"] == pytest.approx(20 / 3)
    assert found["data_wait_share"] == pytest.approx(0.1)


def test_ranks_are_doubled_and_nodes_filled_one_after_the_other() -> None:
    assert _scaling(Placement(1, 1)) == []
    assert _scaling(Placement(1, 3)) == [Placement(1, n) for n in (1, 2, 3)]
    assert _scaling(Placement(2, 4)) == [
        *(Placement(1, 1), Placement(1, 2), Placement(1, 4)),
        Placement(2, 4),
    ]
    assert _scaling(Placement(3, 1)) == [Placement(n, 1) for n in (1, 2, 3)]


def test_preparation_is_measured_beside_its_parts(home: Path) -> None:
    root = write_coco(home / "coco", {"train2017": 12, "val2017": 3})

    class Here(Bench):
        def preparation(self, name: str) -> dict[str, float]:
            preparation.measure(name, root, 0.5, home / "result.json")
            told: dict[str, float] = json.loads((home / "result.json").read_text())
            return told

    with progress_bar(0, "measurement", "preparation") as bar:
        bench = Here(cluster_file.choose("local"), home / "jobs", 0.5)
        (rows,) = preparation.rows(bench, 1, bar)
    found = {row.measured: row.median for row in rows}
    rates = [found[f"{who}/images_per_second"] for who in ("images", "decoder alone")]
    assert found["images:decoder alone"] == pytest.approx(rates[0] / rates[1])
    assert found["captions bf16:one at a time"] > 1
    assert 0 < found["bf16 moves a vector/mean"] < found["bf16 moves a vector/most"] < 0.02
    # What MLflow takes as a metric's name.
    assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in found)
