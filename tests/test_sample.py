"""Sampling through its request: which completions each prompt gets, in which order, and that nothing else has a say in it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import ROOT, request_for

import stages.data.parts
import stages.sample
from stages.artifacts import sha256_file
from stages.data.parquet import read_rows, read_schema, write_rows
from stages.errors import InputError
from stages.models.load import load_policy, save_policy
from stages.request import run_stage
from stages.rollouts.sample import sample_rows
from stages.run import Event, Run
from stages.specs.common import Dtype, Sampling

Rows = list[dict[str, Any]]
Make = Callable[..., Path]
# Two prompts a batch, a state after each batch.
CONFIG: dict[str, Any] = {
    "samples": 3,
    "sampling": {"max_new_tokens": 6},
    "runtime": {"device": "cpu", "threads": 1, "generation_batch": 6, "save_every": 1},
}
COLUMNS = ("id", "prompt", "problem", "answer")
RECORDED = ("step", "sample", "completion", "length", "finish", "policy")


def config(**changes: Any) -> dict[str, Any]:
    """The small config with some values changed; mappings are merged."""
    merged = {name: CONFIG[name] | value if isinstance(value, dict) else value for name, value in changes.items()}
    return CONFIG | merged


def only(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def samples(run: Run) -> Rows:
    return list(read_rows(run.folder / "outputs" / "samples"))


def digest(run: Run) -> str:
    [path] = (run.folder / "outputs").rglob("*.*")
    assert path == run.folder / "outputs" / "samples" / "data.parquet"
    return sha256_file(path)


def events(folder: Path, kind: str) -> list[Event]:
    lines = (folder / "events.jsonl").read_text().splitlines() if (folder / "events.jsonl").is_file() else []
    # A child that is killed, or still writes, may leave the last line unfinished.
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["event"] == kind]


def metrics(run: Run) -> dict[str, float]:
    [found] = events(run.folder, "metrics")
    assert found["step"] == 0
    return found["metrics"]


def long_row(tokens: int) -> dict[str, Any]:
    """A row whose prompt has so many tokens: BOS, two roles, the first number, and one for each summand."""
    row = {"id": f"long {tokens}", "prompt": [{"role": "user", "content": "1" + "+1" * (tokens - 4)}]}
    return row | {"problem": "1", "answer": "1"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Some of these runs set the threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(chain_rows: Rows) -> Rows:
    return [only(row, *COLUMNS) for row in chain_rows[:11]]


@pytest.fixture
def prompts(rows: Rows, dataset: Make) -> Path:
    return dataset(rows, "prompts")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the rows that the stage samples, in its order."""
    seen: list[str] = []

    def record(policy: Any, batch: Rows, *arguments: Any, **named: Any) -> Any:
        seen.extend(row["id"] for row in batch)
        return sample_rows(policy, batch, *arguments, **named)

    monkeypatch.setattr(stages.sample, "sample_rows", record)
    return seen


# What is drawn.


@pytest.mark.parametrize("seed", [0, 3])
def test_every_prompt_has_its_samples_in_order_and_each_is_the_one_of_its_seed(
    init_folder: Path, rows: Rows, prompts: Path, tmp_path: Path, seed: int
) -> None:
    run = run_stage(request_for("sample", tmp_path / "run", config(seed=seed), policy=init_folder, prompts=prompts))
    records = samples(run)
    assert [(r["id"], r["sample"]) for r in records] == [(row["id"], k) for row in rows for k in range(3)]
    expected, _ = sample_rows(load_policy(init_folder), rows, Sampling(max_new_tokens=6), seed=seed, samples=3)
    assert records == [
        one.row
        | {"step": 0, "sample": one.sample, "completion": one.text, "length": len(one.completion.ids)}
        | {"finish": one.completion.finish, "policy": "policy"}
        for one in expected
    ]
    assert list(records[0]) == [*COLUMNS, *RECORDED]
    assert len({r["completion"] for r in records}) > 25
    assert {r["finish"] for r in records} == {"stop", "length"}
    assert json.loads((run.folder / "outputs.json").read_text())["outputs"] == {"samples": "dataset"}


