"""The form of every flow: each field says what it is, holds a value that a person can write, and is what the recipe says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import build_error_obj, validate
from pydantic import BaseModel
from test_specs import REQUIRED, reachable

from flows.cli import PIPELINES, definition_of
from flows.forms import parameters, recipe_flow
from flows.inputs import EXAMPLES, Inputs, kinds
from flows.recipe import config_type, parse, read_recipe
from flows.rlhf import RlhfRecipe
from stages.specs import STAGES, Config

FLOWS = [*PIPELINES, *STAGES]
CONFIGS = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "tests" / "tiny" / "rlhf.yaml"]
Schema = dict[str, Any]
UNSENT = object()


@cache
def schema_of(flow: str) -> Schema:
    """As a deployment registers it."""
    return parameter_schema(definition_of(flow).flow.fn).model_dump_for_openapi()


def resolved(schema: Schema, field: Schema) -> Schema:
    """What the page makes of a field: what it points to, with what is said beside it laid over."""
    return schema["definitions"][field["$ref"].rpartition("/")[2]] | field if "$ref" in field else field


def fields(schema: Schema, node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every field that a person may come to see, once a path."""
    node = resolved(schema, node)
    for name, field in node.get("properties", {}).items():
        yield f"{path}.{name}", resolved(schema, field)
        yield from fields(schema, field, f"{path}.{name}")
    for branch in node.get("anyOf", []):
        yield from fields(schema, branch, path)
    if "items" in node:
        yield from fields(schema, node["items"], f"{path}[]")


def sent(schema: Schema, node: Schema) -> Any:
    """What the page sends of a field that nobody has touched."""
    node = resolved(schema, node)
    if "anyOf" in node:
        return node.get("default", None if node["anyOf"][0]["type"] == "null" else UNSENT)
    if node["type"] == "object":
        values = {name: sent(schema, field) for name, field in node["properties"].items()}
        return {name: value for name, value in values.items() if value is not UNSENT} or UNSENT
    return node.get("default", UNSENT)


def models(kind: type[BaseModel]) -> set[type[Config]]:
    return {model for model in reachable(kind) if issubclass(model, Config)}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("flow", FLOWS)
def test_every_field_says_what_it_is_and_can_be_written(flow: str) -> None:
    schema = schema_of(flow)
    assert schema["required"] == ["recipe"]
    seen = dict(fields(schema, schema))
    assert len(seen) > 20
    for path, field in seen.items():
        assert field["title"], path
        assert field["description"], path
        assert "position" in field, path
        if "anyOf" in field:
            titles = [resolved(schema, branch)["title"] for branch in field["anyOf"]]
            assert titles in (["Off", "On"], ["On", "Off"], ["All", "By name"]), path
        elif field["type"] == "object":
            assert field["properties"], f"{path} would be raw JSON"
            assert field["additionalProperties"] is False, path
        else:
            assert field["type"] in ("string", "integer", "number", "boolean", "array"), path


@pytest.mark.parametrize("flow", PIPELINES)
def test_a_step_that_only_an_artifact_in_its_place_makes_needless_is_at_first_on(flow: str) -> None:
    schema, kind = schema_of(flow), definition_of(flow).recipe
    shown = resolved(schema, schema["properties"]["recipe"])["properties"]
    at_first = {name: field["anyOf"][0]["title"] for name, field in shown.items() if "anyOf" in field}
    needed = {*kind.ALWAYS, *(other for step in kind.ALWAYS for other in kind.NEEDS.get(step, ()))}
    assert {name for name, title in at_first.items() if title == "On"} == needed


@pytest.mark.parametrize("flow", FLOWS)
def test_the_first_fields_are_name_seed_and_inputs_and_the_last_launch_and_pools(flow: str) -> None:
    schema = schema_of(flow)
    recipe = resolved(schema, schema["properties"]["recipe"])
    order = sorted(recipe["properties"], key=lambda name: recipe["properties"][name]["position"])
    assert (order[:3], order[-2:]) == (["name", "seed", "inputs"], ["launch", "pools"])
    assert "name" in recipe["required"]
    assert schema["properties"]["from_step"] | {"description": ""} == {
        "title": "From step",
        "type": "string",
        "default": "",
        "description": "",
        "position": 1,
    }


