"""Model folders: given as such, in the local cache, or downloaded from the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path

from cvae.errors import UserError


def model_folder(
    source: str,
    complete: Callable[[Path], bool],
    wanted: Callable[[set[str]], list[str]],
    subject: str,
    otherwise: str = "",
) -> Path:
    """Returns `source` if it is a folder, else the local folder of that hub model, downloaded if need be.

    complete: returns whether a cached folder, perhaps of a killed download, holds what is needed. wanted:
    returns, for the names of a repository's files, the patterns of those to download. Raises UserError, whose
    message begins with `subject` and ends with `otherwise`, if the model is unavailable.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        cached = _cached(source)
        if cached is not None and complete(cached):
            return cached
        # A short request first: without network the downloader would retry for half a minute.
        files = {file.rfilename for file in HfApi().model_info(source, timeout=10).siblings or ()}
        return Path(snapshot_download(source, allow_patterns=wanted(files)))
    except HFValidationError:
        raise UserError(f"{subject}: there is no such folder") from None
    except Exception as error:  # the exceptions differ between releases of the hub's client
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{subject} is neither here nor to be had from the Hugging Face hub ({reason}); on a machine"
            f" with network run: hf download {source} --local-dir DIR, copy DIR here and give its path"
            f" instead of the name{otherwise}"
        ) from None


def _cached(source: str) -> Path | None:
    # snapshot_download would consider a snapshot without the unwanted files incomplete.
    from huggingface_hub import try_to_load_from_cache

    for config in ("config.json", "vae/config.json"):
        file = try_to_load_from_cache(source, config)
        if isinstance(file, str):
            return Path(file.removesuffix(config))
    return None
