"""Verifiers in worker processes: what hangs, dies or raises costs its own completion; nothing outlives this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from stages.errors import InputError
from stages.rewards import REWARDS, Scoring, pool, require_columns, score
from stages.rewards.base import RewardEntry, Row, Score


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("odd", "two_for_one"):
        monkeypatch.setitem(REWARDS, name, RewardEntry(f"pooled_rewards:{name}", version=1, pooled=True))


def rows_of(count: int) -> list[Row]:
    return [{"id": f"row-{n}", "n": n} for n in range(count)]


def totals(*texts: str, timeout: float = 60.0) -> list[tuple[float | None, str | None] | None]:
    """(total, note) of each; the usual score of a text is its length and its place."""
    found = score("odd", texts, rows_of(len(texts)), timeout)
    return [None if one is None else (one.total, one.note) for one in found]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        *[("hang", "timeout"), ("hang in C", "timeout"), ("crash", "died"), ("killed", "died"), ("exit", "died")],
        *[("memory", "out of memory"), ("much memory", "out of memory")],
    ],
)
def test_a_verifier_that_fails_costs_its_own_completion(text: str, note: str) -> None:
    timeout = 2.0 if note == "timeout" else 60.0
    assert totals("abc", text, "ab", timeout=timeout) == [(3, "kept"), (None, note), (4, "kept")]
    assert totals("a") == [(1, "kept")]


def test_a_reward_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "broken", RewardEntry("broken_rewards:reward", version=1, pooled=True))
    with pytest.raises(InputError, match=r"reward 'broken' raised RuntimeError .*row-0.*: a library of this reward is broken"):
        score("broken", ["a", "b"], rows_of(2), 60.0)


def test_all_of_a_step_may_fail() -> None:
    texts = ["crash", "hang", "killed"] * 2
    assert [one[1] if one else None for one in totals(*texts, timeout=1.0)] == ["died", "timeout", "died"] * 2
    assert totals("a", "none") == [(1, "kept"), None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise", r"reward 'odd' raised KeyError on the row with id 'row-1': .*in the worker's words"),
        ("input error", r"^in the reward's own words$"),
    ],
)
def test_a_reward_that_raises_names_the_row(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        totals("a", text, "b")
    assert totals("a") == [(1, "kept")]


def test_one_score_a_completion() -> None:
    with pytest.raises(InputError, match="reward 'two_for_one' gave 2 scores for 1 completions; it must give one each"):
        score("two_for_one", ["a"], rows_of(1))


def test_order_and_arguments_in_the_pool_and_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, rows = [f"slow {'x' * (n % 7)}" for n in range(60)], rows_of(60)
    pooled = score("odd", texts, rows, extra=0.5)
    assert [one and one.components["n"] for one in pooled] == list(range(60))
    monkeypatch.setitem(REWARDS, "odd", RewardEntry("pooled_rewards:odd", version=1))
    assert score("odd", texts, rows, extra=0.5) == pooled
    assert pooled[1] == Score(len("slow x") + 1 + 0.5, {"n": 1}, [1.0], [0], "kept")


def test_workers_stay_from_step_to_step_and_are_light() -> None:
    import torch

    assert torch.ones(1) == 1
    (first, modules), (second, _) = (totals("who")[0] or (None, None) for _ in range(2))
    if pool.workers() == 1:
        assert first == second
    assert first != os.getpid()
    assert modules == ""


def test_work_goes_on_beside_this_process() -> None:
    with Scoring("odd") as scoring:
        scoring.add(4, "slow", {"n": 0})
        scoring.add(2, "a", {"n": 1})
        assert [one and one.total for one in score("odd", ["b"], rows_of(1))] == [1]
        scoring.add(7, "", {"n": 5})
        scoring.add(0, "", {"n": 0})
        found = scoring.finish()
    assert [(place, one and one.total) for place, one in found.items()] == [(0, 0), (2, 2), (4, 4), (7, 5)]


def test_what_nobody_waits_for_any_more_is_out_of_the_way() -> None:
    """Whether it works already or waits, also after an error elsewhere."""
    assert totals("a") == [(1, "kept")]

    def fail() -> None:
        with Scoring("odd", 600.0) as scoring:
            for place in range(3 * pool.workers()):
                scoring.add(place, "hang", {"n": 0})
            time.sleep(0.3)
            raise ArithmeticError("elsewhere")

    with pytest.raises(ArithmeticError, match="elsewhere"):
        fail()
    assert totals("ab", "hang in C", timeout=5.0) == [(2, "kept"), (None, "timeout")]
    with pytest.raises(InputError, match="in the reward's own words"):
        score("odd", ["input error", *["hang"] * 2 * pool.workers()], rows_of(1 + 2 * pool.workers()), 2.0)
    assert totals("abc") == [(3, "kept")]


def test_an_idle_worker_that_is_killed_is_replaced() -> None:
    who = totals("who")[0]
    assert who is not None
    assert who[0] is not None
    os.kill(int(who[0]), signal.SIGKILL)
    assert totals("a", "bc") == [(1, "kept"), (3, "kept")]
    time.sleep(0.5)
    assert totals("a", "bc") == [(1, "kept"), (3, "kept")]


def test_nothing_to_rate() -> None:
    assert score("odd", [], []) == []


@pytest.mark.parametrize(("processes", "cores", "expected"), [(None, 8, 7), (1, 1, 1), (4, 16, 3), (8, 4, 1)])
def test_workers_leave_a_core_to_each_process(
    processes: int | None, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert pool.workers() == expected


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "math_verify" else object())
    with pytest.raises(
        InputError, match=r"reward 'math' needs a package that is not installed: pip install 'math-verify\[antlr"
    ):
        require_columns("math", ["answer"], "the prompts")
    require_columns("reasoning_gym", ["task", "metadata"], "the prompts")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pebble" else object())
    with pytest.raises(InputError, match="pip install 'pebble'"):
        require_columns("math", ["answer"], "the prompts")
    require_columns("answer", ["answer"], "the prompts")


PARENT = """
import sys, time
from stages.rewards import REWARDS, RewardEntry, Scoring, score

def main():
    REWARDS["odd"] = RewardEntry("pooled_rewards:odd", version=1, pooled=True)
    (one,) = score("odd", ["who"], [{}])
    scoring = Scoring("odd", 3600)
    for place in range(3):
        scoring.add(place, sys.argv[1], {"n": 0})
    time.sleep(0.5)
    print(int(one.total), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(600)

if __name__ == "__main__":
    main()
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def ended(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def descendants(pid: int) -> list[int]:
    children = [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]
    return children + [one for child in children for one in descendants(child)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("busy", "how"),
    [
        *[("hang", signal.SIGKILL), ("hang in C", signal.SIGKILL), ("a", signal.SIGKILL)],
        *[("hang in C", signal.SIGTERM), ("hang", None)],  # None: the process ends by itself
    ],
)
def test_workers_end_with_their_parent(busy: str, how: signal.Signals | None, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), busy, "wait" if how else "end"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        family = [worker, *(descendants(parent.pid) if how else [])]
        if how:
            assert worker in family[1:]
            parent.send_signal(how)
        assert parent.wait(60) == (-how if how else 0)
    assert ended(family)
