"""Step labels to token ids: a completion's steps in one sequence, and at which of its tokens each step is to be judged.

Legend: B sequences (one a row), N steps (of all sequences, end to end).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.data.chat import encode
from stages.data.schemas import labelled_steps
from stages.data.steps import last_tokens_of_encoded
from stages.data.tokens import TokenTable
from stages.errors import InputError

Row = dict[str, Any]


class StepTable:
    """Sequences of `tokens`; the steps of sequence b are `starts_B[b] .. starts_B[b + 1]` of all. `labels_N` are from 0 to 1,
    `ends_N` the places of the steps' last tokens in their sequence, prompt included."""

    def __init__(self, path: Path) -> None:
        self.tokens = TokenTable(path.with_suffix(".arrow"))
        kept = json.loads(path.with_suffix(".json").read_text())
        self.labels_N = np.array([label for labels in kept["labels"] for label in labels], dtype=np.float32)
        self.ends_N = np.array([end for ends in kept["ends"] for end in ends], dtype=np.int64)
        self.starts_B = np.array([0, *accumulate(len(labels) for labels in kept["labels"])], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def steps(self, index: int) -> range:
        """The steps of a sequence."""
        return range(int(self.starts_B[index]), int(self.starts_B[index + 1]))

    def places(self, indices: Sequence[int]) -> np.ndarray:
        """places_N: the steps of some sequences among all, in the order of these sequences."""
        return np.array([place for index in indices for place in self.steps(index)], dtype=np.int64)

    def ends(self, indices: Sequence[int]) -> list[np.ndarray]:
        """For each of some sequences, where its steps end."""
        return [self.ends_N[self.steps(index)] for index in indices]


def encode_step_labels(
    path: Path,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    max_length: int,
    separator: str,
) -> Counter[str]:
    """Write the table of `prompt`, `completions`, `labels` rows; return counts of what became of them.

    The completion is its steps joined by the separator, with an EOS unless `finish` is "length". A step is judged at the token
    that completes the last character of it and its separator; the last one at the completion's last token. A row over
    `max_length` tokens is dropped, as is one whose tokens spell another text. Raises InputError for a row that holds no step
    labels, or when none is left.
    """
    counts: Counter[str] = Counter()
    labels: list[list[float]] = []
    ends: list[list[int]] = []

    def sequences() -> Iterator[tuple[list[int], int, int]]:
        for number, row in enumerate(rows):
            steps, rated = _checked(row, number)
            text = separator.join(steps)
            encoded = encode(tokenizer, row["prompt"], text, stops)
            stopped = row.get("finish") != "length"
            prompt, ids = len(encoded.prompt_ids), encoded.completion_ids if stopped else encoded.completion_ids[:-1]
            if prompt + len(ids) > max_length:
                counts["dropped: too long"] += 1
                continue
            characters = [end - 1 for end in accumulate(len(step) + len(separator) for step in steps)]
            places = last_tokens_of_encoded(tokenizer, ids, stopped, text, characters)
            if places is None:
                counts["dropped: its tokens spell another text"] += 1
                continue
            counts["used"] += 1
            counts["steps"] += len(steps)
            labels.append(rated)
            ends.append([prompt + place for place in places])
            yield [*encoded.prompt_ids, *ids], prompt, number

    TokenTable.write(path.with_suffix(".arrow"), sequences())
    if not counts["used"]:
        raise InputError(f"no row with step labels fits in {max_length} tokens ({dict(counts) or 'the dataset is empty'})")
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"labels": labels, "ends": ends}))
    draft.replace(path.with_suffix(".json"))
    return counts


def _checked(row: Row, number: int) -> tuple[list[str], list[float]]:
    where = f"row {number + 1}"
    for name in ("prompt", "completions", "labels"):
        if row.get(name) is None:
            raise InputError(
                f'{where} has no "{name}" (it has {", ".join(row)}); a process reward model needs "prompt", "completions" '
                '(the steps of a completion) and "labels" (one a step)'
            )
    return labelled_steps(row, where)
