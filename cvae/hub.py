"""Model folders: given as such, in the hub's local cache, or fetched from the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path

from cvae.errors import UserError


def model_folder(
    source: str,
    complete: Callable[[Path], bool],
    wanted: Callable[[set[str]], list[str]],
    where: str,
    otherwise: str = "",
) -> Path:
    """The folder itself, or that of a hub model in the local cache, downloaded if need be.

    complete: whether a folder of the cache, perhaps of a download that was killed, holds what is needed.
    wanted: of the files of a repository, the patterns of those that are fetched. where: begins the error's
    line, as "text encoder 'x'"; otherwise: ends it. Raises UserError where the model cannot be had.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        cached = _cached(source)
        if cached is not None and complete(cached):
            return cached
        # One short question first: the downloader would retry for half a minute where no net is.
        files = {file.rfilename for file in HfApi().model_info(source, timeout=10).siblings or ()}
        return Path(snapshot_download(source, allow_patterns=wanted(files)))
    except HFValidationError:
        raise UserError(f"{where}: there is no such folder") from None
    except Exception as error:  # each release of the hub's client has its own family of errors
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{where} is neither here nor to be had from the Hugging Face hub ({reason}); on a machine"
            f" with network run: hf download {source} --local-dir DIR, copy DIR here and give its path"
            f" instead of the name{otherwise}"
        ) from None


def _cached(source: str) -> Path | None:
    # Not snapshot_download: it calls a snapshot incomplete that lacks files we never wanted.
    from huggingface_hub import try_to_load_from_cache

    for config in ("config.json", "vae/config.json"):
        found = try_to_load_from_cache(source, config)
        if isinstance(found, str):
            return Path(found.removesuffix(config))
    return None
