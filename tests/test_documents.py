"""Every link, path, command and worked example of the documents is true."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvae.config.experiment import load_experiment
from tests.conftest import PROJECT_ROOT
from workflows.sweeps.sweep_file import load_sweep

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "tests/**/*.md")
    for path in PROJECT_ROOT.glob(pattern)
)
TOP = ("cvae", "slurm", "workflows", "analysis", "tests", "configs", "docs")


def _text(name: str) -> str:
    return (PROJECT_ROOT / name).read_text()


def _anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = document.parent / place if place else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in _anchors(target), f"{document.name}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_exists(document: Path) -> None:
    text = document.read_text()
    if document.name == "extending.md":
        text = text.replace("cvae/models/patches.py", "")  # what its reader writes
    for path in re.findall(rf"(?<![\w/.])((?:{'|'.join(TOP)})/[\w/.-]*[\w/])", text):
        assert (PROJECT_ROOT / path).exists(), f"{document.name}: {path}"


def test_every_folder_of_the_map_exists_and_none_is_missing() -> None:
    text = _text("CONTRIBUTING.md").partition("## The map")[2].partition("\n## ")[0]
    for top in ("cvae", "workflows"):
        block = re.search(rf"^    {top}/.*\n((?:      .*\n)+)", text, re.MULTILINE)
        assert block is not None
        named = set(re.findall(r"\b(\w+)/(?:\s|$)", block.group(1)))
        folders = {path.parent.name for path in (PROJECT_ROOT / top).glob("*/__init__.py")}
        assert folders <= named, f"{top}: {folders - named}"


def _commands() -> Iterator[tuple[str, list[str]]]:
    for document in DOCUMENTS:
        for line in re.findall(r"^    ((?:python|make) .*)$", document.read_text(), re.MULTILINE):
            yield document.name, shlex.split(line, comments=True)


@pytest.mark.parametrize(("document", "words"), list(_commands()), ids=str)
def test_every_command_is_understood(document: str, words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", _text("Makefile"), re.MULTILINE)
        assert words[1] in targets
        return
    if words[1] == "-m":
        module = words[2]
        assert importlib.util.find_spec(module), module
        arguments = words[3:]
    else:
        module, arguments = words[1].removesuffix(".py").replace("/", "."), words[2:]
    parser = getattr(importlib.import_module(module), "parser", None)
    if parser is None:
        return
    built = parser()
    # runs.py has commands of its own, which argparse cannot intermix.
    parse = built.parse_args if words[1].endswith("runs.py") else built.parse_intermixed_args
    parse(arguments)
    _check_values([word for word in arguments if not word.startswith("-")])


def _check_values(words: list[str]) -> None:
    """Checks files below configs/, and the values that replace theirs."""
    files = [word for word in words if word.startswith("configs/")]
    values = [word for word in words if re.match(r"[a-z_.]+=", word)]
    for file in files:
        if "/sweeps/" in file:
            load_sweep(PROJECT_ROOT / file, values, PROJECT_ROOT)
        elif "model.backbone=patches" not in values:  # the example of extending.md
            load_experiment(PROJECT_ROOT / file, values)


def test_a_backbone_is_added_as_the_document_says(tmp_path: Path) -> None:
    """Two files are changed in a copy of the package, and the model computes a loss."""
    text = _text("docs/extending.md")
    network, block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    halvings = re.search(r'`("patches": lambda model: \d+)`', text)
    assert halvings is not None
    shutil.copytree(
        PROJECT_ROOT / "cvae", tmp_path / "cvae", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "cvae" / "models" / "patches.py").write_text(network)
    schema = tmp_path / "cvae" / "config" / "experiment.py"
    source = schema.read_text()
    for before, after in (
        ("class Model(Strict):", f"{block}\n\nclass Model(Strict):"),
        ('"resnet", "ldm"]', '"resnet", "ldm", "patches"]'),
        ("    ldm: Ldm = Ldm()\n", "    ldm: Ldm = Ldm()\n    patches: Patches = Patches()\n"),
        ('    "mlp": lambda', f'    {halvings.group(1)},\n    "mlp": lambda'),
    ):
        assert before in source
        source = source.replace(before, after, 1)
    schema.write_text(source)
    code = """
import torch
from cvae.config.experiment import Model
from cvae.models.cvae import Cvae
for fusion in ("concat", "add", "film"):
    for latent in ("vector", "spatial"):
        keys = {"condition": "text", "latent_dim": 4, "likelihood": "gaussian", "fusion": fusion}
        model = Model(backbone="patches", latent=latent, **keys)
        cvae = Cvae(model, (3, 16, 16), 5)
        noise = torch.zeros(2, *cvae.latent_shape)
        parts = cvae(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 5), noise)
        assert parts.recon_loss.shape == (2,)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
