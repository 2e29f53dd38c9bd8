import json
from pathlib import Path

import pytest

from cvae.errors import UserError
from cvae.run.journal import Journal
from tests.conftest import tiny_experiment
from tests.helpers.ranks import lines, new_run
from tests.helpers.trained_runs import make_run
from workflows.evaluate import main


def test_evaluate_measures_journals_and_shows(
    tiny_store: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    journal = Journal(run.journal_file)
    journal.append("start", step=0, world_size=1, hosts=["a"], device="cpu")
    journal.append("end", status="finished", step=7, reason="")
    journal.close()
    groups = ["--metrics", "iwae", "elbo", "--iwae-samples", "3", "--cluster", "local"]
    assert main(["tiny", *groups]) == 0
    table = capsys.readouterr().out
    assert "eval/loss" in table
    assert "eval/iwae_3_bits_per_dim" in table
    assert "nats per image" in table
    assert "leave constants of the likelihood out" in table
    evaluations = lines(run, "evaluation")
    assert [line["key"] for line in evaluations] == ["val/elbo", "val/iwae-3"]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    run_id = json.loads((run.path / "mlflow.json").read_text())["run_id"]
    (point,) = client.get_metric_history(run_id, "eval/iwae_3")
    assert (point.step, point.value) == (7, evaluations[1]["metrics"]["eval/iwae_3"])


def test_bad_input_is_one_line(tiny_store: Path, home: Path) -> None:
    make_run()
    new_run("empty", tiny_experiment())
    for arguments, message in (
        (["tiyn"], "no such run"),
        (["empty"], "has no checkpoint yet"),
        (["tiny", "--metrics", "psnr"], "there is no group of metrics 'psnr'"),
        (["tiny", "--metrics", "captions"], "draws from captions"),
        (["tiny", "--inception", str(home / "none.pt")], "no such file"),
        (["tiny", "--split", "test"], "invalid choice"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
