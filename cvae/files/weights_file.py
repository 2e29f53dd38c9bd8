"""The only writer of .safetensors files; apart from paths.py because it imports torch."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from cvae.files.paths import share


def write_weights(tensors: Mapping[str, Tensor], path: Path, from_pytorch: bool = False) -> None:
    """Writes tensors by name to a .safetensors file whose permissions follow the umask.

    from_pytorch: adds the header that transformers and diffusers expect of a model's weights. Raises
    OSError or SafetensorError (disk full), after which a part of the file may be left.
    """
    save_file(dict(tensors), path, metadata={"format": "pt"} if from_pytorch else None)
    share(path)
