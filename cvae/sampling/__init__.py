"""Trained models in use: drawing, reconstruction, export, labelled pictures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae.sampling.sampler import load as load


def __getattr__(name: str) -> Any:
    """Returns the public function `load`, which is imported late because it imports PyTorch."""
    if name == "load":
        from cvae.sampling.sampler import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
