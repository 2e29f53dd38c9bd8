"""MLflow's store: the SQLite file and the experiments in it."""

import logging
import math
import re
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

from cvae.files import paths
from cvae.files.file_lock import file_lock

_log = logging.getLogger(__name__)


def create_store(uri: str) -> None:
    """Makes the SQLite file if it is not there: whole, and by one process at a time.

    MLflow alone lets two processes create the tables of one file at once, and both fail; whoever is
    killed on the way leaves a file that never works again.
    """
    if not uri.startswith("sqlite:///"):
        return
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(Path(f"{file}.lock"), math.inf):
        if file.exists():
            return
        _log.info("making the store %s", file)
        nascent = Path(f"{file}.new")
        nascent.unlink(missing_ok=True)
        # The experiment `Default`, too, keeps its files beside the database, not in the present folder.
        files = (file.resolve().parent / "mlruns").as_uri()
        SqlAlchemyStore(f"sqlite:///{nascent}", files).engine.dispose()
        nascent.rename(file)


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Of the MLflow experiment of that name, made or restored where it is not there."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server this process is the one that stores files, by default in whatever folder
        # it was started in. Beside its database they go where that goes.
        location = None
        if not uri.startswith(("http:", "https:")):
            beside = uri.removeprefix("sqlite:///")
            folder = Path(beside).resolve().parent if beside != uri else paths.home()
            location = (folder / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri()
        try:
            # The kind makes the UI show runs and charts first instead of traces of prompts.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            created: str = client.create_experiment(name, location, kind)
            return created
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        _log.warning("experiment %s was deleted in MLflow: restored", name)
        client.restore_experiment(experiment.experiment_id)
    there: str = experiment.experiment_id
    return there
