"""Gates, exactly; and the alias `champion`, which moves only for who started from it, and once however often it crashed."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_lineage import published, store_at

from stages.artifacts import Model
from stages.errors import InputError
from tasks.lineage import trace
from tasks.promote import CHAMPION, Gate, Promotion, champion, judge, promote
from tasks.references import resolve
from tasks.store import Store

CANDIDATE = {"win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65, "kl": 2.0, "length": 30.0, "accuracy": 0.8}
BEFORE = {"length": 20.0, "accuracy": 0.82, "truncated": 0.1}
STRICT = Gate.model_validate({"max_kl": 2, "max_length_ratio": 1.5, "no_regression": [{"metric": "accuracy", "drop": 0.03}]})


def test_who_holds_every_limit_passes_and_all_of_them_are_told() -> None:
    verdict = judge(STRICT, CANDIDATE, BEFORE)
    assert verdict.passed
    assert verdict.reasons == [
        "win rate 0.600, surely above 0.550 (must be surely above 0.5)",
        "KL 2 nats (at most 2 allowed)",
        "mean length 30.0 tokens, the champion's 20.0 (at most 1.5 times it allowed)",
        "accuracy 0.8, the champion's 0.82 (may be 0.03 lower)",
    ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"win_rate_low": 0.5}, "win rate 0.600, surely above 0.500 (must be surely above 0.5)"),
        ({"kl": 2.001}, "KL 2 nats (at most 2 allowed)"),
        ({"length": 30.01}, "mean length 30.0 tokens, the champion's 20.0 (at most 1.5 times it allowed)"),
        ({"accuracy": 0.78}, "accuracy 0.78, the champion's 0.82 (may be 0.03 lower)"),
        ({"kl": float("nan")}, "KL nan nats (at most 2 allowed)"),
        ({"win_rate_low": float("nan")}, "win rate 0.600, surely above nan (must be surely above 0.5)"),
        ({"accuracy": float("nan")}, "accuracy nan, the champion's 0.82 (may be 0.03 lower)"),
    ],
)
def test_what_fails_is_told_alone(changed: dict[str, float], reason: str) -> None:
    verdict = judge(STRICT, CANDIDATE | changed, BEFORE)
    assert not verdict.passed
    assert verdict.reasons == [reason]


def test_all_that_fails_is_told() -> None:
    verdict = judge(STRICT, CANDIDATE | {"win_rate_low": 0.1, "kl": 9.0}, BEFORE)
    assert [reason.split()[0] for reason in verdict.reasons] == ["win", "KL"]


def test_a_fault_may_not_grow() -> None:
    gate = Gate.model_validate({"no_regression": [{"metric": "truncated", "drop": 0.05, "better": "lower"}]})
    assert judge(gate, CANDIDATE | {"truncated": 0.14}, BEFORE).passed
    verdict = judge(gate, CANDIDATE | {"truncated": 0.2}, BEFORE)
    assert verdict.reasons == ["truncated 0.2, the champion's 0.1 (may be 0.05 higher)"]


def test_limits_that_are_unset_are_not_asked_for() -> None:
    gate = Gate(max_kl=None, max_length_ratio=None)
    assert judge(gate, {"win_rate": 0.6, "win_rate_low": 0.51}, {}).passed
    with pytest.raises(InputError, match="asks for kl, which evaluate did not measure; it measured win_rate"):
        judge(Gate(max_length_ratio=None), {"win_rate": 0.6, "win_rate_low": 0.51}, {})
    with pytest.raises(InputError, match=r"asks for length, .* it measured nothing"):
        judge(Gate(max_kl=None), CANDIDATE, {})


numbers = st.floats(0, 3, allow_nan=False)


@given(numbers, numbers, numbers, numbers)
def test_a_better_candidate_never_fails_where_a_worse_one_passes(low: float, kl: float, length: float, accuracy: float) -> None:
    worse = {"win_rate": low, "win_rate_low": low, "kl": kl, "length": length, "accuracy": accuracy}
    better = {"win_rate": low, "win_rate_low": low + 0.1, "kl": kl / 2, "length": length / 2, "accuracy": accuracy + 0.1}
    assert judge(STRICT, better, BEFORE).passed >= judge(STRICT, worse, BEFORE).passed


@pytest.mark.parametrize(
    "bad", [{"win_rate": 1.0}, {"max_kl": -1}, {"max_length_ratio": 0}, {"no_regression": [{"metric": "kl"}]}]
)
def test_gates_that_mean_nothing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(?i)less|greater|required"):
        Gate.model_validate(bad)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_at(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def models(store: Store) -> list[Model]:
    made = [published(store, step, "sft", {"seed": place}, {})["checkpoint"] for place, step in enumerate(STEPS)]
    return [one for one in made if isinstance(one, Model)]


@pytest.fixture
def best(request: pytest.FixtureRequest) -> str:
    """A champion's name that no other test uses."""
    return re.sub(r"\W+", "-", request.node.name)


STEPS = ("one", "two", "three")


