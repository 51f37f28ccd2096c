"""Demonstrations as every likelihood loss needs them: tokenised once, drawn in a seeded order, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from accelerate import Accelerator

from stages.data.batching import RowOrder, TokenBatch, micro_batches, pad, target_count
from stages.data.encode import encode_demonstrations
from stages.data.tokens import TokenTable
from stages.models.load import LoadedPolicy
from stages.run import Run
from stages.specs.base import Runtime


class Form(Protocol):
    """What a config says of demonstrations."""

    @property
    def loss_on(self) -> Literal["completion", "all"]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def too_long(self) -> Literal["drop", "truncate"]: ...


@dataclass(frozen=True)
class Demonstrations:
    """Tokenised demonstrations and how a process of a loop takes its share of them."""

    table: TokenTable
    loss_on: Literal["completion", "all"]
    accelerator: Accelerator
    runtime: Runtime
    pad_id: int

    def __len__(self) -> int:
        return len(self.table)

    def count(self, indices: Sequence[int] | np.ndarray) -> int:
        """How many tokens of these rows carry loss, on all processes."""
        return target_count(self.table, indices, self.loss_on)

    def share(self, indices: Sequence[int] | np.ndarray) -> list[TokenBatch]:
        """This process's micro-batches of these rows; without any, a sequence of which no token counts."""
        mine, runtime = indices[self.accelerator.process_index :: self.accelerator.num_processes], self.runtime
        batches = list(micro_batches(self.table, mine, self.loss_on, runtime.micro_batch_tokens, runtime.packed, self.pad_id))
        return batches or [pad([self.table.ids(0)], [int(self.table.lengths[0])], self.pad_id, ())]

    def order(self, seed: int, shuffle: bool = True) -> RowOrder:
        """The stream of rows that a loop draws from."""
        return RowOrder(len(self), seed, shuffle)

    def named(self, indices: Sequence[int] | np.ndarray) -> list[int]:
        """The rows of the source, counted from 1, for messages."""
        return sorted((self.table.rows[indices] + 1).tolist())


def load_demonstrations(
    run: Run,
    accelerator: Accelerator,
    policy: LoadedPolicy,
    data: Path,
    name: str,
    form: Form,
    runtime: Runtime,
    rows: int | None = None,
) -> Demonstrations:
    """Tokenise the first `rows` rows of a dataset, all without a number, once for all tries of a run; log what became of them.

    Raises InputError when a row has no completion or none is left.
    """
    path = run.work / f"{name}.arrow"
    if accelerator.is_main_process and not path.is_file():
        some, limit = islice(run.rows(data), rows), min(form.max_length, policy.context)
        counts = encode_demonstrations(path, some, policy.tokenizer, policy.stops, limit, form.too_long)
        run.table(f"{name} rows", [{"what": what, "rows": count} for what, count in counts.items()])
    accelerator.wait_for_everyone()
    return Demonstrations(TokenTable(path), form.loss_on, accelerator, runtime, policy.pad_id)
