"""Mappings that a person can write as one text: `name: value, name: value`, what stands between YAML's braces.

A form has no field for a mapping, so there it is such a text. Recipes give mappings, and what is read is the same from both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    JsonValue,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    WrapSerializer,
)
from pydantic_core import PydanticCustomError

# What `model_dump` is told when it dumps for a form.
FORM = {"form": True}
HOW = "write it as `name: value, name: value`, with quotes around a value that holds a comma, colon, bracket or #"
PLAIN = re.compile(r"[A-Za-z_][\w./@-]*( [\w./@-]+)*", re.ASCII)
UNUSUAL = re.compile(r"[^\x20-\x7e]")
# YAML 1.1 reads 1e-4 as text.
SHORT_FLOAT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written as 1e-4."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", SHORT_FLOAT, list("-+0123456789"))


def as_text(mapping: dict[str, Any]) -> str:
    """A mapping as the text that is read as it."""
    return ", ".join(f"{_written(name)}: {_written(value)}" for name, value in mapping.items())


def _written(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and yaml.load(value, _Loader) == value:
        return value
    # Not PyYAML's own quoting, which loses some line breaks of Unicode.
    return UNUSUAL.sub(_escaped, json.dumps(value, ensure_ascii=False))


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else f"\\U{ord(found[0]):08x}"


def _wrong(problem: str) -> PydanticCustomError:
    # In a type of its own, whose errors do not repeat the text: it may hold a key.
    return PydanticCustomError("text_mapping", "{problem}", {"problem": f"{problem}; {HOW}"})


def _read(text: str, load: Callable[[str], Any]) -> Any:
    """What a text says between braces of its own or YAML's, or one pair a line."""
    stripped = text.strip()
    try:
        try:
            return load(stripped if stripped.startswith("{") else "{" + stripped + "}")
        except yaml.YAMLError:
            if "\n" not in stripped:
                raise
            return load(stripped)
    except yaml.YAMLError as error:
        raise _wrong("this is no list of names and values") from error


def _arguments(given: Any) -> Any:
    if given is None:
        return {}
    return _read(given, lambda text: yaml.load(text, _Loader)) if isinstance(given, str) else given


def _texts(given: Any) -> Any:
    if given is None:
        return {}
    return _read(given, _pairs) if isinstance(given, str) else given


def _pairs(text: str) -> dict[str, str]:
    """Names and values as they are written: 5 is a text here, too."""
    node = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        raise _wrong("this is no list of names and values")
    pairs: dict[str, str] = {}
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            raise _wrong("a name has one text as its value here, not a list or mapping")
        if not value.value and value.style is None:
            raise _wrong(f"{name.value!r} has no value (a space follows the colon)")
        pairs[name.value] = value.value
    return pairs


def _dumped(mapping: dict[str, Any], dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
    return as_text(mapping) if info.context == FORM else dump(mapping)


_AS_TEXT = (WrapSerializer(_dumped), WithJsonSchema({"type": "string"}))
# Texts by name, and arguments of any kind by name.
Texts = Annotated[dict[str, str], BeforeValidator(_texts), *_AS_TEXT]
Arguments = Annotated[dict[str, JsonValue], BeforeValidator(_arguments), *_AS_TEXT]
