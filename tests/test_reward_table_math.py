"""Mathematics: completions, good, bad and adversarial, against the verdict and its note."""

from __future__ import annotations

import re
from typing import Any

import pytest

from stages.errors import InputError
from stages.rewards import REWARDS, score
from stages.rewards.base import Score
from stages.rewards.math import check, math, plain

MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"


def verdict(answer: str, completion: str) -> Score | None:
    (one,) = math([completion], [{"id": "row", "answer": answer}])
    return one


# The row's answer: what is right in <answer> tags, what is wrong.
STATED: dict[str, tuple[list[str], list[str]]] = {
    "1000": (
        [
            *["1000", "1e3", "1.0E+3", "10e2", "1,000", "1 000", "1\u202f000", "1{,}000", r"1\,000", "1000.0", "10^3", "10**3"],
            *[
                "10³",
                "$1000$",
                r"\(1000\)",
                r"\[1000\]",
                "$$1000$$",
                r"\boxed{1000}",
                "1000.",
                "+1000",
                "１０００",
                "10\u200b00",
            ],
            "١٠٠٠",
        ],
        ["1", "100", "1e2", "1e-3", "1e33", "1.000", "1,0", "10 00", "10003", "10^4", "-1000", "1000!", "1000^2"],
    ),
    "1": (["1", "1e0", "01"], ["1e3", "10**3", "10^{3}", "1,000", "1 000", "1!2", "12"]),
    "0.5": (
        ["1/2", r"\frac{1}{2}", r"\dfrac12", ".5", "0.50", "50%", r"50\%", "½", "1⁄2", "2^{-1}", "5/10", "5e-1"],
        ["0,5", "2", "0.05", r"\frac{2}{1}", "5%", "1/3"],
    ),
    r"\frac{1}{3}": (["1/3", "0.333333", "3^{-1}"], ["0.3333", "0.334", "33%", "3"]),
    "50%": (["50%", "0.5", "1/2", "50"], ["5", "5%", "500"]),
    "9": (["9", "4+5"], ["4 5", r"4\ 5", r"4\quad 5", "4~5", "4\n5", "$4$ $5$", "2 3 4"]),
    "3/2": (["1 1/2", "1 10/20", r"1\frac12", "1½", "3/2", "1.5"], ["1", "2", "1 2", "11/2", "1 1/20"]),
    "1 1/2": (["1 1/2", "3/2", "1  1 / 2", "$1 1/2$"], ["1", "1 1/3", "2 1/2"]),
    "-3": (["-3", "\u22123", "\u20133", "－3", "- 3", "(-3)", "x=-3", "x = \u22123"], ["3", "--3", "-3x"]),
    "3": (
        ["x=3", "y = 3", "$x = 3$", "3 cm", r"3\text{ cm}", "3 meters", "√9", "9^{1/2}", r"\frac{6}{2}"],
        ["3 or 4", "3, 4", "x=3 or x=4", "2 3", "x>3", "x", "3!", "3x", "The answer is 3", "not 3", "[3,4]"],
    ),
    "x=3": (["3", "x=3", "3=x"], ["y=3", "x=-3", "x=3y"]),
    "(1,2)": (["(1,2)", "(1, 2)", r"\left(1,2\right)", "1,2"], ["(2,1)", "[1,2]", "(1,2]", "(1,2,3)"]),
    "[1,2)": (["[1,2)", r"\left[1, 2\right)"], ["[1,2]", "(1,2)", "1,2"]),
    r"\{1,2\}": ([r"\{2, 1\}", "1, 2", "2 and 1"], ["1", r"\{1,2,3\}", r"\{1\}", "12"]),
    "(-\\infty, 2]": (["(-∞, 2]", r"(-\infty,2]"], ["(-∞, 2)", "[2, ∞)"]),
    MATRIX: ([MATRIX, MATRIX.replace("pmatrix", "bmatrix")], [MATRIX.replace("4", "5"), "1,2,3,4"]),
    r"2\pi": (["2π", r"\pi\cdot 2", r"\pi × 2", "6.283185"], ["6.28", "π", "2"]),
    r"\sqrt{2}": (["√2", "sqrt(2)", "2^{1/2}", r"\frac{2}{\sqrt{2}}"], ["1.41", "2", "-√2"]),
    "x^2+2x+1": (["(x+1)^2", "x²+2x+1", "x**2 + 2*x + 1"], ["x^2+1", "(y+1)^2", "(x+1)"]),
    "x > 3": (["x>3", "3 < x"], ["x<3", "x >= 3", "3"]),
    r"\text{east}": ([r"\text{east}", "east", "East"], ["west", r"\text{eat}", "0"]),
    "#### 72": (["72"], ["7"]),
}
RIGHT = [(answer, text) for answer, (right, _) in STATED.items() for text in right]
WRONG = [(answer, text) for answer, (_, wrong) in STATED.items() for text in wrong]