def test_another_seed_draws_other_samples(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    one, other = (
        run_stage(request_for("sample", tmp_path / f"{seed}", config(seed=seed), policy=init_folder, prompts=prompts))
        for seed in (0, 1)
    )
    same = [a["completion"] == b["completion"] for a, b in zip(samples(one), samples(other), strict=True)]
    assert sum(same) < 5


def test_the_config_says_how_completions_are_drawn(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    chosen = config(sampling={"max_new_tokens": 9, "temperature": 0}, samples=2)
    records = samples(run_stage(request_for("sample", tmp_path / "run", chosen, policy=init_folder, prompts=prompts)))
    assert len(records) == 22
    assert all(a["completion"] == b["completion"] for a, b in zip(records[::2], records[1::2], strict=True))
    assert max(r["length"] for r in records) == 9
    assert all(r["length"] == 9 for r in records if r["finish"] == "length")


def test_the_policy_is_loaded_in_the_type_asked_for(
    init_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[torch.dtype] = []

    def load(folder: Path, dtype: Dtype) -> Any:
        policy = load_policy(folder, dtype)
        loaded.append(policy.model.dtype)
        return policy

    monkeypatch.setattr(stages.sample, "load_policy", load)
    for dtype in ("float32", "bfloat16"):
        chosen = config(dtype=dtype, prompts=1)
        run_stage(request_for("sample", tmp_path / dtype, chosen, policy=init_folder, prompts=prompts))
    assert loaded == [torch.float32, torch.bfloat16]


def test_dropout_is_off(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """A checkpoint that was trained with dropout is sampled without."""
    policy = load_policy(init_folder)
    save_policy(policy, tmp_path / "plain")
    policy.model.config.attention_dropout = 0.9
    save_policy(policy, tmp_path / "dropout")
    one, other = (
        run_stage(request_for("sample", tmp_path / f"run {name}", config(), policy=tmp_path / name, prompts=prompts))
        for name in ("plain", "dropout")
    )
    assert digest(one) == digest(other)


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (4, 4), (5, 5), (11, 11), (100, 11), (None, 11)])
def test_only_the_first_prompts_are_used(
    init_folder: Path, rows: Rows, prompts: Path, tmp_path: Path, drawn: list[str], limit: int | None, expected: int
) -> None:
    run = run_stage(request_for("sample", tmp_path / "run", config(prompts=limit), policy=init_folder, prompts=prompts))
    assert drawn == [row["id"] for row in rows[:expected]]
    assert metrics(run)["samples"] == len(samples(run)) == 3 * expected
    # What is drawn last needs no state: it is written to the output at once.
    assert [event["step"] for event in events(run.folder, "state")] == list(range(2, expected, 2))


def test_numbers_and_what_a_person_reads(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    run = run_stage(request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=prompts))
    records = samples(run)
    truncated = [r for r in records if r["finish"] == "length"]
    assert 0 < len(truncated) < 33
    assert metrics(run) == {
        "samples": 33,
        "length": pytest.approx(sum(r["length"] for r in records) / 33),
        "truncated": len(truncated) / 33,
        "prompts_dropped": 0,
    }
    assert [(event["done"], event["total"]) for event in events(run.folder, "progress")] == [
        (done, 11) for done in (2, 4, 6, 8, 10, 11)
    ]
    [table] = events(run.folder, "table")
    assert table["name"] == "samples"
    assert [row["completion"] for row in table["rows"]] == [r["completion"][:120] for r in records[:4]]
    assert all(row["prompt"] in str(r["prompt"]) for row, r in zip(table["rows"], records[:4], strict=True))


# How the machine is used.


def test_the_bytes_do_not_depend_on_how_the_machine_is_used(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    uses = [{}, {}, {"save_every": 2}, {"save_every": 100}, {"generation_batch": 1}, {"generation_batch": 5}]
    uses += [{"generation_batch": 256}, {"generation_batch": 9, "save_every": 3}, {"generation_batch": 256, "threads": 2}]
    found = []
    for number, use in enumerate(uses):
        request = request_for("sample", tmp_path / f"{number}", config(runtime=use), policy=init_folder, prompts=prompts)
        found.append(digest(run_stage(request)))
    assert found == found[:1] * len(uses)
    assert torch.get_num_threads() == 2


def test_a_batch_holds_as_many_prompts_as_its_samples_allow(
    init_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []

    def record(policy: Any, batch: Rows, *arguments: Any, **named: Any) -> Any:
        sizes.append((len(batch), named["batch_size"]))
        return sample_rows(policy, batch, *arguments, **named)

    monkeypatch.setattr(stages.sample, "sample_rows", record)
    for generation_batch, expected in ((1, [1] * 11), (8, [2, 2, 2, 2, 2, 1]), (12, [4, 4, 3]), (256, [11])):
        sizes.clear()
        chosen = config(runtime={"generation_batch": generation_batch})
        run_stage(request_for("sample", tmp_path / f"{generation_batch}", chosen, policy=init_folder, prompts=prompts))
        assert sizes == [(size, generation_batch) for size in expected]


def test_states_are_saved_every_so_many_batches(init_folder: Path, prompts: Path, tmp_path: Path) -> None:
    for save_every, expected in ((1, [2, 4, 6, 8, 10]), (2, [4, 8]), (3, [6]), (6, [])):
        chosen = config(runtime={"save_every": save_every})
        run = run_stage(request_for("sample", tmp_path / f"{save_every}", chosen, policy=init_folder, prompts=prompts))
        assert [event["step"] for event in events(run.folder, "state")] == expected


# Rows that do not fit, and rows of many kinds.


def test_prompts_that_fill_the_context_are_dropped_and_counted(
    init_folder: Path, rows: Rows, dataset: Make, tmp_path: Path
) -> None:
    # First, last, a whole batch of its own, and one beside a prompt that fits; a prompt of 126 leaves room for two tokens.
    given = [long_row(128), rows[0], rows[1], long_row(126), long_row(129), long_row(300), *rows[2:5], long_row(140)]
    run = run_stage(request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=dataset(given, "prompts")))
    records = samples(run)
    kept = [row["id"] for row in (*rows[:2], long_row(126), *rows[2:5])]
    assert [r["id"] for r in records] == [one for one in kept for _ in range(3)]
    assert metrics(run)["prompts_dropped"] == 4
    assert metrics(run)["samples"] == 18
    assert all(1 <= r["length"] <= 2 for r in records if r["id"] == "long 126")


@pytest.mark.parametrize("count", [1, 5])
def test_no_prompt_that_fits_is_an_error(init_folder: Path, dataset: Make, tmp_path: Path, count: int) -> None:
    given = dataset([long_row(128 + number) for number in range(count)], "prompts")
    request = request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=given)
    with pytest.raises(InputError, match="every prompt fills the model's context"):
        run_stage(request)
    assert not (tmp_path / "run" / "outputs.json").exists()


TYPES: dict[str, pa.DataType] = {
    "level": pa.int32(),
    "share": pa.float32(),
    "tags": pa.list_(pa.string()),
    "source": pa.struct([("name", pa.string()), ("page", pa.int64())]),
    "seen": pa.timestamp("us", tz="UTC"),
    "links": pa.map_(pa.string(), pa.int64()),  # rows give it as a list of tuples, whose type nobody can guess
    "never": pa.int64(),
}


def test_columns_keep_their_types_when_the_first_rows_are_null(init_folder: Path, rows: Rows, tmp_path: Path) -> None:
    given = [row | dict.fromkeys(TYPES) for row in rows]
    # Three states' worth of rows without any of them: a part of their own each.
    given[7] |= {"level": 3, "share": 0.5, "tags": ["a", None], "source": {"name": "x", "page": 4}, "links": [("a", 1)]}
    (tmp_path / "prompts").mkdir()
    write_rows(tmp_path / "prompts", given, types=TYPES)
    found = []
    for save_every in (1, 100):
        chosen = config(runtime={"save_every": save_every})
        request = request_for("sample", tmp_path / f"{save_every}", chosen, policy=init_folder, prompts=tmp_path / "prompts")
        found.append(run_stage(request))
    assert digest(found[0]) == digest(found[1])
    schema = read_schema(found[0].folder / "outputs" / "samples")
    assert {name: schema.field(name).type for name in TYPES} == TYPES
    assert schema.field("prompt").type == read_schema(tmp_path / "prompts").field("prompt").type
    assert schema.field("sample").type == schema.field("length").type == pa.int64()
    assert [only(r, *COLUMNS, *TYPES) for r in samples(found[0])[::3]] == given


def test_columns_named_as_the_recorded_ones_are_replaced(
    init_folder: Path, rows: Rows, prompts: Path, dataset: Make, tmp_path: Path
) -> None:
    """Samples can be drawn for rows that are samples themselves, whatever these columns hold."""
    other = {"step": "a", "sample": [1], "completion": 2.5, "length": "b", "finish": 7, "policy": {"of": "x"}}
    given = dataset([other | row for row in rows], "given")
    runs = [
        run_stage(request_for("sample", tmp_path / name, config(), policy=init_folder, prompts=folder))
        for name, folder in (("one", prompts), ("other", given))
    ]
    assert digest(runs[0]) == digest(runs[1])


# Resuming: the same bytes whenever the stage dies, and nothing drawn twice that a state holds.


class CrashError(Exception):
    """What a listener raises in the place of a crash."""


def crash_at(kind: str, number: int) -> Callable[[Event], None]:
    """A listener that fails at the so manyth event of a kind."""
    left = Counter({kind: number})

    def listen(event: Event) -> None:
        left[event["event"]] -= 1
        if event["event"] == kind and left[kind] == 0:
            raise CrashError

    return listen


@pytest.fixture
def whole(init_folder: Path, prompts: Path, tmp_path: Path) -> Run:
    """A run that nothing interrupted."""
    return run_stage(request_for("sample", tmp_path / "whole", config(), policy=init_folder, prompts=prompts))


@pytest.mark.parametrize("saved", [1, 2, 3, 4, 5])
def test_a_run_that_fails_after_any_state_draws_the_rest_alone(
    init_folder: Path, rows: Rows, prompts: Path, tmp_path: Path, whole: Run, drawn: list[str], saved: int
) -> None:
    request = request_for("sample", tmp_path / "broken", config(), policy=init_folder, prompts=prompts)
    with pytest.raises(CrashError):
        run_stage(request, crash_at("state", saved))
    assert drawn == [row["id"] for row in rows[: 2 * saved]]
    torch.manual_seed(1234)
    resumed = run_stage(request)
    assert drawn == [row["id"] for row in rows]
    assert [event["step"] for event in events(resumed.folder, "state")] == [2, 4, 6, 8, 10]
    assert digest(resumed) == digest(whole)
    assert metrics(resumed) == metrics(whole)


@pytest.mark.parametrize(
    ("kind", "number", "again"), [("progress", 4, 2), ("progress", 6, 1), ("metrics", 1, 1), ("table", 1, 1)]
)
def test_a_run_that_fails_elsewhere_draws_again_only_what_no_state_holds(
    init_folder: Path,
    rows: Rows,
    prompts: Path,
    tmp_path: Path,
    whole: Run,
    drawn: list[str],
    kind: str,
    number: int,
    again: int,
) -> None:
    request = request_for("sample", tmp_path / "broken", config(), policy=init_folder, prompts=prompts)
    with pytest.raises(CrashError):
        run_stage(request, crash_at(kind, number))
    first = len(drawn)
    resumed = run_stage(request)
    assert drawn[first:] == [row["id"] for row in rows[first - again :]]
    assert digest(resumed) == digest(whole)


def test_a_state_that_was_half_written_is_made_again(
    init_folder: Path, prompts: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("sample", tmp_path / "broken", config(), policy=init_folder, prompts=prompts)

    def fail(*arguments: Any, **named: Any) -> int:
        write_rows(*arguments, **named)
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(stages.data.parts, "write_rows", fail)
        with pytest.raises(CrashError):
            run_stage(request)
    # And once with a state before it.
    with pytest.raises(CrashError):
        run_stage(request, crash_at("state", 2))
    with monkeypatch.context() as patch:
        patch.setattr(stages.data.parts, "write_rows", fail)
        with pytest.raises(CrashError):
            run_stage(request)
    assert [path.name for path in sorted((request.folder / "state").iterdir())] == [".draft-00000006", "step-00000004"]
    assert digest(run_stage(request)) == digest(whole)


def test_a_run_may_go_on_with_other_batches(
    init_folder: Path, rows: Rows, prompts: Path, tmp_path: Path, whole: Run, drawn: list[str]
) -> None:
    """All of `runtime` may change between two tries, but for the threads: they are those of the first."""
    folder = tmp_path / "broken"
    uses = [({}, 1), ({"generation_batch": 9, "save_every": 2, "threads": 2}, 1), ({"generation_batch": 1, "threads": 2}, None)]
    for use, crash in uses:
        request = request_for("sample", folder, config(runtime=use), policy=init_folder, prompts=prompts)
        if crash is None:
            assert digest(run_stage(request)) == digest(whole)
            continue
        with pytest.raises(CrashError):
            run_stage(request, crash_at("state", crash))
    assert torch.get_num_threads() == 1
    # After 2 prompts, then after 2 batches of 3 more, then one by one.
    assert [event["step"] for event in events(folder, "state")] == [2, 8, 9, 10]
    assert drawn == [row["id"] for row in rows]


def test_parts_are_linked_from_state_to_state(init_folder: Path, rows: Rows, prompts: Path, tmp_path: Path) -> None:
    """A part is written once: a later state links it, and holds what was drawn since beside it."""
    states: list[dict[str, int]] = []

    def listen(event: Event) -> None:
        if event["event"] == "state":
            [state] = (tmp_path / "run" / "state").iterdir()
            parts = sorted(state.glob("*/*.parquet"))
            states.append({f"{part.parent.name}/{part.name}": part.stat().st_ino for part in parts})
            held = [row["id"] for part in parts for row in read_rows(part)]
            assert held == [row["id"] for row in rows[: event["step"]] for _ in range(3)]
            assert {part.stat().st_nlink for part in parts} == {1}, "the state before is gone"

    run_stage(request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=prompts), listen)
    assert [len(state) for state in states] == [1, 2, 3, 4, 5]
    for before, after in pairwise(states):
        assert before.items() < after.items()


def test_dropped_prompts_are_remembered(init_folder: Path, rows: Rows, dataset: Make, tmp_path: Path, drawn: list[str]) -> None:
    """Batches without any sample make states too: without a part, and with their count."""
    given = [long_row(128), long_row(130), long_row(132), *rows[:2], long_row(134)]
    prompts = dataset(given, "prompts")
    request = request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=prompts)
    with pytest.raises(CrashError):
        run_stage(request, crash_at("state", 1))
    assert list((request.folder / "state").rglob("*.parquet")) == []
    with pytest.raises(CrashError):
        run_stage(request, crash_at("state", 1))
    run = run_stage(request)
    assert drawn == [row["id"] for row in given]
    assert metrics(run)["prompts_dropped"] == 4
    assert [r["id"] for r in samples(run)] == [row["id"] for row in rows[:2] for _ in range(3)]


def test_a_last_batch_without_samples_keeps_those_before(init_folder: Path, rows: Rows, dataset: Make, tmp_path: Path) -> None:
    prompts = dataset([*rows[:2], long_row(128)], "prompts")
    run = run_stage(request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=prompts))
    assert [event["step"] for event in events(run.folder, "state")] == [2]
    assert metrics(run) | {"length": 0, "truncated": 0} == {"samples": 6, "prompts_dropped": 1, "length": 0, "truncated": 0}


