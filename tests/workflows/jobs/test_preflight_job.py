"""launch.py --preflight: a real job on this machine, its table and its exit status."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_experiment
from workflows import launch


def test_it_describes_the_node_and_leaves_only_the_code(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["--preflight", "--gpus", "2", "--cluster", "local"]) == 0
    out = capsys.readouterr().out
    assert "needs  unknown: its data are not prepared" in out
    assert "all-reduce over 2 ranks: " in out
    assert "\npassed; the checks took " in out
    assert list((home / "runs").iterdir()) == []


def test_what_does_not_fit_is_an_error(
    tiny_store: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_experiment()))
    words = [str(file), "--preflight", "--cluster", "local"]
    assert launch.main([*words, "model.mlp.hidden_dim=1000000", "model.latent_dim=17160"]) == 1
    out = capsys.readouterr().out
    assert "error: " in out
    assert "Adam's state alone take 8" in out  # 16 bytes for each of 5.2e10 weights, in GB
    assert "\nfailed; the checks took " in out
