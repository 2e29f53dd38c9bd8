import subprocess
import sys
from pathlib import Path

import pytest

from cvae.errors import UserError
from cvae.run.directory import RunDirectory
from tests.conftest import PROJECT_ROOT
from tests.helpers.trained_runs import make_run
from workflows.export import main, size


def test_an_export_says_what_it_weighs(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run()
    assert main(["latest", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    sizes = {line.split()[0]: line.split(maxsplit=1)[1] for line in printed[1:-1]}
    names = {file.name for file in (tmp_path / "out").iterdir()} - {".made-by.json"}
    assert set(sizes) == {*names, "all"}
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sizes["model.safetensors"] == f"{weights / 1000:.1f} kB"
    assert printed[-1].startswith("tiny, step 7: ")


def test_sizes_are_read_easily() -> None:
    assert [size(n) for n in (0, 999, 1000, 90_868_376, 2 * 10**12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "90.9 MB",
        "2000.0 GB",
    ]


def test_a_folder_that_is_not_empty_is_one_line_and_status_2(
    tiny_store: Path, tmp_path: Path
) -> None:
    make_run("mine")
    script = str(PROJECT_ROOT / "workflows" / "export.py")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    command = [sys.executable, script, "mine", str(full)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {full} is not empty, and was not made by export.py; name a new folder, or remove it first\n"
    )


def test_mistakes_make_no_folder(tiny_store: Path, tmp_path: Path) -> None:
    run = make_run("mine")
    RunDirectory.create("empty", run.experiment())
    main(["mine", str(tmp_path / "out")])
    for name, message in (
        ("nine", "no such run .*; did you mean mine"),
        ("empty", "no intact checkpoint yet"),
        (str(tmp_path / "out"), "is already an exported model; copy it"),
    ):
        with pytest.raises(UserError, match=message):
            main([name, str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