@pytest.mark.parametrize("flow", FLOWS)
def test_bounds_and_choices_are_in_the_form(flow: str) -> None:
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum", "pattern": "pattern"}
    schema, checked = schema_of(flow), 0
    for model in models(definition_of(flow).recipe):
        shown = schema["definitions"].get(model.__name__.replace(" ", "_"))
        for name, field in model.model_fields.items() if shown else []:
            for bound in field.metadata:
                for mine, theirs in names.items():
                    if getattr(bound, mine, None) is not None:
                        text = json.dumps(shown["properties"][name])
                        assert f'"{theirs}": {json.dumps(getattr(bound, mine))}' in text, (model, name)
                        checked += 1
    assert checked > 3
    choices = {path.rpartition(".")[2]: field["enum"] for path, field in fields(schema, schema) if "enum" in field}
    assert choices["mode"] == ["in_process", "process"]
    if flow == "grpo":
        rewards = dict(fields(schema, schema))[".recipe.grpo.rewards[].name"]["enum"]
        assert {"format", "reward_model"} <= set(rewards)
    if flow == "label":
        rewards = dict(fields(schema, schema))[".recipe.label.reward.name"]["enum"]
        assert "format" in rewards
        assert "reward_model" not in rewards


@pytest.mark.parametrize("flow", FLOWS)
def test_references_are_fields_with_examples(flow: str) -> None:
    inputs: Any = definition_of(flow).recipe.model_fields["inputs"].annotation
    assert issubclass(inputs, Inputs)
    shown = resolved(schema_of(flow), {"$ref": f"#/definitions/{inputs.__name__.replace(' ', '_')}"})["properties"]
    assert set(shown) == set(kinds(inputs)) != set()
    for name, kind in kinds(inputs).items():
        assert shown[name]["examples"] == list(EXAMPLES[kind])
        assert all(example in shown[name]["description"] for example in EXAMPLES[kind])
    if flow in STAGES:
        assert kinds(inputs) == {name: port.kind for name, port in STAGES[flow].inputs.items()}


@pytest.mark.parametrize("flow", FLOWS)
def test_what_nobody_touches_is_the_default(flow: str) -> None:
    """Prefect's page sends every default that it shows: a wrong one would silently be another computation."""
    schema, kind = schema_of(flow), definition_of(flow).recipe
    recipe, steps = resolved(schema, schema["properties"]["recipe"]), 0
    for name, field in kind.model_fields.items():
        config: Any = config_type(field.annotation)
        if config is None or name == "inputs":
            continue
        shown = recipe["properties"][name]
        values = sent(schema, shown.get("then", shown))
        needed = REQUIRED.get(next((stage for stage, spec in STAGES.items() if spec.config is config), ""), {})
        values = {} if values is UNSENT else values
        assert "seed" not in values, "it would hide the recipe's"
        assert config.model_validate(values | needed) == config.model_validate(needed), name
        steps += 1
    assert steps >= 3


@cache
def recipe_of(path: Path) -> tuple[str, Any]:
    values = read_recipe(path)
    return values["flow"], parse(definition_of(values["flow"]).recipe, values, path.name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_recipe_is_what_its_deployment_takes_and_the_same_recipe_again(path: Path) -> None:
    flow, recipe = recipe_of(path)
    submitted = json.loads(json.dumps(parameters(recipe, "sft")))
    assert submitted["from_step"] == "sft"
    validate(submitted, schema_of(flow), raise_on_error=True)
    # As a deployment is made, null counts for nothing but null.
    validate(submitted, schema_of(flow), raise_on_error=True, preprocess=False)
    again = parse(type(recipe), submitted["recipe"], path.name)
    assert again == recipe
    assert again.references() == recipe.references()
    for name in type(recipe).model_fields:
        if isinstance(before := getattr(recipe, name), Config):
            assert getattr(again, name).identity() == before.identity(), name
    assert set(parameters(recipe)) == {"recipe"}


def test_a_mapping_of_a_recipe_is_a_text_in_its_form() -> None:
    _, recipe = recipe_of(ROOT / "configs" / "r1-quickstart.yaml")
    shown = parameters(recipe)["recipe"]
    assert shown["prompts"]["constants"] == "domain: reasoning"
    assert [reward["where"] for reward in shown["second"]["rewards"]] == ["domain: reasoning", *["domain: general"] * 2, ""]
    assert shown["second"]["rewards"][1]["args"] == "part: answer"
    assert recipe.model_dump(mode="json")["prompts"]["constants"] == {"domain": "reasoning"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ppo": {"steps": 0}}, {"ppo": {"steps": "0 is less than the minimum of 1"}}),
        (
            {"ppo": {"critic": {"optimizer": {"lr": 0}}}},
            {"ppo": {"critic": {"optimizer": {"lr": "0 is less than or equal to"}}}},
        ),
        ({"sft": {"loss_on": "words"}}, {"sft": {"loss_on": "'words' is not one of ['completion', 'all']"}}),
        ({"labels": {"reward": {"name": "anser"}}}, {"labels": {"reward": {"name": "'anser' is not one of ['answer',"}}}),
        ({"labels": {"reward": {}}}, {"labels": {"reward": {"name": "'name' is a required property"}}}),
        ({"inputs": {"promts": "./x"}}, {"inputs": "Additional properties are not allowed ('promts' was unexpected)"}),
    ],
)
def test_the_form_says_at_the_field_what_is_wrong(change: Schema, said: Schema) -> None:
    """Also within a step that may be left out: there JSON schema's own words would be the step's whole repr."""
    _, recipe = recipe_of(ROOT / "tests" / "tiny" / "rlhf.yaml")
    answer = build_error_obj(validate({"recipe": parameters(recipe)["recipe"] | change}, schema_of("rlhf")))["errors"]

    def nested(errors: list[Any]) -> Any:
        if isinstance(errors[0], str):
            return errors[0]
        return {error["property"]: nested(error["errors"]) for error in errors}

    def fits(found: Any, wanted: Any) -> bool:
        if isinstance(wanted, str):
            return isinstance(found, str) and found.startswith(wanted)
        return set(found) == set(wanted) and all(fits(found[name], wanted[name]) for name in wanted)

    found = nested(answer)
    assert fits(found, {"recipe": said}), found


