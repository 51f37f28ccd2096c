"""Rewards by hand, and the errors of a reward that fails: the row is named."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest

from stages.data.chain_sum import steps
from stages.errors import InputError
from stages.rewards import REWARDS, require_columns, score
from stages.rewards.answer import final_answer
from stages.rewards.base import RewardEntry, Row, Score


def broken_on_three(completions: Sequence[str], rows: Sequence[Row], limit: int = 3) -> list[Score | None]:
    """A reward for these tests: raises on a row whose n is `limit`, gives None on an empty completion."""
    if any(row["n"] == limit for row in rows):
        raise KeyError("no such thing")
    return [Score(row["n"], {"n": row["n"]}) if text else None for text, row in zip(completions, rows, strict=True)]


def broken_together(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """Raises on more than one row only."""
    if len(rows) > 1:
        raise RuntimeError("too many")
    return [Score(0.0)]


def one_short(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    return [Score(0.0) for _ in completions[1:]]


def refuses(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    raise InputError("in the reward's own words")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (broken_on_three, broken_together, one_short, refuses):
        monkeypatch.setitem(
            REWARDS, function.__name__, RewardEntry(f"{__name__}:{function.__name__}", version=1, columns=("n",))
        )


def totals(name: str, completions: list[str], rows: list[dict[str, Any]]) -> list[float | None]:
    return [one.total if one else None for one in score(name, completions, rows)]


ROWS = [{"id": f"row-{n}", "n": n} for n in range(5)]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>6</answer>", 1.0),
        ("<think>12+3=15</think><answer> 6\n</answer>", 1.0),
        ("<answer>7</answer> no, <answer>6</answer>", 1.0),
        ("<answer>6</answer> no, <answer>7</answer>", 0.0),
        ("<answer>6</answer> no, <answer>7", 1.0),
        ("<answer>06</answer>", 0.0),
        ("<answer>6.0</answer>", 0.0),
        ("<answer>6", 0.0),
        ("6", 0.0),
        ("", 0.0),
        ("<answer></answer>", 0.0),
    ],
)
@pytest.mark.parametrize("answer", ["6", 6, " 6 "])
def test_answer(completion: str, expected: float, answer: str | int) -> None:
    assert totals("answer", [completion], [{"answer": answer}]) == [expected]


def test_answer_rates_each_completion_by_its_own_row() -> None:
    completions = [f"<answer>{n}</answer>" for n in (1, 2, 3)]
    assert totals("answer", completions, [{"answer": str(n)} for n in (1, 3, 3)]) == [1.0, 0.0, 1.0]


def test_final_answer() -> None:
    assert final_answer("<answer>a\nb</answer>") == "a\nb"
    assert final_answer("<answer>a<answer>b</answer>") == "a<answer>b"
    assert final_answer("none") is None


PREFERENCES = {
    "all right": ("<think>12+3=15;15-9=6</think><answer>6</answer>", 1.0, 0.0, 0.5),
    "a wrong sum at the end": ("<think>12+3=15;15-9=7</think><answer>7</answer>", 0.5, 0.0, 0.0),
    "a wrong sum carried on": ("<think>12+3=14;14-9=5</think><answer>5</answer>", 0.0, 0.0, 0.0),
    "a wrong sum that is made good": ("<think>12+3=14;15-9=6</think><answer>6</answer>", 0.5, 0.0, 0.0),
    "a step left out": ("<think>12+3=15</think><answer>6</answer>", 0.5, 0.0, 0.0),
    "a superfluous step": ("<think>12+3=15;15-9=6;6+0=6</think><answer>6</answer>", 1.0, -0.25, 0.0),
    "steps in another order": ("<think>15-9=6;12+3=15</think><answer>6</answer>", 0.0, 0.0, 0.0),
    "right steps, wrong answer": ("<think>12+3=15;15-9=6</think><answer>7</answer>", 1.0, 0.0, 0.0),
    "right steps, no answer": ("<think>12+3=15;15-9=6</think>", 1.0, 0.0, 0.0),
    "steps without end": ("<think>12+3=15;15-9=6", 0.0, 0.0, 0.0),
    "a lucky guess": ("<answer>6</answer>", 0.0, 0.0, 0.0),
    "a wrong guess": ("<answer>7</answer>", 0.0, 0.0, 0.0),
    "no steps between the tags": ("<think></think><answer>6</answer>", 0.0, 0.0, 0.0),
    "nothing": ("", 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize(("completion", "right", "superfluous", "complete"), PREFERENCES.values(), ids=PREFERENCES)
def test_preference_by_hand(completion: str, right: float, superfluous: float, complete: float) -> None:
    (one,) = score("chain_sum", [completion], [{"problem": "12+3-9", "answer": "6"}])
    parts = {"right": right, "superfluous": superfluous, "complete": complete}
    assert one is not None
    assert (one.total, one.components) == (right + superfluous + complete, parts)


# A completion with a | behind each step, and which of these are right.
STEPS = {
    "all right": ("<think>12+3=15;|15-9=6</think>|<answer>6</answer>|", [1, 1, 1]),
    "text around": ("So: <think>12+3=15;|15-9=6</think>|\nIt is <answer>6</answer>.\n|", [1, 1, 1]),
    "a wrong sum at the end": ("<think>12+3=15;|15-9=7</think>|<answer>7</answer>|", [1, 0, 0]),
    "a wrong sum carried on": ("<think>12+3=14;|14-9=5</think>|<answer>5</answer>|", [0, 0, 0]),
    "a wrong sum that is made good": ("<think>12+3=14;|15-9=6</think>|<answer>6</answer>|", [0, 1, 0]),
    "a step left out": ("<think>12+3=15</think>|<answer>6</answer>|", [1, 0]),
    "a superfluous step": ("<think>12+3=15;|15-9=6;|6+0=6</think>|<answer>6</answer>|", [1, 1, 0, 0]),
    "steps in another order": ("<think>15-9=6;|12+3=15</think>|<answer>6</answer>|", [0, 0, 0]),
    "an empty step": ("<think>12+3=15;|;|15-9=6</think>|<answer>6</answer>|", [1, 0, 0, 0]),
    "right steps, wrong answer": ("<think>12+3=15;|15-9=6</think>|<answer>7</answer>|", [1, 1, 0]),
    "right steps, an answer without tags": ("<think>12+3=15;|15-9=6</think>|6|", [1, 1, 0]),
    "right steps, no answer": ("<think>12+3=15;|15-9=6</think>|", [1, 0]),
    "right steps, a blank for an answer": ("<think>12+3=15;|15-9=6</think>\n |", [1, 0]),
    "steps without end": ("<think>12+3=15;15-9=6|", [0]),
    "a lucky guess": ("<answer>6</answer>|", [0]),
    "no steps between the tags": ("<think></think><answer>6</answer>|", [0]),
}


@pytest.mark.parametrize(("marked", "right"), STEPS.values(), ids=STEPS)
def test_written_steps_and_the_answer_are_rated(marked: str, right: list[int]) -> None:
    steps = marked.split("|")[:-1]
    (one,) = score("chain_sum", ["".join(steps)], [{"problem": "12+3-9", "answer": "6"}])
    assert one is not None
    assert one.step_ends == [end - 1 for end in accumulate(map(len, steps))]
    assert one.step_scores == right


def test_no_text_is_one_wrong_step() -> None:
    (one,) = score("chain_sum", [""], [{"problem": "12+3-9", "answer": "6"}])
    assert one is not None
    assert (one.step_scores, one.step_ends) == ([0.0], [0])


def test_preference_takes_shares_of_the_problem_s_own_steps() -> None:
    problem = "1+1+1+1+1"
    rows = [{"problem": problem, "answer": "5"}]
    written = [*steps(problem)[:3], "4+1=6"]
    assert totals("chain_sum", [f"<think>{';'.join(written)}</think>"], rows) == [0.75]
    assert totals("chain_sum", [f"<think>{';'.join([*written, '6+1=7'])}</think>"], rows) == [0.75 - 0.125]


def test_length_counts_characters() -> None:
    assert score("length", ["", "abcd"], [{}, {}], weight=-0.5) == [Score(0.0), Score(-2.0)]


def test_a_reward_that_raises_names_the_row() -> None:
    with pytest.raises(
        InputError, match=r"reward 'broken_on_three' raised KeyError on the row with id 'row-3': 'no such thing'"
    ):
        score("broken_on_three", ["a"] * 5, ROWS)
    with pytest.raises(InputError, match="on the row with id 'row-1'"):
        score("broken_on_three", ["a"] * 5, ROWS, limit=1)


def test_a_reward_that_raises_on_no_row_alone_names_the_batch() -> None:
    with pytest.raises(InputError, match="reward 'broken_together' raised RuntimeError on the whole batch: too many"):
        score("broken_together", ["a"] * 5, ROWS)


def test_a_reward_may_speak_for_itself() -> None:
    with pytest.raises(InputError, match=r"^in the reward's own words$"):
        score("refuses", ["a"], ROWS[:1])


def test_none_is_no_zero() -> None:
    assert score("broken_on_three", ["a", "", "a"], ROWS[:3]) == [Score(0, {"n": 0}), None, Score(2, {"n": 2})]


def test_a_wrong_number_of_scores_is_refused() -> None:
    with pytest.raises(InputError, match="reward 'one_short' gave 4 scores for 5 completions; it must give one each"):
        score("one_short", ["a"] * 5, ROWS)


def test_a_missing_column_is_refused() -> None:
    message = r"reward 'chain_sum' needs the column 'problem', which is not in rlhf-prompts/2 \(columns: id, answer\)"
    with pytest.raises(InputError, match=message):
        require_columns("chain_sum", ["id", "answer"], "rlhf-prompts/2")
    require_columns("chain_sum", iter(["answer", "id", "problem"]), "rlhf-prompts/2")


@pytest.mark.parametrize("name", ["answer", "chain_sum"])
def test_registered_columns_are_all_a_reward_reads(name: str) -> None:
    row = {"problem": "12+3-9", "answer": "6"}
    score(name, ["<answer>6</answer>"], [{column: row[column] for column in REWARDS[name].columns}])
    for column in REWARDS[name].columns:
        with pytest.raises(InputError, match=f"raised KeyError on the row with id None: '{column}'"):
            score(name, ["<think>12+3=15;15-9=6</think><answer>6</answer>"], [{k: v for k, v in row.items() if k != column}])
