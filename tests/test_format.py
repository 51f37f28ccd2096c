"""The form of reasoning by a table of good, bad and malicious completions, and that none of them takes long."""

from __future__ import annotations

import re

import pytest

from stages.rewards import score
from stages.rewards.answer import final_answer
from stages.rewards.base import Score
from stages.rewards.chain_sum import written_steps

GOOD = {
    "plain": "<think>12+3=15</think><answer>6</answer>",
    "spaces around": " \n<think> a </think>\n\n <answer> b </answer>\t\n",
    "several lines": "<think>a\n\nb</think>\n<answer>c\nd</answer>",
    "unicode spaces between and around": "\u3000<think>a</think>\u00a0\u2028<answer>b</answer>\u2009",
    "angle brackets and other tags": "<think>if a < b > c </b></think><answer><b>1</b></answer>",
    "a tag that is spelt otherwise": "<think>no < think> or </ answer></think><answer>b</answer>",
    "no word of a script that has no spaces": "<think>想</think><answer>6️⃣</answer>",
    "a zero-width space is a character": "<think>\u200b</think><answer>\u200b</answer>",
    "100 kB of digits": f"<think>{'123456789 ' * 10_000}</think><answer>{'7' * 100_000}</answer>",
}
BAD = {
    "nothing": "",
    "spaces": " \n ",
    "text alone": "6",
    "no thinking": "<answer>6</answer>",
    "no answer": "<think>a</think>",
    "no answer, but text": "<think>a</think>6",
    "no tag closes": "<think>a<answer>b",
    "thinking does not close": "<think>a<answer>b</answer>",
    "thinking does not open": "a</think><answer>b</answer>",
    "the answer does not close": "<think>a</think><answer>b",
    "the answer does not open": "<think>a</think>b</answer>",
    "the last bracket is missing": "<think>a</think><answer>b</answer",
    "thinking twice": "<think>a</think><think>a</think><answer>b</answer>",
    "an answer twice": "<think>a</think><answer>b</answer><answer>c</answer>",
    "both twice": "<think>a</think><answer>b</answer>" * 2,
    "the opening tag twice": "<think><think>a</think><answer>b</answer>",
    "the closing tag twice": "<think>a</think></think><answer>b</answer>",
    "the last tag twice": "<think>a</think><answer>b</answer></answer>",
    "the answer inside the thinking": "<think>a<answer>b</answer></think>",
    "the thinking inside the answer": "<answer><think>a</think>b</answer>",
    "nested across": "<think>a<answer>b</think>c</answer>",
    "out of order": "<answer>b</answer><think>a</think>",
    "closed before it opens": "</think>a<think><answer>b</answer>",
    "a tag quoted in the thinking": "<think>then I write <answer></think><answer>b</answer>",
    "a tag quoted in the answer": "<think>a</think><answer>no </think></answer>",
    "text before": "So: <think>a</think><answer>b</answer>",
    "text between": "<think>a</think> so <answer>b</answer>",
    "text after": "<think>a</think><answer>b</answer>.",
    "a zero-width space between": "<think>a</think>\u200b<answer>b</answer>",
    "a mark of the byte order before": "\ufeff<think>a</think><answer>b</answer>",
    "empty thinking": "<think></think><answer>b</answer>",
    "an empty answer": "<think>a</think><answer></answer>",
    "blank thinking": "<think> \n\t</think><answer>b</answer>",
    "a blank answer": "<think>a</think><answer> \n</answer>",
    "unicode spaces for thinking": "<think>\u00a0\u2003\u3000</think><answer>b</answer>",
    "upper case": "<THINK>a</THINK><ANSWER>b</ANSWER>",
    "upper case once": "<think>a</think><Answer>b</answer>",
    "spaces in a tag": "<think >a</think><answer>b</answer>",
    "an attribute": '<think>a</think><answer id="1">b</answer>',
    "escaped": "&lt;think&gt;a&lt;/think&gt;&lt;answer&gt;b&lt;/answer&gt;",
}
# What a regular expression with a quantifier in a quantifier, or two that can share the text, takes minutes or hours for:
# quadratic would be 10^10 steps and more.
ENDLESS = {
    "opening tags": "<think>" * 200_000,
    "closing tags": "<think>a" + "</think>" * 200_000,
    "borders": "<think>a" + "</think><answer>" * 100_000,
    "borders and ends": "<think>a" + "</think><answer>b</answer>x" * 100_000,
    "spaced borders": "<think>a" + "</think> <answer>b</answer> " * 100_000 + "x",
    "answers that open": "<think>a</think>" + "<answer>" * 200_000,
    "answers that close": "<think>a</think><answer>b" + "</answer>" * 200_000 + "x",
    "spaces": " " * 1_000_000,
    "spaces before": " " * 1_000_000 + "x",
    "spaces between": "<think>a</think>" + " " * 1_000_000 + "x<answer>b</answer>",
    "spaces after": "<think>a</think><answer>b</answer>" + " " * 1_000_000 + "x",
    "brackets": "<" * 1_000_000,
    "halves of tags": "<think>" + "</thin</answe" * 100_000,
}


@pytest.mark.parametrize("completion", GOOD.values(), ids=GOOD)
def test_what_has_the_form_gets_1(completion: str) -> None:
    assert score("format", [completion], [{}]) == [Score(1.0)]


@pytest.mark.parametrize("completion", BAD.values(), ids=BAD)
def test_what_lacks_the_form_gets_0(completion: str) -> None:
    assert score("format", [completion], [{}]) == [Score(0.0)]


def test_each_completion_is_rated_by_itself() -> None:
    texts = [*GOOD.values(), *BAD.values()]
    expected = [Score(1.0)] * len(GOOD) + [Score(0.0)] * len(BAD)
    assert score("format", texts[::-1], [{}] * len(texts)) == expected[::-1]


@pytest.mark.parametrize("name", ENDLESS)
def test_a_malicious_completion_does_not_hold_anything_up(name: str) -> None:
    """These end at once, or not within the patience of whoever runs them."""
    completion = ENDLESS[name]
    assert score("format", [completion], [{}]) == [Score(0.0)]
    assert (final_answer(completion) is None) == ("</answer>" not in completion)
    assert written_steps(completion) == (["a"] if completion.startswith("<think>a</think>") else [])


@pytest.mark.parametrize("completion", [text for table in (GOOD, BAD) for text in table.values()], ids=[*GOOD, *BAD])
def test_answers_and_steps_are_what_the_shortest_matches_hold(completion: str) -> None:
    answers = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    assert final_answer(completion) == (answers[-1].strip() if answers else None)
    thinking = re.search(r"<think>(.*?)</think>", completion, re.DOTALL)
    assert written_steps(completion) == (thinking[1].split(";") if thinking and thinking[1].strip() else [])
