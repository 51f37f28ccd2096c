"""A verifier of programs: runs the program in a completion on the row's `tests`, in a sandbox (stages/rewards/sandbox.py).

The program is the last ```python block (else the last unlabelled block) of the final `<answer>`, or, without one, of what
follows `</think>`; an answer without any block is the program itself. It must be complete, imports included, and has Python's
standard library. The `tests` are, as they are or as JSON text,

    a script, or a list of statements     asserts on the program's functions (MBPP, HumanEval). A script that defines
                                          `check(candidate)` is called with the row's `entry_point`. An item that only
                                          imports or defines is no test of its own.
    [{"input": ..., "output": ...}]       what the program gets on stdin and must write to stdout (APPS, LiveCodeBench; APPS'
                                          {"inputs": [...], "outputs": [...]} too). Spaces at the ends of lines, runs of spaces
                                          and empty lines at the end make no difference.

Asserts run in a process of their own, see stages/rewards/remote.py: a program never sees an expected value, and exits, patched
builtins and objects that equal everything are wrong answers. What is left is the tests' own weakness: a program can know its
few inputs by heart, and helper functions that a test takes from the program are the program's word. Tests of what was printed,
of identity (`is`) or of a function's source do not work across processes.
"""

from __future__ import annotations

import ast
import builtins
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from stages.errors import InputError
from stages.rewards.answer import final_answer
from stages.rewards.base import Row, Score
from stages.rewards.program import Ended, Limits, SandboxError, wait
from stages.rewards.sandbox import Isolation, Sandbox, open_sandbox

BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
PYTHON_LABELS = ("python", "python3", "py")
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


@dataclass(frozen=True)
class Pair:
    """What a program gets on stdin, what it must write to stdout."""

    input: str
    output: str


@dataclass(frozen=True)
class Asserts:
    """Statements in the order in which they run, which of them are tests (the others define what those need), and the names of
    builtins that stand for the program's own functions."""

    statements: list[str]
    counted: list[bool]
    first: list[str]


Tests = list[Pair] | Asserts


def code(
    completions: Sequence[str],
    rows: Sequence[Row],
    *,
    allow_execution: bool = False,
    isolation: Isolation = "auto",
    partial: bool = False,
    seconds: float = 10.0,
    memory_mb: int = 1024,
    tolerance: float = 0.0,
    parallel: int | None = None,
) -> list[Score | None]:
    """1 when a completion's program passes all of its row's `tests`, else 0; with `partial` the share that it passes.

    `seconds` and `memory_mb` are for each pair, and for all asserts of a row together; after a test that is not done in time
    none is run. `tolerance` is the relative and absolute error that is allowed where an expected output is a decimal number.
    `parallel` programs run at once (by default as many as this process has cores). The component `passed` is the share of tests
    passed before the first that was not, with `partial` of all. None: the tests cannot be run, or the sandbox failed. Raises
    InputError without `allow_execution`, where programs cannot be confined, and for tests of another form.
    """
    if allow_execution is not True:
        raise InputError(
            "the reward 'code' runs programs that a model wrote on this machine, confined as stages/rewards/sandbox.py says; "
            "say `allow_execution: true` in its args when you want that"
        )
    if parallel is not None and parallel < 1:
        raise InputError(f"the reward 'code' runs at least one program at once: `parallel` must be above 0, not {parallel!r}")
    sandbox, limits = open_sandbox(isolation), Limits(seconds=seconds, memory_mb=memory_mb)
    tests = [read_tests(row) for row in rows]

    def one(place: int) -> Score | None:
        score, reason = rate(completions[place], tests[place], sandbox, limits, partial, tolerance)
        return replace(score or Score(None), note=_note(reason))

    with ThreadPoolExecutor(parallel or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, range(len(completions))))


def rate(
    completion: str, tests: Tests, sandbox: Sandbox, limits: Limits, partial: bool = False, tolerance: float = 0.0
) -> tuple[Score | None, str]:
    """The score of a completion and the reason for it; "" when all tests passed."""
    source = extract(completion)
    if source is None:
        return Score(0.0, {"passed": 0.0}), "no program"
    number = len(tests) if isinstance(tests, list) else sum(tests.counted)
    if not number:
        return None, "no tests"
    try:
        if isinstance(tests, list):
            passed, reason = run_pairs(source, tests, sandbox, limits, partial, tolerance)
        else:
            passed, reason = run_asserts(source, tests, sandbox, limits, partial)
    except SandboxError as error:
        return None, str(error)
    if passed is None:
        return None, reason
    return Score(passed / number if partial else float(passed == number), {"passed": passed / number}), reason


def _note(reason: str) -> str | None:
    """A reason with what is of one test alone behind the colon, since notes are counted by what stands before it."""
    test, _, what = reason.partition(": ")
    return f"{what}: {test}" if what and test.startswith("test ") else reason or None


def extract(completion: str) -> str | None:
    """The program in a completion; None when there is none."""
    answer = final_answer(completion)
    _, closed, after = completion.rpartition("</think>")
    text = answer if answer is not None else after if closed or "<think>" not in completion else ""
    blocks = [(label.strip().lower(), body) for label, body in BLOCK.findall(text)]
    for labels in (PYTHON_LABELS, ("",)):
        if mine := [body for label, body in blocks if label in labels]:
            return mine[-1]
    return answer if answer and not blocks else None


