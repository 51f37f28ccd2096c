"""The running-sum task against plain Python arithmetic, and the mixtures that its sources promise."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import yaml
from conftest import INIT
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts import digest_of
from stages.data.chain_sum import (
    LARGEST,
    VERSION,
    bare,
    base_rows,
    demonstration_rows,
    guess,
    new_problem,
    result,
    sloppy,
    steps,
    words,
    worked,
)
from stages.data.procedural import PROCEDURAL
from stages.models.tokenizers import word_tokenizer

SEEDS = st.integers(0, 10**9)
SUMS = [name for name in PROCEDURAL if name.startswith("chain-sum/")]
ARITHMETIC = re.compile(r"-?\d+([+-]\d+)*")
STEP = re.compile(r"(-?\d+)([+-]\d)=(-?\d+)")
SOLUTION = re.compile(r"<think>([^<]*)</think><answer>(-?\d+)</answer>")
ANSWER = re.compile(r"<answer>(\d+)</answer>")


def value(expression: str) -> int:
    """Python's own value of a sum."""
    assert ARITHMETIC.fullmatch(expression)
    return eval(expression)


def parts(solution: str) -> tuple[list[tuple[int, str, int]], int]:
    """The steps (from, term, to) and the answer of a solution."""
    found = SOLUTION.fullmatch(solution)
    assert found, solution
    lines = [STEP.fullmatch(line) for line in found.group(1).split(";")]
    assert all(lines), solution
    return [(int(line[1]), line[2], int(line[3])) for line in lines if line], int(found.group(2))


def kind(row: dict[str, Any]) -> str:
    """What a completion is: good, sloppy, right (a bare right answer) or wrong (a bare wrong one)."""
    if bare_answer := ANSWER.fullmatch(row["completion"]):
        return "right" if bare_answer[1] == row["answer"] else "wrong"
    lines, _ = parts(row["completion"])
    return "good" if all(value(f"{before}{term}") == after for before, term, after in lines) else "sloppy"


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    kinds = [kind(row) for row in rows]
    return {name: kinds.count(name) / len(kinds) for name in ("good", "sloppy", "right", "wrong")}


def test_by_hand() -> None:
    assert steps("12+3-9") == ["12+3=15", "15-9=6"]
    assert result("12+3-9") == 6
    assert worked("12+3-9") == "<think>12+3=15;15-9=6</think><answer>6</answer>"
    assert bare(6) == "<answer>6</answer>"


@settings(max_examples=150)
@given(SEEDS)
def test_problems_stay_in_range(seed: int) -> None:
    problem = new_problem(random.Random(seed))
    terms = re.findall(r"[+-]\d", problem)
    assert re.match(r"\d+", problem)[0] + "".join(terms) == problem  # pyright: ignore[reportOptionalSubscript]
    assert 2 <= len(terms) <= 5
    assert "+0" not in terms
    assert "-0" not in terms
    totals = [value(problem[: place.start()]) for place in re.finditer(r"[+-]", problem)] + [value(problem)]
    assert len(totals) == len(terms) + 1
    assert all(0 <= total <= LARGEST for total in totals)
    assert result(problem) == value(problem)


def test_problems_use_the_whole_range() -> None:
    rng = random.Random(0)
    problems = [new_problem(rng) for _ in range(2000)]
    assert {value(problem) for problem in problems} == set(range(20))
    assert {len(re.findall(r"[+-]", problem)) for problem in problems} == {2, 3, 4, 5}
    assert {term for problem in problems for term in re.findall(r"[+-]\d", problem)} == {f"{t:+d}" for t in range(-9, 10) if t}


@settings(max_examples=150)
@given(SEEDS)
def test_worked_solutions_are_right(seed: int) -> None:
    problem = new_problem(random.Random(seed))
    lines, answer = parts(worked(problem))
    start = re.match(r"\d+", problem)[0]  # pyright: ignore[reportOptionalSubscript]
    assert start + "".join(term for _, term, _ in lines) == problem
    total = int(start)
    for before, term, after in lines:
        assert before == total
        total = value(f"{before}{term}")
        assert after == total
    assert answer == total == value(problem)


@settings(max_examples=300)
@given(SEEDS)
def test_sloppy_solutions_have_one_wrong_sum_and_build_on_it(seed: int) -> None:
    rng = random.Random(seed)
    problem = new_problem(rng)
    lines, answer = parts(sloppy(problem, rng))
    start = re.match(r"\d+", problem)[0]  # pyright: ignore[reportOptionalSubscript]
    assert start + "".join(term for _, term, _ in lines) == problem
    assert [before for before, _, _ in lines] == [int(start), *(after for _, _, after in lines[:-1])]
    errors = [after - value(f"{before}{term}") for before, term, after in lines]
    assert sum(error != 0 for error in errors) == 1
    assert max(map(abs, errors)) <= 2
    assert answer == lines[-1][2] != value(problem)


