"""Rewards by name. To add one: write `def reward(completions, rows, **args) -> list[Score | None]` and add one line here.

`None` means "no reward" and is left out of every mean; it is never 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

from stages.errors import InputError
from stages.rewards.base import RewardEntry, Row, Score

REWARDS: dict[str, RewardEntry] = {
    "answer": RewardEntry("stages.rewards.answer:answer", version=1, columns=("answer",)),
    "format": RewardEntry("stages.rewards.form:form", version=1),
    "judge": RewardEntry("stages.rewards.judge:judge", version=1, arguments="stages.rewards.judge:JudgeArgs"),
    "length": RewardEntry("stages.rewards.length:length", version=1),
    "reward_model": RewardEntry("stages.rewards.learned:learned", version=1, port="reward_model"),
    "safety_model": RewardEntry("stages.rewards.learned:learned", version=1, port="safety_model"),
    "code": RewardEntry("stages.rewards.code:code", version=1, columns=("tests",)),
    "chain_sum": RewardEntry("stages.rewards.chain_sum:preference", version=2, columns=("problem", "answer")),
    "lists_helpful": RewardEntry("stages.rewards.lists:helpful", version=1, columns=("problem",)),
    "lists_harmless": RewardEntry("stages.rewards.lists:harmless", version=1),
}


def score(name: str, completions: Sequence[str], rows: Sequence[Row], **args: Any) -> list[Score | None]:
    """Call a reward. Raises InputError naming the row (by id) on which the reward function raised."""
    module, function = REWARDS[name].target.split(":")
    reward = getattr(importlib.import_module(module), function)
    try:
        scores = reward(completions, rows, **args)
    except InputError:
        raise
    except Exception as error:
        culprit = next((row for text, row in zip(completions, rows, strict=True) if _raises(reward, text, row, args)), None)
        where = f"on the row with id {culprit.get('id')!r}" if culprit is not None else "on the whole batch"
        raise InputError(f"reward {name!r} raised {type(error).__name__} {where}: {error}") from error
    if len(scores) != len(completions):
        raise InputError(f"reward {name!r} gave {len(scores)} scores for {len(completions)} completions; it must give one each")
    return scores


def _raises(reward: Any, completion: str, row: Row, args: dict[str, Any]) -> bool:
    try:
        reward([completion], [row], **args)
    except Exception:
        return True
    return False


def require_columns(name: str, columns: Iterable[str], dataset: str) -> None:
    """Refuse a dataset that lacks a column which a reward needs, before anything is sampled."""
    missing = sorted(set(REWARDS[name].columns) - set(columns))
    if missing:
        raise InputError(
            f"reward {name!r} needs the column {missing[0]!r}, which {dataset} does not have (it has {', '.join(columns)})"
        )
