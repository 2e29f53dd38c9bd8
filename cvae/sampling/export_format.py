"""The format of an exported model: one folder with all that drawing needs, no pickles, every file checksummed.

A run's own model/, which MLflow gets, is the same without text_encoder/, samples.png and README.md.

<folder>/
    config.json           describes the model and its origin; the sha256 of itself and the other files
    experiment.yaml       the resolved experiment, which launch.py accepts
    model.safetensors     the best weights, fp32, by parameter name
    text_encoder/         the frozen encoder as published; captioned models only
    samples.png           images that the model drew
    README.md             the model card; not checked, so that people can complete it
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
# The only files that are read: nothing outside the folder, nothing in deeper folders.
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
    skipped: int  # number of files of the source that could not be used
    source: dict[str, Any]


class DataFacts(_Block):
    """The data that the model was trained on."""

    dataset: str
    digest: str  # sha256 over the checksums of the prepared files that the run read
    train: SplitFacts
    trained_on: int  # number of images of `train` that data.fraction left
    val: SplitFacts


class Provenance(_Block):
    """The origin of the weights, from the run's journal; None if it was not recorded."""

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
    """The contents of config.json."""

    format: Literal["cvae-workflow"] = "cvae-workflow"
    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    """Part of the names of pictures."""
    step: Annotated[int, Field(ge=0, lt=2**53)]  # number of optimizer steps that led to the weights
    image_shape: tuple[_Size, _Size, _Size]  # C, H, W
    condition_dim: Annotated[int, Field(ge=0, le=2**16)]
    classes: list[str]
    text_encoder: ExportedEncoder | None
    metrics: dict[str, float]  # at `step`, by their names in MLflow: val/loss, val/kl, …
    data: DataFacts
    provenance: Provenance
    sha256: dict[str, str] = {}

    def to_json(self, files: dict[str, str]) -> str:
        """Returns config.json with these sha256 of the other files, and its own."""
        tree = self.model_dump(mode="json")
        tree["sha256"] = files
        tree["sha256"] = {**files, CONFIG: sha256_of_json(tree)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def find_model(name: str) -> RunDirectory | Path:
    """Returns the run (by name, folder, or "latest") or the exported folder of that name.

    Raises UserError if there is neither.
    """
    folder = Path(name).resolve()
    if name not in {LATEST, *(run.name for run in all_runs())} and folder.is_dir():
        # A run's folder has no weights at its top: with weights it is an export without its config.json.
        if (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file():
            return folder
        if not (folder / EXPERIMENT).is_file():
            raise UserError(f"{folder} is neither a run nor an exported model")
    return RunDirectory.open(name)


def check_target(folder: Path) -> None:
    """Raises UserError unless `folder` is absent or empty: a card that people completed is never replaced."""
    path = check_folder(folder, EXPORTED_BY)
    if path.is_dir() and os.listdir(path):
        raise UserError(f"{folder} is not empty; name a folder that does not exist yet")


def plain_name(name: str) -> str:
    """Returns a run's name as an exported model may have it."""
    return name if re.fullmatch(_NAME, name) else re.sub(r"[^A-Za-z0-9_]", "_", name)[:200] or "_"


def read(folder: Path) -> ExportedModel:
    """Returns the description of an exported model, after comparing every file with its sha256.

    Raises UserError if a file is missing or was changed, or if the folder is no exported model.
    """
    file = folder / CONFIG
    tree = _json_object(file)
    if tree.get("format") != FORMAT:
        raise UserError(f"{folder} holds another kind of model, not one that export.py wrote")
    if tree.get("format_version") != VERSION:
        raise UserError(
            f"{folder} was exported in format {str(tree.get('format_version'))[:20]}; this version of the"
            f" project reads format {VERSION}"
        )
    try:
        digests = dict(tree["sha256"])
        is_intact = digests.pop(CONFIG) == sha256_of_json({**tree, "sha256": digests})
    except (KeyError, TypeError, ValueError, RecursionError):
        is_intact = False
    if not is_intact:
        raise _fault(file, "is damaged: its sha256 differs")
    try:
        exported = ExportedModel.model_validate(tree)
    except ValidationError as error:
        raise _fault(file, f"is damaged: {first_fault(error)}") from None
    _check_files(folder, digests)
    return exported


def _fault(file: Path, text: str) -> UserError:
    return UserError(f"{file} {text}; copy the exported folder again, or export the run again")


def _json_object(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or {} for another JSON value."""
    if not file.is_file():
        raise _fault(file, "is missing")
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise ValueError("too large")
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise _fault(file, "is damaged") from None
    return tree if isinstance(tree, dict) else {}


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    """Raises UserError unless each file that is read lies in the folder and has the sha256 of its export."""
    for name in (EXPERIMENT, WEIGHTS):
        if name not in digests:
            raise _fault(folder / CONFIG, f"has no sha256 of {name}")
    for name in digests:
        if not _READ.fullmatch(name) or name.endswith(("/.", "/..")):
            raise _fault(folder / CONFIG, f"names {name[:100]!r}, which no export holds")
        if not (folder / name).is_file():
            raise _fault(folder / name, "is missing")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise _fault(folder / name, "is a link to a file elsewhere")
    if (folder / EXPERIMENT).stat().st_size > _LARGEST_YAML:
        raise _fault(folder / EXPERIMENT, "is too large for an experiment")
    # An additional tokenizer file would change the tokens.
    found = {f"{TEXT_ENCODER}/{file.name}" for file in (folder / TEXT_ENCODER).glob("[!.]*")}
    if strange := sorted(found - digests.keys()):
        raise UserError(f"{folder / strange[0]} was not exported with the rest; remove it")
    total = sum((folder / name).stat().st_size for name in digests)
    with progress_bar(total, "B", f"{folder.name}: check", delay=2) as bar:
        for name, digest in digests.items():
            if sha256_of_file(folder / name, bar.update) != digest:
                raise _fault(folder / name, "is damaged: its sha256 differs")
