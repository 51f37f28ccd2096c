"""One step through the real store: run, skip, resume, adopt, fail, recompute."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import INIT, ROOT
from rich.console import Console

from stages.artifacts import Dataset, Model
from stages.data.parquet import write_rows
from stages.errors import InputError
from stages.request import Request
from stages.run import Event, Run
from stages.specs import STAGES
from tasks.execute import execute, headline, headline_names, made_outputs
from tasks.home import configure_environment
from tasks.launch import Launch
from tasks.lease import Held
from tasks.plan import StepCall, examine
from tasks.references import resolve
from tasks.report import print_results
from tasks.store import Store

SFT: dict[str, Any] = {
    "steps": 40,
    "batch_size": 4,
    "generations": 2,
    "sampling": {"max_new_tokens": 4},
    "optimizer": {"lr": 1e-3},
    "runtime": {"save_every": 1, "log_every": 1, "device": "cpu"},
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    return Store(configure_environment())


def prepare_call(store: Store, rows: int = 20, **fields: Any) -> StepCall:
    source = resolve(store, "procedural:chain-sum/demonstrations", "dataset")
    config = {"rows": rows, "heldout": 0.2}
    return StepCall(recipe="r", name="data", stage="prepare", config=config, inputs={"source": source}, pipeline="", **fields)


def sft_call(store: Store, **fields: Any) -> StepCall:
    train = execute.fn(prepare_call(store)).artifacts["train"]
    inputs: dict[str, Dataset | Model] = {"model": resolve(store, f"init:{INIT}", "model"), "train": train}
    return StepCall(recipe="r", name="sft", stage="sft", config=SFT, inputs=inputs, pipeline="", **fields)


def test_run_then_skip(store: Store) -> None:
    call = prepare_call(store)
    first = execute.fn(call)
    second = execute.fn(call)
    assert (first.status, second.status) == ("ran", "skipped")
    assert second.artifacts == first.artifacts
    assert second.metrics == first.metrics
    assert first.artifacts["train"].name == "r-data-train"
    assert not list((store.root / "runs").iterdir()), "a finished step leaves no run folder"


def test_operational_fields_do_not_recompute(store: Store) -> None:
    call = sft_call(store)
    execute.fn(call)
    other = call.model_copy(update={"config": {**SFT, "runtime": {"save_every": 7, "log_every": 3, "device": "cpu"}}})
    assert examine(store, other).action == "skip"


def test_a_changed_field_is_the_reason(store: Store) -> None:
    execute.fn(prepare_call(store))
    plan = examine(store, prepare_call(store, rows=21))
    assert (plan.action, plan.reason) == ("run", "rows: 20 -> 21")


def test_recompute_makes_a_new_version_with_the_same_bytes(store: Store) -> None:
    first = execute.fn(prepare_call(store))
    second = execute.fn(prepare_call(store, recompute=True))
    assert second.status == "ran"
    assert [result.artifacts["train"].version for result in (first, second)] == ["1", "2"]
    assert first.artifacts["train"].digest == second.artifacts["train"].digest


def test_a_retry_of_a_recompute_goes_on_instead_of_beginning_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = execute.fn(prepare_call(store))
    again = prepare_call(store, recompute=True).model_copy(update={"pipeline": "flow-run-2"})

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tasks.store.Store._register", die)
        with pytest.raises(KeyboardInterrupt):
            execute.fn(again)
    second = execute.fn(again)
    assert (second.status, execute.fn(again).status) == ("resumed", "skipped")
    assert second.run_id != first.run_id
    other = again.model_copy(update={"pipeline": "flow-run-3"})
    assert examine(store, other).reason == "asked for by --from"


def test_damaged_artifacts_are_made_again(store: Store) -> None:
    first = execute.fn(prepare_call(store))
    (store.locate(first.artifacts["train"]) / "data.parquet").unlink()
    assert "missing" in examine(store, prepare_call(store)).reason
    second = execute.fn(prepare_call(store))
    assert second.status == "ran"
    assert second.artifacts["train"].digest == first.artifacts["train"].digest


def kill_child_at_a_state(store: Store, states: int) -> None:
    """Kill the stage's child process once its run folder has seen some saved states."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for events in (store.root / "runs").glob("*/events.jsonl"):
            if events.read_text().count('"event": "state"') >= states:
                found = subprocess.run(["pgrep", "-f", str(events.parent / "request.json")], capture_output=True, text=True)
                for pid in found.stdout.split():
                    os.kill(int(pid), signal.SIGKILL)
                return
        time.sleep(0.005)


