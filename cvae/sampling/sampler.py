"""Opens trained models: runs and exported folders.

For example:

    from cvae.sampling import load

    model = load("runs/demo")
    images = model.draw(["a red bus on a street"], 8)  # uint8 (1, 8, C, H, W)
"""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cvae.config.experiment import Experiment, load_experiment
from cvae.data.experiment_data import open_data
from cvae.errors import UserError
from cvae.models.backbone import ImageShape
from cvae.models.cvae import Cvae, build_model
from cvae.run import checkpoint
from cvae.run.directory import RunDirectory
from cvae.sampling import export_format
from cvae.sampling.export_format import ExportedModel
from cvae.sampling.trained_model import TrainedModel


def load(place: str | Path | RunDirectory, device: torch.device | None = None) -> TrainedModel:
    """Opens a run (its name, its folder, or "latest") or an exported folder.

    device: by default the GPU if there is one, else the CPU. Raises UserError if `place` is neither, or if
    its files are damaged.
    """
    model = place if isinstance(place, RunDirectory) else export_format.find_model(str(place))
    return (
        load_run(model, device) if isinstance(model, RunDirectory) else load_export(model, device)
    )


def load_run(run: RunDirectory, device: torch.device | None = None) -> TrainedModel:
    """Opens a run with the weights of its best intact checkpoint (the averaged weights if it has them).

    Raises UserError if there is no checkpoint yet or if the run's data are not prepared here.
    """
    experiment = run.experiment()
    weights, step = checkpoint.load_weights(run.checkpoints, warnings.warn)
    data = open_data(experiment)
    store, encoder = data.store, experiment.data.text_encoder
    return TrainedModel(
        name=run.name,
        experiment=experiment,
        model=_model(experiment, data.image_shape, data.condition_dim, weights, device, store.path),
        step=step,
        classes=store.manifest.classes or [],
        encoder_source=encoder,
        encoder_entry=store.manifest.text_encoders[encoder] if encoder else None,
        data_digest=data.digest,
        run=run,
        seed=experiment.seed,
    )


def load_export(folder: Path, device: torch.device | None = None) -> TrainedModel:
    """Opens an exported folder, after comparing each of its files with its sha256.

    Raises UserError if a file is missing or was changed, or if the folder is no exported model.
    """
    exported = export_format.read(folder)
    experiment = load_experiment(folder / export_format.EXPERIMENT)
    file = folder / export_format.WEIGHTS
    try:
        weights = load_file(file)
    except (SafetensorError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file} is damaged: {str(error)[:150]}") from None
    _check_sizes(folder, exported, experiment)
    encoder, shape, width = exported.text_encoder, exported.image_shape, exported.condition_dim
    # The folder model/ of a run, which MLflow gets, has no copy of the encoder: it is found by its name.
    copy = folder / export_format.TEXT_ENCODER
    return TrainedModel(
        name=exported.name,
        experiment=experiment,
        model=_model(experiment, shape, width, weights, device, folder),
        step=exported.step,
        classes=exported.classes,
        encoder_source=(str(copy) if copy.is_dir() else encoder.name) if encoder else None,
        encoder_entry=encoder.entry if encoder else None,
        data_digest=exported.data.digest,
        run=None,
        seed=experiment.seed,
    )


def _check_sizes(folder: Path, exported: ExportedModel, experiment: Experiment) -> None:
    """Raises UserError unless the sizes in config.json are those that the experiment requires."""
    encoder, size = exported.text_encoder, experiment.data.image_size
    text_dim = encoder.entry.dim if encoder and experiment.data.text_encoder else 0
    widths = {"text": text_dim, "label": len(exported.classes)}
    width = widths.get(experiment.model.condition, exported.condition_dim)
    if exported.condition_dim != width or exported.image_shape[1:] != (size, size):
        file = folder / export_format.CONFIG
        raise UserError(f"{file} is damaged: its sizes are not those of {export_format.EXPERIMENT}")


def _model(
    experiment: Experiment,
    shape: ImageShape,
    condition_dim: int,
    weights: dict[str, Tensor],
    device: torch.device | None,
    source: Path,
) -> Cvae:
    """Returns the model with these weights, in eval mode.

    Raises UserError if the weights have other names, shapes or types than the model's, or if one is not
    finite. source: the store or the folder that set the shapes.
    """
    # First without memory: sizes that do not fit may be beyond all measure.
    with torch.device("meta"):
        expected = build_model(experiment.model, shape, condition_dim, experiment.seed).state_dict()
    if reason := _misfit(weights, expected):
        raise UserError(
            f"{experiment.name}: the weights do not fit {source} ({reason}): the data were prepared"
            " differently, or the weights are damaged or of another version of this project"
        )
    model = build_model(experiment.model, shape, condition_dim, experiment.seed)
    model.load_state_dict(weights)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval()


def _misfit(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Returns why these weights cannot be those of a model with the `expected` ones, or None if they can."""
    for name in sorted(weights.keys() ^ expected.keys()):
        return f"{name[:80]} is {'missing' if name in expected else 'not of this model'}"
    for name, tensor in weights.items():
        actual, needed = (
            f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (tensor, expected[name])
        )
        if actual != needed:
            return f"{name} is {actual} instead of {needed}"
        if not torch.isfinite(tensor).all():
            return f"{name} has values that are not finite"
    return None
