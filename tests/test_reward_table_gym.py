"""reasoning-gym: its tasks as rows, their own answers under their own scorers, and answers that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages.data.procedural import procedural
from stages.data.reasoning_gym import TASKS
from stages.data.schemas import canonical
from stages.errors import InputError
from stages.rewards import check_rows, score
from stages.rewards.base import Score
from stages.rewards.reasoning_gym import RUN_AS_CODE, check, reasoning_gym

SUM: dict[str, Any] = {"id": "sum", "task": "chain_sum", "answer": "7", "metadata": '{"expression": "3 + 4"}'}
COUNTDOWN: dict[str, Any] = {
    "id": "countdown",
    "task": "countdown",
    "answer": "3*4 + 1",
    "metadata": '{"numbers": [1, 3, 4], "target": 13}',
}


@pytest.mark.parametrize("task", [task for task in TASKS if task != "knight_swap"])  # which takes seconds to make
def test_a_task_s_own_answer_is_right_and_no_answer_is_worth_nothing(task: str) -> None:
    rows = list(procedural(f"reasoning-gym/{task}").rows(2, 7))
    for row in rows:
        assert check(row) is None
        canonical(row, "here")
        if row["answer"] is not None:
            assert reasoning_gym([f"<think>hm</think><answer>{row['answer']}</answer>"], [row]) == [Score(1.0)]
        assert (
            reasoning_gym(["", "I do not know", "<think><answer>1</answer></think>"], [row] * 3)
            == [Score(0.0, note="no answer")] * 3
        )


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "family_relationships"])
def test_rows_depend_on_the_seed_alone(task: str) -> None:
    source = procedural(f"reasoning-gym/{task}")
    rows = list(source.rows(20, 1))
    assert list(source.rows(20, 1)) == rows
    assert list(source.rows(30, 1))[:20] == rows
    assert list(source.rows(20, 2)) != rows
    assert isinstance(source.version, str)
    assert "reasoning-gym 0." in source.version
    for row in rows:
        assert row["task"] == task
        assert json.loads(row["metadata"])["source_dataset"] == task
        assert row["prompt"][0]["content"].endswith("between <answer> and </answer>.")


@pytest.mark.parametrize(
    "name", ["reasoning-gym/chain_sums", "reasoning-gym/arc_agi", "reasoning-gym/", "reasoning-gym/composite"]
)
def test_unknown_tasks(name: str) -> None:
    with pytest.raises(KeyError, match="reasoning-gym/chain_sum"):
        procedural(name)


CASES: dict[str, tuple[dict[str, Any], float, str | None]] = {
    "<answer>7</answer>": (SUM, 1.0, None),
    "<answer> 7\n</answer>": (SUM, 1.0, None),
    "<answer>8</answer><answer>7</answer>": (SUM, 0.0, "two answers"),
    "<answer>8</answer>": (SUM, 0.0, None),
    "7": (SUM, 0.0, "no answer"),
    r"\boxed{7}": (SUM, 0.0, "no answer"),
    "<answer></answer>": (SUM, 0.0, "no answer"),
    "<answer>" + "7" * 100_000 + "</answer>": (SUM, 0.0, "answer too long"),
    "<answer>1 + 3*4</answer>": (COUNTDOWN, 1.0, None),
    "<answer>3*4 + 1</answer>": (COUNTDOWN, 1.0, None),
    "<answer>1 + 3 + 4</answer>": (COUNTDOWN, 0.05, None),
    "<answer>((</answer>": (COUNTDOWN, 0.01, None),
    "<answer>__import__('os').abort()</answer>": (COUNTDOWN, 0.0, "answer not parsed"),
    "<answer>exit()</answer>": (COUNTDOWN, 0.0, "answer not parsed"),
    "<answer>(exit)()</answer>": (COUNTDOWN, 0.0, "answer not parsed"),
    "<answer>ｅｘｉｔ()</answer>": (COUNTDOWN, 0.0, "answer not parsed"),
    "<answer>[].append</answer>": (COUNTDOWN, 0.0, "answer not parsed"),
    "<answer>1 # 3*4</answer>": (COUNTDOWN, 0.0, "answer not parsed"),
}


@pytest.mark.parametrize(("completion", "expected"), CASES.items(), ids=range(len(CASES)))
def test_answers(completion: str, expected: tuple[dict[str, Any], float, str | None]) -> None:
    row, total, note = expected
    assert reasoning_gym([completion], [row]) == [Score(total, note=note)]


@pytest.mark.parametrize("task", sorted(RUN_AS_CODE))
def test_no_scorer_runs_an_answer(task: str, tmp_path: Path) -> None:
    (row,) = procedural(f"reasoning-gym/{task}").rows(1, 3)
    witness = tmp_path / "witness"
    for code in (f"open('{witness}', 'w')", f"[open('{witness}','w')]", f"__import__('pathlib').Path('{witness}').touch()"):
        assert reasoning_gym([f"<answer>{code}</answer>"], [row]) == [Score(0.0, note="answer not parsed")]
    assert not witness.exists()


def test_a_scorer_that_raises_has_not_parsed_the_answer() -> None:
    (row,) = procedural("reasoning-gym/prime_factorization").rows(1, 0)
    assert reasoning_gym(["<answer>none</answer>"], [row]) == [Score(0.0, note="answer not parsed")]


PRIME = {"task": "prime_factorization", "answer": "none", "metadata": "{}"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (SUM | {"task": "no_such"}, "\"task\" is 'no_such', which is no task of reasoning-gym that can be kept in rows"),
        (SUM | {"metadata": "{"}, "\"metadata\" is not what the task 'chain_sum' needs: JSONDecodeError: "),
        (COUNTDOWN | {"answer": "3 + 4"}, "\"answer\" is '3 + 4', which the scorer of 'countdown' does not call right"),
        (COUNTDOWN | {"metadata": "{}"}, "\"answer\" is '3*4 + 1', which the scorer of 'countdown' does not call right"),
        (PRIME, "\"metadata\" is not what the task 'prime_factorization' needs: ValueError: "),
    ],
)
def test_a_row_that_no_completion_can_be_rated_on_is_refused(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=f"^the row with id 'bad', for the reward 'reasoning_gym': {re.escape(problem)}"):
        check_rows("reasoning_gym", [SUM, row | {"id": "bad"}])


def test_a_bad_row_that_was_not_checked_is_named() -> None:
    with pytest.raises(InputError, match=r"^the row with id 'bad': \"metadata\" is not what the task 'chain_sum' needs"):
        score("reasoning_gym", ["<answer>7</answer>"] * 2, [SUM, SUM | {"id": "bad", "metadata": "{"}])


def test_in_the_pool() -> None:
    rows = [row for row, _, _ in CASES.values()]
    assert score("reasoning_gym", list(CASES), rows) == [Score(total, note=note) for _, total, note in CASES.values()]
