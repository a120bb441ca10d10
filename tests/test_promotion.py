"""The gate in a real registry: who is champion, what is spent and remembered, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_registry import answered, checkout, context_of, hand_made_link, registered  # noqa: F401  fixtures

from cola_core.checksums import seal_folder
from cola_core.config.report import PromoteConfig
from cola_core.errors import UserError
from flows.cli import main as cola
from tasks import merge, prepare, register
from tasks.context import Context
from tasks.gate import CHAMPION, Judgement, SettledError, promote, rollback
from tasks.places import ARTIFACTS, link_dir
from tasks.store import open_store

NAME = "cola-moods"
QUICK = PromoteConfig(resamples=1000, guard_resamples=100, loss=1.0, calibration_error=1.0, f1=1.0)
ROWS = 60


def right(count: int, start: int = 0) -> list[bool]:
    """Answers of which `count` are right, from row `start` on."""
    return [start <= row < start + count for row in range(ROWS)]


def train(place: Path, seed: int, correct: list[bool], **answers: Any) -> None:
    """Another chain, registered as the next challenger with these answers."""
    context = context_of(place)
    shutil.rmtree(link_dir("2"))
    hand_made_link(context, 2, "causal", 2, seed)
    merge.main(context)
    answered("2", correct, base=10, **answers)
    register.main(context)


def judged(config: PromoteConfig = QUICK, version: str | None = None) -> Judgement:
    with open_store() as store:
        return promote(store, NAME, config, version)


def champion() -> str | None:
    with open_store() as store:
        found = store.client.get_registered_model(NAME).aliases.get(CHAMPION)
    return str(found) if found else None


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, call: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(f"mlflow.MlflowClient.{call}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_chain_that_beats_the_base_is_the_first_champion_and_one_that_beats_it_the_next(checkout: Path) -> None:  # noqa: F811
    train(checkout, 1, right(30))
    first = judged()
    assert (first.decision.verdict, first.use, first.champion) == ("promote", 1, None)
    assert champion() == first.version
    train(checkout, 2, right(55))
    second = judged()
    assert (second.decision.verdict, second.use, second.champion) == ("promote", 2, first.version)
    assert champion() == second.version != first.version
    with open_store() as store:
        told = json.loads(store.client.get_model_version(NAME, second.version).tags["cola.judged"])
        assert told["decision"]["reason"].startswith("more accurate than the champion by 41.67 points")
        assert rollback(store, NAME, "it answers rudely") == (first.version, second.version)
        assert store.client.get_model_version(NAME, second.version).tags["cola.rolled_back"] == "it answers rudely"
        with pytest.raises(UserError, match="no earlier champion to go back to"):
            rollback(store, NAME, "again")
    assert champion() == first.version
    with pytest.raises(SettledError, match="was judged before"):
        judged()
    assert champion() == first.version, "what was rolled back does not come back by itself"


def test_one_that_is_not_shown_to_be_better_stays_a_challenger_and_is_not_asked_again(checkout: Path) -> None:  # noqa: F811
    train(checkout, 1, right(50))
    judged()
    before = champion()
    train(checkout, 2, right(52))
    found = judged()
    assert found.decision.verdict == "abstain"
    assert "more test rows would tell" in found.decision.reason
    assert champion() == before
    for _ in range(2):
        with pytest.raises(
            SettledError, match=r"version \d was judged before \(abstain: not shown to be more accurate"
        ):
            judged()
    train(checkout, 3, right(53))
    assert judged().use == 3, "refusals spend nothing"


def test_the_champion_is_not_its_own_challenger(checkout: Path) -> None:  # noqa: F811
    train(checkout, 1, right(50))
    judged()
    with pytest.raises(SettledError, match="is the champion already"):
        judged()


def test_a_chain_is_judged_once_whatever_form_it_is_registered_in(checkout: Path) -> None:  # noqa: F811
    train(checkout, 1, right(12))
    assert judged().decision.verdict == "abstain"
    context = context_of(checkout)
    context.raw["register"]["merged"] = True
    register.main(context)
    with pytest.raises(SettledError, match="this chain was judged before, as version"):
        judged()


def test_answers_to_other_rows_are_not_compared_and_spend_nothing(checkout: Path) -> None:  # noqa: F811
    train(checkout, 1, right(50))
    judged()
    train(checkout, 2, right(55), prefix="other")
    with pytest.raises(UserError, match=r"version 2 was not scored on these test rows; in the checkout that trained"):
        judged()
    train(checkout, 3, right(51))
    assert judged().use == 2


def test_a_champion_that_is_scored_on_new_rows_as_well_keeps_its_place_there(checkout: Path) -> None:  # noqa: F811
    """Another choice of rows from the same file spends what is left; another file has a level of its own."""
    train(checkout, 1, right(50))
    judged()
    train(checkout, 1, right(30), prefix="other")
    with pytest.raises(SettledError, match="version 2 is the champion already"):
        judged()
    train(checkout, 2, right(55), prefix="other")
    found = judged()
    assert (found.champion, found.use) == ("2", 2)
    assert found.decision.gains["champion"]["difference"] == pytest.approx(25 / ROWS), "of the new rows"
    write_data(checkout, "test", 30)
    train(checkout, 2, right(20), prefix="other")
    train(checkout, 3, right(50), prefix="other")
    found = judged()
    assert found.use == 1
    assert found.decision.gains["champion"]["difference"] == pytest.approx(30 / ROWS), "of the file, not of its like"
    write_data(checkout, "train", 40)
    train(checkout, 4, right(60), prefix="other")
    assert judged().use == 2, "the test file is the same"


def write_data(place: Path, name: str, count: int) -> None:
    """Prepare again, with other rows in one of the files."""
    file = ARTIFACTS / f"fetch/data/{name}.jsonl"
    rows = [{"text": f"{name} {number}", "label": ["good", "poor"][number % 2]} for number in range(count)]
    file.write_text("\n".join(map(json.dumps, rows)))
    seal_folder(file.parent)
    prepare.main(Context("prepare", None, context_of(place).raw))


def test_a_version_that_the_registry_lost_is_told(checkout: Path) -> None:  # noqa: F811
    train(checkout, 1, right(50))
    with open_store() as store:
        store.client.delete_model_version(NAME, "2")
    with pytest.raises(UserError, match="cola-moods: version 2 is no longer in the registry"):
        judged(version="2")


def test_a_test_set_is_used_up(checkout: Path) -> None:  # noqa: F811
    few = QUICK.model_copy(update={"uses": 2})
    for seed in (1, 2):
        train(checkout, seed, right(11))
        judged(few)
    train(checkout, 3, right(60))
    for config in (few, QUICK.model_copy(update={"uses": 1})):
        with pytest.raises(UserError, match=r"file was used 2 times, which spent 0\.05 of promote\.level 0\.05"):
            judged(config)
    assert champion() is None


def test_what_earlier_uses_spent_counts_however_the_level_is_shared_now(checkout: Path) -> None:  # noqa: F811
    train(checkout, 1, right(11))
    judged(QUICK.model_copy(update={"uses": 2}))
    thirds = QUICK.model_copy(update={"uses": 3})
    train(checkout, 2, right(11))
    assert judged(thirds).use == 2
    train(checkout, 3, right(60))
    with pytest.raises(UserError, match=r"spent 0\.0417 of promote\.level 0\.05, and another use costs 0\.0167"):
        judged(thirds)
    assert judged(QUICK.model_copy(update={"uses": 10})).use == 3


def test_a_run_judges_its_own_version_whatever_was_registered_meanwhile(checkout: Path) -> None:  # noqa: F811
    train(checkout, 1, right(30))
    train(checkout, 2, right(55))
    assert judged(version="2").version == champion() == "2", "the first is the fixture's"
    assert judged().version == champion() == "3"


def test_cut_off_before_the_alias_moves_the_next_call_moves_it_without_another_use(
    checkout: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(checkout, 1, right(50))
    with killed_at(monkeypatch, "set_registered_model_alias"):
        judged()
    assert champion() is None
    found = judged()
    assert (found.decision.verdict, found.use) == ("promote", 1)
    assert champion() == found.version


def test_a_promotion_that_was_cut_off_is_not_completed_over_another_champion(
    checkout: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(checkout, 1, right(20))
    first = judged()
    train(checkout, 2, right(45))
    with killed_at(monkeypatch, "set_registered_model_alias"):
        judged()
    with open_store() as store:
        store.client.set_registered_model_alias(NAME, CHAMPION, "1")  # by hand, meanwhile
    with pytest.raises(
        SettledError, match=f"was judged when version {first.version} was champion, and there is another now"
    ):
        judged()
    assert champion() == "1"


def test_cut_off_before_the_decision_is_noted_the_use_is_spent_all_the_same(
    checkout: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(checkout, 1, right(50))
    with killed_at(monkeypatch, "set_model_version_tag"):
        judged()
    assert judged().use == 2, "it may have been looked at"


def test_a_version_without_answers_is_told(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("tasks.answered.Tested.tags", lambda _: {})
    train(checkout, 1, right(50))
    with pytest.raises(UserError, match=r"version \d holds no answers to test rows"):
        judged()


def test_without_a_challenger_the_line_says_how_to_get_one(checkout: Path) -> None:  # noqa: F811
    with open_store() as store, pytest.raises(UserError, match="nobody: no version is called challenger"):
        promote(store, "nobody", QUICK)


def test_the_command_line_tells_the_decision_and_the_numbers(
    checkout: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(checkout, 1, right(40))
    assert cola(["promote"]) == 0
    told = capsys.readouterr().out
    assert "cola-moods version 2: promote: more accurate than the base by 50.00 points" in told
    assert "use 1 of this test set" in told
    assert cola(["promote", NAME]) == 2
    assert "is the champion already" in capsys.readouterr().err
    train(checkout, 2, right(55))
    assert cola(["promote"]) == 0
    assert "calibration error: worse by -0.0167" in capsys.readouterr().out
    assert cola(["rollback", "--reason", "a bad night"]) == 0
    assert "cola-moods: version 2 is champion again, in place of 3: a bad night" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert cola(["promote"]) == 75
