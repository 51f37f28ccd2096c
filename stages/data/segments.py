"""Preferences whose completions are scored segment by segment, as 2D-DPO learns from them, to token ids.

2D-DPO (arXiv 2410.19720, rl4llm eq. 79) sums over pairs of segments. A segment's weight is the weighted sum of its scores over
the aspects. With N the smaller number of segments, the N of largest weight of the chosen completion meet the N of smallest
weight of the rejected one: the best the worst, the second best the second worst, and so on; the others do not enter. A segment
of weight 0 moves nothing: give the worst a score above 0 where it is to become less likely.

Legend: I items (pairs). Sequence 2i is the chosen completion of item i, 2i + 1 the rejected.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.data.chat import encode
from stages.data.schemas import SEGMENTS, scored_segments
from stages.data.steps import last_tokens_of_encoded
from stages.data.tokens import TokenTable
from stages.errors import InputError

Row = dict[str, Any]


class Pairing(NamedTuple):
    """Segments of an item that meet, place by place: their numbers in their completions, from 0, and their weights."""

    chosen: list[int]
    rejected: list[int]
    chosen_weights: list[float]
    rejected_weights: list[float]


class SegmentTable:
    """Items of two sequences of `tokens`, `items_I2`: the chosen and the rejected completion."""

    def __init__(self, path: Path) -> None:
        self.tokens = TokenTable(path.with_suffix(".arrow"))
        kept = json.loads(path.with_suffix(".json").read_text())
        self._segments: list[list[int]] = kept["segments"]
        self._weights: list[list[float]] = kept["weights"]
        self.items_I2 = np.arange(len(self.tokens), dtype=np.int64).reshape(-1, 2)
        self.rows_I: np.ndarray = self.tokens.rows[::2]

    def __len__(self) -> int:
        return len(self.items_I2)

    def segments(self, sequence: int) -> list[int]:
        """The numbers of tokens of the segments of a sequence's completion."""
        return list(self._segments[sequence])

    def pairing(self, item: int) -> Pairing:
        """The pairs of segments of an item, as 2D-DPO makes them; of equal weights the earlier segment comes first."""
        better, worse = self.items_I2[item]
        return pair_segments(self._weights[better], self._weights[worse])


def pair_segments(better: Sequence[float], worse: Sequence[float]) -> Pairing:
    """The heaviest segments of the better completion beside the lightest of the worse one, as many as both have."""
    pairs = min(len(better), len(worse))
    chosen = sorted(range(len(better)), key=lambda k: -better[k])[:pairs]
    rejected = sorted(range(len(worse)), key=lambda k: worse[k])[:pairs]
    return Pairing(chosen, rejected, [better[k] for k in chosen], [worse[k] for k in rejected])


@dataclass(frozen=True)
class Segmented:
    """A completion: its tokens, and of each segment the number of tokens and the weight; `given` is how many segments there
    were before some were joined."""

    prompt_ids: list[int]
    ids: list[int]
    tokens: list[int]
    weights: list[float]
    given: int


