"""Rounds: each a record that survives all tries, on a slice of its own, never two at once, and a gate before the alias."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import INIT, ROOT
from mlflow.entities import RunStatus
from prefect.client.schemas.objects import State
from rich.console import Console
from rounding import GOOD, TINY, WORSE, World, nothing, tiny
from test_cli import COMMAND, environment_for, posttrain
from test_lineage import published, store_at

from flows import rounds as flow
from flows.rounds_recipe import RoundsRecipe
from stages.errors import InputError
from tasks.promote import CHAMPION, champion, promote
from tasks.round_report import print_rounds
from tasks.rounds import Round, Rounds, alone
from tasks.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_at(tmp_path_factory.mktemp("home"))


@pytest.fixture
def world(store: Store, monkeypatch: pytest.MonkeyPatch) -> World:
    """Every start runs faked steps over the module's store."""
    monkeypatch.setenv("POSTTRAIN_HOME", str(store.root))
    made = World(store)
    monkeypatch.setattr(flow, "Pipeline", made.pipeline)
    monkeypatch.setattr("flows.runner.Pipeline", made.pipeline)
    return made


def start(recipe: RoundsRecipe, **more: Any) -> Any:
    return flow.rounds.fn(recipe, **more)


def no_memory(step: str) -> None:
    if step in ("reward_model", "ppo"):
        raise RuntimeError(f"no memory for {step}")


def rounds_of(store: Store, name: str) -> list[Round]:
    return Rounds(store, name).all()


def handles(one: Round) -> dict[str, str]:
    return {name: str(given) for name, given in one.inputs.items()}


def test_three_rounds_each_from_the_last_ones_champion(world: World, store: Store) -> None:
    recipe = tiny(name="three")
    read: list[dict[str, dict[str, str]]] = []
    plots: list[str] = []
    for _ in range(3):
        plots.append(start(recipe)[-1].plot)
        read.append(dict(world.read))
    assert plots[-1] == str(store.root / "plots" / "three-round-3.png")
    every = rounds_of(store, "three")
    assert [(one.number, one.state, one.start, one.count, one.version) for one in every] == [
        (1, "promoted", 0, 16, "1"),
        (2, "promoted", 16, 16, "2"),
        (3, "promoted", 32, 16, "3"),
    ]
    assert champion(store, "three-champion") == "3"
    assert [one.champion_version for one in every] == [None, "1", "2"]
    first = handles(every[0])["champion"]
    assert first.startswith("source-init")
    assert [handles(one)["champion"] for one in every] == [first, "three-champion/1", "three-champion/2"]
    assert {handles(one)["first"] for one in every} == {first}
    assert [one["samples"]["policy"] for one in read] == [first, "three-champion/1", "three-champion/2"]
    assert [one["evaluate-candidate"]["opponent"] for one in read] == [first, "three-champion/1", "three-champion/2"]
    # All preferences so far, and the round's.
    assert read[0]["preferences"].keys() == {"source", "exclude"}
    for number, (before, now) in enumerate(zip(every, read[1:], strict=False), start=2):
        assert before.outcome is not None
        assert now["preferences"]["source"] == str(before.outcome.made["train"])
        assert now["heldout_preferences"]["source"] == str(before.outcome.made["heldout"])
        assert now["preferences"]["also"] == f"three-labels-train/{number}"
    assert world.configs["samples"].seed == recipe.seed + 2
    assert world.configs["evaluate-candidate"].seed == recipe.seed


def test_a_gate_that_fails_leaves_the_alias_alone(world: World, store: Store) -> None:
    recipe = tiny(name="kept")
    start(recipe)
    world.measured["evaluate-candidate"] = WORSE
    start(recipe)
    start(recipe)
    assert champion(store, "kept-champion") == "1"
    _, second, third = rounds_of(store, "kept")
    assert (second.state, second.version) == ("kept", None)
    assert second.why == "win rate 0.500, surely above 0.400 (must be surely above 0.5)"
    assert (third.start, handles(third)["champion"]) == (32, "kept-champion/1")
    # What the kept round labelled is not lost.
    assert second.outcome is not None
    assert world.read["preferences"]["source"] == str(second.outcome.made["train"])


def test_a_failed_round_is_gone_on_with(world: World, store: Store, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(60)))
    recipe = tiny(name="failed", inputs={"prompts": str(rows)}, prompts={"heldout": 0.2})

    world.before = no_memory
    with pytest.raises(RuntimeError, match="no memory"):
        start(recipe)
    [before] = rounds_of(store, "failed")
    assert (before.state, before.outcome) == ("running", None)
    assert store.client.get_run(before.id).info.status == "FAILED"
    assert champion(store, "failed-champion") is None

    # Another file, another recipe, a champion that somebody made meanwhile: the same round sees none of it.
    rows.write_text(json.dumps({"prompt": "other"}) + "\n")
    other = published(store, "other", "sft", {"seed": 77}, {})["checkpoint"]
    assert other.kind == "model"
    promote(store, "failed-champion", other, None, "x", "round 9 of other")
    edited = recipe.model_copy(update={"stream": recipe.stream.model_copy(update={"per_round": 5})})
    with pytest.raises(RuntimeError, match="no memory"):
        start(edited)
    world.before = nothing
    start(edited)
    [after] = rounds_of(store, "failed")
    assert (after.id, after.number, after.start, after.count) == (before.id, 1, 0, 16)
    assert handles(after) == handles(before)
    assert after.state == "kept"
    assert after.why == "started from without a champion, and meanwhile round 9 of other made failed-champion/1 the champion"
    assert store.client.get_run(after.id).info.status == "FINISHED"
    # Only the next one does.
    start(tiny(name="failed", stream={"per_round": 5}))
    assert handles(rounds_of(store, "failed")[1])["champion"] == "failed-champion/1"


