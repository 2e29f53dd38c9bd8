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
    """Creates the SQLite file of a URI unless it exists: whole, and by one process at a time.

    MLflow alone lets two processes create the tables of one file at once, and both fail; a process
    that is killed meanwhile leaves a file that never works again.
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
        temporary = Path(f"{file}.new")
        temporary.unlink(missing_ok=True)
        # The artifacts of the experiment `Default` go next to the database, not into the current folder.
        artifacts = (file.resolve().parent / "mlruns").as_uri()
        SqlAlchemyStore(f"sqlite:///{temporary}", artifacts).engine.dispose()
        temporary.rename(file)


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Returns the id of the MLflow experiment of a name, which is created or restored if necessary."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = None
        if not uri.startswith(("http:", "https:")):
            # Without a server this process stores artifacts, by default in the current folder.
            database = uri.removeprefix("sqlite:///")
            folder = Path(database).resolve().parent if database != uri else paths.home()
            location = (folder / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri()
        try:
            # This kind makes the UI show runs and charts first instead of traces of prompts.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, location, kind))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        _log.warning("experiment %s was deleted in MLflow: restored", name)
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)
