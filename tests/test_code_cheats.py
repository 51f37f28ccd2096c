"""Programs that would pass assert tests without solving the task, and honest ones whose values are not plain data."""

from __future__ import annotations

import collections
import decimal
import fractions
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_code import judged

from stages.rewards.code import Asserts, read_tests
from stages.rewards.remote import Handle, decode, encode, raised

TESTS = ["assert f(1) == 41", "assert abs(f(2) - 42.0) < 1e-6", "assert f(3) in (43, 44)", "assert set(f(4)) == {44}"]
TESTS += [
    "assert f(5) < 0 and f(6) > 9",
    "assert math.isclose(f(7), 47)",
    "assert isinstance(f(8), dict)",
    "assert f(9) == [1]",
]
TESTS += ["assert all(map(lambda n: f(n) == n, [11]))", "assert f(12) is None", "assert max(f(1), 5) == 9"]
ALL = "__eq__ __ne__ __lt__ __gt__ __le__ __ge__ __contains__ __sub__ __rsub__ __abs__ __float__ __index__ __iter__ __hash__"
CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit in the function": "import sys\ndef f(x): sys.exit(0)",
    "hard exit in the function": "import os\ndef f(x): os._exit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "stop iteration": "def f(x): raise StopIteration",
    "generator exit": "def f(x): raise GeneratorExit",
    "a base exception": "class E(BaseException): pass\ndef f(x): raise E",
    "an exception of no arguments": "class E(OSError):\n  def __str__(self): raise SystemExit\ndef f(x): raise E",
    "equal to everything": f"class A: pass\nfor n in '{ALL}'.split(): setattr(A, n, lambda *a: True)\ndef f(x): return A()",
    "a number equal to everything": f"class A(int): pass\nfor n in '{ALL}'.split(): setattr(A, n, lambda *a: True)\n"
    "def f(x): return A()",
    "a list equal to everything": "class A(list):\n  __eq__ = lambda *a: True\ndef f(x): return A([A()])",
    "a wrong class": "class A:\n  __class__ = int\n  __eq__ = lambda *a: True\ndef f(x): return A()",
    "a metaclass": "class M(type):\n  __eq__ = __instancecheck__ = lambda *a: True\n  __hash__ = None\n"
    "class A(metaclass=M): pass\ndef f(x): return A",
    "patched builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.all = builtins.abs = lambda *a: True\n"
    "builtins.isinstance = lambda *a: True\ndef f(x): return 0",
    "its own builtins": "def isinstance(*a): return True\nabs = set = all = max = min = isinstance\ndef f(x): return 0",
    "its own module": "class math:\n  isclose = lambda *a: True\ndef f(x): return 0",
    "a patched module": "import math\nmath.isclose = lambda *a: True\ndef f(x): return 0",
    "forged verdicts": "import os\ndef f(x):\n  for fd in (1, 2): os.write(fd, b'[true, \"\"]\\n' * 20)\n  return 0",
    "forged answers": "import os\ndef f(x):\n  for fd in range(3, 32):\n    try: os.write(fd, b'[true, \"\"]\\n' * 20)\n"
    "    except OSError: pass\n  return 0",
    "no answers": "import os\nos.closerange(0, 32)\ndef f(x): return 0",
    "nested answers": "def f(x):\n  a = []\n  for _ in range(500): a = [a]\n  return a",
    "endless answers": "import itertools\ndef f(x): return itertools.count()",
    "changed serving": "import __main__\n__main__.encode = lambda value, keep: True\n"
    '__main__.json.dumps = lambda *a: \'{"raised": [], "content": [true, true]}\'\ndef f(x): return 0',
    "a hung function": "import time\ndef f(x): time.sleep(99)",
    "a hung thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\ndef f(x): return 0",
    "tracing": "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = lambda *a: None\ndef f(x): return 0",
    "no function": "g = 1",
    "no Python": "def f(x:",
    "an exception": "raise ValueError",
    "reading stdin": "def f(x): return input()",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_pass_nothing(name: str) -> None:
    share, reason = judged(CHEATS[name], TESTS, partial=True, seconds=3.0)
    assert share == 0
    assert reason


def test_a_program_cannot_find_the_expected_values() -> None:
    """It searches its own memory, frames, modules, open files and folder for a word of the tests."""
    source = """
import gc, os, sys
def seen():
    frames, frame = [], sys._getframe()
    while frame:
        frames += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    texts = [repr(one) for one in frames] + [repr(one) for one in gc.get_objects() if type(one) in (dict, list, tuple)]
    for fd in range(32):
        try:
            texts.append(os.pread(fd, 10**6, 0).decode())
        except OSError:
            pass
    texts += os.listdir() + sys.argv + [repr(os.environ)]
    return [any("-".join(("needle", word)) in text for text in texts) for word in ("expected", "given")]
def f(x):
    return seen()
"""
    tests = ["word = 'needle-expected'\nassert f('needle-given') == [False, True]"]
    assert judged(source, tests) == (1, "")


