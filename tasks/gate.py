"""The registry's gate: who is champion, why, and how often a test set has been asked.

All of it stands in the registry itself, beside the versions it is about: how often a test set was used and who was
champion as tags of the registered model, what was decided as tags of a version.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cola_core.config.report import PromoteConfig
from cola_core.errors import UserError
from cola_core.evaluation.gate import Decision, judge
from tasks.answered import Tested, read_answers
from tasks.publish import ALIAS
from tasks.store import Store

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
        UserError: there is no challenger, the champion was not scored on its rows, or their file is used up.
    """
    challenger = _version(store, name, wanted) if wanted else _alias(store, name, ALIAS)
    champion = _alias(store, name, CHAMPION)
    if challenger is None:
        raise UserError(f"{name}: no version is called {ALIAS}; `dvc repro` registers the trained chain as one")
    version, holder = str(challenger.version), str(champion.version) if champion else None
    if version == holder:
        raise SettledError(f"{name}: version {version} is the {CHAMPION} already; train another chain")
    if told := challenger.tags.get(JUDGED):
        return _completed(store, name, challenger, holder, json.loads(told))
    _refuse_same_chain(store, challenger)
    tested = Tested.of(challenger)
    mine, base = read_answers(store, challenger, tested)
    theirs = read_answers(store, champion, tested)[0] if champion else None
    use = _spend(store, name, tested.file, config)
    decision = judge(mine, theirs, base, config, seed=int(tested.rows, 16) % 2**31)
    note = json.dumps({"decision": decision.to_json(), "use": use, "rows": tested.rows, "champion": holder})
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


def _version(store: Store, name: str, number: str) -> ModelVersion:
    """
    Raises:
        UserError: the registry has lost it.
    """
    found = store.client.search_model_versions(f"name = '{name}' and version_number = {number}")
    if not found:
        raise UserError(f"{name}: version {number} is no longer in the registry; `dvc repro` registers its chain again")
    return found[0]


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


def _spend(store: Store, name: str, file: str, config: PromoteConfig) -> int:
    """Note one more use of a test file, and the level that it spends, whatever earlier ones spent; returns which it is.

    Other rows of the same file are the same test set: a level for each choice of them could be spent without end.

    Raises:
        UserError: there is not as much of the level left.
    """
    tags = store.client.get_registered_model(name).tags
    spent: dict[str, dict[str, float]] = json.loads(tags.get(USES, "{}"))
    before = spent.get(file, {"uses": 0, "level": 0.0})
    uses, level = int(before["uses"]), before["level"]
    share = config.level / config.uses
    if level + share > config.level * (1 + 1e-9):
        raise UserError(
            f"{name}: its test file was used {uses} times, which spent {level:.3g} of promote.level {config.level:g}, "
            f"and another use costs {share:.3g}; what is chosen on it any longer is fitted to it: name "
            "another in fetch.data.test"
        )
    spent[file] = {"uses": uses + 1, "level": level + share}
    store.client.set_registered_model_tag(name, USES, json.dumps(spent))
    return uses + 1
