"""A run's model as MLflow's `mlflow.pyfunc` loads it.

    model = mlflow.pyfunc.load_model("runs:/<run id>/model")
    images = model.predict(["a red bus on a street"], params={"count": 8, "seed": 0})  # uint8 (1, 8, C, H, W)

MLflow imports this module, which logged models name, for its function _load_pyfunc; nothing here needs MLflow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cvae.errors import UserError
from cvae.sampling.inference import Images
from cvae.sampling.sampler import load_export
from cvae.sampling.trained_model import TrainedModel


class Drawing:
    """The model that MLflow wraps; `trained` gives access to everything besides drawing."""

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Images:
        """Returns uint8 (M, count, C, H, W): `count` images for each of M prompts.

        model_input: captions, or classes by name or number, as a list, an array, a Series or a DataFrame of
        one column; anything empty, or None, for a model without condition. params: count (1), and seed of
        the noise (the run's). Raises UserError as TrainedModel.draw does, and for an unknown parameter.
        """
        defaults = {"count": 1, "seed": self.trained.seed}
        values = {**defaults, **(params or {})}
        if unknown := sorted(values.keys() - defaults.keys()):
            raise UserError(f"{unknown[0]}: no such parameter; there are {', '.join(defaults)}")
        trained = replace(self.trained, seed=int(values["seed"]))
        return trained.draw(_prompts(model_input), int(values["count"]))


def _prompts(model_input: Any) -> Sequence[str | int] | None:
    values = np.asarray([] if model_input is None else model_input, dtype=object)
    if values.ndim == 2 and values.shape[1] != 1:
        raise UserError(f"one column of captions or classes is needed, not {values.shape[1]}")
    return list(values.reshape(-1)) or None


def _load_pyfunc(folder: str) -> Drawing:
    """Loads a model for MLflow. Raises UserError if a file is damaged."""
    return Drawing(load_export(Path(folder)))