@pytest.mark.parametrize(("answer", "text"), RIGHT)
def test_right(answer: str, text: str) -> None:
    assert verdict(answer, f"<think>So.</think><answer>{text}</answer>") == Score(1.0)


@pytest.mark.parametrize(("answer", "text"), WRONG)
def test_wrong(answer: str, text: str) -> None:
    one = verdict(answer, f"<think>So.</think><answer>{text}</answer>")
    assert one is not None
    assert one.total == 0
    assert one.note in (None, "answer not parsed")


# Where the answer stands, when it is 4: total and note.
PLACES: dict[str, tuple[float, str | None]] = {
    "<think>2+2</think><answer>4</answer>": (1, None),
    "<think>2+2</think>\n\n<answer>\n4\n</answer>\n": (1, None),
    "2+2</think><answer>4</answer>": (1, None),
    "<answer>4</answer> I hope that 5 is wrong": (1, None),
    "<answer>4</answer><answer>4</answer>": (1, None),
    "<answer><answer>4</answer></answer>": (1, None),
    "<answer>The result: <answer>4</answer>": (1, None),
    "<answer>5</answer></answer>4": (0, None),
    "<answer>4</answer><answer>5</answer>": (0, "two answers"),
    "<answer>5</answer><answer>4</answer>": (0, "two answers"),
    "<answer>4</answer>" + "<answer>5</answer>" * 9: (0, "two answers"),
    "<think><answer>4</answer></think>": (0, "no answer"),
    "<think><answer>4</answer></think><answer>5</answer>": (0, None),
    "<think><answer>5</answer></think><answer>4</answer>": (1, None),
    "<think>4</think>": (0, "no answer"),
    "<think>it is 4": (0, "no answer"),
    "<think>a</think> 4 <think>5": (1, None),
    "<think><think>a</think></think><answer>4</answer>": (1, None),
    r"<think>\boxed{4}</think>": (0, "no answer"),
    "": (0, "no answer"),
    " \n": (0, "no answer"),
    "<answer></answer>": (0, "no answer"),
    "<answer> </answer>": (0, "no answer"),
    "<answer>4": (0, "no answer"),
    "no number": (0, "no answer"),
    "<answer>?</answer>": (0, "answer not parsed"),
    r"<answer>\frac{</answer>": (0, "answer not parsed"),
    "<ANSWER>5</ANSWER> 4": (1, None),
    r"so \boxed{4}": (1, None),
    r"so \boxed{4}, not 5": (1, None),
    r"\boxed{5} no, \boxed{4}": (1, None),
    r"\boxed{4} no, \boxed{5}": (0, None),
    r"\boxed{\frac{8}{2}}": (1, None),
    r"\boxed{4 \text{ or } 5}": (0, None),
    r"\boxed{}": (0, "no answer"),
    r"\boxed{4} <answer>5</answer>": (0, None),
    "so we get $4$": (1, None),
    "2 + 2 = 4": (1, None),
    "The answer is 4.": (1, None),
    "The final answer is 5. I said 4 first": (0, None),
    "4 " + "word " * 300: (0, "no answer"),
    "<answer>" + "9" * 100_000 + "</answer>": (0, "answer too long"),
    r"\boxed{" + "9" * 100_000 + "}": (0, "answer too long"),
    "9" * 100_000: (0, None),
    "<answer>" + "(" * 900 + "</answer>": (0, "answer not parsed"),
    "<answer>" + "(" * 400 + "4" + ")" * 400 + "</answer>": (0, "answer not parsed"),
    "<answer>" + "{" * 400 + "4" + "}" * 400 + "</answer>": (0, "answer not parsed"),
    "<answer>" + r"\frac{1}{" * 99 + "4" + "}" * 99 + "</answer>": (0, "answer not parsed"),
    "<answer>((((4))))</answer>": (1, None),
    "<answer>" * 12_000: (0, "no answer"),
    "</answer>" * 12_000: (0, "no answer"),
    "<answer>4</answer>" * 6_000: (1, None),
    "<think>" * 12_000 + "</think>" * 12_000 + "4": (1, None),
    r"\boxed{" * 12_000: (0, "no answer"),
    "$" * 100_000: (0, "no answer"),
    "answer: " * 12_000: (0, "no answer"),
    r"\(" * 50_000: (0, "no answer"),
    "\u200b\u200d4\ufeff": (1, None),
    "４": (1, None),
    "four": (0, "no answer"),
    "<answer>4\x00</answer>": (0, "answer not parsed"),
    "<answer>__import__('os').abort()</answer>": (0, "answer not parsed"),
    "<answer>4 # ignore the rest</answer>": (0, "answer not parsed"),
    "reward: 1.0 score: 1": (0, None),
}


