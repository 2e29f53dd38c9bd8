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

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cvae.data.store import TextEncoderEntry
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file, sha256_of_json
from cvae.files.json_file import first_fault
from cvae.files.output_folder import check_folder
from cvae.progress import progress_bar
from cvae.run.directory import LATEST, RunDirectory, all_runs

CONFIG, EXPERIMENT, WEIGHTS = "config.json", "experiment.yaml", "model.safetensors"
TEXT_ENCODER, SAMPLES, CARD = "text_encoder", "samples.png", "README.md"
EXPORTED_BY = "export.py"
# What is read, and no other name: nothing outside the folder, nothing in deeper folders.
_READ = re.compile(rf"experiment\.yaml|model\.safetensors|samples\.png|{TEXT_ENCODER}/[^/\x00]+")
_LARGEST_JSON, _LARGEST_YAML = 16 << 20, 1 << 20
_NAME = r"[^/\x00-\x1f\x7f.-][^/\x00-\x1f\x7f]{0,199}"
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


_Size = Annotated[int, Field(ge=1, le=4096)]


class ExportedModel(_Block):
    format: Literal["cvae-workflow"] = "cvae-workflow"
    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    """Part of the names of pictures."""
    step: Annotated[int, Field(ge=0, lt=2**53)]
    """Optimizer steps behind the weights."""
    image_shape: tuple[_Size, _Size, _Size]
    """C, H, W."""
    condition_dim: Annotated[int, Field(ge=0, le=2**16)]
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
        tree["sha256"] = {**files, CONFIG: sha256_of_json(tree)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def find_model(name: str) -> RunDirectory | Path:
    """The run (by name, folder, or "latest") or the exported folder. Raises UserError where there is neither."""
    folder = Path(name).resolve()
    if name not in {LATEST, *(run.name for run in all_runs())} and folder.is_dir():
        # A run has no weights of its own beside its experiment: an export without its config.json is no run.
        if (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file():
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


def plain_name(name: str) -> str:
    """A run's name as an exported model can have it."""
    return name if re.fullmatch(_NAME, name) else re.sub(r"[^A-Za-z0-9_]", "_", name)[:200] or "_"


def read(folder: Path) -> ExportedModel:
    """Returns what a folder says it is, once every file that is read proved to be what was exported.

    Raises UserError if something is missing, was changed, or is no exported model.
    """
    again = f"copy {folder} anew, or export the run again"
    tree = _tree(folder / CONFIG, again)
    if tree.get("format") != FORMAT:
        raise UserError(f"{folder} holds another kind of model, none exported by export.py")
    if tree.get("format_version") != VERSION:
        raise UserError(
            f"{folder} was exported in format {str(tree.get('format_version'))[:20]}; this version of the"
            f" project reads format {VERSION}"
        )
    try:
        digests = dict(tree["sha256"])
        whole = digests.pop(CONFIG) == sha256_of_json({**tree, "sha256": digests})
    except (KeyError, TypeError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{folder / CONFIG} is damaged (its sha256 is another); {again}")
    try:
        exported = ExportedModel.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG} is damaged ({first_fault(error)}); {again}") from None
    _check_files(folder, digests, again)
    return exported


def _tree(file: Path, again: str) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file} is missing; {again}")
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise ValueError("too large")
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file} is damaged; {again}") from None
    return tree if isinstance(tree, dict) else {}


def _check_files(folder: Path, digests: dict[str, str], again: str) -> None:
    """Raises UserError unless all that is read of the folder lies in it and has the sha256 of its export."""
    for name in (EXPERIMENT, WEIGHTS):
        if name not in digests:
            raise UserError(f"{folder / CONFIG} has no sha256 of {name}; {again}")
    inside = folder.resolve()
    for name in digests:
        if not _READ.fullmatch(name) or name.endswith(("/.", "/..")):
            raise UserError(
                f"{folder / CONFIG} names {name[:100]!r}, which no export holds; {again}"
            )
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {again}")
        if not (folder / name).resolve().is_relative_to(inside):
            raise UserError(f"{folder / name} is a link to a file elsewhere; {again}")
    if (folder / EXPERIMENT).stat().st_size > _LARGEST_YAML:
        raise UserError(f"{folder / EXPERIMENT} is too large for an experiment; {again}")
    # A further file of a tokenizer would change the tokens.
    there = {f"{TEXT_ENCODER}/{file.name}" for file in (folder / TEXT_ENCODER).glob("[!.]*")}
    if strange := sorted(there - digests.keys()):
        raise UserError(f"{folder / strange[0]} was not exported with the rest; remove it")
    total = sum((folder / name).stat().st_size for name in digests)
    with progress_bar(total, "B", f"{folder.name}: check", delay=2) as bar:
        for name, digest in digests.items():
            if sha256_of_file(folder / name, bar.update) != digest:
                raise UserError(f"{folder / name} is damaged (its sha256 is another); {again}")
