import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cvae.errors import UserError
from cvae.sampling import lettering
from tests.conftest import PROJECT_ROOT, write_store
from tests.cvae.data.conftest import small_bert
from tests.helpers.trained_runs import encode_with, make_run
from workflows import export
from workflows.generate import main

__all__ = ["small_bert"]


def test_a_mistake_is_one_line_and_status_2(tiny_store: Path) -> None:
    make_run("mine")
    script = str(PROJECT_ROOT / "workflows" / "generate.py")
    command = [sys.executable, script, "mine", "low", " "]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: caption 2 of 2 is empty; say what to draw\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nine", "nine: no such run .*; did you mean mine"),
        ("mine lowe", "'lowe' is no class of tiny; did you mean low"),
        ("mine -n 0", "0 is not a whole number above 0"),
        ("mine -n 101", "at most 100"),
        ("mine low --reconstruct", "take no captions"),
        ("mine --reconstruct --latent-map", "not allowed with"),
        ("mine --latent-map nine", "nine: no such run"),
        ("mine --out there/a.png", "there is no folder there"),
        ("mine --out a.jpg", "name it a.png"),
        ("plain low", "without a condition"),
        ("words --latent-map", "has no labels"),
        ("mine --latent-map words", "runs on the same data"),
        ("mine low --seed x", "x is not a whole number from 0"),
        ("mine --reconstruct --seed 1", "draw no noise"),
        ("mine " + 101 * "low ", "101 captions: a picture holds at most 100"),
    ],
)
def test_mistakes_write_nothing(
    arguments: str, message: str, tiny_store: Path, tiny_captioned_store: Path
) -> None:
    runs = [
        make_run("mine"),
        make_run("plain", condition="none"),
        make_run("words", captioned=True),
    ]
    with pytest.raises(UserError, match=message):
        main(arguments.split())
    assert [list(run.pictures.iterdir()) for run in runs] == [[], [], []]


def test_classes_are_drawn_and_judged(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(home, captioned=False, sizes=(1500, 200))
    run = make_run()
    assert main(["latest"]) == 0
    picture, facts = run.pictures / "classes.png", run.pictures / "classes.json"
    assert Image.open(picture).width > 8 * 96
    judged = json.loads(facts.read_text())
    assert judged["run"] == "tiny"
    assert judged["step"] == 7
    assert set(judged["sample_accuracy_per_class"]) == {"low", "middle", "high"}
    assert judged["classifier_real_accuracy"] > 0.95
    # Fresh weights draw grey: all samples look alike, so just one class can be right.
    assert judged["sample_accuracy"] == pytest.approx(1 / 3, abs=0.01)
    printed = capsys.readouterr().out
    assert "33.3 % of samples are classified as their class" in printed
    assert "classes.png" in printed


def test_pictures_of_a_plain_vae_beside_a_cvae(
    tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, cvae = make_run("plain", condition="none"), make_run("cvae")
    main(["plain", "-n", "3"])
    main(["plain", "--reconstruct", "-n", "5"])
    main(["cvae", "High", "0"])
    main(["cvae", "--latent-map", "plain"])
    assert sorted(file.name for file in plain.pictures.iterdir()) == [
        "reconstructions.png",
        "samples.png",
    ]
    probes = json.loads((cvae.pictures / "latent_map.json").read_text())["linear_probe"]
    assert list(probes) == ["cvae", "plain"]
    assert "a linear probe reads the class from μ" in capsys.readouterr().out


def test_captions_are_drawn_and_matched(tiny_captioned_store: Path, tmp_path: Path) -> None:
    encode_with(tiny_captioned_store)
    run = make_run(captioned=True, encoder="minilm")
    main(["tiny", "a dog", "eine größere Katze", "-n", "2", "--out", str(tmp_path / "dogs.PNG")])
    assert Image.open(tmp_path / "dogs.PNG").width > 200
    main([str(run.path)])
    facts = json.loads((run.pictures / "caption_match.json").read_text())
    assert facts["chance"] == pytest.approx(1 / 21)
    assert facts["caption_match"] == sum(facts["captions"].values()) / 21


def test_an_exported_model_draws_where_the_person_is(
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, here = tmp_path / "out", tmp_path / "here"
    run = make_run()
    assert export.main(["tiny", str(folder)]) == 0
    before = sorted(folder.rglob("*"))
    here.mkdir()
    monkeypatch.chdir(here)
    assert main([str(folder), "low", "high", "-n", "2"]) == 0
    assert main([str(folder), "--reconstruct"]) == 0  # the data are here
    sheet, reconstructions = sorted(os.listdir(here))
    assert sheet.startswith("tiny-captions-low-")
    assert reconstructions == "tiny-reconstructions.png"
    main(["tiny", "low", "high", "-n", "2"])
    drawn = (run.pictures / sheet.removeprefix("tiny-")).read_bytes()
    assert (here / sheet).read_bytes() == drawn
    assert sorted(folder.rglob("*")) == before

    # Sheets of other captions, counts and seeds do not replace it; the printed path is theirs.
    for more in (["--seed", "5"], ["-n", "3"], ["middle"], ["middle", "low"]):
        capsys.readouterr()
        main([str(folder), "low", "high", "-n", "2", *more])
        printed = capsys.readouterr().out.splitlines()[-1]
        assert (here / printed).read_bytes() != drawn
    assert len(os.listdir(here)) == 6
    shutil.rmtree(tiny_store)
    main([str(folder), "low", "high", "-n", "2"])
    assert (here / sheet).read_bytes() == drawn
    for arguments in ([], ["--reconstruct"], ["--latent-map"]):
        with pytest.raises(UserError, match="this needs its data: tiny is not prepared at 16×16"):
            main([str(folder), *arguments])


def test_captions_of_every_kind(
    tiny_captioned_store: Path,
    small_bert: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lettering, "_system_fonts", list)
    lettering._font_file.cache_clear()
    encode_with(tiny_captioned_store, small_bert)
    make_run(captioned=True, encoder=small_bert)
    captions = ["一 dog", "a dog", "a dog", "red " * 60, "קטן", "b " * 40]
    main(["tiny", *captions, "-n", "1", "--out", str(tmp_path / "a.png")])
    printed, noted = capsys.readouterr()
    assert printed.splitlines()[0] == (
        "no font here has 一: the labels name or number such letters"
    )
    notes = [line for line in noted.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert (
        "the text encoder reads only the first 32 tokens of “red red red red red red …”" in notes[0]
    )
    main(["tiny", *(f"dog {n}" for n in range(100)), "-n", "2", "--out", str(tmp_path / "b.png")])
    assert 100 * 32 < Image.open(tmp_path / "b.png").height < 9000
    with pytest.raises(UserError, match="not valid UTF-8"):
        main(["tiny", "bad \udcff"])
