"""Supervised fine-tuning through its request: what carries loss, what is dropped, what is written, and resuming."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, kill_child, recorded, request_for
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import stages.training.demonstrations
from stages.artifacts import sha256_file
from stages.data.batching import TokenBatch
from stages.data.chat import Encoded, encode
from stages.data.parquet import read_rows
from stages.errors import InputError
from stages.models.load import LoadedPolicy, load_policy
from stages.request import Request, run_stage
from stages.rollouts.sample import sample_rows
from stages.run import Event, Run
from stages.specs.sft import SftConfig

Rows = list[dict[str, Any]]
Make = Callable[..., Path]
CONFIG: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "max_length": 96,
    "optimizer": {"lr": 1e-2, "warmup": 0},
    "generations": 5,
    "sampling": {"max_new_tokens": 12},
    "runtime": {"device": "cpu", "threads": 1, "save_every": 2, "log_every": 1},
}


def config(**changes: Any) -> dict[str, Any]:
    """The small config with some values changed; mappings are merged."""
    merged = {name: CONFIG.get(name, {}) | value if isinstance(value, dict) else value for name, value in changes.items()}
    return CONFIG | merged


def events(folder: Path, kind: str) -> list[Event]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def metrics(folder: Path, name: str) -> dict[int, float]:
    return {event["step"]: event["metrics"][name] for event in events(folder, "metrics") if name in event["metrics"]}


def counts(folder: Path, name: str) -> dict[str, int]:
    [table] = [event for event in events(folder, "table") if event["name"] == name]
    return {row["what"]: row["rows"] for row in table["rows"]}


def digests(run: Run) -> dict[str, str]:
    root = run.folder / "outputs"
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(root.rglob("*")) if path.is_file()}


def encoded(policy: LoadedPolicy, rows: Rows) -> list[Encoded]:
    return [encode(policy.tokenizer, row["prompt"], row["completion"], policy.stops) for row in rows]


@torch.no_grad()
def plain_loss(model: Any, sequences: list[Encoded], loss_on: str = "completion") -> float:
    """The oracle: transformers' own logits of each sequence alone, in nats a token that carries loss."""
    total, count = 0.0, 0
    for one in sequences:
        ids_T = torch.tensor([*one.prompt_ids, *one.completion_ids])
        first = len(one.prompt_ids) if loss_on == "completion" else 1
        logp_TV = model.eval()(ids_T[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(logp_TV[t - 1, ids_T[t]]) for t in range(first, len(ids_T)))
        count += len(ids_T) - first
    return total / count


@pytest.fixture
def policy(init_folder: Path) -> LoadedPolicy:
    return load_policy(init_folder, seed=0)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[TokenBatch]:
    """Every micro-batch that the stage makes."""
    return recorded(monkeypatch, stages.training.demonstrations, "micro_batches")


def sequences_in(batches: list[TokenBatch]) -> dict[int, tuple[list[int], list[int]]]:
    """For each row of right-padded batches: its token ids, and the positions that carry loss."""
    found = {}
    for batch in batches:
        assert batch.attention_BT is not None
        for b, index in enumerate(batch.indices):
            length = int(batch.attention_BT[b].sum())
            assert not batch.target_BT[b, length:].any()
            found[index] = (batch.ids_BT[b, :length].tolist(), batch.target_BT[b].nonzero().flatten().tolist())
    return found


def test_the_loss_falls_on_training_and_held_out_rows(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, policy: LoadedPolicy
) -> None:
    train, held = chain_rows[:32], chain_rows[32:]
    inputs = {"model": init_folder, "train": dataset(train, "train"), "heldout": dataset(held, "heldout")}
    chosen = config(steps=None, epochs=10, batch_size=10, heldout_rows=12, optimizer={"lr": 3e-2})
    run = run_stage(request_for("sft", tmp_path / "run", chosen, **inputs))

    loss = metrics(run.folder, "loss")
    assert list(loss) == list(range(1, 33))
    assert sum(loss[step] for step in range(30, 33)) < 0.6 * sum(loss[step] for step in range(1, 4))
    before, after = metrics(run.folder, "heldout_loss_before"), metrics(run.folder, "heldout_loss")
    assert list(before) == [0]
    # 32 rows are 4 steps of 10 an epoch; the last step of 32 ends the eighth of these.
    assert list(after) == [4, 8, 12, 16, 20, 24, 28, 32]
    assert after[32] < 0.7 * before[0]
    sequences = encoded(policy, held[:12])
    assert before[0] == pytest.approx(plain_loss(policy.model, sequences), abs=1e-5)
    # What was measured last is what is in the checkpoint, as plain transformers loads it.
    checkpoint = run.folder / "outputs" / "checkpoint"
    assert after[32] == pytest.approx(plain_loss(AutoModelForCausalLM.from_pretrained(checkpoint), sequences), abs=1e-5)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.apply_chat_template(held[0]["prompt"], add_generation_prompt=True, return_dict=False)
    assert ids == sequences[0].prompt_ids


def test_generations_are_the_trained_policy_s_on_held_out_prompts(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path
) -> None:
    held = [row | {"label": True} for row in chain_rows[40:]]
    inputs = {"model": init_folder, "train": dataset(chain_rows[:40], "train"), "heldout": dataset(held, "heldout")}
    run = run_stage(request_for("sft", tmp_path / "run", config(), **inputs))
    records = list(read_rows(run.folder / "outputs" / "generations"))
    names = ["id", "prompt", "problem", "answer", "step", "sample", "completion", "length", "finish", "policy"]
    assert list(records[0]) == names
    parsed = SftConfig.model_validate(config())
    trained = load_policy(run.folder / "outputs" / "checkpoint")
    samples, _ = sample_rows(trained, held[:5], parsed.sampling, seed=0, step=6)
    for record, row, sample in zip(records, held[:5], samples, strict=True):
        assert {name: record[name] for name in ("id", "prompt", "answer")} == {n: row[n] for n in ("id", "prompt", "answer")}
        assert (record["completion"], record["length"]) == (sample.text, len(sample.completion.ids))
        assert (record["step"], record["sample"], record["policy"]) == (6, 0, "sft")
        assert record["finish"] == sample.completion.finish


def test_without_held_out_rows_nothing_is_measured_and_training_prompts_are_sampled(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path
) -> None:
    run = run_stage(request_for("sft", tmp_path / "run", config(steps=1), model=init_folder, train=dataset(chain_rows)))
    assert metrics(run.folder, "heldout_loss_before") == metrics(run.folder, "heldout_loss") == {}
    records = list(read_rows(run.folder / "outputs" / "generations"))
    assert [record["id"] for record in records] == [row["id"] for row in chain_rows[:5]]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_the_first_loss_is_that_of_the_tokens_that_count(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, policy: LoadedPolicy, loss_on: str
) -> None:
    rows = chain_rows[:12]
    chosen = config(steps=1, batch_size=12, loss_on=loss_on, runtime={"micro_batch_tokens": 100})
    run = run_stage(request_for("sft", tmp_path / "run", chosen, model=init_folder, train=dataset(rows)))
    expected = plain_loss(policy.model, encoded(policy, rows), loss_on)
    assert metrics(run.folder, "loss") == {1: pytest.approx(expected, abs=1e-5)}
    other = plain_loss(policy.model, encoded(policy, rows), "all" if loss_on == "completion" else "completion")
    assert abs(other - expected) > 1e-3


def test_prompt_tokens_carry_no_loss_and_the_end_of_sequence_does(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, policy: LoadedPolicy, batches: list[TokenBatch]
) -> None:
    rows = chain_rows[:16]
    run_stage(request_for("sft", tmp_path / "run", config(steps=2), model=init_folder, train=dataset(rows)))
    found = sequences_in(batches)
    assert sorted(found) == list(range(16))
    for index, one in enumerate(encoded(policy, rows)):
        ids, targets = found[index]
        assert ids == [*one.prompt_ids, *one.completion_ids]
        assert targets == list(range(len(one.prompt_ids), len(ids)))
        assert ids[-1] == policy.stops[0]
        assert ids.count(policy.stops[0]) == 1


def long_row(policy: LoadedPolicy, tokens: int) -> dict[str, Any]:
    """A row whose prompt has exactly so many tokens."""
    row = {"id": f"{tokens:016}", "prompt": [{"role": "user", "content": "1"}], "completion": "<answer>1</answer>"}
    short = len(encoded(policy, [row])[0].prompt_ids)
    return row | {"prompt": [{"role": "user", "content": "1" + "+1" * (tokens - short)}]}


def test_long_rows_are_dropped_and_counted(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, policy: LoadedPolicy, batches: list[TokenBatch]
) -> None:
    rows = [*chain_rows, long_row(policy, 29), long_row(policy, 30), long_row(policy, 31)]
    chosen = config(steps=None, epochs=1, max_length=30)
    run = run_stage(request_for("sft", tmp_path / "run", chosen, model=init_folder, train=dataset(rows)))
    sizes = [len(one.prompt_ids) + len(one.completion_ids) for one in encoded(policy, rows)]
    fitting = [place for place, size in enumerate(sizes) if size <= 30]
    assert counts(run.folder, "train rows") == {
        "used": len(fitting),
        "dropped: too long": len(rows) - len(fitting) - 2,
        "dropped: the prompt fills the context": 2,
    }
    assert 10 < len(fitting) < 40
    trained = sequences_in(batches)
    assert len(trained) == len(fitting)
    assert {tuple(ids) for ids, _ in trained.values()} == {
        (*one.prompt_ids, *one.completion_ids) for one in encoded(policy, [rows[place] for place in fitting])
    }


def test_long_rows_are_cut_and_then_have_no_end(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, policy: LoadedPolicy, batches: list[TokenBatch]
) -> None:
    rows = [*chain_rows, long_row(policy, 29), long_row(policy, 30)]
    chosen = config(steps=7, max_length=30, too_long="truncate")
    run = run_stage(request_for("sft", tmp_path / "run", chosen, model=init_folder, train=dataset(rows)))
    whole = encoded(policy, rows[:-1])
    cut = sum(len(one.prompt_ids) + len(one.completion_ids) > 30 for one in whole)
    assert counts(run.folder, "train rows") == {
        "used": len(whole) - cut,
        "used, completion cut": cut,
        "dropped: the prompt fills the context": 1,
    }
    found = sequences_in(batches)
    assert len(found) == len(whole)
    for index, one in enumerate(whole):
        ids, targets = found[index]
        assert ids == [*one.prompt_ids, *one.completion_ids][:30]
        assert targets == list(range(len(one.prompt_ids), len(ids)))
        assert (policy.stops[0] in ids) == (len(one.prompt_ids) + len(one.completion_ids) <= 30)


def test_the_model_s_context_limits_too(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path, policy: LoadedPolicy
) -> None:
    assert policy.context == 128
    rows = [*chain_rows[:8], long_row(policy, 127), long_row(policy, 128)]
    chosen = config(steps=2, max_length=4096, too_long="truncate")
    held = dataset(rows, "heldout")
    run = run_stage(request_for("sft", tmp_path / "run", chosen, model=init_folder, train=dataset(rows, "train"), heldout=held))
    expected = {"used": 8, "used, completion cut": 1, "dropped: the prompt fills the context": 1}
    assert counts(run.folder, "train rows") == counts(run.folder, "heldout rows") == expected
    assert all(math.isfinite(value) for value in metrics(run.folder, "loss").values())


def test_no_row_left_is_an_error(init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path) -> None:
    request = request_for("sft", tmp_path / "run", config(max_length=5), model=init_folder, train=dataset(chain_rows))
    with pytest.raises(InputError, match=r"no row fits in 5 tokens .*fills the context.*48"):
        run_stage(request)


def test_rows_without_a_completion_are_an_error(init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "completion"} for row in chain_rows]
    request = request_for("sft", tmp_path / "run", config(), model=init_folder, train=dataset(rows))
    with pytest.raises(InputError, match='row 1 has no column "completion"'):
        run_stage(request)