HONEST = {
    "in place": ("def f(x): x.sort()", "a = [3, 1]\nf(a)\nassert a == [1, 3]"),
    "in place, nested": ("def f(x): x[0].append(1); x.append(2)", "a = [[]]\nf(a)\nassert a == [[1], 2]"),
    "a dict in place": ("def f(x): x.pop('a'); x['c'] = {1}", "d = {'a': 1}\nf(d)\nassert d == {'c': {1}}"),
    "a set in place": ("def f(x): x |= {2}", "s = {1}\nf(s)\nassert s == {1, 2}"),
    "keywords": ("def f(x, *, y=2): return x - y", "assert f(5, y=1) == 4 and f(y=3, x=3) == 0"),
    "values": (
        "import collections, decimal, fractions\ndef f(): return [(), set(), frozenset({1}), b'a', 1j, range(3), "
        "decimal.Decimal('0.1'), fractions.Fraction(1, 3), collections.Counter('aa'), collections.deque([1]), float('inf'), "
        "10**5000]",
        "from decimal import Decimal\nfrom fractions import Fraction\nfrom collections import Counter, deque\n"
        "assert f() == [(), set(), frozenset({1}), b'a', 1j, range(3), Decimal('0.1'), Fraction(1, 3), Counter(a=2), "
        "deque([1]), float('inf'), 10**5000]",
    ),
    "kinds": ("def f(): return (1, [2]), {1: 'a', (2, 3): None}", "a, b = f()\nassert type(a) is tuple and b[2, 3] is None"),
    "generators": ("def f(n):\n  while n: yield n; n -= 1", "assert list(f(3)) == [3, 2, 1] and sum(f(4)) == 10 and 2 in f(3)"),
    "maps": ("def f(x): return map(str, x)", "assert list(f([1])) == ['1'] and next(f([2])) == '2'"),
    "classes": (
        "class Stack:\n  size = 0\n  def __init__(self): self.items = []\n"
        "  def push(self, x): self.items.append(x); return self\n"
        "  def __len__(self): return len(self.items)\n  def __getitem__(self, n): return self.items[n]\n"
        "  def __setitem__(self, n, x): self.items[n] = x\n  def __str__(self): return f'Stack{self.items}'",
        "s = Stack()\ns.push(1).push(2)\ns[0] = 5\nassert len(s) == 2 and s[0] == 5 and s.items == [5, 2]\n"
        "assert str(s) == 'Stack[5, 2]'\n"
        "s.size = 9\nassert s.size == 9 and Stack.size == 0 and isinstance(s, Stack) and not isinstance(3, Stack) and s",
    ),
    "objects as arguments": (
        "class Node:\n  def __init__(self, v, next=None): self.v, self.next = v, next\n"
        "def f(n): return n.v + f(n.next) if n else 0\ndef g(ns): return [n.v for n in ns]",
        "a = Node(1, Node(2))\na.next.next = Node(3)\nassert f(a) == 6 and g([a, a.next]) == [1, 2] and not a.next.next.next",
    ),
    "objects compared": (
        "import dataclasses\n@dataclasses.dataclass(order=True)\nclass P:\n  x: int\n"
        "  def __add__(self, o): return P(self.x + o.x)",
        "assert P(1) == P(1) and P(1) != P(2) and P(1) < P(2) and P(1) + P(2) == P(3) and P(1) != 1 and not P(1) == (1,)\n"
        "assert sorted([P(2), P(1)])[0].x == 1",
    ),
    "exceptions": (
        "class Bad(ValueError): pass\ndef f(x):\n  if x: raise Bad('no')\n  return {}['a']",
        "try: f(1)\nexcept ValueError as e: assert e.args == ('no',)\nelse: assert 0\n"
        "try: f(0)\nexcept KeyError as e: assert e.args == ('a',)\nelse: assert 0",
    ),
    "its own constants": ("LIMIT = 7\ndef f(): return LIMIT", "assert LIMIT == f()"),
    "recursion": ("def f(n): return 1 if n < 2 else n * f(n - 1)", "assert f(500) % 499 == 0"),
    "a builtin's name": ("def sum(a, b): return a * b", "assert sum(3, 4) == 12"),
    "a module's name": ("def bisect(a): return a / 2", "assert bisect(3) == 1.5 and abs(bisect(-4)) == 2"),
    "a module of the tests": ("def f(x): return x / 3", "assert math.isclose(f(1) * 3, 1) and re.match('a', 'a')"),
    "Solution": ("class Solution:\n  def two(self, a, b): return [a.index(b)]", "assert Solution().two([4, 5], 5) == [1]"),
    "printing": (
        "def f(x): print('[false, 0]', flush=True); return x",
        "print('[false, 1]', flush=True)\nassert f(1) == 1",
    ),
    "unittest": (
        "def f(x): return x",
        "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertEqual(f([1]), [1])\n"
        "r = unittest.TestResult()\nunittest.defaultTestLoader.loadTestsFromTestCase(T).run(r)\n"
        "assert r.testsRun == 1 and r.wasSuccessful()",
    ),
    "its main guard is not run": ("def f(): return 1\nif __name__ == '__main__': input()", "assert f() == 1"),
    "its own module": ("import sys\ndef f(): return sys.modules[f.__module__].f is f", "assert f() is True"),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(name: str) -> None:
    source, test = HONEST[name]
    assert judged(source, test) == (1, "")


def test_a_test_that_catches_everything_does_not_pass_a_dead_program() -> None:
    tests = ["try: f(1)\nexcept Exception: pass", "assert True"]
    assert judged("def f(x): raise OSError", tests) == (1, "")
    assert judged("import os\ndef f(x): os._exit(0)", tests)[0] == 0


def test_the_entry_point_may_have_a_builtins_name() -> None:
    tests = "def check(candidate):\n    assert abs(candidate([1, 2]) - 2) == 0"
    cheat = "def abs(x): return 0\ndef max(x): return 7"
    assert judged("def max(x): return sorted(x)[-1]", tests, entry_point="max")[0] == 1
    assert judged(cheat, tests, entry_point="max")[0] == 0


def test_what_the_tests_cannot_give_is_no_verdict() -> None:
    tests = ["assert f(1) == 1", "class A: pass\nassert f(A()) is None"]
    total, reason = judged("def f(x): return x", tests)
    assert total is None
    assert "the tests give the program a A, which cannot leave their process" in reason
    assert judged("def f(x): return 2", tests)[0] == 0, "wrong before it comes to that"


@pytest.mark.parametrize(
    ("tests", "first", "imports"),
    [
        ("assert sum(1, 2) == 3", ["sum"], []),
        ("assert set(f(1)) == {1}", [], []),
        ("assert f(x) == 1\nx = 3", [], []),
        ("import math\nassert abs(sum(1)) == math.pi", ["abs", "sum"], []),
        ("assert abs(f(1) - math.pi) < string.x", [], ["import math", "import string"]),
        ("assert select(1)", [], []),
    ],
)
def test_whose_name_it_is(tests: str, first: list[str], imports: list[str]) -> None:
    assert read_tests({"tests": tests}) == Asserts([*imports, tests], [False] * len(imports) + [True], first)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
scalars |= st.decimals(allow_nan=False) | st.fractions() | st.builds(range, st.integers(-9, 9), st.integers(-9, 9))
hashable = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=5
)
values = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.sets(hashable, max_size=3)
        | st.lists(inner, max_size=3).map(collections.deque)
    ),
    max_leaves=10,
)


