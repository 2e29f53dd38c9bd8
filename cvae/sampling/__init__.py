"""A trained model in use: it draws, reconstructs, is exported, and labels its pictures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvae.sampling.sampler import load as load


def __getattr__(name: str) -> Any:
    """Returns `load`, the public entry; it is imported late, since it imports PyTorch."""
    if name == "load":
        from cvae.sampling.sampler import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
