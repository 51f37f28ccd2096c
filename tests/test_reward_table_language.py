"""Language consistency: texts against the share of their words in a language."""

from __future__ import annotations

import pytest

from stages.errors import InputError
from stages.rewards import score
from stages.rewards.base import Score
from stages.rewards.language import pieces

ENGLISH = "Let me think about this step by step."
GERMAN = "Zuerst berechnen wir die Fläche des Dreiecks."
CHINESE = "让我一步一步地思考。"
SHARES: dict[str, tuple[str, str, float]] = {
    "English": (ENGLISH, "en", 1),
    "not German": (ENGLISH, "de", 0),
    "German": (GERMAN, "de", 1),
    "Chinese": (CHINESE, "zh", 1),
    "Japanese": ("これは日本語の文章です。", "ja", 1),
    "Japanese is not Chinese": ("これは日本語の文章です。", "zh", 0),
    "Russian": ("Сначала мы вычислим площадь треугольника.", "ru", 1),
    "half": (f"{ENGLISH} {ENGLISH[:-1]}! {CHINESE[:8]}。", "en", 16 / 24),
    "English and German": (f"{ENGLISH} {GERMAN}", "en", 8 / 15),
    "words inside a sentence": ("First 首先 we compute the 面积 of it", "en", 6 / 10),
    "the thinking alone": (f"<think>{ENGLISH}</think>{CHINESE}", "en", 1),
    "the thinking, not the answer": (f"<think>{CHINESE}</think>{ENGLISH}", "en", 0),
    "thinking that does not end": (f"<think>{ENGLISH}", "en", 1),
    "the prompt opened it": (f"{CHINESE}</think>{ENGLISH}", "zh", 1),
    "mathematics": (f"{ENGLISH} $Fläche = \\text{{Länge mal Breite}}$ \\[ \\text{{Länge}} \\]", "en", 1),
    "environments": (f"{ENGLISH} \\begin{{align}} x &= \\text{{die Länge des Dreiecks}} \\end{{align}}", "en", 1),
    "code": (f"{ENGLISH}\n```python\nprint('Hallo Welt, wie geht es dir')\n```\n`und auch das hier ist Code`", "en", 1),
    "code that does not end": (f"{ENGLISH}\n```\n{GERMAN}", "en", 1),
    "short sentences together": ("Ok.\nWait.\nThis is right.\nSo yes.", "en", 1),
    "capitals": ("LET ME THINK ABOUT THIS AGAIN.", "en", 1),
    "tags and addresses": (f"{ENGLISH} <tool> https://beispiel.example/die/Adresse </tool>", "en", 1),
    "nothing but an English name": (f"{CHINESE}{CHINESE} Euler", "zh", 1),
}


@pytest.mark.parametrize(("text", "language", "share"), SHARES.values(), ids=SHARES)
def test_shares(text: str, language: str, share: float) -> None:
    assert score("language", [text], [{}], language=language) == [Score(share)]


NO_WORDS = ["", "<think></think>Hello there, this is English", "<think> \n</think>", "$x = 3$", "1 + 2 = 3", "x, y, z", "So 12"]
NO_WORDS += ["`for word in words: print(word)`", "12" * 50_000, "?!" * 50_000, "$" * 100_000, r"\(" * 50_000, "`" * 100_001]
NO_WORDS += [r"\begin{a}" * 11_000, "```" * 33_333, "\u200b" * 9, "🙂🙂🙂", "<think>" * 14_000]


@pytest.mark.parametrize("text", NO_WORDS, ids=range(len(NO_WORDS)))
@pytest.mark.parametrize("language", ["en", "zh"])
def test_without_words_nothing_is_in_a_wrong_language(text: str, language: str) -> None:
    assert score("language", [text], [{}], language=language) == [Score(1.0, note="no words")]


@pytest.mark.parametrize("text", [ENGLISH * 2_500, CHINESE * 10_000, "word" * 25_000, "x1 " * 33_333])
def test_long_texts(text: str) -> None:
    (one,) = score("language", [text], [{}])
    assert one is not None
    assert one.total in (0.0, 1.0)


def test_english_is_the_default_and_verdicts_repeat() -> None:
    texts = [text for text, _, _ in SHARES.values()]
    assert score("language", [ENGLISH], [{}]) == [Score(1.0)]
    assert score("language", texts, [{}] * len(texts)) == score("language", texts, [{}] * len(texts))


def test_short_pieces_go_with_their_neighbours() -> None:
    assert pieces("So. We add them up. Yes") == [("So We add them up Yes", 6)]
    assert pieces("We add them. 我们好。So on and on. Yes") == [("We add them", 3), ("我们好", 3), ("So on and on Yes", 5)]
    assert pieces("So. Yes") == []


@pytest.mark.parametrize("language", ["xx", "English", "", "zz"])
def test_an_unknown_language_is_refused(language: str) -> None:
    with pytest.raises(InputError, match=f"language: '{language}' is no language that can be told; there are .*de.*en"):
        score("language", ["a"], [{}], language=language)