def test_a_loss_that_is_not_finite_stops_with_its_rows_and_keeps_the_last_state(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path
) -> None:
    # Row 3 does not fit and is dropped: the message counts the rows of the source.
    rows = [*chain_rows[:2], chain_rows[2] | {"completion": "1+" * 90}, *chain_rows[3:9]]
    chosen = config(batch_size=8, shuffle=False, optimizer={"lr": 1e30, "warmup": 0}, runtime={"save_every": 1})
    request = request_for("sft", tmp_path / "run", chosen, model=init_folder, train=dataset(rows))
    with pytest.raises(InputError, match=r"step 2, rows \[1, 2, 4, 5, 6, 7, 8, 9\] of train: loss is .*(nan|inf)"):
        run_stage(request)
    [state] = (tmp_path / "run" / "state").iterdir()
    assert state.name == "step-00000001"
    assert all(tensor.isfinite().all() for tensor in load_file(state / "model.safetensors").values())
    assert not (tmp_path / "run" / "outputs.json").exists()


def test_how_the_machine_is_used_does_not_change_the_losses(
    init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path
) -> None:
    inputs = {"model": init_folder, "train": dataset(chain_rows[:32], "train"), "heldout": dataset(chain_rows[32:], "heldout")}
    uses = [{}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 70, "packed": True}, {"packed": True, "save_every": 100}]
    found = []
    for number, use in enumerate(uses):
        chosen = config(runtime=use)
        run = run_stage(request_for("sft", tmp_path / f"run {number}", chosen, **inputs))
        found.append([*metrics(run.folder, "loss").values(), *metrics(run.folder, "heldout_loss").values()])
    assert len(found[0]) == 8
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


