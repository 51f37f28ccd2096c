"""Tests in one process, the program under test in another: what a program does to its own process cannot pass a test.

The tests' process (`judge`) takes the names that it does not have from the program's process (`serve`): calling such a name
sends the arguments over a pipe and gets the result. Only plain data crosses as itself: None, numbers, text, bytes, lists,
tuples, sets, dicts, ranges, deques, decimals, fractions, and subclasses of these as their plain kind. Anything else that the
program returns stays there, and the tests hold a `Handle` of it. A handle can be called, read, indexed, iterated over and, with
another handle, compared and computed with; next to plain data it is equal to nothing and computes nothing, since its class is
the program's own and would be told the expected value.

This text is run by `python -c` in two children (stages/rewards/code.py), so it imports nothing of this project.
"""

from __future__ import annotations

import builtins
import collections
import decimal
import fractions
import json
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
PAIRED = (*COMPARED, "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
OPERATIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "call": lambda function, *args, **named: function(*args, **named),
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "isinstance": isinstance,
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "neg", "abs", *PAIRED)},
}
SEQUENCES: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}


class Died(BaseException):
    """The program's process is gone: no test can go on, not even one that catches every Exception."""


class Unsupported(BaseException):
    """The tests give the program something that cannot cross."""


class Handle:
    """What the tests hold of an object in the program's process."""

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self.__dict__["_ask"], self.__dict__["_number"] = ask, number

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._ask("call", self, *args, **named)

    def __bool__(self) -> bool:
        return self._ask("bool", self) is True

    def __instancecheck__(self, other: Any) -> bool:
        return isinstance(other, Handle) and self._ask("isinstance", other, self) is True

    def __hash__(self) -> int:
        return self._number


def _single(name: str) -> Any:
    return lambda self, *args: self._ask(name, self, *args)


def _paired(name: str) -> Any:
    return lambda self, other: self._ask(name, self, other) if isinstance(other, Handle) else NotImplemented


for _name in ("iter", "next", "len", "str", "getitem", "setitem", "delitem", "neg", "abs"):
    setattr(Handle, f"__{_name}__", _single(_name))
for _name in PAIRED:
    setattr(Handle, f"__{_name.rstrip('_')}__", _paired(_name))


def encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    """Plain data as JSON's types; `keep` gives the JSON of anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(one, keep) for one in value]}
    match value:
        case dict():
            return {"dict": [[encode(key, keep), encode(one, keep)] for key, one in value.items()]}
        case bytes() | bytearray():
            return {"bytes": value.hex()}
        case complex():
            return {"complex": [value.real, value.imag]}
        case range():
            return {"range": [value.start, value.stop, value.step]}
        case decimal.Decimal() | fractions.Fraction():
            return {type(value).__name__: str(value)}
    return keep(value)


def decode(value: Any, fetch: Callable[[str, Any], Any]) -> Any:
    """What `encode` was given; `fetch` gives what `keep` kept, by kind and content."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(one, fetch) for one in content)
    match kind:
        case "dict":
            return {decode(key, fetch): decode(one, fetch) for key, one in content}
        case "bytes":
            return bytes.fromhex(content)
        case "complex":
            return complex(*content)
        case "range":
            return range(*content)
        case "Decimal":
            return decimal.Decimal(content)
        case "Fraction":
            return fractions.Fraction(content)
    return fetch(kind, content)


def serve(source: str, read: TextIO, write: TextIO) -> None:
    """The program's process: load it, then do what the tests ask, one line each."""
    program = types.ModuleType("program")
    sys.modules["program"] = program
    kept: list[Any] = []

    def keep(value: Any) -> dict[str, Any]:
        kept.append(value)
        return {"object": len(kept) - 1}

    def fetch(_kind: str, number: Any) -> Any:
        return kept[number]

    def answer(operation: str, args: list[Any], named: dict[str, Any]) -> Any:
        if operation == "load":
            return exec(compile(source, "program.py", "exec", dont_inherit=True), program.__dict__)
        if operation == "name":
            return program.__dict__[args[0]]
        return OPERATIONS[operation](*args, **named)

    for line in read:
        operation, *args = json.loads(line)
        args, named = decode(args[0], fetch), decode(args[1], fetch)
        try:
            result = answer(operation, args, named)
            reply = {"raised": [], "content": [encode(one, keep) for one in (result, *args)]}
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            reply = {"raised": names, "content": [encode(one, repr) for one in error.args]}
        write.write(json.dumps(reply) + "\n")
        write.flush()


