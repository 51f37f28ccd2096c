"""Demonstrations to a token table, with a count of what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from stages.data.chat import encode
from stages.data.tokens import TokenTable
from stages.errors import InputError


def encode_demonstrations(
    path: Path,
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    max_length: int,
    too_long: Literal["drop", "truncate"],
) -> Counter[str]:
    """Write the token table of `prompt` + `completion` rows to `path` and return counts of rows by what happened to them.

    A sequence over `max_length` tokens is dropped or cut; a cut one has no EOS. A prompt that leaves no room for a
    completion is always dropped. Raises InputError when a row has no completion or no row is left.
    """
    counts: Counter[str] = Counter()

    def sequences() -> Iterator[tuple[list[int], int, int]]:
        for number, row in enumerate(rows):
            if "completion" not in row:
                raise InputError(
                    f'row {number + 1} has no column "completion" (it has {", ".join(row)}); demonstrations are needed here'
                )
            encoded = encode(tokenizer, row["prompt"], row["completion"], stops)
            prompt, ids = len(encoded.prompt_ids), [*encoded.prompt_ids, *encoded.completion_ids]
            if prompt >= max_length:
                counts["dropped: the prompt fills the context"] += 1
            elif len(ids) <= max_length:
                counts["used"] += 1
                yield ids, prompt, number
            elif too_long == "truncate":
                counts["used, completion cut"] += 1
                yield ids[:max_length], prompt, number
            else:
                counts["dropped: too long"] += 1
        # Here, so that no empty table is left for the next try to find.
        if not counts["used"] + counts["used, completion cut"]:
            raise InputError(f"no row fits in {max_length} tokens ({dict(counts) or 'the dataset is empty'}); raise max_length")

    TokenTable.write(path, sequences())
    return counts
