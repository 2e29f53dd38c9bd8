"""Logs a run's model/ in MLflow, in the form that mlflow.pyfunc loads."""

import tempfile
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.utils import environment

import cvae
from cvae.config.experiment import load_experiment
from cvae.sampling.export_format import CONFIG, EXPERIMENT, ExportedModel

NAME = "model"
# MLflow would search every installed package, for seconds, to warn of versions that are not these.
environment.warn_dependency_requirement_mismatches = lambda model_requirements: None
_OLD_SERVER = {"ENDPOINT_NOT_FOUND", "RESOURCE_DOES_NOT_EXIST", "NOT_IMPLEMENTED"}
# The packages that cvae/pyfunc.py imports.
_REQUIREMENTS = "torch numpy pandas safetensors pydantic pyyaml pillow matplotlib tqdm scikit-learn transformers"


def log_model(client: MlflowClient, run_id: str, source: Path) -> None:
    """Creates or replaces the run's model `runs:/<run_id>/model`; may be called again at any time.

    Raises MLflow's exceptions, and OSError or ValueError if the folder is damaged.
    """
    exported = ExportedModel.model_validate_json((source / CONFIG).read_bytes())
    with tempfile.TemporaryDirectory(dir=source.parent, prefix=".mlflow-") as scratch:
        folder = Path(scratch, NAME)
        _save(source, exported, folder)
        try:
            model = _find_or_create(client, run_id)
        except MlflowException as error:
            if error.error_code not in _OLD_SERVER:
                raise
            # A server before MLflow 3 has no logged models, but loads the same folder from the artifacts.
            client.log_artifacts(run_id, str(folder), NAME)
            return
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    outputs = client.get_run(run_id).outputs
    logged = outputs.model_outputs if outputs else []
    if model.model_id not in [output.model_id for output in logged]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, exported.step)])


def _find_or_create(client: MlflowClient, run_id: str) -> LoggedModel:
    experiment = client.get_run(run_id).info.experiment_id
    query = f"name = '{NAME}' AND source_run_id = '{run_id}'"
    models = client.search_logged_models([experiment], query)
    return models[0] if models else client.create_logged_model(experiment, NAME, run_id)


def _save(source: Path, exported: ExportedModel, folder: Path) -> None:
    experiment = load_experiment(source / EXPERIMENT)
    packages = _REQUIREMENTS.split()
    if experiment.model.backbone == "ldm":
        packages.append("diffusers")
    shape = (-1, -1, *exported.image_shape)
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module="cvae.pyfunc",
        data_path=str(source),
        # The loading machine may lack this project, and draws with the code that trained the model.
        code_paths=[str(Path(cvae.__file__).parent)],
        # No index has the version of a local build, such as 2.13.0+cpu.
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in packages],
        signature=ModelSignature(
            outputs=Schema([TensorSpec(np.dtype("uint8"), shape)]),
            params=ParamSchema(
                [ParamSpec("count", "long", 1), ParamSpec("seed", "long", experiment.seed)]
            ),
        ),
    )