def test_a_flow_may_take_further_texts() -> None:
    """Which Prefect sends by name and a caller by place or name, the empty one as None."""

    def more(recipe: RlhfRecipe, from_step: str | None = None, labels: str | None = None) -> Any:
        """Run.

        Args:
            labels: A file of labels.
        """
        return recipe.name, from_step, labels

    made = recipe_flow(more)
    shown = parameter_schema(made.fn).properties
    assert shown["labels"] == {
        "title": "Labels",
        "type": "string",
        "default": "",
        "description": "A file of labels.",
        "position": 2,
    }
    _, recipe = recipe_of(ROOT / "tests" / "tiny" / "rlhf.yaml")
    assert made.fn(recipe, None, "x") == made.fn(recipe, labels="x", from_step="") == ("tiny", None, "x")
    assert made.fn(parameters(recipe)["recipe"]) == ("tiny", None, None)
    assert made.fn({"name": "web", "inputs": {}}).message.startswith("recipe: evaluate is missing: How every model")


RUN = """
import json, sys
from tasks.home import configure_environment
from flows.server import start_prefect_server, wait_until_ready
root = configure_environment()
start_prefect_server(root)
from prefect import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flow_engine import run_flow
from flows.rlhf import rlhf
wait_until_ready(root)
said = []
with get_client(sync_client=True) as client:
    schema = rlhf.parameters.model_dump_for_openapi()
    registered = client.create_flow(rlhf)
    made = client.create_deployment(registered, "form", parameter_openapi_schema=schema, enforce_parameter_schema=True)
    for values in json.loads(sys.argv[1]):
        try:
            run = client.create_flow_run_from_deployment(made, parameters=values)
        except PrefectHTTPStatusError as error:
            said.append(error.response.json()["detail"])
            continue
        run_flow(rlhf, flow_run=run, parameters=run.parameters, return_type="state")
        run = client.read_flow_run(run.id)
        seconds = (run.end_time - run.start_time).total_seconds()
        said.append([run.name, run.state.name, run.state.message, seconds])
print(json.dumps(said))
"""


def test_a_run_that_the_form_cannot_refuse_fails_at_once_and_in_words(tmp_path: Path) -> None:
    _, recipe = recipe_of(ROOT / "tests" / "tiny" / "rlhf.yaml")
    good = parameters(recipe)["recipe"]
    both = good | {"grpo": {"rewards": [{"name": "format", "args": "a: ["}]}}
    given = [{"recipe": both, "from_step": ""}, {"recipe": good | {"seed": "x"}}]
    ours = ("POSTTRAIN_", "PREFECT_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(given)],
        cwd=ROOT,
        env=environment | {"POSTTRAIN_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (name, state, message, seconds), refused = json.loads(done.stdout)
    assert (name, state) == ("tiny", "Failed")
    assert message.startswith("recipe: grpo.rewards.0.args: this is no list of names and values; write it as `name: value")
    assert seconds < 5, "within a second where nothing else runs"
    assert refused.startswith("Error creating flow run: Validation failed for field 'recipe.seed'. Failure reason: 'x' is not")
    assert "Traceback" not in done.stderr