def test_killed_child_resumes_to_the_same_bytes(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    call = sft_call(store, launch=Launch(mode="process"))
    killer = threading.Thread(target=kill_child_at_a_state, args=(store, 3))
    killer.start()
    with pytest.raises(RuntimeError, match="ended with -9"):
        execute.fn(call)
    killer.join()
    unfinished = store.unfinished(key=call.key())
    assert unfinished is not None
    assert unfinished.info.status == "FAILED"
    assert examine(store, call).action == "resume"
    resumed = execute.fn(call)
    assert resumed.status == "resumed"
    assert resumed.run_id == unfinished.info.run_id

    steps = [metric.step for metric in store.client.get_metric_history(resumed.run_id, "loss")]
    assert steps == list(range(1, 41)), "every step is logged once, in order"
    again = execute.fn(call.model_copy(update={"recompute": True, "launch": Launch()}))
    assert {n: a.digest for n, a in again.artifacts.items()} == {n: a.digest for n, a in resumed.artifacts.items()}


def test_killed_while_publishing_adopts_what_is_done(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    call = prepare_call(store)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tasks.store.Store._register", die)
        with pytest.raises(KeyboardInterrupt):
            execute.fn(call)
    with monkeypatch.context() as patched:
        patched.setattr("tasks.execute.launch", die)
        result = execute.fn(call)
    assert result.status == "resumed"
    assert result.artifacts["train"].version == "1"


@pytest.mark.parametrize("other", [False, True])
def test_a_lease_that_was_lost_for_a_while(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, other: bool
) -> None:
    """Another machine that had it has gone on with the same run to its end; or nobody had it."""
    call = prepare_call(store)

    def check(_: Held) -> bool:
        [run] = store.runs(key=call.key())
        if other:
            folder = tmp_path_factory.mktemp("elsewhere") / "run"
            shutil.copytree(store.root / "runs" / run.info.run_id, folder)
            made = made_outputs(folder, call.spec())
            store.publish(run.info.run_id, folder, made, {output: call.registered_name(output) for output in made}, call.inputs)
        return False

    monkeypatch.setattr(Held, "check", check)
    result = execute.fn(call)
    assert result.status == ("skipped" if other else "ran")
    assert len(store.client.search_model_versions("name = 'r-data-train'")) == 1
    assert len(store.runs(key=call.key())) == 1
    assert not list((store.root / "runs").iterdir())


def test_a_recompute_that_nobody_else_went_on_with_is_published(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease was lost for a while; that the same was published before says nothing of it."""
    call = prepare_call(store)
    execute.fn(call)
    monkeypatch.setattr(Held, "check", lambda _: False)
    result = execute.fn(call.model_copy(update={"recompute": True}))
    assert (result.status, result.artifacts["train"].version) == ("ran", "2")
    assert {run.info.status for run in store.runs(key=call.key())} == {"FINISHED"}


def test_a_failing_stage_publishes_nothing_and_harms_nothing(store: Store) -> None:
    good = execute.fn(prepare_call(store))
    bad = prepare_call(store).model_copy(update={"config": {"rows": 20, "filters": {"min_prompt_chars": 10_000}}})
    with pytest.raises(InputError, match="data: no row is left"):
        execute.fn(bad)
    assert not list((store.root / "runs").iterdir()), "what cannot be gone on from is not kept"
    assert store.find(bad.key()) == (None, None)
    assert len(store.client.search_model_versions("name = 'r-data-train'")) == 1
    assert execute.fn(prepare_call(store)).artifacts == good.artifacts


def test_two_processes_compute_a_key_once(store: Store) -> None:
    call = sft_call(store)
    code = (
        "import sys\nfrom tasks.plan import StepCall\nfrom tasks.execute import execute\n"
        "print(execute.fn(StepCall.model_validate_json(sys.argv[1])).status)\n"
    )
    arguments = [sys.executable, "-c", code, call.model_dump_json()]
    children = [subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(child.communicate(timeout=120)[0].split()[-1] for child in children)
    assert said == ["ran", "skipped"]
    assert len(store.client.search_model_versions("name = 'r-sft'")) == 1


def stand_in(request: Request, _: Launch, listener: Callable[[Event], None]) -> None:
    """A stage's process that leaves its outputs and PPO's metrics, at once. With the seed 1 it measured no length."""
    run = Run(request.folder, STAGES[request.stage].outputs, request.key, listener)
    for step in (1, 2, 3):
        run.log(step, {"reward": step / 2, "kl": 0.5 * step} | ({} if request.config["seed"] == 1 else {"length": 4.0}))
    for output, kind in STAGES[request.stage].outputs.items():
        if kind == "model":
            (run.output(output) / "model.safetensors").write_text(output)
        else:
            write_rows(run.output(output), [{"id": "a", "prompt": "p", "step": 0}])
    run.done()


def test_reinforcement_learning_leaves_a_plot_a_version(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = execute.fn(prepare_call(store))
    assert prepared.plot is None
    model = resolve(store, f"init:{INIT}", "model")
    inputs: dict[str, Dataset | Model] = {"policy": model, "reward": model, "prompts": prepared.artifacts["train"]}
    call = StepCall(recipe="r", name="rl", stage="ppo", config={}, inputs=inputs, pipeline="")
    monkeypatch.setattr("tasks.execute.launch", stand_in)
    first = execute.fn(call)
    plots = store.root / "plots"
    plot = plots / "r-rl-1.png"
    assert first.plot == str(plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    beside = store.files.read(str(store.client.get_run(first.run_id).info.artifact_uri), "plots/r-rl-1.png")
    assert beside == plot.read_bytes()
    # Several models of one step have names of their own.
    assert {made.name for made in first.artifacts.values()} == {"r-rl", "r-rl-critic", "r-rl-rollouts"}
    assert {made.version for made in first.artifacts.values()} == {"1"}

    made = plot.stat().st_mtime_ns
    skipped = execute.fn(call)
    assert (skipped.status, skipped.plot) == ("skipped", first.plot)
    assert plot.stat().st_mtime_ns == made
    plot.unlink()
    assert execute.fn(call).status == "skipped"
    assert plot.is_file(), "one that is gone is drawn again"

    again = execute.fn(call.model_copy(update={"recompute": True}))
    assert again.plot == str(plots / "r-rl-2.png")
    assert sorted(plots.iterdir()) == [plot, plots / "r-rl-2.png"]

    without = execute.fn(call.model_copy(update={"config": {"seed": 1}}))
    assert (without.status, without.metrics, without.plot) == ("ran", {"reward": 1.5, "kl": 1.5}, None)
    other = execute.fn(call.model_copy(update={"recipe": "other", "name": "alone"}))
    assert (other.status, other.plot) == ("skipped", str(plots / "r-rl-2.png")), "named as the checkpoint, whoever asks"
    given: dict[str, Dataset | Model] = {"policy": first.artifacts["checkpoint"], "prompts": inputs["prompts"]}
    evaluated = execute.fn(call.model_copy(update={"name": "e", "stage": "evaluate", "inputs": given}))
    assert (set(evaluated.metrics), evaluated.plot) == ({"reward", "kl", "length"}, None)
    assert len(list(plots.iterdir())) == 2

    # However long the path is, it is one line, which can be copied.
    deep = first.model_copy(update={"plot": f"{'/deep' * 40}/r.png"})
    console = Console(file=StringIO(), width=60)
    print_results(console, "r", [deep, prepared, without])
    said: Any = console.file
    assert f"\nrl: its curves in {deep.plot}\n" in said.getvalue()
    assert said.getvalue().count("its curves in") == 1


def test_headline_shows_before_and_after(store: Store) -> None:
    spec = sft_call(store).spec()
    assert headline(spec, {"heldout_loss_before": 5.2123, "heldout_loss": 0.5, "other": 1}) == "heldout_loss 5.21 -> 0.5"


def test_a_star_stands_for_all_metrics_that_begin_so() -> None:
    """But for their bounds and counts; in the headline's order, and sorted among themselves."""
    spec = STAGES["evaluate"]
    assert "rewards.*" in spec.headline
    numbers = {"kl": 0.5, "rewards.b": 2.0, "rewards.a": 1.0, "reward": 0.1, "rewards.a_low": 0.0, "rewards.a_high": 2.0}
    numbers |= {"rewards.b_missing": 3.0, "rewards.b_before": 1.5, "rewards": 9.0, "length": 7.0, "accuracy_low": 0.1}
    assert headline_names(spec, numbers) == ["reward", "rewards.a", "rewards.b", "kl"]
    assert headline(spec, numbers) == "reward 0.1  rewards.a 1  rewards.b 1.5 -> 2  kl 0.5"
    assert headline_names(spec, {}) == []
    assert headline_names(STAGES["sft"], numbers | {"heldout_loss": 1.0}) == ["heldout_loss"]