@pytest.mark.parametrize(("completion", "expected"), PLACES.items(), ids=range(len(PLACES)))
def test_places(completion: str, expected: tuple[float, str | None]) -> None:
    one = verdict("4", completion)
    assert one is not None
    assert (one.total, one.note) == expected


def test_places_in_the_pool_and_in_time() -> None:
    found = score("math", list(PLACES), [{"id": "row", "answer": "4"}] * len(PLACES))
    assert found == [Score(total, note=note) for total, note in PLACES.values()]


@pytest.mark.parametrize(
    "prompt", ["Answer with <answer>4</answer>", [{"role": "user", "content": r"<answer>4</answer> \boxed{4}"}]]
)
def test_the_prompt_s_text_is_no_answer(prompt: Any) -> None:
    rows = [{"id": "row", "answer": "4", "prompt": prompt}] * 2
    assert math(["I do not know", "<answer>5</answer>"], rows) == [Score(0.0, note="no answer"), Score(0.0)]


def test_each_completion_by_its_own_row() -> None:
    completions = [f"<answer>{n}</answer>" for n in (1, 2, 3)]
    assert math(completions, [{"answer": str(n)} for n in (1, 3, 3)]) == [Score(1.0), Score(0.0), Score(1.0)]


@pytest.mark.parametrize("answer", ["", " ", "?", "$", r"\frac{1}", "(" * 30, "9" * 5000])
def test_a_row_s_answer_that_cannot_be_parsed_names_the_row(answer: str) -> None:
    assert re.fullmatch(r'"answer" is .{2,70}, which math-verify cannot parse', check({"answer": answer}) or "")
    with pytest.raises(InputError, match=r"^the row with id 'bad': \"answer\" is "):
        score("math", ["<answer>4</answer>"] * 2, [{"id": "good", "answer": "4"}, {"id": "bad", "answer": answer}])


@pytest.mark.parametrize("answer", STATED)
def test_a_row_s_answer_that_can_be_parsed(answer: str) -> None:
    assert check({"answer": answer}) is None
    assert check({"answer": f"${answer}$"}) is None


@pytest.mark.parametrize("answer", [r"10^{10^{10}}", r"(10^{10})!", r"9^{9^{9^{9}}}"])
def test_what_cannot_be_computed_in_time_has_no_verdict(answer: str) -> None:
    rows = [{"id": "row", "answer": "4"}] * 2
    found = score("math", [f"<answer>{answer}</answer>", "<answer>4</answer>"], rows, 2.0)
    assert found == [Score(None, note="timeout"), Score(1.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e3", "1000"),
        ("-1.50e-2", "-0.0150"),
        ("2e3x", "2e3x"),
        ("x1e3", "x1e3"),
        ("1e9999", "1e9999"),
        ("x¹²", "x^{12}"),
        ("1 234 567", "1234567"),
        ("1 23", "1 23"),
        ("\u22123−4", "-3-4"),
        ("a\u200bb", "ab"),
        ("２＋２", "2+2"),
    ],
)
def test_plain(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_it_is_pooled_and_checked() -> None:
    assert REWARDS["math"].pooled
    assert REWARDS["math"].check == "stages.rewards.math:check"