def no_other(*args: Any) -> Any:
    raise AssertionError(args)


@given(values)
def test_plain_data_crosses_as_it_is(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value, no_other))), no_other)
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, list | dict | set | frozenset | tuple | collections.deque)
    assert type(back) is type(value)


def test_what_is_not_plain_is_kept() -> None:
    thing = object()
    assert encode([thing, decimal.Decimal(1), fractions.Fraction(1)], id)["list"][0] == id(thing)
    assert decode({"tuple": [{"object": 3}]}, lambda kind, content: (kind, content)) == (("object", 3),)


@pytest.mark.parametrize(
    ("names", "operation", "kind"),
    [
        (["ValueError", "Exception"], "call", ValueError),
        (["StopIteration", "Exception"], "call", RuntimeError),
        (["StopIteration", "Exception"], "next", StopIteration),
        (["SystemExit", "BaseException", "object"], "call", RuntimeError),
        (["KeyboardInterrupt"], "next", RuntimeError),
        (["UnicodeDecodeError", "ValueError"], "call", RuntimeError),
        (["open", "nothing"], "call", RuntimeError),
        ([], "call", RuntimeError),
    ],
)
def test_what_a_program_may_raise_in_the_tests(names: list[str], operation: str, kind: type[Exception]) -> None:
    assert type(raised(names, ["why"], operation)) is kind


def test_a_handle_tells_the_program_nothing_of_plain_data() -> None:
    asked = []
    handle = Handle(lambda *args: asked.append(args), 0)
    assert (handle == 3, handle != 3, handle in [1, 2]) == (False, True, False)
    for compute in ("handle < 3", "handle - 3", "3 - handle", "handle * 3", "handle % 'x'", "handle | set()"):
        with pytest.raises(TypeError):
            eval(compute, {"handle": handle})
    assert not asked