def test_outputs_that_a_kill_left_half_written_are_made_again(
    init_folder: Path, prompts: Path, tmp_path: Path, whole: Run, drawn: list[str]
) -> None:
    expected = digest(whole)
    (whole.folder / "outputs.json").unlink()
    path = whole.folder / "outputs" / "samples" / "data.parquet"
    path.write_bytes(path.read_bytes()[:100])
    (path.parent / "left over.parquet").write_text("by the killed try")
    request = request_for("sample", whole.folder, config(), policy=init_folder, prompts=prompts)
    assert digest(run_stage(request)) == expected
    assert len(drawn) == 1
    assert (whole.folder / "outputs.json").is_file()


def test_a_killed_child_resumes_to_the_same_bytes(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, drawn: list[str]
) -> None:
    chosen = config(sampling={"max_new_tokens": 20}, runtime={"generation_batch": 3})
    rows = [only(row, *COLUMNS) for row in chain_rows]
    inputs = {"policy": init_folder, "prompts": dataset(rows, "prompts")}
    expected = run_stage(request_for("sample", tmp_path / "whole", chosen, **inputs))
    request = request_for("sample", tmp_path / "killed", chosen, **inputs)
    request.folder.mkdir()
    file = request.folder / "request.json"
    file.write_text(request.model_dump_json())

    with subprocess.Popen([sys.executable, "-m", "stages", str(file)], cwd=ROOT) as child:
        deadline = time.monotonic() + 120
        while len(events(request.folder, "state")) < 5 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
    assert child.returncode == -9
    saved = max(int(path.name[5:13]) for path in (request.folder / "state").glob("step-*"))
    assert 5 <= saved < 48
    assert not (request.folder / "outputs.json").exists()

    drawn.clear()
    resumed = run_stage(request)
    # Nothing that the child had saved is drawn again, and nothing is left out.
    assert drawn == [row["id"] for row in rows[saved:]]
    assert digest(resumed) == digest(expected)
    assert metrics(resumed) == metrics(expected)


def test_rows_with_one_id_keep_their_places(init_folder: Path, dataset: Make, tmp_path: Path) -> None:
    prompts = [{"id": "a", "prompt": "1+2"}, {"id": "b", "prompt": "3"}, {"id": "a", "prompt": "4+5"}]
    folder = dataset(prompts, "prompts")
    request = request_for("sample", tmp_path / "run", config(samples=1), policy=init_folder, prompts=folder)
    run = run_stage(request)
    assert [row["prompt"] for row in read_rows(run.folder / "outputs" / "samples")] == ["1+2", "3", "4+5"]
