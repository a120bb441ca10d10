"""A version's answers to test rows, kept beside it in the registry: one folder per set of rows, for the gate."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_core.checksums import check_files
from cola_core.errors import UserError
from cola_core.evaluation.gate import Scored
from cola_core.sealed import read_sealed
from tasks.places import ARTIFACTS
from tasks.store import Store, temporaries

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["Tested", "keep_answers", "predictions_of", "read_answers"]

PLACE = "answers"
STAGES = ("evaluate", "evaluate_base")  # the chain's answers, and its base's


@dataclass(frozen=True)
class Tested:
    """Which rows a version was scored on, as its tags tell it.

    file: sha256 of the file that they were taken from; rows: a hash of that, their ids and right answers.
    """

    file: str
    rows: str

    @classmethod
    def evaluated(cls) -> Tested:
        """That of the evaluation which stands in the artifacts.

        Raises:
            UserError: it is not what was written.
        """
        for stage in STAGES:
            check_files(ARTIFACTS / stage)
        files = read_sealed(ARTIFACTS / "prepare/manifest.json", "manifest")["files"]
        file = next(files[name] for name in sorted(files))  # test comes before train
        table = predictions_of(ARTIFACTS / STAGES[0])
        rows = json.dumps([file, table["id"], table["gold"]])
        return cls(file, hashlib.sha256(rows.encode()).hexdigest()[:16])

    @classmethod
    def of(cls, version: ModelVersion) -> Tested:
        """That of a version's newest evaluation.

        Raises:
            UserError: the version tells of none.
        """
        try:
            return cls(version.tags["cola.test"], version.tags["cola.rows"])
        except KeyError:
            raise UserError(
                f"{version.name}: version {version.version} holds no answers to test rows, as versions made before 0.4 "
                "do not; register its chain again"
            ) from None

    def tags(self) -> dict[str, str]:
        """What `of` reads."""
        return {"cola.test": self.file, "cola.rows": self.rows}


def predictions_of(folder: Path) -> dict[str, list[Any]]:
    """The columns that an evaluation's stage left in `folder`, a value per test row.

    Raises:
        OSError: there are none.
    """
    import pyarrow as pa

    table: dict[str, list[Any]] = pa.ipc.open_stream(_predictions(folder).read_bytes()).read_all().to_pydict()
    return table


def keep_answers(store: Store, model_id: str, tested: Tested) -> None:
    """Lay the answers of the artifacts beside a model's files; those to other rows stay."""
    with temporaries("answers") as folder:
        for stage in STAGES:
            (folder / stage).mkdir()
            shutil.copyfile(_predictions(ARTIFACTS / stage), _predictions(folder / stage))
        store.client.log_model_artifacts(model_id, str(folder), f"{PLACE}/{tested.rows}")


def read_answers(store: Store, version: ModelVersion, tested: Tested) -> tuple[Scored, Scored]:
    """What a version and its base answered to the rows of `tested`.

    Raises:
        UserError: it was not evaluated on them.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with temporaries("answers") as folder:
        try:
            address = f"models:/{version.name}/{version.version}/{PLACE}/{tested.rows}"
            found = Path(download_artifacts(address, dst_path=str(folder), tracking_uri=store.uri))
            mine, base = (predictions_of(found / stage) for stage in STAGES)
        except (MlflowException, OSError):
            raise UserError(
                f"{version.name}: version {version.version} was not scored on these test rows; in the checkout that "
                "trained it, give fetch.data, prepare and evaluate their present values and run `dvc repro`"
            ) from None
    final = max((name.split("_")[1] for name in mine if name.startswith("links_")), key=int)
    return _scored(mine, f"links_{final}"), _scored(base, "base")


def _predictions(folder: Path) -> Path:
    return folder / "predictions.arrow"


def _scored(table: dict[str, list[Any]], model: str) -> Scored:
    columns = (table.get(f"{model}_{what}", []) for what in ("predicted", "loss", "confidence"))
    return Scored(table["gold"], *columns)
