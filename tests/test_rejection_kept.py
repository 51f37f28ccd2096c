"""Which of the accepted samples are kept, what is written of them, and that training takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import labelling
import pytest
import rejecting
from conftest import request_for
from labelling import chain_group, group, within
from rejecting import Reject, Rows, counts, digests, events, made, metrics, pass_rates, texts

import stages.rejection
from stages.data.labels import held_out
from stages.data.schemas import row_id
from stages.prepare import _held_out
from stages.request import run_stage
from stages.specs.prepare import PrepareConfig

registered = labelling.registered
reject = rejecting.reject


# Doubles and the cap.


def test_of_samples_equal_but_for_white_space_the_first_is_kept(reject: Reject) -> None:
    rows = group("a", "1  x", "1 x", " 1\tx\n", "1 X", "1 x y", "1 x")
    rows += group("b", "1 x")
    run = reject(rows, per_prompt=None, choose="shortest")
    # The first one is kept, though it is not the shortest; another prompt's is no double of it.
    assert texts(run) == ["1 X", "1  x", "1 x y", "1 x"]
    assert counts(run.folder)["doubles"] == 3
    assert sorted(texts(reject(rows, per_prompt=None, deduplicate=False))) == sorted(row["completion"] for row in rows)


def test_doubles_are_of_the_accepted_samples(reject: Reject) -> None:
    """One that is rejected does not stand for an equal one that is not; and the pass rate counts all."""
    rows = group("a", "1", "1", "1 ", "0")
    rows[0]["finish"] = "length"
    run = reject(rows)
    assert texts(run) == ["1"]
    assert made(run)[0]["sample"] == 1
    assert pass_rates(run) == {"a": 0.5}
    assert counts(run.folder) == {
        "samples": 4, "rejected: cut off": 1, "doubles": 1, "beyond the cap": 0, "kept": 1, "rejected: worth below 1": 1,
    }  # fmt: skip


def test_the_best_are_kept_first_and_ties_stay_in_order(reject: Reject) -> None:
    rows = [*group("a", "2 x", "5", "2 y", "2 z", "1", "0"), *group("b", "1", "3", "2")]
    run = reject(rows, per_prompt=3)
    assert texts(run) == ["5", "2 x", "2 y", "3", "2", "1"]
    assert pass_rates(run) == {"a": 5 / 6, "b": 1.0}
    assert counts(run.folder)["beyond the cap"] == 2
    assert metrics(run)["accepted"] == 8 / 9
    assert texts(reject(rows)) == ["5", "2 x", "2 y", "2 z", "3", "2", "1"], "four by default"


def test_the_best_is_the_weighted_sum_of_all_criteria(reject: Reject) -> None:
    """Of those without a bound too; without a verdict there is no sum, and it comes last."""
    rows = [row | {"bonus": bonus} for row, bonus in zip(group("a", "?", "1", "5"), (3.0, 2.0, 1.0), strict=True)]
    bonus: dict[str, Any] = {"name": "bonus", "weight": 2.0, "minimum": 0.0}
    run = reject(rows, criteria=[bonus, {"name": "worth", "weight": 3.0}])
    assert texts(run) == ["5", "1", "?"]
    assert [row["reward"] for row in made(run)] == [2 + 15, 4 + 3, None]
    assert texts(reject(rows, criteria=[bonus, {"name": "worth", "weight": -3.0}])) == ["1", "5", "?"]
    assert texts(reject(rows, criteria=[bonus, {"name": "worth", "weight": 0.0}])) == ["?", "1", "5"]


def test_the_shortest_are_kept_first_by_characters(reject: Reject) -> None:
    rows = group("a", "3 abc", "1 x", "2", "1 y", "5 long")
    rows = [row | {"length": 1} for row in rows]
    assert texts(reject(rows, choose="shortest", per_prompt=3)) == ["2", "1 x", "1 y"]


def test_any_are_kept_by_the_seed(reject: Reject) -> None:
    rows = [row for number in range(400) for row in group(f"{number}", "1 a", "1 b", "1 c", "1 d", "0")]
    chosen: dict[str, Any] = {"choose": "random", "per_prompt": 1}
    run = reject(rows, **chosen)
    shares = Counter(text[-1] for text in texts(run))
    assert all(within(shares[letter] / 400, 0.25, 400) for letter in "abcd"), shares
    assert digests(reject(rows, **chosen)) == digests(run)
    assert digests(reject(rows, **chosen, seed=1)) != digests(run)
    # Whoever else is there, and with or without numbers: each prompt has a choice of its own.
    alone = texts(reject([row for row in rows if row["prompt"] in ("7", "8", "9")], **chosen))
    assert alone == texts(run)[7:10]
    unnumbered = [{name: value for name, value in row.items() if name not in ("sample", "step")} for row in rows]
    shares = Counter(text[-1] for text in texts(reject(unnumbered, **chosen)))
    assert all(within(shares[letter] / 400, 0.25, 400) for letter in "abcd"), shares


# What is written.


def test_a_whole_row(reject: Reject) -> None:
    """A demonstration, where it comes from and what was said of it; what the samples had under these names gives way."""
    rows = group("a", "2", level=7, reward="old", **{"rewards.worth": "old", "prompt_id": 5})
    run = reject(rows)
    [row] = made(run)
    said = {"prompt": "a", "completion": "2"}
    assert row == said | {
        "id": row_id(said),
        "prompt_id": "id of a",
        "answer": "answer to a",
        "level": 7,
        "step": 0,
        "sample": 0,
        "length": 1,
        "finish": "stop",
        "policy": "policy",
        "reward": 2.0,
        "rewards.worth": 2.0,
    }
    assert row["id"] != "id of a"
    [prompt] = made(run, "prompts")
    expected = {"id": "id of a", "prompt": "a", "answer": "answer to a", "level": 7, "samples": 1, "pass_rate": 1.0}
    assert prompt == expected | {"prompt_id": 5}


def test_every_prompt_has_a_pass_rate(reject: Reject) -> None:
    rows = [*group("none", "0", "0 x"), *group("all", "1", "2"), *group("some", "?", "1", "0", "-1"), *group("one", "0")]
    run = reject(rows)
    assert pass_rates(run) == {"none": 0.0, "all": 1.0, "some": 0.25, "one": 0.0}
    assert [row["samples"] for row in made(run, "prompts")] == [2, 2, 4, 1]


def many(prompts: int = 600) -> Rows:
    return [row for number in range(prompts) for row in group(f"prompt {number}", "1", "2")]


def test_prompts_are_held_out_by_a_hash_of_their_own(reject: Reject) -> None:
    run = reject(many(), heldout=0.3)
    sides = {name: {row["prompt"] for row in made(run, name)} for name in ("train", "heldout")}
    assert not sides["train"] & sides["heldout"]
    assert len(made(run, "train")) + len(made(run, "heldout")) == 1200
    assert within(len(sides["heldout"]) / 600, 0.3, 600)
    assert metrics(run)["rows_heldout"] == 2 * len(sides["heldout"])
    assert len(made(run, "prompts")) == 600
    # Half of the prompts change no side when others are there; and the seed does not matter.
    again = reject(many(300), heldout=0.3, seed=5)
    assert {row["prompt"] for row in made(again, "heldout")} == {p for p in sides["heldout"] if int(p.split()[1]) < 300}
    # Independent of the split that `prepare` has made of these prompts already, and of label's.
    for module_held_out in (
        lambda prompt: _held_out(PrepareConfig(heldout=0.3), {"prompt": prompt}),
        lambda prompt: held_out(0.3, {"prompt": prompt}),
    ):
        both = sum(module_held_out(prompt) for prompt in sides["heldout"]) / len(sides["heldout"])
        assert within(both, 0.3, len(sides["heldout"])), both


def test_without_a_share_nothing_is_held_out(reject: Reject) -> None:
    run = reject(many(20))
    assert set(digests(run)) == {"train", "prompts"}
    assert metrics(run) == {"rows_train": 40, "rows_heldout": 0, "rows_prompts": 20, "accepted": 1.0}


def test_every_group_is_judged_alike_whatever_chunk_it_is_in(reject: Reject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for number in range(41) for row in group(f"{number}", *map(str, range(1 + number % 4)), "1")]
    chosen: dict[str, Any] = {"choose": "random", "per_prompt": 2, "heldout": 0.3}
    whole = reject(rows, **chosen)
    assert stages.rejection.CHUNK == 1024
    asked: list[int] = []
    scored = stages.rejection.Mixture.__call__

    def record(self: Any, completions: Sequence[str], rows: Sequence[Any]) -> Any:
        asked.append(len(completions))
        return scored(self, completions, rows)

    monkeypatch.setattr(stages.rejection.Mixture, "__call__", record)
    sizes = [2 + number % 4 for number in range(41)]
    for chunk in (1024, 20, 41, 1):
        asked.clear()
        monkeypatch.setattr(stages.rejection, "CHUNK", chunk)
        run = reject(rows, **chosen)
        assert (digests(run), counts(run.folder)) == (digests(whole), counts(whole.folder))
        assert asked == [sum(sizes[start : start + chunk]) for start in range(0, 41, chunk)]
        told = [(one["done"], one["total"]) for one in events(run.folder, "progress")]
        assert told == [(sum(asked[: n + 1]), sum(sizes)) for n in range(len(asked))]


# What comes of it is what training takes.


def test_they_are_the_demonstrations_of_sft_and_the_prompts_of_grpo(reject: Reject, init_folder: Path, tmp_path: Path) -> None:
    rows = [*chain_group("1+2", "3", "3", "0"), *chain_group("2+2", "4", "0", "0"), *chain_group("3+3", "0", "0")]
    run = reject(rows)
    outputs, common = run.folder / "outputs", {"sampling": {"max_new_tokens": 4}, "runtime": rejecting.CONFIG["runtime"]}
    config: dict[str, Any] = {"steps": 1, "batch_size": 2, "generations": 2} | common
    sft = run_stage(request_for("sft", tmp_path / "sft", config, model=init_folder, train=outputs / "train"))
    [told] = [event for event in events(sft.folder, "table") if event["name"] == "train rows"]
    assert told["rows"] == [{"what": "used", "rows": 2}]
    config = {"steps": 1, "prompts": 2, "group": 2, "rewards": [{"name": "length"}], **common}
    config["curriculum"] = {"column": "pass_rate", "minimum": 0.1, "order": "falling"}
    grpo = run_stage(request_for("grpo", tmp_path / "grpo", config, policy=init_folder, prompts=outputs / "prompts"))
    drawn = list(rejecting.read_rows(grpo.folder / "outputs" / "rollouts"))
    assert [row["prompt"][0]["content"] for row in drawn] == ["1+2", "1+2", "2+2", "2+2"]
    [told] = [event for event in events(grpo.folder, "table") if event["name"] == "curriculum"]
    assert told["rows"][0] == {"what": "used", "rows": 2}
