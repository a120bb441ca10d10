"""One version in MLflow's registry per chain and form, made so that every step may be repeated."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import chdir
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cola_core
from cola_core.data.templates import template
from cola_core.errors import UserError
from cola_core.sealed import write_sealed
from cola_core.secrets import mask
from tasks.answered import Tested, keep_answers
from tasks.places import ARTIFACTS, home, main_checkout
from tasks.records import identity
from tasks.release import FOLDER, Release, pack, read_release, registration
from tasks.store import Store, temporaries

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["ALIAS", "publish", "restore"]

ALIAS = "challenger"
WHOLE = "cola.whole"  # the tag of a version that nothing is missing of, written last
REQUIREMENTS = (
    *("gguf", "jinja2", "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "safetensors"),
    *("torch", "transformers"),
)
DESCRIPTION = 5000  # characters that every database behind MLflow takes


def publish(store: Store, release: Release, card: str) -> str:
    """Make the chain's version if there is none, complete it if a call was cut off, and point `challenger` to it.

    Returns:
        the version.

    Raises:
        UserError: the artifacts hold another chain than the release.
    """
    model_id = _logged_model(store, release)
    version = _find(store, release, model_id) or _new_version(store, release, card, model_id)
    number, tested = str(version.version), Tested.evaluated()
    if not tested.tags().items() <= version.tags.items():
        keep_answers(store, model_id, tested)
    for key, value in {**_tags(release), **tested.tags()}.items():  # the scores of the evaluation that stands now
        store.client.set_model_version_tag(release.name, number, key, value)
    link = json.dumps([{"name": release.name, "version": number}])
    store.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})  # the UI's way to the version
    store.client.set_registered_model_alias(release.name, ALIAS, number)
    store.client.set_model_version_tag(release.name, number, WHOLE, "yes")
    return number


def restore(store: Store, new: bool) -> None:
    """Register again what registration.json of this checkout tells of, if the store has lost it or has it in part.

    Args:
        new: the store is another than before, so the versions of all workspaces come back too, in their old order;
            one that is missing in the same store was deleted by its user.
    """
    others = [main_checkout(), *(home() / "workspaces").glob("*/")] if new else []
    for place in sorted({Path.cwd(), *others}, key=_registered):
        _restore(store, place)


def _registered(place: Path) -> float:
    """Seconds since 1970; 0 for a checkout without a registration."""
    note = place / FOLDER / "registration.json"
    return note.stat().st_mtime if note.is_file() else 0.0


def _restore(store: Store, place: Path) -> None:
    try:
        found = read_release(place)
        if found is None or _is_whole(store, found[0]):
            return
        release, content = found
        with chdir(place):  # an artifact's path is the same in every checkout
            number = publish(store, release, (FOLDER / "README.md").read_text(encoding="utf-8"))
            again = registration(release, number, ALIAS, mask(store.uri))
            if any(content.get(key) != value for key, value in again.items()):
                write_sealed(FOLDER / "registration.json", "registration", again)
    except (FileNotFoundError, UserError) as error:
        print(f"sync: the model is not registered again: {error}", file=sys.stderr, flush=True)


def _is_whole(store: Store, release: Release) -> bool:
    """Whether a version serves this chain in this form and nothing of it is missing, its files neither."""
    return any(WHOLE in v.tags and _has_files(store, _model_id(v)) for v in _versions(store, release))


def _find(store: Store, release: Release, model_id: str) -> ModelVersion | None:
    return next((v for v in _versions(store, release) if _model_id(v) == model_id), None)


def _versions(store: Store, release: Release) -> Sequence[ModelVersion]:
    """All that serve this chain in this form."""
    same = f"name = '{release.name}' and tags.`cola.served` = '{release.served}'"
    return list(store.client.search_model_versions(same))


def _model_id(version: ModelVersion) -> str:
    return str(version.source).rpartition("/")[2]


def _has_files(store: Store, model_id: str) -> bool:
    """MLmodel is written last, so a model that has it has everything."""
    return any(file.path == "MLmodel" for file in store.client.list_logged_model_artifacts(model_id))


def _new_version(store: Store, release: Release, card: str, model_id: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        store.client.create_registered_model(release.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    description = card.partition("---\n")[2].partition("---\n")[2].strip()[:DESCRIPTION]
    return store.client.create_model_version(
        release.name, f"models:/{model_id}", tags=_tags(release), description=description, model_id=model_id
    )


def _logged_model(store: Store, release: Release) -> str:
    """The chain's model with its files; one that an earlier call left unfinished is finished."""
    experiment = store.experiment(release.name)
    same = f"tags.`cola.served` = '{release.served}'"
    found = store.client.search_logged_models([experiment], same, max_results=1)
    run_id = store.run_that_made(release.name, ARTIFACTS / "evaluate", identity(ARTIFACTS / "evaluate"))
    model = found[0] if found else _new_model(store, release, experiment, run_id)
    if not _has_files(store, model.model_id):
        if run_id:
            for name, value in release.scores.items():
                store.client.log_metric(run_id, name, value, model_id=model.model_id)
        _upload(store, release, model.model_id)
    store.client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _new_model(store: Store, release: Release, experiment: str, run_id: str | None) -> LoggedModel:
    """An empty model under a name that tells it from others where MLflow lists them side by side."""
    links = release.serve["final"]
    params = {"recipe": release.recipe, "links": links, "task": release.task, "seed": str(release.seed)}
    name = re.sub(r"[^\w-]", "-", f"{release.recipe}-m{links}-seed{release.seed}")  # MLflow refuses / : . and others
    return store.client.create_logged_model(experiment, name, run_id, _tags(release), params)


def _upload(store: Store, release: Release, model_id: str) -> None:
    from mlflow import pyfunc
    from mlflow.models import Model

    from tasks import served_model  # MLflow takes its path; the import makes it a dependency of the stage

    with temporaries("model") as folder:
        chain, model = folder / "chain", folder / "model"
        pack(release, chain)
        pyfunc.save_model(
            model,
            python_model=served_model.__file__,
            artifacts={"chain": str(chain)},
            code_paths=[str(Path(cola_core.__file__).parent)],
            pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in REQUIREMENTS],
            mlflow_model=Model(model_uuid=model_id, model_id=model_id),
            **_schema(release),
        )
        manifest = (model / "MLmodel").rename(folder / "MLmodel")
        store.client.log_model_artifacts(model_id, str(model))
        store.client.log_model_artifact(model_id, str(manifest))


def _schema(release: Release) -> dict[str, Any]:
    """Signature and example: the columns that the prompt's template reads, or `prompt` in their place."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema
    from pandas import DataFrame

    columns = sorted(template("prepare.prompt", release.serve["prepare"]["prompt"]).names)
    inputs: list[Any] = [ColSpec(DataType.string, name, required=False) for name in [*columns, "prompt"]]
    outputs: list[Any] = [ColSpec(DataType.string, "prediction")]
    signature = ModelSignature(Schema(inputs), Schema(outputs))
    return {"signature": signature, "input_example": DataFrame([{name: f"the text of {name}" for name in columns}])}


def _tags(release: Release) -> dict[str, str]:
    values = {"recipe": release.recipe, "task": release.task, "seed": release.seed, "chain": release.chain}
    values["served"] = release.served
    scores = {name: f"{value:.6g}" for name, value in release.scores.items()}
    return {f"cola.{name}": str(value) for name, value in {**values, **scores}.items()}
