"""The registry's gate: who is champion, why, and how often a test set has been asked.

All of it stands in the registry itself, beside the versions it is about: how often a test set was used and who was
champion as tags of the registered model, what was decided as tags of a version.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_core.config.report import PromoteConfig
from cola_core.errors import UserError
from cola_core.evaluation.gate import Decision, Scored, judge
from tasks.publish import ALIAS
from tasks.release import ANSWERS, BASE_ANSWERS
from tasks.store import Store, temporaries

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["CHAMPION", "Judgement", "SettledError", "promote", "rollback"]

CHAMPION = "champion"
JUDGED, HISTORY, USES, RETURNED = "cola.judged", "cola.champions", "cola.uses", "cola.rolled_back"


class SettledError(UserError):
    """The challenger is the champion, or its chain was judged before: there is nothing to decide."""


@dataclass(frozen=True)
class Judgement:
    """What became of a version, and which use of the test set it was."""

    name: str
    version: str
    champion: str | None
    decision: Decision
    use: int


def promote(store: Store, name: str, config: PromoteConfig, wanted: str | None = None) -> Judgement:
    """Judge the challenger of `name`, or the version that is wanted, once, and make it champion if it may be.

    The use of the test set is noted before anything is looked at, the decision before the alias moves; a call that was
    cut off between the two is completed by the next one.

    Raises:
        SettledError: the challenger is the champion, or its chain was judged before.
        UserError: there is no challenger, the two were scored on different rows, or the test set is used up.
    """
    challenger = store.client.get_model_version(name, wanted) if wanted else _alias(store, name, ALIAS)
    champion = _alias(store, name, CHAMPION)
    if challenger is None:
        raise UserError(f"{name}: no version is called {ALIAS}; `dvc repro` registers the trained chain as one")
    version, holder = str(challenger.version), str(champion.version) if champion else None
    if version == holder:
        raise SettledError(f"{name}: version {version} is the {CHAMPION} already; train another chain")
    if told := challenger.tags.get(JUDGED):
        return _completed(store, name, challenger, holder, json.loads(told))
    _refuse_same_chain(store, challenger)
    mine, base, rows = _answers(store, challenger)
    theirs = _champion_answers(store, challenger, champion, rows) if champion else None
    use = _spend(store, name, rows, config)
    decision = judge(mine, theirs, base, config, seed=int(rows, 16) % 2**31)
    note = json.dumps({"decision": decision.to_json(), "use": use, "rows": rows, "champion": holder})
    store.client.set_model_version_tag(name, version, JUDGED, note)
    if decision.verdict == "promote":
        _crown(store, name, version, holder)
    return Judgement(name, version, holder, decision, use)


def rollback(store: Store, name: str, reason: str) -> tuple[str, str]:
    """Make the champion before this one champion again; returns both versions, the new one first.

    Raises:
        UserError: there is no champion, or none before it.
    """
    champion = _alias(store, name, CHAMPION)
    earlier = [each for each in _history(store, name) if champion and each != str(champion.version)]
    if champion is None or not earlier:
        raise UserError(f"{name}: no earlier {CHAMPION} to go back to")
    version, before = str(champion.version), earlier[-1]
    store.client.set_model_version_tag(name, version, RETURNED, reason)
    store.client.set_registered_model_alias(name, CHAMPION, before)
    store.client.set_registered_model_tag(name, HISTORY, json.dumps(earlier[:-1]))
    return before, version


def _alias(store: Store, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points to, or none."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _completed(
    store: Store, name: str, challenger: ModelVersion, holder: str | None, told: dict[str, Any]
) -> Judgement:
    """A promotion whose alias was not moved any more is completed; any other judgement stands."""
    version, decision = str(challenger.version), Decision(**told["decision"])
    if decision.verdict != "promote" or version in _history(store, name) or RETURNED in challenger.tags:
        raise SettledError(f"{name}: version {version} was judged before ({decision.verdict}: {decision.reason})")
    if told["champion"] != holder:
        was = f"version {told['champion']} was {CHAMPION}" if told["champion"] else f"there was no {CHAMPION}"
        raise SettledError(f"{name}: version {version} was judged when {was}, and there is another now")
    _crown(store, name, version, holder)
    return Judgement(name, version, holder, decision, told["use"])


def _refuse_same_chain(store: Store, challenger: ModelVersion) -> None:
    same = f"name = '{challenger.name}' and tags.`cola.chain` = '{challenger.tags['cola.chain']}'"
    for version in store.client.search_model_versions(same):
        if JUDGED in version.tags:
            raise SettledError(f"{challenger.name}: this chain was judged before, as version {version.version}")


def _crown(store: Store, name: str, version: str, holder: str | None) -> None:
    """Note who was champion, then move the alias: one row of the registry, so there is a champion at any moment."""
    history = _history(store, name)
    if holder and history[-1:] != [holder]:
        store.client.set_registered_model_tag(name, HISTORY, json.dumps([*history, holder]))
    store.client.set_registered_model_alias(name, CHAMPION, version)


def _history(store: Store, name: str) -> list[str]:
    """Versions that were champion before, oldest first."""
    found: list[str] = json.loads(store.client.get_registered_model(name).tags.get(HISTORY, "[]"))
    return found


def _spend(store: Store, name: str, rows: str, config: PromoteConfig) -> int:
    """Note one more use of a test set, and the level that it spends, whatever earlier ones spent; returns which it is.

    Raises:
        UserError: there is not as much of the level left.
    """
    tags = store.client.get_registered_model(name).tags
    spent: dict[str, dict[str, float]] = json.loads(tags.get(USES, "{}"))
    before = spent.get(rows, {"uses": 0, "level": 0.0})
    uses, level = int(before["uses"]), before["level"]
    share = config.level / config.uses
    if level + share > config.level * (1 + 1e-9):
        raise UserError(
            f"{name}: its test rows were used {uses} times, which spent {level:.3g} of promote.level {config.level:g}, "
            f"and another use costs {share:.3g}; what is chosen on them any longer is fitted to them: name new test "
            "rows in fetch.data.test"
        )
    spent[rows] = {"uses": uses + 1, "level": level + share}
    store.client.set_registered_model_tag(name, USES, json.dumps(spent))
    return uses + 1


def _champion_answers(store: Store, challenger: ModelVersion, champion: ModelVersion, rows: str) -> Scored:
    theirs, _, other = _answers(store, champion)
    if other != rows:
        raise UserError(
            f"{challenger.name}: version {challenger.version} and the {CHAMPION}, version {champion.version}, were "
            "scored on different test rows; register one of them again with the other's evaluate and prepare sections"
        )
    return theirs


def _answers(store: Store, version: ModelVersion) -> tuple[Scored, Scored, str]:
    """A version's answers, those of its base, and a hash of the rows: ids and right answers."""
    mine, base = (_table(store, version, file) for file in (ANSWERS, BASE_ANSWERS))
    rows = hashlib.sha256(json.dumps([mine["id"], mine["gold"]]).encode()).hexdigest()[:16]
    final = max((name.split("_")[1] for name in mine if name.startswith("links_")), key=int)
    return _scored(mine, f"links_{final}"), _scored(base, "base"), rows


def _scored(table: dict[str, list[Any]], model: str) -> Scored:
    columns = (table.get(f"{model}_{what}", []) for what in ("predicted", "loss", "confidence"))
    return Scored(table["gold"], *columns)


def _table(store: Store, version: ModelVersion, file: str) -> dict[str, list[Any]]:
    import pyarrow as pa
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with temporaries("answers") as folder:
        try:
            address = f"models:/{version.name}/{version.version}/artifacts/chain/{file}"
            found = download_artifacts(address, dst_path=str(folder), tracking_uri=store.uri)
        except (MlflowException, OSError):
            raise UserError(
                f"{version.name}: version {version.version} holds no answers to test rows, as versions made before 0.4 "
                "do not; register its chain again"
            ) from None
        table: dict[str, list[Any]] = pa.ipc.open_stream(Path(found).read_bytes()).read_all().to_pydict()
    return table
