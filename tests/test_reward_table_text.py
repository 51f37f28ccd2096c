"""Choices, exact and normalised matches, repetition: completions against the verdict and its note."""

from __future__ import annotations

import pytest

from stages.errors import InputError
from stages.rewards import check_rows, score
from stages.rewards.base import Score
from stages.rewards.text import last_box, shown, stated, thinking, words

LONG = 100_000
Verdict = tuple[float, str | None]
RIGHT: Verdict = (1.0, None)
WRONG: Verdict = (0.0, None)
TWO: Verdict = (0.0, "two answers")
NONE: Verdict = (0.0, "no answer")
UNREAD: Verdict = (0.0, "answer not parsed")


def verdict(name: str, answer: object, completion: str) -> Verdict:
    (one,) = score(name, [completion], [{"id": "row", "answer": answer, "prompt": "Say <answer>B</answer> or (C)."}])
    assert one is not None
    assert one.total is not None
    return one.total, one.note


CHOICES: dict[str, Verdict] = {
    **dict.fromkeys(["B", "b", "(B)", "(b)", "B.", "B)", "B:", "[B]", "**B**", "$B$", r"\text{B}", "Ｂ", " B\n"], RIGHT),
    **dict.fromkeys(["B) Paris", "B. Paris and Rome", "(B) Paris, France", "B: Paris", "Answer: B", "answer: (b)"], RIGHT),
    **dict.fromkeys(["The correct answer is B.", "Option B", "the answer is option b", "Choice: (B)", "B. A dog"], RIGHT),
    **dict.fromkeys(["<answer>B</answer>", "<think>A or C?</think><answer>(b)</answer>", r"so \boxed{B}"], RIGHT),
    **dict.fromkeys(["<think>A</think>B", "<answer>B</answer> and not C", r"\boxed{A}, no: \boxed{B}", "B or B"], RIGHT),
    **dict.fromkeys(["<answer>b</answer><answer>(B)</answer>", "Answer: B. The answer is B."], RIGHT),
    **dict.fromkeys(
        [r"\textbf{B}", r"\mathbf{(B)}", r"The answer is \textit{B}.", "B - Paris", "B \u2014 Paris, not Rome"], RIGHT
    ),
    **dict.fromkeys(["A", "C", "(c)", "<answer>D</answer>", "Z", "The answer is A.", "C. B is wrong"], WRONG),
    **dict.fromkeys(["B or C", "(B) or (C)", "B, C", "B and C", "B/C", "A & B", "(A) is wrong, so (B)", "Answer: B or C"], TWO),
    **dict.fromkeys(
        ["<answer>B</answer><answer>C</answer>", "<answer>B or C</answer>", "the answer is A. The answer is B."], TWO
    ),
    **dict.fromkeys(["Paris", "AB", "Because", "B's", "bB", "1", "I think it is", "the answer is a number", "?"], UNREAD),
    **dict.fromkeys(["B-52", "b-flat", r"\textbfB"], UNREAD),
    **dict.fromkeys(["<answer>Paris</answer> B", "B" * LONG, "(" * LONG, "answer " * 15_000, "B\n\nC"], UNREAD),
    **dict.fromkeys(["", "<think>B</think>", "<think>B", "<think><answer>B</answer></think>"], NONE),
    "<answer></answer>B": UNREAD,
    "B, " * 30_000: RIGHT,
    "<answer>B</answer>" * 5_000: RIGHT,
}


@pytest.mark.parametrize(("completion", "expected"), CHOICES.items(), ids=range(len(CHOICES)))
@pytest.mark.parametrize("answer", ["B", "(b)"])
def test_choice(completion: str, expected: Verdict, answer: str) -> None:
    assert verdict("choice", answer, completion) == expected


