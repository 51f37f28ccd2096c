"""Identity: what changes a key and what does not, and that every config can be shown as a form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import Field, ValidationError

from stages.rewards import REWARDS
from stages.rewards.base import RewardEntry
from stages.specs import STAGES, Config, StageSpec
from stages.specs.base import OPERATIONAL, Runtime
from stages.specs.common import RewardRef

# The fields that a stage's config demands, for stages that have such.
REQUIRED: dict[str, dict[str, Any]] = {"grpo": {"rewards": [{"name": "length"}]}}
REQUIRED["rejection"] = {"criteria": [{"name": "format", "minimum": 1.0}]}
# Not required, but only a KL takes the other source.
REQUIRED["distill"] = {"objective": "forward_kl"}
ALTERNATIVES: list[Any] = [True, False, 1, 3, 0.25, 0.5, 200, 4.0, "cpu", {"x": "y"}, [{"name": "answer"}]]
ALTERNATIVES += [{"name": "answer"}, {"weight": 2.0}, {"model": "m", "url": "http://localhost:8000/v1"}]
ALTERNATIVES += [{"rewards": [{"name": "length"}]}, "r1-zero", {"rank": 8}, [1.0, 2.0], {"start": 3}]
# What has to be said beside a field for it to be allowed.
BESIDE: dict[str, dict[str, Any]] = {
    "Objective.tau": {"name": "ipo"},
    "Objective.label_smoothing": {"name": "robust_dpo"},
    "Objective.gamma": {"name": "simpo"},
    "Objective.nll_coefficient": {"name": "cpo"},
    "Objective.w_desirable": {"name": "kto"},
    "Objective.w_undesirable": {"name": "kto", "beta": 0.3},
    "Objective.discopop_tau": {"name": "discopop"},
    "Pairing.part": {"parts": 3},
    "PreferenceConfig.aspects": {"objective": {"name": "two_d_dpo"}},
    "LabelConfig.segments": {"reward": {"name": "chain_sum"}},
}


class Inner(Config):
    kept: int = 1
    speed: int = Field(default=1, json_schema_extra=OPERATIONAL)


class Outer(Config):
    one: Inner = Inner()
    several: tuple[Inner, ...] = ()
    named: dict[str, list[Inner]] | None = None
    hardware: Inner = Field(default=Inner(), json_schema_extra=OPERATIONAL)
    maybe: Inner | None = None


def base(name: str) -> Config:
    return STAGES[name].config.model_validate(REQUIRED.get(name, {}))


def key(spec: StageSpec, config: Config, **inputs: str) -> str:
    return spec.key(config, {"source": "digest"} | inputs)


def nested(annotation: Any) -> Iterator[type[Config]]:
    """The config classes that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in get_args(annotation):
        yield from nested(argument)


def reachable(config: type[Config]) -> set[type[Config]]:
    found = {config}
    for field in config.model_fields.values():
        for inner in nested(field.annotation):
            found |= reachable(inner)
    return found


CONFIGS = sorted({config for spec in STAGES.values() for config in reachable(spec.config)}, key=lambda config: config.__name__)


def operational(config: type[Config], name: str) -> bool:
    extra = config.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))


def other_values(config: Config) -> Iterator[tuple[str, Config]]:
    """(field, the config with another value there) for every field, and for every field of configs within it."""
    for name, field in type(config).model_fields.items():
        current = getattr(config, name)
        if isinstance(current, Config):
            for path, changed in other_values(current):
                yield f"{name}.{path}", config.model_copy(update={name: changed})
            continue
        literals = [value for one in (field.annotation, *get_args(field.annotation)) if get_origin(one) is Literal
                    for value in get_args(one)]  # fmt: skip
        given = config.model_dump() | BESIDE.get(f"{type(config).__name__}.{name}", {})
        for value in literals or ALTERNATIVES:
            try:
                changed = type(config).model_validate(given | {name: value})
            except ValidationError:
                continue
            if getattr(changed, name) != current:
                yield name, changed
                break
        else:
            raise AssertionError(f"{type(config).__name__}.{name}: add a value to ALTERNATIVES that it takes")


def test_operational_fields_are_no_identity_at_any_depth() -> None:
    slow, fast = Inner(kept=2), Inner(kept=2, speed=9)
    identity = {"one": {"kept": 2}, "several": [{"kept": 2}], "named": {"a": [{"kept": 2}]}, "maybe": {"kept": 2}}
    for inner, hardware in ((slow, slow), (fast, fast), (fast, Inner(kept=5))):
        config = Outer(one=inner, several=(inner,), named={"a": [inner]}, hardware=hardware, maybe=inner)
        assert config.identity() == identity
    assert Outer(one=Inner(kept=3)).identity() != Outer().identity()


@pytest.mark.parametrize("name", STAGES)
def test_each_field_changes_the_key_unless_it_is_operational(name: str) -> None:
    spec, config = STAGES[name], base(name)
    keys = {"": key(spec, config)}
    for path, changed in other_values(config):
        first = path.split(".")[0]
        if operational(spec.config, first):
            assert key(spec, changed) == keys[""], path
        else:
            assert key(spec, changed) not in keys.values(), path
            keys[path] = key(spec, changed)
    assert {path.split(".")[0] for path in keys if path} == {
        n for n in spec.config.model_fields if not operational(spec.config, n)
    }


