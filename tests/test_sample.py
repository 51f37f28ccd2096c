"""Sampling through its request: which completions each prompt gets, in which order, and that nothing else has a say in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sampling
import torch
from conftest import request_for
from sampling import (
    COLUMNS,
    RECORDED,
    Rows,
    config,
    digest,
    events,
    metrics,
    samples,
)

import stages.data.parts
import stages.sample
from stages.models.load import load_policy, save_policy
from stages.request import run_stage
from stages.rollouts.sample import sample_rows
from stages.specs.common import Dtype, Sampling

threads = sampling.threads
rows = sampling.rows
prompts = sampling.prompts
drawn = sampling.drawn


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
