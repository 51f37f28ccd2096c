r"""A verifier of mathematics: is the final answer equal to the row's `answer`? Numbers and LaTeX, by `math-verify`.

The final answer is what stands in `<answer>` tags after the thinking; without tags, in the last `\boxed{}`; without that, the
last expression that math-verify finds in the end of the text. In tags and boxes all of it is the answer, units aside: an
answer that hedges ("4 or 5", "4 5") or explains itself is not the number in it. Two different answers in tags are wrong.

Equal is what math-verify calls equal: decimals to 6 places (1/3 and 0.333333), `x=3` and `3`, `50%` and `0.5` and `50`, sets
in any order, an open interval and a pair. A comma between digits parts thousands ("1,000") or members ("2,5").

math-verify's own time limits are off: they would turn a slow verdict into a wrong one. The pool has a limit.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import accumulate
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from stages.errors import InputError
from stages.rewards.base import Row, Score
from stages.rewards.text import last_box, shown, stated

# It warns of every limit that is off, and of every answer it cannot read.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

LONGEST = 1000  # characters of an answer; how far from the end one without tags may stand
DEEPEST = 20  # brackets within brackets, beyond which the parser takes seconds
WHOLE = [LatexExtractionConfig(boxed_match_priority=0)]
ANYWHERE = [*WHOLE, ExprExtractionConfig()]
SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63", "-"),
        **{"\u00d7": r"\times ", "·": r"\cdot ", "÷": "/", "\u2044": "/", "\u2215": "/", "π": r"\pi ", "∞": r"\infty "},
        **{"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "\u222a": r"\cup ", "°": r"^{\circ}"},
        **{power: f"^{{{digit}}}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    }
)
POWERS = re.compile(r"(?<=\d)\}\^\{(?=\d)")
ROOT = re.compile(r"√\s*(\w+)")
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.])")
THOUSANDS = re.compile(r"(?<=\d)(?:[ \u00a0\u2009\u202f]|\\,|\{,\})(?=\d{3}(?!\d))")
MIXED = re.compile(r"(?<![\w.}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])")
BESIDE = re.compile(r"\d(?:[\s~$]|\\[ ,;:!]|\\q?quad(?![a-z]))+\d")
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def math(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    """1 when the final answer equals the row's `answer`, else 0. Raises InputError naming a row whose answer cannot be read."""
    return [_rate(text, row) for text, row in zip(completions, rows, strict=True)]


def check(row: Row) -> str | None:
    """What is wrong with a row, if anything."""
    return None if _gold(str(row["answer"])) else f'"answer" is {str(row["answer"])[:60]!r}, which math-verify cannot parse'


def _rate(completion: str, row: Row) -> Score:
    gold = _gold(str(row["answer"]))
    if not gold:
        raise InputError(f"the row with id {row.get('id')!r}: {check(row)}")
    text = shown(completion)
    answers = stated(text)
    if len(answers) > 1:
        return Score(0.0, note="two answers")
    whole = answers[0] if answers else last_box(text)
    if len(whole or "") > LONGEST:
        return Score(0.0, note="answer too long")
    if not (text if whole is None else whole):
        return Score(0.0, note="no answer")
    found = _read(text[-LONGEST:], ANYWHERE) if whole is None else _whole(whole)
    if not found:
        return Score(0.0, note="no answer" if whole is None else "answer not parsed")
    return Score(float(verify(gold, found, timeout_seconds=None)))


@lru_cache(maxsize=1024)
def _gold(answer: str) -> list[Any]:
    return _whole(answer) or _read(answer, ANYWHERE)


def _whole(answer: str) -> list[Any]:
    """An answer of which every character counts."""
    text = plain(answer).strip().rstrip(".")
    for opening, closing in DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            text = text[len(opening) : -len(closing)]
    text = MIXED.sub(r"\1\\frac{\2}{\3}", text.strip())
    # math-verify adds up numbers that stand side by side: "4 5" would be 9.
    if not text or _depth(text) > DEEPEST or BESIDE.search(text):
        return []
    return _read(f"\\boxed{{{text}}}", WHOLE)


def _depth(text: str) -> int:
    return max(accumulate((one in "([{") - (one in ")]}") for one in text))


def _read(text: str, how: list[Any]) -> list[Any]:
    return parse(plain(text), how, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def plain(text: str) -> str:
    """Text in the characters that LaTeX has: no invisible ones, minus signs and digits of ASCII, `1e3` written out."""
    kept = (character for character in text.translate(SIGNS) if unicodedata.category(character) != "Cf")
    text = "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in kept).replace("**", "^")
    text = THOUSANDS.sub("", ROOT.sub(r"\\sqrt{\1}", POWERS.sub("", text)))
    return SCIENTIFIC.sub(lambda found: f"{Decimal(found[1]).scaleb(int(found[2])):f}", text)
