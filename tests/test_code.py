"""The code reward: programs in completions, tests in the forms of published datasets, and programs that cheat."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from sandboxing import opened

from stages.errors import InputError
from stages.rewards import REWARDS, score
from stages.rewards.code import Asserts, Pair, code, extract, near, rate, read_tests, same
from stages.rewards.program import Limits, SandboxError
from stages.rewards.sandbox import Sandbox

ADD = "def add(a, b):\n    return a + b"
# MBPP 2, HumanEval 3 and an APPS-like row, as these datasets write them
SHARED = ["assert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))"]
SHARED += ["assert set(similar_elements((1, 2, 3, 4),(5, 4, 3, 7))) == set((3, 4))"]
BELOW_ZERO = """

METADATA = {
    'author': 'jt',
    'dataset': 'test'
}


def check(candidate):
    assert candidate([]) == False
    assert candidate([1, 2, -3, 1, 2, -3]) == False
    assert candidate([1, 2, -4, 5, 6]) == True
"""
SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10"}, {"input": "-1 1", "output": "0\n\n"}]


def block(source: str) -> str:
    return f"Here it is.\n```python\n{source}\n```\nDone."


def scores(sources: list[str], tests: Any, **args: Any) -> list[float | None]:
    entry_point = args.pop("entry_point", None)
    rows = [{"id": n, "tests": tests, "entry_point": entry_point} for n in range(len(sources))]
    found = score("code", [block(source) for source in sources], rows, allow_execution=True, **{"seconds": 20.0, **args})
    return [one.total if one else None for one in found]


def judged(source: str, tests: Any, partial: bool = False, seconds: float = 20.0, **row: Any) -> tuple[float | None, str]:
    sandbox = opened("auto")
    assert isinstance(sandbox, Sandbox), sandbox
    found, reason = rate(block(source), read_tests({"tests": tests, **row}), sandbox, Limits(seconds=seconds), partial)
    return found.total if found else None, reason


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\n```python3\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\nprints\n```\n3\n```", "a\n"),
        ("```text\na\n```", None),
        ("```python\na", None),
        ("a = 1", None),
        ("<answer>a = 1</answer>", "a = 1"),
        ("<answer></answer>", None),
        ("<answer>```python\na\n```</answer>\n```python\nb\n```", "a\n"),
        ("<answer>```text\na\n```</answer>", None),
        ("<think>```python\na\n```</think>", None),
        ("<think>```python\na\n```", None),
        ("<think>```python\na\n```</think>\n```python\nb\n```", "b\n"),
        ("  ```Python\n  a\n  ```", "  a\n"),
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("", None),
    ],
)
def test_the_program_of_a_completion(completion: str, program: str | None) -> None:
    assert extract(completion) == program


def test_mbpp() -> None:
    right = "def similar_elements(a, b):\n    return tuple(set(a) & set(b))"
    assert scores([right, right.replace("&", "|"), "x = 1"], SHARED) == [1, 0, 0]


@pytest.mark.parametrize("tests", [BELOW_ZERO, [BELOW_ZERO], json.dumps([BELOW_ZERO]), BELOW_ZERO + "\ncheck(below_zero)"])
def test_humaneval(tests: Any) -> None:
    right = (
        "from typing import List\ndef below_zero(operations: List[int]) -> bool:\n    balance = 0\n"
        "    for one in operations:\n        balance += one\n        if balance < 0: return True\n    return False"
    )
    assert scores([right, right.replace("< 0", "< -9")], tests, entry_point="below_zero") == [1, 0]


@pytest.mark.parametrize(
    "tests",
    [
        SUMS,
        json.dumps(SUMS),
        {"inputs": [one["input"] for one in SUMS], "outputs": [one["output"] for one in SUMS]},
        json.dumps({"input": [[one["input"]] for one in SUMS], "output": [[one["output"]] for one in SUMS]}),
    ],
    ids=["pairs", "json", "apps", "lists of lines"],
)
def test_stdin_and_stdout(tests: Any) -> None:
    assert scores(["print(sum(map(int, input().split())))", "print(3)", "1 / 0"], tests) == [1, 0, 0]


def test_all_or_the_share() -> None:
    sources = [
        "print(sum(map(int, input().split())))",
        "print(3)",
        "a, b = map(int, input().split())\nprint(max(0, a + b, 10))",
    ]
    assert scores(sources, SUMS, partial=True) == [1, 1 / 3, 1 / 3]
    assert scores(sources, SUMS) == [1, 0, 0]
    tests = ["import math", "assert add(1, 2) == 3", "assert add(1, 1) == 5", "assert math.isclose(add(0.1, 0.2), 0.3)"]
    assert judged(ADD, tests, partial=True) == (pytest.approx(2 / 3), "AssertionError:  in 'assert add(1, 1) == 5'")
    assert judged(ADD, tests) == (0, "AssertionError:  in 'assert add(1, 1) == 5'")


def test_components() -> None:
    found = score("code", [block("print(3)")] * 2, [{"tests": SUMS}, {"tests": SUMS[::-1]}], allow_execution=True)
    assert [one.components for one in found if one] == [{"passed": 1 / 3}, {"passed": 0.0}]


def test_the_rest_is_not_run_after_a_time_out() -> None:
    begun = time.monotonic()
    source = "if input() == '2': import time; time.sleep(60)\nprint(1)"
    pairs = [{"input": str(n), "output": "1"} for n in (1, *[2] * 30)]
    assert judged(source, pairs, partial=True, seconds=2.0) == (1 / 31, "test 2: not done after 2 s")
    assert time.monotonic() - begun < 30
    slow = "def f(x):\n  while x: pass\n  return x"
    verdict = judged(slow, ["assert f(0) == 0", "assert f(1) == 0", "assert f(0) == 0"], partial=True, seconds=2.0)
    assert verdict == (1 / 3, "not done after 2 s")


@pytest.mark.parametrize(
    ("written", "expected", "tolerance", "verdict"),
    [
        ("1 2\n3", "1 2\n3\n", 0, True),
        ("1  2 \n3\n\n", "1 2\n3", 0, True),
        ("1 2 3", "1 2\n3", 0, False),
        ("\n1", "1", 0, False),
        ("12", "1 2", 0, False),
        ("", "", 0, True),
        ("", "1", 0, False),
        ("yes", "YES", 0, False),
        ("1.0", "1", 0, False),
        ("0.3333333", "0.333333", 0, False),
        ("0.3333333", "0.333333", 1e-6, True),
        ("0.334", "0.333333", 1e-6, False),
        ("1000001.5", "1000001.0", 1e-6, True),
        ("1e-3", "1.0E-3", 1e-9, True),
        ("10000001", "10000000", 1e-6, False),
        ("nan", "1.5", 1e9, False),
        ("inf", "1.5", 0.5, False),
        ("x", "1.5", 0.5, False),
        ("nan", "nan", 0, True),
        ("1.5", "nan", 0.5, False),
    ],
)
def test_outputs_are_compared_by_words(written: str, expected: str, tolerance: float, verdict: bool) -> None:
    assert same(written, expected, tolerance) == verdict
    assert near("0.5", "0.5", 0) is False


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (3, "neither a script"),
        ([1, 2], "neither a script"),
        ([{"input": "1"}], "neither a script"),
        (["assert f(1) == 2", {"input": "", "output": ""}], "neither a script"),
        ([{"input": 1, "output": "2"}], "must be text, not 1"),
        ({"inputs": ["1"], "outputs": []}, "as many inputs as outputs"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "no fn_name"),
        ({"x": 1}, "as many inputs as outputs"),
        ("assert f(", "are not Python"),
        (["assert f(1) == 1", "a b"], "are not Python"),
    ],
)
def test_tests_of_another_form(tests: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf'"tests" of the row with id \'r\'.*{message}'):
        read_tests({"id": "r", "tests": tests})


def test_forms() -> None:
    assert read_tests({"tests": '[{"input": "a", "output": ["b", "c"]}]'}) == [Pair("a", "b\nc")]
    assert read_tests({"tests": "import math\nassert f(1)"}) == Asserts(["import math\nassert f(1)"], [True], [])
    setup = ["import math", "class A: pass", "x = 1\ndef g(): pass", "assert f(x)"]
    assert read_tests({"tests": setup}) == Asserts(setup, [False, False, False, True], [])


@pytest.mark.parametrize("tests", [[], "", "import math", "[]", ["x = 1"]])
def test_no_tests_is_no_verdict(tests: Any) -> None:
    assert judged("x = 1", tests) == (None, "no tests")


def test_no_program() -> None:
    found = score("code", ["I cannot."], [{"tests": SUMS}], allow_execution=True)
    assert found[0]
    assert found[0].total == 0


def test_it_is_off_unless_said() -> None:
    for args in ({}, {"allow_execution": False}, {"allow_execution": "no"}, {"allow_execution": 1}):
        with pytest.raises(InputError, match=r"programs that a model wrote.*allow_execution: true"):
            score("code", [block(ADD)], [{"tests": ["assert add(1, 1) == 2"]}], **args)
    with pytest.raises(InputError, match="`parallel` must be above 0"):
        code([], [], allow_execution=True, parallel=0)
    assert REWARDS["code"].columns == ("tests",)


def test_none_when_the_sandbox_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **named: Any) -> None:
        raise SandboxError("no room")

    monkeypatch.setattr(Sandbox, "start", fails)
    assert judged("print(1)", SUMS) == (None, "no room")
    assert judged(ADD, ["assert add(1, 1) == 2"]) == (None, "no room")


def test_results_are_in_order_and_rows_their_own() -> None:
    sources = [block(f"import time; time.sleep({0.3 * (n == 0)}); print({n})") for n in range(6)]
    rows = [{"tests": [{"input": "", "output": str(n if n != 3 else 9)}]} for n in range(6)]
    found = score("code", sources, rows, allow_execution=True, parallel=3)
    assert [one.total for one in found if one] == [1, 1, 1, 0, 1, 1]