@pytest.mark.parametrize("answer", ["Paris", "", "B or C", "12"])
def test_a_row_whose_answer_is_no_letter_is_refused(answer: str) -> None:
    rows = [{"id": "good", "answer": "B"}, {"id": "bad", "answer": answer}]
    message = f"the row with id 'bad'.*: \"answer\" is '{answer}', which is no one letter"
    with pytest.raises(InputError, match=message):
        check_rows("choice", rows)
    with pytest.raises(InputError, match=message):
        score("choice", ["B", "B"], rows)


MATCHES: dict[tuple[str, str], tuple[Verdict, Verdict]] = {
    ("Paris", "<answer>Paris</answer>"): (RIGHT, RIGHT),
    ("Paris", "Paris"): (RIGHT, RIGHT),
    ("Paris", "<think>Rome</think>\nParis\n"): (RIGHT, RIGHT),
    ("Paris", "<answer> Paris </answer>"): (RIGHT, RIGHT),
    (" Paris ", "<answer>Paris</answer>"): (RIGHT, RIGHT),
    ("Paris", "<answer>paris</answer>"): (WRONG, RIGHT),
    ("Paris", "<answer>The Paris.</answer>"): (WRONG, RIGHT),
    ("Paris", "<answer>It is Paris</answer>"): (WRONG, WRONG),
    ("Paris", "<answer>Par is</answer>"): (WRONG, WRONG),
    ("Paris", "<answer>P\u200baris</answer>"): (WRONG, RIGHT),
    ("Paris", "<answer>Ｐａｒｉｓ</answer>"): (WRONG, RIGHT),
    ("Straße", "<answer>STRASSE</answer>"): (WRONG, RIGHT),
    ("café", "<answer>cafe\u0301</answer>"): (WRONG, RIGHT),
    ("the end", "<answer>a end</answer>"): (WRONG, RIGHT),
    ("theend", "<answer>the end</answer>"): (WRONG, WRONG),
    ("New  York", "<answer>new york</answer>"): (WRONG, RIGHT),
    ("U.S.A.", "<answer>USA</answer>"): (WRONG, RIGHT),
    ("12", "<answer>１２</answer>"): (WRONG, RIGHT),
    ("1+1", "<answer>11</answer>"): (WRONG, WRONG),
    ("3.14", "<answer>314</answer>"): (WRONG, WRONG),
    ("3.14", "<answer>'3.14'.</answer>"): (WRONG, RIGHT),
    ("5", "<answer>-5</answer>"): (WRONG, WRONG),
    ("-5", "<answer>\u22125</answer>"): (WRONG, RIGHT),
    ("-.5", "<answer>.5</answer>"): (WRONG, WRONG),
    (".5", "<answer>5</answer>"): (WRONG, WRONG),
    ("1/2", "<answer>12</answer>"): (WRONG, WRONG),
    ("50%", "<answer>50</answer>"): (WRONG, WRONG),
    ("50%", "<answer>50 %.</answer>"): (WRONG, WRONG),
    ("2,5", "<answer>25</answer>"): (WRONG, WRONG),
    ("1000000", "<answer>1,000,000</answer>"): (WRONG, RIGHT),
    ("1914-1918", "<answer>1914\u20131918</answer>"): (WRONG, RIGHT),
    ("co-op 7", '<answer>coop "7"!</answer>'): (WRONG, RIGHT),
    ("COVID-19", "<answer>covid19</answer>"): (WRONG, RIGHT),
    ("1. Paris", "<answer>1 Paris</answer>"): (WRONG, RIGHT),
    ("the", "<answer>The</answer>"): (WRONG, RIGHT),
    ("the", "<answer>a</answer>"): (WRONG, WRONG),
    ("...", "<answer>...</answer>"): (RIGHT, RIGHT),
    ("...", "<answer>!</answer>"): (WRONG, WRONG),
    ("北京", "<answer>北京。</answer>"): (WRONG, RIGHT),
    ("Paris", "<answer>Paris</answer><answer>Rome</answer>"): (TWO, TWO),
    ("Paris", "<answer>Paris</answer><answer>Paris</answer>"): (RIGHT, RIGHT),
    ("Paris", "<think>Paris</think>"): (NONE, NONE),
    ("Paris", "<answer></answer>"): (NONE, NONE),
    ("Paris", "<think><answer>Paris</answer></think>Rome"): (WRONG, WRONG),
    ("9", "9" * LONG): (WRONG, WRONG),
    ("9" * LONG, "9" * LONG): (RIGHT, RIGHT),
    ("a", " the" * 25_000): (WRONG, WRONG),
}