def read_tests(row: Row) -> Tests:
    """The tests of a row. Raises InputError, naming the row, when they have none of the forms."""
    value: Any = row["tests"]
    where = f'"tests" of the row with id {row.get("id")!r}'
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        value = found if isinstance(found, list | dict) else [value]
    if isinstance(value, dict):
        value = _columns(value, where)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return asserts(value, row.get("entry_point"), where)
    if isinstance(value, list) and all(isinstance(one, dict) and {"input", "output"} <= set(one) for one in value):
        return [Pair(_text(one["input"], where), _text(one["output"], where)) for one in value]
    raise InputError(f'{where} are neither a script, nor a list of statements, nor pairs {{"input": ..., "output": ...}}')


def _columns(value: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """APPS' form: a list of inputs and a list of outputs."""
    inputs, outputs = value.get("inputs", value.get("input")), value.get("outputs", value.get("output"))
    if value.get("fn_name") or not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise InputError(f"{where} need as many inputs as outputs, and no fn_name: write calls of a function as asserts")
    return [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]


def _text(value: Any, where: str) -> str:
    """Text, or a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: an input and an output must be text, not {value!r}")
    return value


def asserts(statements: list[str], entry_point: str | None, where: str) -> Asserts:
    """Statements as tests. Raises InputError when one is not Python."""
    try:
        trees = [ast.parse(one) for one in statements]
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{where} are not Python: {error}") from error
    nodes = [node for tree in trees for node in ast.walk(tree)]
    free = names_used(nodes) - names_bound(nodes)
    defined = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    if entry_point and "check" in defined and "check" not in names_used(nodes):
        statements, trees = [*statements, f"check({entry_point})"], [*trees, ast.parse(f"check({entry_point})")]
    counted = [not all(isinstance(node, DEFINITIONS) for node in tree.body) for tree in trees]
    # A program that could redefine `math` or `abs` would pass any test within a tolerance. So a module that the tests use is
    # Python's, and a builtin too but where the tests can mean nothing else: MBPP has functions named `sum`.
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    modules = (free & sys.stdlib_module_names) - called - {entry_point}
    free -= modules
    first = [entry_point] if entry_point else sorted(free) if all(hasattr(builtins, name) for name in free) else []
    imports = [f"import {name}" for name in sorted(modules)]
    return Asserts([*imports, *statements], [False] * len(imports) + counted, first)


def names_used(nodes: list[ast.AST]) -> set[str]:
    """The names whose values the tests use."""
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def names_bound(nodes: list[ast.AST]) -> set[str]:
    """The names that the tests define themselves."""
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in nodes:
        match node:
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                bound |= {(alias.asname or alias.name).split(".")[0] for alias in aliases}
    return bound


def run_pairs(
    source: str, pairs: list[Pair], sandbox: Sandbox, limits: Limits, partial: bool, tolerance: float
) -> tuple[int, str]:
    """How many pairs a program gets right, and why not all. Each pair is a run of its own."""
    passed, reason = 0, ""
    for number, pair in enumerate(pairs, 1):
        ended = sandbox.run(source, pair.input.encode(errors="replace"), limits)
        wrong = ended.reason or ("" if same(ended.stdout.decode(errors="replace"), pair.output, tolerance) else "wrong output")
        passed += not wrong
        reason = reason or (f"test {number}: {wrong}" if wrong else "")
        if ended.stopped or (wrong and not partial):
            break
    return passed, reason


def run_asserts(source: str, tests: Asserts, sandbox: Sandbox, limits: Limits, partial: bool) -> tuple[int | None, str]:
    """How many tests a program passes, and why not all; None when a test cannot be run."""
    judge = judged(source, tests, sandbox, limits)
    verdicts = [json.loads(line) for line in judge.stdout.decode().splitlines() if line.endswith("]")]
    passed = 0
    for counted, (verdict, reason) in zip(tests.counted, verdicts, strict=False):
        if verdict is None:
            return None, reason
        if not verdict and not partial:
            return passed, reason
        passed += bool(verdict and counted)
    reasons = [reason for verdict, reason in verdicts if not verdict]
    missing = "" if len(verdicts) == len(tests.counted) else judge.reason or "the program ended before the tests"
    return passed, next(iter(reasons), missing)


def judged(source: str, tests: Asserts, sandbox: Sandbox, limits: Limits) -> Ended:
    """How the tests' process ended, after running beside the program's process and joined to it by two pipes."""
    asked, ask = os.pipe()
    answered, answer = os.pipe()
    started = []
    try:
        given = {"tests": tests.statements, "first": tests.first, "read": answered, "write": ask}
        started.append(sandbox.start(remote(), json.dumps(given).encode(), limits, pipes=(answered, ask)))
        given = {"source": source, "read": asked, "write": answer}
        started.append(sandbox.start(remote(), json.dumps(given).encode(), limits, pipes=(asked, answer)))
    except SandboxError:
        for program in started:
            program.stop()
            program.read()
        raise
    finally:
        for fd in (asked, ask, answered, answer):
            os.close(fd)
    return wait(*started)[0]


@cache
def remote() -> str:
    """The text that both processes run."""
    return resources.files("stages.rewards").joinpath("remote.py").read_text()


def same(written: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether an output is the expected one: the same words on the same lines."""
    ours, theirs = (text.rstrip().split("\n") for text in (written, expected))
    if len(ours) != len(theirs):
        return False
    words = [(a.split(), b.split()) for a, b in zip(ours, theirs, strict=True)]
    return all(len(a) == len(b) and all(x == y or near(x, y, tolerance) for x, y in zip(a, b, strict=True)) for a, b in words)


def near(word: str, expected: str, tolerance: float) -> bool:
    """Whether a word is the expected decimal number but for the tolerance, relative or absolute."""
    if not tolerance or not re.fullmatch(r"[+-]?\d*\.\d+(e[+-]?\d+)?|[+-]?\d+e[+-]?\d+", expected, re.IGNORECASE):
        return False
    try:
        return math.isclose(float(word), float(expected), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False
