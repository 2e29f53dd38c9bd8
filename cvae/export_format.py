"""An exported model: one folder with all that drawing takes. No pickles, every file checksummed.

A run's own model/, which MLflow gets, is the same without text_encoder/, samples.png and README.md.

<folder>/
    config.json           what the model is and what it came from; sha256 of the other files and of itself
    experiment.yaml       the resolved experiment; launch.py takes it back
    model.safetensors     best weights, fp32, by parameter name
    text_encoder/         the frozen encoder as it was published; captioned models only
    samples.png           what it draws
    README.md             model card; for people to complete, so that it alone is not checked
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cvae.data.building import progress_bar
from cvae.data.store import TextEncoderEntry, file_sha256
from cvae.errors import UserError
from cvae.output import check_folder
from cvae.run_directory import LATEST, RunDirectory, all_runs

CONFIG, EXPERIMENT, WEIGHTS = "config.json", "experiment.yaml", "model.safetensors"
TEXT_ENCODER, SAMPLES, CARD = "text_encoder", "samples.png", "README.md"
EXPORTED_BY = "export.py"
FORMAT, VERSION = "cvae-workflow", 1


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExportedEncoder(_Block):
    name: str
    entry: TextEncoderEntry


class SplitFacts(_Block):
    name: str
    images: int
    captions: int
    skipped: int
    """Files of the source that could not be used."""
    source: dict[str, Any]


class DataFacts(_Block):
    """What the model was trained on."""

    dataset: str
    digest: str
    """sha256 over the checksums of the prepared files that the run read."""
    train: SplitFacts
    trained_on: int
    """Images of `train` that data.fraction left."""
    val: SplitFacts


class Provenance(_Block):
    """From the run's journal; None where it does not say."""

    commit: str | None
    uncommitted_changes: bool | None
    packages: dict[str, str | None]
    commands: list[str]
    world_size: int | None
    hosts: int | None
    device: str | None
    precision: str | None


class Exported(_Block):
    format: Literal["cvae-workflow"] = "cvae-workflow"
    format_version: Literal[1] = 1
    name: str
    step: int
    """Optimizer steps behind the weights."""
    image_shape: tuple[int, int, int]
    """C, H, W."""
    condition_dim: int
    classes: list[str]
    text_encoder: ExportedEncoder | None
    metrics: dict[str, float]
    """At `step`, as in MLflow: val/loss, val/kl, …"""
    data: DataFacts
    provenance: Provenance
    sha256: dict[str, str] = {}

    def to_json(self, files: dict[str, str]) -> str:
        """config.json, with the sha256 of these files and its own."""
        tree = self.model_dump(mode="json")
        tree["sha256"] = files
        tree["sha256"] = {**files, CONFIG: _tree_sha256(tree)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def locate(name: str) -> RunDirectory | Path:
    """The run (by name, folder, or "latest") or the exported folder. Raises UserError where there is neither."""
    folder = Path(name).resolve()
    if name not in {LATEST, *(run.name for run in all_runs())} and folder.is_dir():
        if (folder / CONFIG).is_file():
            return folder
        if not (folder / EXPERIMENT).is_file():
            raise UserError(f"{folder} is neither a run nor an exported model")
    return RunDirectory.open(name)


def check_target(folder: Path) -> None:
    """Raises UserError unless an export can go to that folder: it never replaces another, whose card people
    complete."""
    path = check_folder(folder, EXPORTED_BY)
    if path.is_dir() and os.listdir(path):
        raise UserError(f"{folder} is not empty; name a folder that is not there yet")


def read(folder: Path) -> Exported:
    """What a folder says it is, once every file proved to be what was exported.

    Raises UserError where something is missing, was changed, or is no exported model.
    """
    again = f"copy {folder} anew, or export the run again"
    try:
        tree = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{folder / CONFIG} is damaged; {again}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"{folder} holds another kind of model, none exported by export.py")
    if tree.get("format_version") != VERSION:
        raise UserError(
            f"{folder} was exported in format {tree.get('format_version')}; this version of the project"
            f" reads format {VERSION}"
        )
    try:
        digests = dict(tree["sha256"])
        whole = digests.pop(CONFIG) == _tree_sha256({**tree, "sha256": digests})
        exported = Exported.model_validate(tree)
    except (KeyError, TypeError, ValueError, ValidationError):
        whole = False
    if not whole:
        raise UserError(f"{folder / CONFIG} is damaged (its sha256 is another); {again}")
    missing = [name for name in digests if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / missing[0]} is missing; {again}")
    with progress_bar(
        sum((folder / name).stat().st_size for name in digests),
        "B",
        f"{folder.name}: check",
        delay=2,
    ) as bar:
        for name, digest in digests.items():
            if file_sha256(folder / name, bar.update) != digest:
                raise UserError(f"{folder / name} is damaged (its sha256 is another); {again}")
    # A further file of a tokenizer would change the tokens.
    there = {f"{TEXT_ENCODER}/{file.name}" for file in (folder / TEXT_ENCODER).glob("[!.]*")}
    if strange := sorted(there - digests.keys()):
        raise UserError(f"{folder / strange[0]} was not exported with the rest; remove it")
    return exported


def _tree_sha256(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