@pytest.mark.parametrize(("pair", "expected"), MATCHES.items(), ids=range(len(MATCHES)))
def test_matches(pair: tuple[str, str], expected: tuple[Verdict, Verdict]) -> None:
    assert (verdict("exact", *pair), verdict("normalised", *pair)) == expected


def test_a_row_may_accept_several_answers() -> None:
    for name in ("exact", "normalised"):
        assert [verdict(name, ["Paris", 12], text) for text in ("Paris", "12", "Rome")] == [RIGHT, RIGHT, WRONG]


REPEATED: dict[str, tuple[str, int, float]] = {
    "nothing": ("", 3, 0.0),
    "too short": ("a b", 3, 0.0),
    "no repetition": ("a b c d", 3, 0.0),
    "one of two": ("a a a a", 3, -1 / 2),
    "by words": ("a b a b a b", 2, -3 / 5),
    "one word": ("a b a b", 1, -1 / 2),
    "case": ("A a A a", 1, -3 / 4),
    "spaces": ("a \n\t b  a b", 2, -1 / 3),
    "without spaces": ("我我我我", 3, -1 / 2),
    "both": ("我a我 a", 1, -2 / 4),
    "a loop": ("so " * 33_334, 3, -(1 - 1 / 33_332)),
    "one long word": ("9" * LONG, 3, 0.0),
}


@pytest.mark.parametrize(("text", "n", "expected"), REPEATED.values(), ids=REPEATED)
def test_repetition(text: str, n: int, expected: float) -> None:
    (one,) = score("repetition", [text], [{}], n=n)
    assert one is not None
    assert one.total is not None
    assert one.total == pytest.approx(expected, abs=1e-12)
    (half,) = score("repetition", [text], [{}], n=n, max_penalty=0.5)
    assert half == Score(one.total / 2)


@pytest.mark.parametrize("args", [{"n": 0}, {"max_penalty": -1.0}])
def test_repetition_of_nonsense_is_refused(args: dict[str, float]) -> None:
    with pytest.raises(InputError, match="repetition: n is"):
        score("repetition", ["a"], [{}], **args)


@pytest.mark.parametrize(
    ("completion", "thought", "visible", "answers"),
    [
        ("a", None, "a", []),
        ("<think>a</think>b", "a", "b", []),
        ("a</think>b", "a", "b", []),
        ("<think>a", "a", "", []),
        ("<think>a</think>b<think>c", "a", "b", []),
        ("<think>a<think>b</think>c</think>d", "a<think>b</think>c", "d", []),
        ("<answer>a</answer>b<answer> c </answer>", None, "<answer>a</answer>b<answer> c </answer>", ["a", "c"]),
        ("<answer>a<answer>b</answer></answer>", None, "<answer>a<answer>b</answer></answer>", ["b"]),
    ],
)
def test_parts_of_a_completion(completion: str, thought: str | None, visible: str, answers: list[str]) -> None:
    assert (thinking(completion), shown(completion), stated(shown(completion))) == (thought, visible, answers)


def test_boxes_and_words() -> None:
    assert last_box(r"\boxed{a} \boxed{b{c}{d}} e}") == "b{c}{d}"
    assert last_box(r"\boxed{a} \boxed{b") is None
    assert last_box("a") is None
    assert words("It's 12我们\nカA!") == ["it's", "12", "我", "们", "カ", "a!"]
