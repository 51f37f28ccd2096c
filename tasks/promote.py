"""Gates and the alias `champion`: whether a candidate is good enough, and how it takes the champion's place.

Every version of a champion's name has been the champion once: `promote` registers one just before the alias moves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from pydantic import BaseModel, ConfigDict, Field

from stages.artifacts import Model, digest_of
from stages.errors import InputError
from stages.specs.base import Config
from tasks.exclusive import exclusive
from tasks.store import Store

CHAMPION = "champion"
BY, DURING = "posttrain.promoted_by", "posttrain.round"


class Kept(Config):
    """A metric of `evaluate` in which a candidate must not fall behind the champion."""

    metric: str = Field(
        min_length=1, title="Metric", description="As evaluate names it: accuracy, reward, rewards.NAME, pass_at_4, truncated."
    )
    drop: float = Field(
        ge=0,
        title="Allowed drop",
        description="How far the candidate's mean may be on the wrong side of the champion's. It is the plain difference, on "
        "the same prompts with the same seeds: on few prompts an interval would let a real drop pass. A metric's noise decides "
        "what is sensible, so there is no default.",
    )
    better: Literal["higher", "lower"] = Field(
        default="higher", title="Better", description="lower: the metric is a fault, such as truncated."
    )


class Gate(Config):
    """What a candidate must show on the held-out prompts to take the champion's place. All of it must hold."""

    win_rate: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        title="Win rate",
        description="The lower end of the 95% interval of the win rate against the champion must be above this. One half: the "
        "candidate is better, and that is hardly luck (1 in 40).",
    )
    max_kl: float | None = Field(
        default=10.0,
        ge=0,
        title="Largest KL",
        description="Nats a completion from the reference of optimisation. 10 is what the best of 60,000 samples would cost "
        "(log n - 1 + 1/n): a policy further off says what the reference never would. Long completions need more.",
    )
    max_length_ratio: float | None = Field(
        default=1.5,
        gt=0,
        title="Largest length",
        description="Of the candidate's mean length, as a multiple of the champion's: longer answers are the commonest way to "
        "win without being better (arXiv 2310.03716). Unset it where thinking longer is the aim.",
    )
    no_regression: list[Kept] = Field(
        default_factory=list, title="No regression", description="Metrics in which the candidate must not be worse."
    )


class Verdict(BaseModel):
    """Whether a gate was passed. `reasons` are what failed or, of a candidate that passed, all that held."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    reasons: list[str]


def judge(gate: Gate, candidate: Mapping[str, float], champion: Mapping[str, float]) -> Verdict:
    """Hold the metrics of `evaluate` against a gate. Raises InputError for a metric that was not measured; NaN never passes."""
    checks = [_win_rate(gate, candidate)]
    if gate.max_kl is not None:
        kl = _measured(candidate, "kl")
        checks.append((kl <= gate.max_kl, f"KL {kl:.3g} nats", f"at most {gate.max_kl:g} allowed"))
    if gate.max_length_ratio is not None:
        ours, theirs = _measured(candidate, "length"), _measured(champion, "length")
        words = f"mean length {ours:.1f} tokens, the champion's {theirs:.1f}"
        checks.append((ours <= gate.max_length_ratio * theirs, words, f"at most {gate.max_length_ratio:g} times it allowed"))
    checks += [_kept(kept, candidate, champion) for kept in gate.no_regression]
    passed = all(held for held, _, _ in checks)
    return Verdict(passed=passed, reasons=[f"{words} ({limit})" for held, words, limit in checks if held is passed])


Check = tuple[bool, str, str]


def _win_rate(gate: Gate, candidate: Mapping[str, float]) -> Check:
    rate, low = _measured(candidate, "win_rate"), _measured(candidate, "win_rate_low")
    return low > gate.win_rate, f"win rate {rate:.3f}, surely above {low:.3f}", f"must be surely above {gate.win_rate:g}"


def _kept(kept: Kept, candidate: Mapping[str, float], champion: Mapping[str, float]) -> Check:
    ours, theirs = _measured(candidate, kept.metric), _measured(champion, kept.metric)
    worse = theirs - ours if kept.better == "higher" else ours - theirs
    words = f"{kept.metric} {ours:.3g}, the champion's {theirs:.3g}"
    return worse <= kept.drop, words, f"may be {kept.drop:g} {'lower' if kept.better == 'higher' else 'higher'}"


def _measured(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        known = ", ".join(sorted(one for one in metrics if not one.endswith(("_low", "_high", "_missing"))))
        raise InputError(f"the gate asks for {name}, which evaluate did not measure; it measured {known or 'nothing'}")
    return metrics[name]


class Promotion(BaseModel):
    """What came of a promotion: the champion's new version, or why the alias stayed."""

    model_config = ConfigDict(frozen=True)

    version: str | None
    why: str


def champion(store: Store, name: str) -> str | None:
    """The version of a name that carries the alias now, or None when none does."""
    try:
        found = store.client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if found is None else str(found)


def promote(store: Store, name: str, candidate: Model, started_from: str | None, by: str, during: str) -> Promotion:
    """Make a candidate the champion of a name, if the champion is still the version that `by` started from (None: there was
    none); otherwise say who moved it.

    `by` identifies who promotes (a round): called again after a crash at any point, it ends as it would have. `during` says it
    in words. Between tools that move the alias without this function there is no order: MLflow has no compare-and-set.
    """
    with exclusive(store, digest_of(["promote", name])):
        now = champion(store, name)
        ours = _version_of(store, name, by)
        if ours is not None and now == str(ours.version):
            return Promotion(version=now, why=f"is {name}/{now}")
        if now != started_from:
            if ours is not None:
                store.client.delete_model_version(name, str(ours.version))
            return Promotion(version=None, why=_moved(store, name, now, started_from))
        version = str((ours or _register(store, name, candidate, by, during)).version)
        _tell_model(store, name, version, candidate)
        store.client.set_registered_model_alias(name, CHAMPION, version)
        return Promotion(version=version, why=f"is {name}/{version}")


def _version_of(store: Store, name: str, by: str) -> ModelVersion | None:
    return next((v for v in store.client.search_model_versions(f"name = '{name}'") if v.tags.get(BY) == by), None)


def _register(store: Store, name: str, candidate: Model, by: str, during: str) -> ModelVersion:
    try:
        store.client.create_registered_model(name, tags={"kind": "model"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model_id = candidate.uri.removeprefix("models:/")
    run_id = store.client.get_logged_model(model_id).source_run_id
    tags = {"kind": "model", "digest": candidate.digest, BY: by, DURING: during}
    return store.client.create_model_version(name, candidate.uri, run_id, tags=tags, model_id=model_id)


def _tell_model(store: Store, name: str, version: str, candidate: Model) -> None:
    """Name the version on the model's own page, beside the one that its step registered."""
    model_id = candidate.uri.removeprefix("models:/")
    known = json.loads(store.client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    ours = {"name": name, "version": version}
    if ours not in known:
        store.client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*known, ours])})


def _moved(store: Store, name: str, now: str | None, started_from: str | None) -> str:
    """In words, who moved the alias."""
    before = f"{name}/{started_from}" if started_from else "without a champion"
    if now is None:
        return f"started from {before}, which is the champion no more: somebody took the alias away"
    who = store.client.get_model_version(name, now).tags.get(DURING, "somebody by hand")
    return f"started from {before}, and meanwhile {who} made {name}/{now} the champion"
