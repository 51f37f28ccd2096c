"""A reward of several parts: rules, verifiers and learned models, weighted, each for all rows or for some of them.

    reward(completion) = sum of weight * score over the parts whose `where` the row meets

A part that has no verdict (None) leaves the whole completion without a reward: a sum without it would rate the completion as
if it had failed there. Parts of weight 0 are only reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from stages.errors import InputError
from stages.rewards import REWARDS, Scoring, check_rows, require_columns, score
from stages.rewards.base import Row, Score, verdict
from stages.specs.common import WeightedReward

# The scores of one completion, by the keys of the parts that are for its row.
Scores = Mapping[str, Score | None]


@dataclass(frozen=True)
class Mixed:
    """What became of one completion: its reward, every part's score by key (None: no verdict; absent: not for this row), and,
    as (position of the step's last character, weighted score), what rated which step of it; the parts' notes by key."""

    total: float | None
    parts: Mapping[str, float | None]
    steps: Sequence[tuple[int, float]] = field(default_factory=list)
    notes: Mapping[str, str] = field(default_factory=dict)


class Mixture:
    """The parts of a reward, ready to be asked. `given` are further arguments by reward name: a learned one's model."""

    def __init__(self, parts: Sequence[WeightedReward], given: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.parts = list(parts)
        self.given = given or {}

    @property
    def keys(self) -> list[str]:
        return [part.key for part in self.parts]

    def check(self, columns: Iterable[str], dataset: str) -> None:
        """Refuse a dataset that lacks a column that a part needs or chooses its rows by."""
        columns = list(columns)
        for part in self.parts:
            require_columns(part.name, columns, dataset)
            if missing := sorted(set(part.where) - set(columns)):
                raise InputError(
                    f"reward {part.key!r} is for rows by the column {missing[0]!r}, which is not in {dataset} "
                    f"(columns: {', '.join(columns)})"
                )

    def check_row(self, row: Row, where: str) -> None:
        """Refuse, before anything is sampled, a row that no part rates, or that lacks what a part needs of it."""
        mine = [part for part in self.parts if applies(part, row)]
        if not any(part.decides for part in mine):
            raise InputError(f"{where}: no reward is for it; give one without `where`, or leave such rows out in `prepare`")
        for part in mine:
            for column in REWARDS[part.name].columns:
                if row.get(column) is None or row[column] == "":
                    raise InputError(f'{where}: "{column}" is empty, and the reward {part.name!r} needs it')

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Refuse, before anything is sampled, a row of which a part can rate no completion: its answer cannot be read."""
        for part in self.parts:
            check_rows(part.name, [row for row in rows if applies(part, row)], part.timeout)

    def __call__(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Mixed]:
        """One `Mixed` a completion, in order. Pooled parts work beside the others."""
        with self.begin() as begun:
            for place, (text, row) in enumerate(zip(completions, rows, strict=True)):
                begun.add(place, text, row)
            return begun.finish()

    def begin(self) -> Begun:
        """Be asked about completions as they come."""
        return Begun(self)

    def arguments(self, part: WeightedReward) -> dict[str, Any]:
        return {**part.args, **self.given.get(part.name, {})}

    def unpooled(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Scores]:
        """The scores of each completion by the parts that are not pooled."""
        found: list[dict[str, Score | None]] = [{} for _ in completions]
        for part in self.parts:
            places = [place for place, row in enumerate(rows) if applies(part, row)]
            if places and not REWARDS[part.name].pooled:
                texts, theirs = [completions[i] for i in places], [rows[i] for i in places]
                for place, one in zip(places, score(part.name, texts, theirs, **self.arguments(part)), strict=True):
                    found[place][part.key] = one
        return [*found]

    def mixed(self, text: str, verdicts: Scores) -> Mixed:
        """What becomes of a completion that all its parts have scored."""
        parts = {key: verdict(one) for key, one in verdicts.items()}
        notes = {key: one.note for key, one in verdicts.items() if one is not None and one.note}
        weighted = [
            (part.weight, parts[part.key], verdicts[part.key]) for part in self.parts if part.weight and part.key in parts
        ]
        known = [(weight, weight * total, one) for weight, total, one in weighted if total is not None and one is not None]
        if len(known) < len(weighted):
            return Mixed(None, parts, notes=notes)
        steps: list[tuple[int, float]] = []
        for weight, value, one in known:
            if one.step_scores is None or one.step_ends is None:
                steps.append((max(0, len(text) - 1), value))
            else:
                steps += [(end, weight * score) for end, score in zip(one.step_ends, one.step_scores, strict=True)]
        return Mixed(sum(value for _, value, _ in known), parts, sorted(steps), notes)


class Begun:
    """A mixture that is given completions one by one, in any order. Its pooled parts begin at once; the others, which do better
    with many, are asked in the end. On leaving it as a context, what still works or waits is cancelled."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._given: dict[int, tuple[str, Row]] = {}
        pooled = [part for part in mixture.parts if REWARDS[part.name].pooled]
        self._scorings = [(part, Scoring(part.name, part.timeout, **mixture.arguments(part))) for part in pooled]

    def add(self, place: int, text: str, row: Row) -> None:
        """Give it a completion, which has this place in the order of the results."""
        self._given[place] = (text, row)
        for part, scoring in self._scorings:
            if applies(part, row):
                scoring.add(place, text, row)

    def pooled(self) -> dict[int, Scores]:
        """The scores of each completion by the pooled parts, once they are there, by its place."""
        found: dict[int, dict[str, Score | None]] = {place: {} for place in sorted(self._given)}
        for part, scoring in self._scorings:
            for place, one in scoring.finish().items():
                found[place][part.key] = one
        return {**found}

    def finish(self) -> list[Mixed]:
        """One `Mixed` a completion, in order of places."""
        given = [self._given[place] for place in sorted(self._given)]
        here = self.mixture.unpooled([text for text, _ in given], [row for _, row in given])
        pooled = self.pooled().values()
        return [self.mixture.mixed(text, {**a, **b}) for (text, _), a, b in zip(given, here, pooled, strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for _, scoring in self._scorings:
            scoring.__exit__(*error)


def applies(part: WeightedReward, row: Row) -> bool:
    """Whether a part rates a row's completions."""
    return all(str(row.get(column)) == value for column, value in part.where.items())