def test_sloppy_slips_at_any_step() -> None:
    problem = "5+1+1+1+1"
    places = set()
    for seed in range(60):
        lines, _ = parts(sloppy(problem, random.Random(seed)))
        places |= {n for n, (before, term, after) in enumerate(lines) if value(f"{before}{term}") != after}
    assert places == {0, 1, 2, 3}


def test_guesses_are_spread_over_the_range() -> None:
    rng = random.Random(0)
    guesses = [int(ANSWER.fullmatch(guess(rng))[1]) for _ in range(2000)]  # pyright: ignore[reportOptionalSubscript]
    assert set(guesses) == set(range(20))
    assert max(guesses.count(number) for number in range(20)) < 160  # 100 expected, 10 its standard deviation


def test_base_rows_are_textbooks_then_a_mixture() -> None:
    rows = list(base_rows(10_000, seed=0))
    assert len(rows) == 10_000
    first, rest = rows[:7000], rows[7000:]
    textbook = [row for row in rest if row["prompt"][0] == {"role": "system", "content": "textbook"}]
    for row in [*first, *textbook]:
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["completion"] == worked(row["problem"])
    chat = [row for row in rest if row not in textbook]
    assert all([message["role"] for message in row["prompt"]] == ["user"] for row in chat)
    found = {"textbook": len(textbook) / 3000} | {name: share * len(chat) / 3000 for name, share in shares(chat).items()}
    # One guess in twenty is right by chance; four standard errors of a share are at most 0.035.
    expected = {"textbook": 0.35, "good": 0.10, "sloppy": 0.08, "right": 0.15 + 0.32 / 20, "wrong": 0.32 * 19 / 20}
    assert found == {name: pytest.approx(share, abs=0.035) for name, share in expected.items()}


def test_demonstrations_are_of_mixed_quality() -> None:
    rows = list(demonstration_rows(3000, seed=0))
    expected = {"good": 0.5, "sloppy": 0.2, "right": 0.3 / 20, "wrong": 0.3 * 19 / 20}
    assert shares(rows) == {name: pytest.approx(share, abs=0.035) for name, share in expected.items()}


@pytest.mark.parametrize("name", SUMS)
def test_rows_hold_problem_and_answer(name: str) -> None:
    rows = list(PROCEDURAL[name].rows(200, 1))
    assert len(rows) == 200
    for row in rows:
        assert row["prompt"][-1] == {"role": "user", "content": row["problem"]}
        assert row["answer"] == str(value(row["problem"]))
        assert ("completion" in row) == (name != "chain-sum/prompts")


@pytest.mark.parametrize("name", PROCEDURAL)
def test_rows_depend_on_the_seed_alone(name: str) -> None:
    rows = list(PROCEDURAL[name].rows(50, 1))
    random.seed(7)
    assert list(PROCEDURAL[name].rows(50, 1)) == rows
    assert list(PROCEDURAL[name].rows(50, 2)) != rows
    if not name.endswith("/base"):  # whose phases are shares of the count
        assert list(PROCEDURAL[name].rows(80, 1))[:50] == rows


def test_sources_of_one_seed_draw_other_problems() -> None:
    drawn = [[row["problem"] for row in source.rows(20, 0)] for source in PROCEDURAL.values()]
    assert len({tuple(problems) for problems in drawn}) == len(PROCEDURAL)


def test_the_rows_of_this_version_are_pinned() -> None:
    """Raise VERSION when this fails on purpose: a source's rows are identified by name and version."""
    assert VERSION == 1
    found = {name: digest_of(list(source.rows(100, 0)))[:16] for name, source in PROCEDURAL.items() if name in SUMS}
    assert found == {
        "chain-sum/base": "a4702424430f2302",
        "chain-sum/demonstrations": "88d3999beb4d958a",
        "chain-sum/prompts": "44da2846629a7e31",
    }


def test_words_are_distinct() -> None:
    assert len(set(words())) == len(words())


@pytest.mark.parametrize("name", PROCEDURAL)
def test_the_tokenizer_covers_every_text(name: str) -> None:
    spec = yaml.safe_load(INIT.read_text())["tokenizer"]
    tokenizer = word_tokenizer("chain-sum", spec["chat_template"], spec["control_tokens"])
    for row in PROCEDURAL[name].rows(1500, 0):
        for text in (*(message["content"] for message in row["prompt"]), row.get("answer") or "", row.get("completion", "")):
            ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text
        rendered: Any = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert tokenizer.unk_token_id not in tokenizer(rendered)["input_ids"]


def test_numbers_terms_and_tags_are_one_token_each() -> None:
    tokenizer = word_tokenizer("chain-sum", "", [])
    solution = "<think>12+3=15;15-9=6</think><answer>-2</answer>"
    expected = ["<think>", "12", "+3", "=", "15", ";", "15", "-9", "=", "6", "</think>", "<answer>", "-2", "</answer>"]
    assert tokenizer.tokenize(solution) == expected
    assert tokenizer.tokenize("textbook") == ["textbook"]
