"""The MLflow store: where it is, how it opens without noise, and one clear line when it is out of reach."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_core.errors import RetryError, UserError
from cola_core.files import new_file, scratch
from cola_core.locks import alone
from cola_core.secrets import mask
from tasks.places import home, main_checkout

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["Store", "database_file", "locked", "open_store", "temporaries", "tracking_uri"]

QUIET = {
    "DO_NOT_TRACK": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
BATCH = {"params": 100, "tags": 100, "metrics": 1000}  # what one call of log_batch may carry
BUSY = "another process has been writing to it for too long"  # MLflow waits 20 seconds for a file database
REFUSED = {"INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "BAD_REQUEST"}


@dataclass
class Store:
    """An open MLflow store; experiments are made when first asked for."""

    client: MlflowClient
    uri: str
    experiments: dict[str, str] = field(default_factory=dict)

    def experiment(self, name: str) -> str:
        """The id of an experiment, made or taken out of the bin if need be."""
        if name not in self.experiments:
            found = self.client.get_experiment_by_name(name)
            if found is not None and found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            self.experiments[name] = found.experiment_id if found else self._new_experiment(name)
        return self.experiments[name]

    def run(self, record: dict[str, Any], started: int) -> Run:
        """The run of a record (of any state, binned ones too), made RUNNING if there is none yet.

        Args:
            record: at least `id`, `stage` and `experiment`.
            started: milliseconds since 1970.
        """
        from mlflow.entities import ViewType

        experiment = self.experiment(record["experiment"])
        same = f"tags.`cola.record` = '{record['id']}'"
        found = self.client.search_runs([experiment], same, ViewType.ALL, max_results=1)
        tags = {"cola.record": record["id"], "mlflow.source.name": f"tasks/{record['stage'].split('@')[0]}.py"}
        return found[0] if found else self.client.create_run(experiment, started, tags, run_name=record["stage"])

    def run_that_made(self, experiment: str, path: Path, identity: str) -> str | None:
        """The id of the newest run that has `path` with this hash among its outputs, or None."""
        same = f"tags.`cola.out.{path.as_posix()}` = '{identity}'"
        found = self.client.search_runs([self.experiment(experiment)], same, max_results=1)
        return found[0].info.run_id if found else None

    def log(self, run_id: str, kind: str, items: Sequence[Any]) -> None:
        """Write params, tags or metrics (`kind`) in as few calls as MLflow allows."""
        for first in range(0, len(items), BATCH[kind]):
            part: dict[str, Any] = {kind: items[first : first + BATCH[kind]]}
            self.client.log_batch(run_id, **part)

    def _new_experiment(self, name: str) -> str:
        """Beside a database the artifacts lie in the main checkout; a server decides for itself."""
        place = None if self.uri.startswith("http") else str(main_checkout() / "mlartifacts" / name)
        # the tag opens MLflow's page on runs and models; its own guess would be the view for chat agents
        return self.client.create_experiment(name, place, {"mlflow.experimentKind": "custom_model_development"})


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the main checkout whatever workspace asks.

    Raises:
        UserError: a file store, which MLflow 3 no longer writes.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"sqlite:///{main_checkout() / 'mlflow.db'}"
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI: {mask(uri)!r} is no store; allowed: sqlite:///, postgresql://, mysql://, http(s)://"
        )
    return uri


@contextmanager
def open_store() -> Iterator[Store]:
    """Open the store; whatever goes wrong with it inside the block is told in one line.

    Raises:
        RetryError: unreachable, locked or full; nothing on disk is lost.
        UserError: the store refuses what it is asked, or its address is none.
    """
    uri = tracking_uri()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient, set_registry_uri, set_tracking_uri
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for logger in ("mlflow", "alembic", "urllib3"):  # what goes wrong is raised as well, and told in one line
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # The client resolves `models:/m-...` through the process's own address, which else is a file in the workspace.
    set_tracking_uri(uri)
    set_registry_uri(uri)
    try:
        # two processes that both make the tables of a new database get in each other's way; a server makes its own
        with nullcontext() if uri.startswith("http") else locked("store"):
            _make_tables(uri)
            store = Store(MlflowClient(uri, uri), uri)
            store.client.search_experiments(max_results=1)
        yield store
    except (MlflowException, SQLAlchemyError, OSError) as error:
        refused = getattr(error, "error_code", "") in REFUSED
        raise (UserError if refused else RetryError)(_line(uri, error)) from None


@contextmanager
def temporaries(name: str) -> Iterator[Path]:
    """A new folder, removed at the end, in which MLflow makes its temporary files too: a kill else leaves them in /tmp.

    For one thread of a process at a time.
    """
    before = tempfile.tempdir
    with scratch(home(), name) as folder:
        tempfile.tempdir = str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before


def database_file(uri: str) -> Path | None:
    """The file of a `sqlite:///` address, or None for a server and for addresses with options."""
    plain = uri.startswith("sqlite:///") and not uri.startswith("sqlite:///file:") and "?" not in uri
    return Path(uri.removeprefix("sqlite:///")) if plain else None


def _make_tables(uri: str) -> None:
    """Make a new database whole or not at all: MLflow takes seconds for it, and one cut off is of no use ever after."""
    from mlflow import MlflowClient

    file = database_file(uri)
    if file is None or (file.is_file() and file.stat().st_size):
        return
    with new_file(file) as temporary:
        MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold `.cola/<name>.lock`."""
    with alone(home() / f"{name}.lock"):
        yield


def _line(uri: str, error: BaseException) -> str:
    words = str(error).strip().splitlines() or [type(error).__name__]
    words = [BUSY] if "database is locked" in words[0] else words
    return mask(f"MLflow at {uri}: {words[0][:300]}; the records are kept, `cola sync` posts them later")
