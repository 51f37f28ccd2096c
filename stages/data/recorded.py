"""What a dataset of samples records of each sample, beside the columns of its prompt."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
RECORDED = ("step", "sample", "completion", "length", "finish", "policy")


def of_one_sample(column: str) -> bool:
    """Whether a column of a rollouts dataset tells of one sample, not of its prompt."""
    return column in (*RECORDED, "reward", "notes", "kl", "advantage") or column.startswith("rewards.")


def recorded(row: Row, step: int, sample: int, completion: str, length: int | None, finish: str, policy: str) -> Row:
    """A prompt's row with one sample of it, as a row of a rollouts dataset."""
    given = {name: value for name, value in row.items() if name not in RECORDED}
    return given | dict(zip(RECORDED, (step, sample, completion, length, finish, policy), strict=True))


def sample_number(row: Row, place: int) -> int:
    """Which sample of its prompt a row is: by its column, or by its place among them."""
    return place if row.get("sample") is None else int(row["sample"])