def versions(store: Store, best: str) -> list[str]:
    return sorted(str(v.version) for v in store.client.search_model_versions(f"name = '{best}'"))


def test_a_champion_after_another(store: Store, models: list[Model], best: str) -> None:
    assert champion(store, best) is None
    one, two, _ = models
    assert promote(store, best, one, None, "a", "round 1 of r") == Promotion(version="1", why=f"is {best}/1")
    assert promote(store, best, two, "1", "b", "round 2 of r") == Promotion(version="2", why=f"is {best}/2")
    assert champion(store, best) == "2"
    # The version's own entry in the list of a model's page, beside its step's.
    tags = store.client.get_logged_model(two.uri.removeprefix("models:/")).tags
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": "r-two", "version": "1"}, {"name": best, "version": "2"}]


def test_a_champion_is_an_input_and_has_a_lineage(store: Store, models: list[Model], best: str) -> None:
    one, two, _ = models
    promote(store, best, one, None, "a", "round 1 of r")
    promote(store, best, two, "1", "b", "round 2 of r")
    for reference, made, version in ((f"models:/{best}@champion", two, "2"), (f"models:/{best}/1", one, "1")):
        found = resolve(store, reference, "model")
        assert (str(found), found.digest, found.uri) == (f"{best}/{version}", made.digest, made.uri)
        node = trace(store, reference)[0]
        assert (str(node), node.digest, node.problems) == (f"{best}/{version}", made.digest, [])
        assert node.made is not None
        assert node.made.step == made.name.removeprefix("r-")
    with pytest.raises(InputError, match=rf"models:/{best}/7: no such model; it has the versions"):
        resolve(store, f"models:/{best}/7", "model")


def test_only_who_started_from_the_champion_moves_it(store: Store, models: list[Model], best: str) -> None:
    one, two, three = models
    promote(store, best, one, None, "a", "round 1 of r")
    late = promote(store, best, two, None, "b", "round 1 of other")
    assert late == Promotion(
        version=None, why=f"started from without a champion, and meanwhile round 1 of r made {best}/1 the champion"
    )
    assert (champion(store, best), versions(store, best)) == ("1", ["1"])
    promote(store, best, two, "1", "c", "round 2 of r")
    store.client.set_registered_model_alias(best, CHAMPION, "1")
    store.client.delete_registered_model_alias(best, CHAMPION)
    gone = promote(store, best, three, "2", "d", "round 3 of r")
    assert gone == Promotion(
        version=None, why=f"started from {best}/2, which is the champion no more: somebody took the alias away"
    )
    by_hand = store.client.create_model_version(best, one.uri, None)
    store.client.set_registered_model_alias(best, CHAMPION, by_hand.version)
    moved = promote(store, best, three, "2", "d", "round 3 of r")
    assert moved.why == f"started from {best}/2, and meanwhile somebody by hand made {best}/3 the champion"


@pytest.mark.parametrize("call", ["create_model_version", "set_logged_model_tags", "set_registered_model_alias"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_anywhere_ends_as_no_crash(
    store: Store, models: list[Model], best: str, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    one, two, _ = models
    promote(store, best, one, None, "a", "round 1 of r")
    crash_at(store, monkeypatch, call, when)
    with pytest.raises(KeyboardInterrupt):
        promote(store, best, two, "1", "b", "round 2 of r")
    monkeypatch.undo()
    assert champion(store, best) == ("2" if (call, when) == ("set_registered_model_alias", "after") else "1")
    for _ in range(2):
        assert promote(store, best, two, "1", "b", "round 2 of r").version == "2"
    assert (champion(store, best), versions(store, best)) == ("2", ["1", "2"])
    assert resolve(store, f"models:/{best}@champion", "model").digest == two.digest


def test_a_version_that_never_was_the_champion_goes(
    store: Store, models: list[Model], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = models
    promote(store, best, one, None, "a", "round 1 of r")
    crash_at(store, monkeypatch, "set_registered_model_alias", "before")
    with pytest.raises(KeyboardInterrupt):
        promote(store, best, two, "1", "b", "round 2 of r")
    monkeypatch.undo()
    assert promote(store, best, three, "1", "c", "round 1 of other").version == "3"
    late = promote(store, best, two, "1", "b", "round 2 of r")
    assert late.why == f"started from {best}/1, and meanwhile round 1 of other made {best}/3 the champion"
    assert (champion(store, best), versions(store, best)) == ("3", ["1", "3"])


def test_of_two_at_once_one_wins(store: Store, models: list[Model], best: str) -> None:
    came: list[Promotion] = []

    def go(number: int) -> None:
        came.append(promote(store, best, models[number], None, f"by {number}", f"round 1 of r{number}"))

    threads = [threading.Thread(target=go, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.version is not None for one in came) == 1
    assert versions(store, best) == ["1"]


def crash_at(store: Store, monkeypatch: pytest.MonkeyPatch, call: str, when: str) -> None:
    original: Callable[..., Any] = getattr(store.client, call)

    def crash(*given: Any, **more: Any) -> Any:
        if when == "after":
            original(*given, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(store.client, call, crash)