class Remote:
    """The program's process, as the tests' process sees it."""

    def __init__(self, read: TextIO, write: TextIO) -> None:
        self.read, self.write = read, write

    def ask(self, operation: str, *args: Any, **named: Any) -> Any:
        """What the program's process gives, or raise what it raises. Lists, dicts and sets that it changed are changed here."""
        request = [operation, encode(list(args), self._give), encode(named, self._give)]
        try:
            self.write.write(json.dumps(request) + "\n")
            self.write.flush()
            line = self.read.readline()
        except OSError as error:
            raise Died("the program's process ended") from error
        if not line.endswith("\n"):
            raise Died("the program's process ended")
        try:
            reply = json.loads(line)
            names, content = reply["raised"], [decode(one, self._take) for one in reply["content"]]
        except Exception as error:
            raise Died(f"the program's process does not answer: {error}") from error
        if names:
            raise raised(names, content, operation)
        result, *after = content
        for before, now in zip(args, after, strict=False):
            if type(before) is type(now) and isinstance(before, list | dict | set):
                update(before, now)
        return result

    def _give(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Handle):
            return {"object": value.__dict__["_number"]}
        raise Unsupported(f"the tests give the program a {type(value).__name__}, which cannot leave their process")

    def _take(self, kind: str, content: Any) -> Any:
        if kind == "object" and type(content) is int:
            return Handle(self.ask, content)
        raise ValueError(kind)


def raised(names: list[str], message: list[Any], operation: str) -> Exception:
    """The nearest built-in Exception. StopIteration would end a loop of the tests early: it is itself for `next` alone."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            if issubclass(kind, StopIteration | StopAsyncIteration) and operation != "next":
                break
            try:
                return kind(*message)
            except TypeError:
                return RuntimeError(name, *message)
    return RuntimeError(*names[:1], *message)


def update(before: Any, now: Any) -> None:
    """Make a list, dict or set what it is now."""
    if isinstance(before, list):
        before[:] = now
    else:
        before.clear()
        before.update(now)


class Names(dict[str, Any]):
    """The tests' global names: their own, Python's, and then the program's; the program's before Python's for `first`."""

    def __init__(self, remote: Remote, first: list[str]) -> None:
        super().__init__(__name__="tests")
        self.remote, self.first = remote, first

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.first:
            raise KeyError(name)
        self[name] = self.remote.ask("name", name)
        return self[name]


def judge(tests: list[str], first: list[str], remote: Remote, verdicts: TextIO) -> None:
    """The tests' process: one JSON line a test, [True, ""], [False, why] or [None, why] for a test that cannot be run."""

    def verdict(passed: bool | None, why: str) -> None:
        verdicts.write(json.dumps([passed, why]) + "\n")
        verdicts.flush()

    names = Names(remote, first)
    try:
        remote.ask("load")
        for test in tests:
            try:
                exec(compile(test, "test.py", "exec", dont_inherit=True), names)
            except Died:
                raise
            except Unsupported as error:
                verdict(None, str(error))
            except BaseException as error:
                verdict(False, f"{type(error).__name__}: {error}"[:200] + f" in {test[:200]!r}")
            else:
                verdict(True, "")
    except BaseException as error:
        verdict(False, f"{type(error).__name__}: {error}"[:200])
    verdicts.flush()
    os._exit(0)


def main() -> None:
    """One of the two, as stdin says."""
    sys.set_int_max_str_digits(0)
    job = json.load(sys.stdin)
    read, write = os.fdopen(job["read"]), os.fdopen(job["write"], "w")
    if "source" in job:
        serve(job["source"], read, write)
    else:
        verdicts = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the tests print is no verdict
        judge(job["tests"], job["first"], Remote(read, write), verdicts)


if __name__ == "__main__":
    main()
