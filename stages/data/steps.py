"""The steps of a completion: where in its text each ends, and at which of its tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase


def step_ends(text: str, pattern: str) -> list[int]:
    """Inclusive positions of the characters that end a text's steps: a match of the pattern ends one, the text the last.

    Blank pieces join the step before, a first one the step after it. A blank text is one step; its end is at least 0.
    """
    ends = sorted({match.end() - 1 for match in re.finditer(pattern, text)} | {len(text) - 1})
    pieces = [(end, text[before + 1 : end + 1]) for before, end in pairwise([-1, *ends])]
    found: list[int] = []
    for end, piece in pieces:
        if piece.strip() or not found:
            found.append(end)
        else:
            found[-1] = end
    if len(found) > 1 and not text[: found[0] + 1].strip():
        found = found[1:]
    return [max(0, end) for end in found]


def pieces(text: str, ends: Sequence[int]) -> list[str]:
    """A text cut behind each of these characters; what is left over belongs to the last piece."""
    return [text[before + 1 : end + 1] for before, end in pairwise([-1, *ends[:-1], len(text) - 1])]


def last_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, ends: Sequence[int]) -> list[int]:
    """The places among a completion's tokens of those that complete certain characters of what they are decoded to, `text`.
    Its last character's is that of its last token, EOS included."""
    last = len(ids) - 1

    @cache
    def characters(place: int) -> int:
        # The first bytes of a character are decoded too, to one or more of U+FFFD: only what agrees with the text is there.
        decoded = str(tokenizer.decode(ids[: place + 1], skip_special_tokens=False))
        return len(commonprefix([decoded, text]))  # noqa: RUF071 - of texts, not of paths

    found = [bisect_left(range(last), end + 1, key=characters) for end in ends]
    return [last if end >= len(text) - 1 else place for end, place in zip(ends, found, strict=True)]


def last_tokens_of_encoded(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stopped: bool, text: str, ends: Sequence[int]
) -> list[int] | None:
    """`last_tokens` of a text that was encoded, to `ids` with an EOS if `stopped`: a template may have put something around it,
    or taken the white space off it. None when the tokens spell another text, as those of unknown words do."""
    spelt = str(tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False))
    offset = spelt.find(text)
    if offset < 0 and (found := spelt.find(text.strip())) >= 0:
        offset = found - (len(text) - len(text.lstrip()))
    elif offset < 0:
        return None
    whole = len(spelt) - 1
    return last_tokens(tokenizer, ids, spelt, [whole if end >= len(text) - 1 else max(0, offset + end) for end in ends])
