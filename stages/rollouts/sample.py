"""Sampling completions for rows: tokenise, generate with each sample's own seed, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.data.chat import encode_prompt
from stages.data.recorded import recorded
from stages.models.load import LoadedPolicy
from stages.rollouts.engine import Completion, generate
from stages.rollouts.seeds import sample_seed
from stages.specs.common import Sampling

Row = dict[str, Any]
# A sample's record, with its prompt's place in the batch.
Placed = tuple[int, Row]


@dataclass(frozen=True)
class Sample:
    """A row, its tokenised prompt, and one completion of it as tokens and as text (without EOS)."""

    row: Row
    sample: int
    prompt_ids: list[int]
    completion: Completion
    text: str

    @property
    def rated_row(self) -> Row:
        """The row as rewards are given it: with how the sample ended."""
        return {**self.row, "finish": self.completion.finish}

    def record(self, step: int, policy: str) -> Row:
        """The sample as a row of a rollouts dataset."""
        length, finish = len(self.completion.ids), self.completion.finish
        return recorded(self.row, step, self.sample, self.text, length, finish, policy)


# Is told of each sample as soon as it has ended, with its place among all of them.
Ended = Callable[[int, Sample], None]


def sample_rows(
    policy: LoadedPolicy,
    rows: Sequence[Row],
    sampling: Sampling,
    *,
    seed: int,
    step: int = 0,
    samples: int = 1,
    numbers: Sequence[int] | None = None,
    batch_size: int = 256,
    ended: Ended = lambda *_: None,
) -> tuple[list[Sample], int]:
    """`samples` completions of each row, in order of rows, and the number of rows whose prompt fills the context.

    A row's samples are numbered from 0, or from its number in `numbers`: a row that comes twice is to be sampled anew.
    """
    encoded = [
        (row, encode_prompt(policy.tokenizer, row["prompt"]), n)
        for row, n in zip(rows, numbers or [0] * len(rows), strict=True)
    ]
    wanted = [(row, ids, first + k) for row, ids, first in encoded if 0 < len(ids) < policy.context for k in range(samples)]
    seeds = [sample_seed(seed, step, row["id"], k) for row, _, k in wanted]
    was_training = policy.model.training
    policy.model.eval()
    drawn: dict[int, Sample] = {}

    def read(place: int, completion: Completion) -> None:
        row, ids, k = wanted[place]
        drawn[place] = Sample(row, k, ids, completion, _text(policy, completion))
        ended(place, drawn[place])

    generate(policy, [ids for _, ids, _ in wanted], seeds, sampling, batch_size, read)
    policy.model.train(was_training)
    return [drawn[place] for place in range(len(wanted))], len(rows) - len(wanted) // samples


def _text(policy: LoadedPolicy, completion: Completion) -> str:
    ids = completion.ids[:-1] if completion.finish == "stop" else completion.ids
    return str(policy.tokenizer.decode(ids, skip_special_tokens=False))
