"""The shape that a config's JSON schema has for the form that a person fills in: Prefect's page draws a field by it.

What the page of Prefect 3.8 (its V2, the default) and its check of the values make of a property, seen in a browser:
    text or number without a default    one field, empty; the check takes null for it
    anyOf                               a tab a branch, by the branch's title; of a value that fits none its whole repr is said
    type beside anyOf, no default       tabs all the same, at first the first one; the check takes null, or else what `if` and
                                        `then` say, and so answers at the field within that is wrong
    $ref                                drawn with the defaults of the class, whatever the field's own default is
    object without properties           raw JSON
    position                            the order; databases do not all keep that of the keys
In the older V1 a `type` beside anyOf is drawn as raw JSON, without the tabs.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler

from stages.specs.texts import FORM

SCALARS = ("string", "integer", "number", "boolean")
# What a field says beside its title that may be None but seldom is: its page shows it open.
AT_FIRST_ON: dict[str, Any] = {"at_first_on": True}
OFF = {"type": "null", "title": "Off", "description": "Left out."}


def shape(kind: type[BaseModel], schema: dict[str, Any], handler: GetJsonSchemaHandler) -> None:
    """Give a config's own schema this shape, in place."""
    for position, (name, field) in enumerate(kind.model_fields.items()):
        found = schema["properties"][name]
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel) and not _usual(default):
            found = _with_defaults(found, default, handler)
        found = _optional(found, default, handler) if {"type": "null"} in found.get("anyOf", []) else found
        schema["properties"][name] = found | {"position": position}


def _optional(found: dict[str, Any], default: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
    """A field that may be None: empty, or a switch."""
    kind, *others = (branch for branch in found["anyOf"] if branch != {"type": "null"})
    if others:
        return found
    rest = {name: value for name, value in found.items() if name != "anyOf"}
    on = kind | {"title": "On"}
    if default is not None:
        return rest | {"anyOf": [OFF, on]}
    rest.pop("default", None)
    if kind.get("type") in SCALARS:
        return {**kind, **rest}
    within = handler.resolve_ref_schema(kind)["type"]
    tabs = [on, OFF] if rest.pop("at_first_on", False) else [OFF, on]
    return rest | {"type": within, "anyOf": tabs, "if": {"type": within}, "then": kind}


def _usual(value: BaseModel) -> bool:
    """Whether it says nothing but the defaults of its class."""
    every = type(value).model_fields.items()
    return all(
        not field.is_required() and getattr(value, name) == field.get_default(call_default_factory=True)
        for name, field in every
    )


def _with_defaults(found: dict[str, Any], default: BaseModel, handler: GetJsonSchemaHandler) -> dict[str, Any]:
    """A config's schema with the defaults of one of its values in place of its class's."""
    values = default.model_dump(mode="json", context=FORM)
    made = deepcopy(handler.resolve_ref_schema(found))
    for name in type(default).model_fields:
        inner = getattr(default, name)
        if isinstance(inner, BaseModel):
            if not _usual(inner):
                made["properties"][name] = _with_defaults(made["properties"][name], inner, handler)
        elif values[name] is not None or "default" in made["properties"][name]:
            made["properties"][name]["default"] = values[name]
    own = {name: value for name, value in found.items() if name not in ("$ref", "allOf", "default")}
    return made | own
