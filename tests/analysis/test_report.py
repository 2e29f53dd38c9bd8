import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import analysis
from analysis import report
from analysis.report_data import ReportData
from cvae.errors import UserError
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from tests.conftest import PROJECT_ROOT
from tests.helpers.trained_runs import make_run

EVIL = '<script>alert("x")</script> 🦊'


def tell(run: RunDirectory, loss: float, status: str = "finished", reason: str = "") -> None:
    journal = Journal(run.journal_file)
    journal.append(
        "start", step=0, world_size=2, hosts=["a", "a"], device="cpu", commit="0123abc" * 5
    )
    for step in (10, 20, 30):
        journal.append("step", step=step, metrics={"train/loss": loss + 30 / step})
        metrics = {"val/loss": loss + 3 / step, "val/recon_loss": loss - 2, "val/kl": 2.0}
        journal.append("epoch", step=step, epoch=step / 10, metrics=metrics)
    journal.append("end", status=status, step=30, reason=reason)
    journal.close()


@pytest.fixture
def runs(tiny_captioned_store: Path) -> list[RunDirectory]:
    """A CVAE, a plain VAE, and a run that failed with markup in its reason."""
    made = [make_run(name, captioned=True) for name in ("cvae", "broken")]
    made.insert(1, make_run("vae", captioned=True, condition="none"))
    for run, loss in zip(made[:2], (100.0, 110.0), strict=True):
        tell(run, loss)
    tell(made[2], float("nan"), "failed", EVIL)
    return made


def make(out: Path, *arguments: str) -> str:
    assert report.main([*arguments, "--out", str(out)]) == 0
    return (out / "index.html").read_text("utf-8")