@pytest.mark.parametrize("moved", [False, True])
def test_a_crash_around_the_promotion(world: World, store: Store, monkeypatch: pytest.MonkeyPatch, moved: bool) -> None:
    recipe = tiny(name=f"crash-{moved}")

    def crash(*given: Any) -> Any:
        if moved:
            promote(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flow, "promote", crash)
        with pytest.raises(KeyboardInterrupt):
            start(recipe)
    assert champion(store, f"{recipe.name}-champion") == ("1" if moved else None)
    # What was decided is not judged again: neither steps nor a gate that has become stricter matter.
    stricter = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"win_rate": 0.99})})
    world.before = lambda step: pytest.fail(f"{step} ran")
    assert start(stricter) == []
    [one] = rounds_of(store, recipe.name)
    assert (one.state, one.version) == ("promoted", "1")
    assert champion(store, f"{recipe.name}-champion") == "1"
    assert len(store.client.search_model_versions(f"name = '{recipe.name}-champion'")) == 1


def test_a_start_beside_a_running_round_ends_at_once(world: World, store: Store) -> None:
    with alone(store, "beside"):
        began = time.monotonic()
        state = start(tiny(name="beside"))
    assert time.monotonic() - began < 5
    assert isinstance(state, State)
    assert (state.name, state.is_completed()) == ("AlreadyRunning", True)
    assert "another process runs a round of beside right now" in str(state.message)
    assert rounds_of(store, "beside") == []
    assert len(start(tiny(name="beside"))) > 5


def test_what_is_missing_is_seen_before_a_round_is_recorded(world: World, store: Store) -> None:
    for changes, more, words in (
        ({"inputs": {"prompts": None}}, {}, r"inputs\.prompts is needed"),
        ({"inputs": {"model": None}}, {}, r"inputs\.model is needed"),
        ({"inputs": {"prompts": "./nothing.jsonl"}}, {}, r"inputs\.prompts: \./nothing\.jsonl: no such file"),
        ({}, {"from_step": "pop"}, "--from pop: no step has this name; there are prompts, fresh"),
        ({}, {"labels": "./answers.jsonl"}, "no round of missing waits for labels"),
    ):
        with pytest.raises(InputError, match=words):
            start(tiny(name="missing", **changes), **more)
    assert rounds_of(store, "missing") == []


def test_another_stream_begins_at_its_start(world: World, store: Store) -> None:
    for changes in (
        {},
        {"stream": {"per_round": 7}},
        {"stream": {"per_round": 7, "seed": 8}},
        {"prompts": {"rows": 90, "heldout": 0.1}},
    ):
        start(tiny(name="streams", **changes))
    every = rounds_of(store, "streams")
    assert [(one.start, one.count) for one in every] == [(0, 16), (16, 7), (0, 7), (0, 16)]
    assert len({one.stream for one in every}) == 3


def test_a_named_champion_is_where_it_begins(world: World, store: Store) -> None:
    mine = published(store, "mine", "sft", {"seed": 5}, {})["checkpoint"]
    store.client.set_registered_model_alias(mine.name, CHAMPION, mine.version)
    start(tiny(name="named", champion=mine.name, inputs={"model": None}))
    [one] = rounds_of(store, "named")
    assert (handles(one)["champion"], handles(one)["first"], one.version) == (str(mine), str(mine), "2")
    assert champion(store, mine.name) == "2"


def test_the_first_champion_is_made_once_and_pinned(world: World, store: Store) -> None:
    more: dict[str, Any] = {"inputs": {"demonstrations": "procedural:chain-sum/demonstrations"}}
    more |= {"demonstrations": {"rows": 20, "heldout": 0.2}, "sft": {"steps": 1}, "reference": "first"}
    start(tiny(name="made", **more))
    world.measured["evaluate-candidate"] = GOOD
    start(tiny(name="made", **more | {"sft": {"steps": 2}}))
    first, second = rounds_of(store, "made")
    assert handles(first)["champion"] == handles(first)["first"] == handles(second)["first"] == "made-sft/1"
    assert handles(second)["champion"] == "made-champion/1"
    assert "sft" not in world.read
    assert world.read["ppo"]["reference"] == world.read["evaluate-candidate"]["reference"] == "made-sft/1"
    assert world.read["evaluate-champion"]["reference"] == "made-sft/1"


