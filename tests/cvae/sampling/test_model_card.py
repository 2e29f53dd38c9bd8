import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cvae.run.journal import Journal
from cvae.sampling.export import export_run
from cvae.sampling.model_card import model_card
from cvae.sampling.sampler import load_run
from tests.cvae.data.conftest import small_bert
from tests.helpers.trained_runs import encode_with, make_run

__all__ = ["small_bert"]


def test_the_card_tells_of_data_metrics_and_origin(tiny_store: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = make_run()
    digest = load_run(run).data.digest
    journal = Journal(run.journal_file)
    facts = {"hosts": ["a", "b", "a"], "world_size": 3, "device": "V100", "precision": "fp16"}
    packages = {"torch": "2.10", "mlflow": None}
    facts |= {"commit": "c0ffee", "uncommitted_changes": False, "packages": packages}
    journal.append("start", step=0, data_digest=digest, **facts)
    for step, loss in ((3, 99.0), (7, 12.5), (9, 45.0)):
        journal.append("epoch", step=step, epoch=1.0, metrics={"val/loss": loss, "val/kl": np.nan})
    journal.close()
    launch = [{"command": "/home/me/cvae/workflows/launch.py /home/me/x.yaml --name tiny"}]
    run.launch_file.write_text(json.dumps(launch))
    (run.pictures / "classes.json").write_text(json.dumps({"step": 6, "sample_accuracy": 0.5}))
    exported = export_run(run, tmp_path / "out")
    assert exported.metrics == {"val/loss": 12.5}
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "c0ffee",
        "torch 2.10",
        "3 ranks on 2 hosts; V100, fp16",
        digest,
        "12.5",
        "`tiny`",
    ):
        assert fact in card
    assert "launch.py x.yaml --name tiny" in card
    assert "/home/me" not in card + (tmp_path / "out" / "config.json").read_text()
    parsed = ModelCard(card).data
    assert parsed.library_name == "cvae-workflow"
    assert parsed.eval_results[0].metric_value == 12.5
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["tiny"]


def test_the_cards_examples_run(tiny_store: Path, tmp_path: Path) -> None:
    from workflows import generate

    folder = tmp_path / "out"
    export_run(make_run(), folder)
    examples = (folder / "README.md").read_text().replace("FOLDER", str(folder))
    command, *lines = [line.strip() for line in examples.splitlines() if line.startswith("    ")]
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "workflows/generate.py")
    assert generate.main([*arguments, "--out", str(tmp_path / "a.png")]) == 0
    names: dict[str, Any] = {}
    exec("\n".join(lines[:3]), names)
    assert f"# uint8 {names['images'].shape}" in lines[2]


def test_a_coco_models_card_names_licences_and_limits(
    tiny_captioned_store: Path, small_bert: str, tmp_path: Path
) -> None:
    encode_with(tiny_captioned_store, small_bert)
    run = make_run(captioned=True, encoder=small_bert)
    exported = export_run(run, tmp_path / "out")
    assert "Flickr" not in (tmp_path / "out" / "README.md").read_text()
    data = exported.data.model_copy(update={"dataset": "coco", "trained_on": 15})
    metrics = {"val/text_gain": 3.25, "val/text_gain_se": 0.5}
    exported = exported.model_copy(update={"data": data, "metrics": metrics})
    trained = load_run(run)
    card = model_card(exported, trained.experiment, trained.model, ['a "dog\'s" day'])
    for fact in (
        "Flickr",
        "CC BY 4.0",
        "32 tokens",
        "| 15 |",
        "of the split's 50 images",
        "3.25 ± 0.5",
    ):
        assert fact in card
    quoted = next(line for line in card.splitlines() if "generate.py FOLDER" in line)
    assert shlex.split(quoted)[3] == 'a "dog\'s" day'
    assert str(Path(small_bert).parent) not in card