def encode_segments(
    path: Path,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    max_length: int,
    aspects: Sequence[float] | None = None,
) -> Counter[str]:
    """Write the table of `chosen`, `rejected` rows with segments (see `scored_segments`); return counts of what became of them.

    A segment's weight is the sum over its aspects of weight x score, or their mean without `aspects`. It has the tokens behind
    those of the segment before, up to the one that completes its last character; the completion's last tokens, EOS included,
    are the last segment's. Segments that end in one token are joined, with the mean of their weights. A truncated completion
    (`chosen_finish`, `rejected_finish` say "length") gets no EOS.

    A row is dropped when its columns of segments are all null, when a completion is empty, has more than `max_length` tokens or
    tokens that spell another text, when both are equal, or when no pair of its segments has a weight above 0. Raises InputError
    for `aspects` that cannot be used, for a row that lacks some of these columns, or when none is left.
    """
    if aspects is not None and not (all(math.isfinite(one) and one >= 0 for one in aspects) and any(aspects)):
        raise InputError(f"the weights of aspects must not be negative, and one must be above 0; they are {list(aspects)}")
    counts: Counter[str] = Counter()
    segments: list[list[int]] = []
    weights: list[list[float]] = []

    def sequences() -> Iterator[tuple[list[int], int, int]]:
        for number, row in enumerate(rows):
            where = f"row {number + 1}"
            if all(name in row and row[name] is None for name in SEGMENTS):
                counts["dropped: without segments"] += 1
                continue
            for name in ("prompt", "chosen", "rejected", *SEGMENTS):
                if row.get(name) is None:
                    raise InputError(
                        f'{where} has no "{name}" (it has {", ".join(row)}); 2D-DPO needs pairs with {", ".join(SEGMENTS)}'
                    )
            found = scored_segments(row, where)
            pair = []
            for name in ("chosen", "rejected"):
                weights_K = _weights(found[f"{name}_scores"], aspects, where)
                pair.append(_segmented(tokenizer, stops, row, name, found[f"{name}_ends"], weights_K))
            if reason := _useless(pair, max_length):
                counts[f"dropped: {reason}"] += 1
                continue
            counts["used"] += 1
            for one in pair:
                counts["segments"] += len(one.tokens)
                counts["segments joined: they end in one token"] += one.given - len(one.tokens)
                segments.append(one.tokens)
                weights.append(one.weights)
                yield [*one.prompt_ids, *one.ids], len(one.prompt_ids), number

    TokenTable.write(path.with_suffix(".arrow"), sequences())
    if not counts["used"]:
        raise InputError(f"no pair with segments fits in {max_length} tokens ({dict(counts) or 'the dataset is empty'})")
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"segments": segments, "weights": weights}))
    draft.replace(path.with_suffix(".json"))
    return +counts


def _segmented(
    tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], row: Row, name: str, ends: Sequence[int], weights: Sequence[float]
) -> Segmented:
    """A row's completion; without segments where its tokens spell another text."""
    text, stopped = row[name], row.get(f"{name}_finish") != "length"
    encoded = encode(tokenizer, row["prompt"], text, stops)
    ids = encoded.completion_ids if stopped else encoded.completion_ids[:-1]
    places = last_tokens_of_encoded(tokenizer, ids, stopped, text, [*ends[:-1], len(text) - 1]) or []
    ending: dict[int, list[float]] = {}
    for place, weight in zip(places, weights, strict=False):
        ending.setdefault(place, []).append(weight)
    tokens = [place - before for before, place in pairwise([-1, *ending])]
    return Segmented(encoded.prompt_ids, ids, tokens, [fmean(group) for group in ending.values()], len(places))


def _useless(pair: Sequence[Segmented], max_length: int) -> str | None:
    better, worse = pair
    if not (better.ids and worse.ids):
        return "empty"
    if any(len(one.prompt_ids) + len(one.ids) > max_length for one in pair):
        return "too long"
    if not (better.tokens and worse.tokens):
        return "its tokens spell another text"
    if better.ids == worse.ids:
        return "equal chosen and rejected"
    pairing = pair_segments(better.weights, worse.weights)
    return None if any([*pairing.chosen_weights, *pairing.rejected_weights]) else "its paired segments weigh nothing"


def _weights(scores: Sequence[float | list[float]], aspects: Sequence[float] | None, where: str) -> list[float]:
    found = []
    for score in scores:
        values = score if isinstance(score, list) else [score]
        if aspects is not None and len(values) != len(aspects):
            raise InputError(
                f"{where}: its segments have scores of {len(values)} aspects, and there are weights of {len(aspects)} "
                f"({list(aspects)}); give one weight an aspect"
            )
        found.append(fmean(values) if aspects is None else float(np.dot(aspects, values)))
    return found