def test_people_label_between_two_starts(world: World, store: Store, tmp_path: Path) -> None:
    recipe = tiny(name="people", questions={}, labels=None)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "q", "prefers": "left"}\n')
    state = start(recipe)
    assert (state.name, state.is_completed()) == ("AwaitingLabels", True)
    assert [result.name for result in state.data] == ["prompts", "fresh", "samples", "questions"]
    [waiting] = rounds_of(store, "people")
    assert waiting.state == "awaiting_labels"
    assert store.client.get_run(waiting.id).info.status == RunStatus.to_string(RunStatus.SCHEDULED)
    with alone(store, "people"):
        pass
    # A start without labels has nothing to do.
    world.before = lambda step: pytest.fail(f"{step} ran")
    again = start(recipe)
    assert (again.name, again.data) == ("AwaitingLabels", [])
    assert "waits for people's labels of people-questions-questions" in str(again.message)
    world.before = no_memory
    with pytest.raises(RuntimeError, match="no memory"):
        start(recipe, labels=str(answers))
    assert rounds_of(store, "people")[0].state == "running"
    world.before = nothing
    # The answers are the round's now.
    start(recipe)
    [one] = rounds_of(store, "people")
    assert (one.id, one.state, one.start) == (waiting.id, "promoted", 0)
    assert world.read["answers"]["answers"] == handles(one)["answers"]
    assert world.read["preferences"]["source"] == "people-answers-train/1"
    with pytest.raises(InputError, match="no round of people waits for labels"):
        start(recipe, labels=str(answers))
    assert start(recipe).name == "AwaitingLabels"
    assert [(one.number, one.start, one.state) for one in rounds_of(store, "people")][1:] == [(2, 16, "awaiting_labels")]


def test_all_rounds_are_told(world: World, store: Store) -> None:
    recipe = tiny(name="told")
    start(recipe)
    world.measured["evaluate-candidate"] = WORSE | {"accuracy": 0.45, "accuracy_low": 0.4, "accuracy_high": 0.5}
    start(recipe)
    world.before = no_memory
    with pytest.raises(RuntimeError, match="no memory"):
        start(recipe)
    console = Console(file=StringIO(), width=200)
    said = flow.report(console, recipe)["rounds"]
    assert [one["state"] for one in said] == ["promoted", "kept", "running"]
    assert said[1]["outcome"]["figures"]["labels"] == 14
    print_rounds(console, "told", rounds_of(store, "told"))
    text: Any = console.file
    lines = text.getvalue().splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows[0] == ["1", "16", "14", "0.75", "0.5 -> 0.8", "0.7", "1", "18 -> 20", "promoted"]
    assert rows[2][:6] == ["2", "16", "14", "0.75", "0.5 -> 0.45", "0.5"]
    assert rows[3][3:6] == ["(0.7-0.8)", "(0.4-0.5)", "(0.4-0.8)"]
    assert [row[-1] for row in rows if row[0]] == ["promoted", "kept", "running"] * 2
    assert "round 1: promoted as told-champion/1: win rate 0.700, surely above 0.600 (must be surely above 0.5)" in "".join(
        lines
    )
    assert "round 2: its candidate was not promoted: win rate 0.500, surely above 0.400" in "".join(lines)


def test_a_command_killed_in_a_round_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--set", "ppo.steps=12", "--set", f"inputs.model=init:{INIT}"]
    command = [*COMMAND, "run", str(TINY), "--json", *settings]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=environment_for(tmp_path), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/state/step-*/rollouts.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        # Somebody else's start, of the schedule say, has nothing to do.
        monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
        assert start(tiny(name="tiny-rounds")).name == "AlreadyRunning"
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    store = store_at(tmp_path)
    [before] = rounds_of(store, "tiny-rounds")
    assert before.state == "running"
    assert champion(store, "tiny-rounds-champion") is None

    done = posttrain(tmp_path, "run", str(TINY), "--json", *settings)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {stage["name"]: stage["status"] for stage in said["stages"]} == {
        **dict.fromkeys(("prompts", "fresh", "samples", "labels", "heldout_preferences", "preferences"), "skipped"),
        **{"reward_model": "skipped", "ppo": "resumed", "evaluate-champion": "ran", "evaluate-candidate": "ran"},
    }
    [after] = said["rounds"]
    assert (after["id"], after["number"], after["start"], after["count"]) == (before.id, 1, 0, 16)
    assert after["inputs"] == before.model_dump(mode="json")["inputs"]
    assert (after["state"], champion(store, "tiny-rounds-champion")) == ("promoted", "1")
    assert "tiny-rounds: rounds so far" in done.stderr
    planned = {name: plan.action for name, _, plan in flow.plan(tiny()).plans}
    assert (planned["prompts"], planned["fresh"], planned["ppo"]) == ("skip", "run", "run")
    assert len(rounds_of(store, "tiny-rounds")) == 1