def test_only_runtimes_and_ways_to_endpoints_are_operational() -> None:
    """A field that is left out of keys by mistake makes wrong skips: each one has to be added here on purpose."""
    marked = {(config.__name__, name) for config in CONFIGS for name in config.model_fields if operational(config, name)}
    stages = {(spec.config.__name__, "runtime") for spec in STAGES.values() if "runtime" in spec.config.model_fields}
    endpoints = {("Endpoint", name) for name in ("url", "api_key", "timeout", "retries", "concurrency")}
    # Whether the reference is asked ahead or in every step.
    assert marked == stages | endpoints | {("PreferenceConfig", "reference")}
    assert all(STAGES[name].config.model_fields["runtime"].annotation is Runtime for name in ("sft", "evaluate"))


@pytest.mark.parametrize("name", STAGES)
def test_version_stage_and_inputs_change_the_key(name: str) -> None:
    spec, config = STAGES[name], base(name)
    one = key(spec, config)
    assert one == spec.key(config, {"source": "digest"})
    others = [
        key(replace(spec, version=spec.version + 1), config),
        key(replace(spec, name="other"), config),
        key(spec, config, source="another digest"),
        key(spec, config, exclude="digest"),
        spec.key(config, {"other": "digest"}),
        spec.key(config, {}),
    ]
    assert len({one, *others}) == 7
    assert key(replace(spec, headline=("x",)), config) == one
    assert key(spec, config, a="1", b="2") == key(spec, config, b="2", a="1")


def test_reward_name_arguments_and_version_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = STAGES["evaluate"]

    def keys() -> list[str]:
        rewards = [RewardRef(name="answer"), RewardRef(name="chain_sum"), RewardRef(name="answer", args={"a": 1})]
        configs = [{"verifier": rewards[0]}, {"verifier": rewards[1]}, {"verifier": rewards[2]}, {"rewards": rewards[:1]}, {}]
        return [key(spec, spec.config.model_validate(config)) for config in configs]

    before = keys()
    assert len(set(before)) == 5
    monkeypatch.setitem(REWARDS, "answer", replace(REWARDS["answer"], target="elsewhere:answer"))
    assert keys() == before
    monkeypatch.setitem(REWARDS, "answer", replace(REWARDS["answer"], version=REWARDS["answer"].version + 1))
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [False, True, False, False, True]


def test_a_reward_must_be_registered() -> None:
    with pytest.raises(ValidationError, match="no reward is named 'anwser'; there are answer, chain_sum"):
        RewardRef(name="anwser")
    assert all(isinstance(entry, RewardEntry) and entry.version >= 1 for entry in REWARDS.values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_unknown_fields_are_refused(config: type[Config]) -> None:
    with pytest.raises(ValidationError) as error:
        config.model_validate({"no_such_field": 1})
    assert ("extra_forbidden", ("no_such_field",)) in [(one["type"], one["loc"]) for one in error.value.errors()]


@pytest.mark.parametrize("name", STAGES)
def test_configs_are_frozen(name: str) -> None:
    config = base(name)
    for field in type(config).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, field, getattr(config, field))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_has_a_title_and_a_help_text(config: type[Config]) -> None:
    titles = [field.title for field in config.model_fields.values()]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    for name, field in config.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
    assert config.__doc__


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_a_form_of_a_config_is_not_too_long(config: type[Config]) -> None:
    assert len(config.model_fields) <= 22, "about 20 at most: move some to a nested config"


@pytest.mark.parametrize("name", STAGES)
def test_json_keeps_config_and_key(name: str) -> None:
    spec = STAGES[name]
    kept = 0
    for path, config in [("", base(name)), *other_values(base(name))]:
        try:
            spec.config.model_validate(config.model_dump())
        except ValidationError:
            continue  # A value that its own field takes, but the stage does not: PPO cannot draw at temperature 0.
        kept += 1
        for again in (json.loads(config.model_dump_json()), json.loads(json.dumps(config.model_dump(mode="json")))):
            parsed = spec.config.model_validate(again)
            assert parsed == config, path
            assert key(spec, parsed) == key(spec, config), path
    assert kept > min(10, len(spec.config.model_fields))


def test_numbers_written_in_two_ways_are_one_value() -> None:
    sft = STAGES["sft"]
    one, two = (
        sft.config.model_validate({"epochs": 2, "optimizer": {"lr": 1}}),
        sft.config.model_validate({"epochs": 2.0, "optimizer": {"lr": 1.0}}),
    )
    assert key(sft, one) == key(sft, two)


@pytest.mark.parametrize("name", STAGES)
def test_a_schema_for_the_form_can_be_made(name: str) -> None:
    schema = STAGES[name].config.model_json_schema()
    assert set(schema["properties"]) == set(STAGES[name].config.model_fields)
    assert STAGES[name].name == name
    assert STAGES[name].version >= 1


def test_a_mapping_changes_only_what_it_names() -> None:
    """A stage's own defaults of a shared config stay: `{lr: 1}` for a reward model keeps its cosine."""

    class Leaf(Config):
        one: int = 1
        two: int = 2

    class Branch(Config):
        leaf: Leaf = Field(default_factory=lambda: Leaf(one=10, two=20))
        other: int = 5

    class Tree(Config):
        branch: Branch = Field(default_factory=lambda: Branch(leaf=Leaf(one=100, two=200), other=50))
        maybe: Branch | None = None

    found = Tree.model_validate({"branch": {"leaf": {"one": 3}}, "maybe": {"other": 7}})
    assert found.branch == Branch(leaf=Leaf(one=3, two=200), other=50)
    assert found.maybe == Branch(leaf=Leaf(one=10, two=20), other=7)
    assert Tree.model_validate(found.model_dump(mode="json")) == found
    with pytest.raises(ValidationError, match=r"branch\.leaf\.three"):
        Tree.model_validate({"branch": {"leaf": {"three": 3}}})
    config = STAGES["reward_model"].config.model_validate({"optimizer": {"lr": 1.0}})
    assert config.model_dump()["optimizer"]["schedule"] == "cosine"