def test_bfloat16_after_float32_in_one_process(init_folder: Path, chain_rows: Rows, dataset: Make, tmp_path: Path) -> None:
    train = dataset(chain_rows)
    runs = {
        dtype: run_stage(request_for("sft", tmp_path / dtype, config(steps=2, dtype=dtype), model=init_folder, train=train))
        for dtype in ("float32", "bfloat16")
    }
    losses = {dtype: metrics(run.folder, "loss")[1] for dtype, run in runs.items()}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
    weights = load_file(runs["bfloat16"].folder / "outputs" / "checkpoint" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


# Resuming: the same bytes whenever the stage dies.

LONG: dict[str, Any] = {"steps": 40, "runtime": {"save_every": 1, "log_every": 1}}


@pytest.fixture
def inputs(init_folder: Path, chain_rows: Rows, dataset: Make) -> dict[str, Path]:
    return {"model": init_folder, "train": dataset(chain_rows[:32], "train"), "heldout": dataset(chain_rows[32:], "heldout")}


def test_the_same_config_gives_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    one, other = (run_stage(request_for("sft", tmp_path / name, config(), **inputs)) for name in ("one", "other"))
    assert digests(one) == digests(other)
    assert {"checkpoint/model.safetensors", "checkpoint/config.json", "generations/data.parquet"} <= set(digests(one))
    changed = run_stage(request_for("sft", tmp_path / "changed", config(seed=1), **inputs))
    for name in ("checkpoint/model.safetensors", "generations/data.parquet"):
        assert digests(changed)[name] != digests(one)[name]


class CrashError(Exception):
    """What a listener raises in the place of a crash."""


@pytest.mark.parametrize("saved", [1, 2, 3, 5, 6])
def test_a_run_that_fails_after_any_step_ends_as_one_that_does_not(inputs: dict[str, Path], tmp_path: Path, saved: int) -> None:
    chosen = config(runtime={"save_every": 1})
    expected = run_stage(request_for("sft", tmp_path / "whole", chosen, **inputs))

    def crash(event: Event) -> None:
        if event["event"] == "state" and event["step"] == saved:
            raise CrashError

    request = request_for("sft", tmp_path / "broken", chosen, **inputs)
    with pytest.raises(CrashError):
        run_stage(request, crash)
    torch.manual_seed(1234)
    resumed = run_stage(request)
    assert [event["step"] for event in events(resumed.folder, "state")] == [1, 2, 3, 4, 5, 6]
    assert digests(resumed) == digests(expected)
    assert metrics(resumed.folder, "loss") == metrics(expected.folder, "loss")
    assert metrics(resumed.folder, "heldout_loss") == metrics(expected.folder, "heldout_loss")


def test_outputs_that_a_kill_left_half_written_are_made_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    request = request_for("sft", tmp_path / "run", config(), **inputs)
    run = run_stage(request)
    expected = digests(run)
    (run.folder / "outputs.json").unlink()
    shutil.rmtree(run.folder / "outputs" / "checkpoint")
    rows = run.folder / "outputs" / "generations" / "data.parquet"
    rows.write_bytes(rows.read_bytes()[:100])
    (rows.parent / "left over").write_text("by the killed try")
    steps = len(events(run.folder, "state"))
    assert digests(run_stage(request)) == expected
    assert len(events(run.folder, "state")) == steps
    assert json.loads((run.folder / "outputs.json").read_text()) == {
        "key": request.key,
        "outputs": {"checkpoint": "model", "generations": "dataset"},
    }


def last_state(folder: Path) -> int:
    lines = (folder / "events.jsonl").read_text().splitlines() if (folder / "events.jsonl").is_file() else []
    steps = [json.loads(line)["step"] for line in lines if '"event": "state"' in line and line.endswith("}")]
    return max(steps, default=0)


def assert_killed_child_resumes(request: Request, expected: Run) -> None:
    """A child of 40 steps that is killed after its fifth state and started again ends in the bytes of `expected`."""
    command = kill_child(request, lambda: last_state(request.folder) >= 5)
    assert 5 <= last_state(request.folder) < 40

    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    killed = Run(request.folder, {})
    assert digests(killed) == digests(expected)
    assert metrics(killed.folder, "loss") == metrics(expected.folder, "loss")


def test_a_killed_child_resumes_to_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    expected = run_stage(request_for("sft", tmp_path / "whole", config(**LONG), **inputs))
    request = request_for("sft", tmp_path / "killed", config(**LONG), **inputs)
    assert_killed_child_resumes(request, expected)
    assert (request.folder / "outputs.json").is_file()