def test_a_report_is_whole_and_needs_nothing_beside_it(
    runs: list[RunDirectory], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    page = make(out, "--experiment", "tiny")
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "url(http" not in page
    assert page.count("<img") == page.count("data:image/webp;base64,") == 2
    assert "<svg" in page
    assert "Lowest val/loss: 100.10 nats per image, cvae (condition=text)." in page
    for name in ("learning_curves", "elbo_parts"):
        assert (out / "figures" / f"{name}.svg").stat().st_size > 1000
        assert (out / "figures" / f"{name}.png").stat().st_size > 1000
    table = pd.read_parquet(out / "tables" / "runs.parquet")
    assert set(table["run"]) == {"cvae", "vae", "broken"}
    assert list(table["run"]) == list(pd.read_csv(out / "tables" / "runs.csv")["run"])


def test_labelled_runs_have_a_latent_map(tiny_store: Path, tmp_path: Path) -> None:
    tell(make_run("cvae"), 100.0)
    make(tmp_path / "report", "--runs", "latest")
    assert (tmp_path / "report" / "figures" / "latent_map.png").stat().st_size > 1000


def test_what_runs_say_cannot_become_part_of_the_page(
    runs: list[RunDirectory], tmp_path: Path
) -> None:
    page = make(tmp_path / "report", "--experiment", "tiny")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; 🦊" in page


def test_failed_runs_are_shown_and_never_averaged_in(
    runs: list[RunDirectory], tmp_path: Path
) -> None:
    for seed in (1, 2):
        again = make_run(f"cvae{seed}", captioned=True)
        text = again.experiment_file.read_text()
        again.experiment_file.write_text(re.sub(r"(?m)^seed: .*", f"seed: {seed}", text))
        tell(again, 100.0 + seed)
    out = tmp_path / "report"
    page = make(out, "--experiment", "tiny")
    groups = pd.read_parquet(out / "tables" / "groups.parquet").set_index(
        "runs that differ in the seed alone"
    )
    assert groups.loc["condition=text", "seeds"] == 3
    assert groups.loc["condition=text", "val/loss"] == pytest.approx(101.1)
    assert groups.loc["condition=text", "val/loss se"] == pytest.approx(1 / 3**0.5)
    left_out = page[page.index('id="left_out"') :]
    assert "broken" in left_out
    assert "failed" in left_out
    # One VAE beside three CVAEs: one pair, and from one pair no interval.
    ablation = pd.read_parquet(out / "tables" / "ablation_model.condition.parquet")
    assert ablation["verdict"].unique().tolist() == ["one seed"]
    assert ablation["low"].isna().all()


def test_a_metric_that_is_not_a_number_differs_from_one_that_is_missing(
    runs: list[RunDirectory], tmp_path: Path
) -> None:
    journal = Journal(runs[0].journal_file)
    journal.append("evaluation", step=30, key="psnr", metrics={"eval/psnr": float("nan")})
    journal.close()
    page = make(tmp_path / "report", "--runs", "cvae", "vae")
    rows = {name: page[page.index(f">{name}</td>") :].split("</tr>")[0] for name in ("cvae", "vae")}
    assert ">NaN<" in rows["cvae"]
    assert ">NaN<" not in rows["vae"]
    tell(make_run("nan", captioned=True), float("nan"))
    page = make(tmp_path / "report", "--runs", "cvae", "nan")
    assert "its val/loss is NaN" in page[page.index('id="left_out"') :]


def test_a_report_is_made_anew_but_nothing_else_is_replaced(
    runs: list[RunDirectory], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    make(out, "--runs", "cvae", "vae")
    before = {file.name for file in (out / "tables").iterdir()}
    make(out, "--runs", "cvae")
    assert {file.name for file in (out / "tables").iterdir()} < before
    (out / ".made-by.json").unlink()  # as an older version has left it
    page = make(out, "--runs", "cvae", "vae")
    assert "vae" in page
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which report\.py did not make"):
        report.main(["--runs", "cvae", "--out", str(out)])
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "index.html").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty, and was not made by report\.py"):
        report.main(["--runs", "cvae", "--out", str(other)])
    assert (other / "index.html").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "tinny"], "did you mean tiny"),
        (["--runs", "cvea"], "did you mean"),
        (["--sweep", "none"], "no such sweep"),
        ([], "a report of which runs?"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, runs: list[RunDirectory], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        report.main([*arguments, "--out", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


def test_the_command_as_people_call_it(runs: list[RunDirectory], tmp_path: Path) -> None:
    # As a script its folder comes first on the path: no module in it may hide one of Python's own.
    command = [sys.executable, "analysis/report.py", "--runs", "vea", "--out", str(tmp_path / "r")]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: vea: no such run")
    assert "Traceback" not in done.stderr


def test_a_report_can_be_read_and_acted_upon(runs: list[RunDirectory], tmp_path: Path) -> None:
    journal = Journal(runs[0].journal_file)
    metrics = {"eval/iwae_5": 1600.0, "eval/iwae_5_bits_per_dim": 9.0}
    journal.append("evaluation", step=30, metrics=metrics)
    journal.close()
    page = make(tmp_path / "report", "--experiment", "tiny")
    best = page[page.index(">cvae</td>") :].split("</tr>")[0]
    assert "<b>98</b>" in best  # the lowest recon_loss
    assert best.index("100.1") < best.index("finished")
    assert "DIR" not in re.sub('<style.*?</style>|base64,[^"]*', "", page, flags=re.S)
    assert "not tested" not in page
    assert "½ log π + log 255" in page
    commands = re.findall(r"<code>(.*?)</code>", page[page.index('id="next"') :])
    assert "python workflows/generate.py cvae" in commands
    assert "python workflows/runs.py resume broken" in commands
    assert all(command.startswith("python ") for command in commands)


def test_pictures_name_the_keys_in_the_tables_order(runs: list[RunDirectory]) -> None:
    table = analysis.runs("tiny")
    data = ReportData(table, analysis.curves(table))
    assert data.labels["cvae"] == "condition=text"
    here = [Path(path).name for path in data.showcase(6)]
    assert here == [name for name in table.index if name in here]


def test_the_number_of_intervals_is_reported(
    runs: list[RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in runs[:2]:
        for seed in (1, 2):
            again = make_run(f"{run.name}{seed}", captioned=True)
            text = run.experiment_file.read_text()
            again.experiment_file.write_text(re.sub(r"(?m)^seed: .*", f"seed: {seed}", text))
            tell(again, 100.0 + seed + 9 * (run.name == "vae"))
    monkeypatch.setattr(report, "pictures", lambda folders, labels: ([], []))
    page = make(tmp_path / "report", "--experiment", "tiny")
    assert re.search(r"Of \d+ such intervals about [\d.]+ would exclude zero by chance", page)
