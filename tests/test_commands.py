"""What the commands about servers refuse before anything is started, contacted or computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rounding import tiny as tiny_rounds
from test_recipe import TINY

from flows import rounds, runner
from flows.cli import main
from flows.deploy import check_cron
from flows.recipe import parse, read_recipe
from flows.rlhf import RlhfRecipe
from stages.errors import InputError
from tasks import home

DEPLOY = ("deploy", str(TINY))
FIELDS = "must be five fields"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    """A state of its own, where nothing is up; what a command sets in the environment is taken back."""
    with patch.dict(os.environ, {"POSTTRAIN_HOME": str(tmp_path)}):
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            os.environ.pop(name, None)
        yield


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*DEPLOY, "--cron", "nonsense"), f"error: --cron 'nonsense': {FIELDS}"),
        ((*DEPLOY, "--cron", ""), f"error: --cron '': {FIELDS}"),
        ((*DEPLOY, "--cron", "0 0 30 2 *"), "error: --cron '0 0 30 2 *': no such time ever comes"),
        ((*DEPLOY, "--set", "flow=rhlf"), f"error: {TINY}: no flow is named 'rhlf'; did you mean rlhf?"),
        ((*DEPLOY, "--set", "flow=3"), f"error: {TINY}: no flow is named 3; there are rlhf, "),
        (("up", "--prefect-port", "4373", "--mlflow-port", "4373"), "error: --prefect-port and --mlflow-port are both 4373: "),
    ],
)
def test_one_line_says_what_is_wrong(capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    assert main(list(arguments)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(
            ((*DEPLOY, "--every", time), f"--every: '{time}' must be a number with its unit")
            for time in ("0s", "7", "1.5h", "٣s")
        ),
        (
            (*DEPLOY, "--every", "999999999999d"),
            "must be a number with its unit, such as 90s, 30m, 12h or 7d, and at most 3650d",
        ),
        ((*DEPLOY, "--every", "3651d"), "and at most 3650d"),
        ((*DEPLOY, "--every", "9" * 5000 + "s"), "and at most 3650d"),
        *(
            (("ui", "--mlflow-port", port), "must be a port: a number from 1 to 65535")
            for port in ("0", "99999", "-1", "x", "٣")
        ),
    ],
)
def test_so_does_the_grammar(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(list(arguments))
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, FIELDS) for text in ("* * *", "@every 5m", "@reboot", "0 0 12 * * *", "٣ * * * *")),
        *((text, "each within its range") for text in ("99 * * * *", "R * * * *", "H * * * *", "*/0 * * * *")),
        *((text, "no such time ever comes") for text in ("0 0 30 2 *", "0 0 31 4,6 *")),
    ],
)
def test_times_that_are_none_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        check_cron(text)
    assert str(refused.value).startswith(f"--cron {text!r}: ")


@pytest.mark.parametrize("text", ["30 7 * * mon-fri", "*/15 * * * *", "0 0 29 2 *", "@daily"])
def test_times_that_come_are_taken(text: str) -> None:
    check_cron(text)


@pytest.fixture
def _servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers with two pools that take steps."""
    monkeypatch.setattr(runner, "server", lambda: "http://somewhere")
    monkeypatch.setattr(runner, "get_client", lambda **_: nullcontext())
    monkeypatch.setattr(runner, "step_pools", lambda _: ["cpu", "gpu"])
    for module in (runner, rounds):
        monkeypatch.setattr(module, "losses", lambda: 0)
        monkeypatch.setattr(module, "Store", lambda _: None)


NAMED = "no work pool that takes steps is named"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["pools.ppo=gpus"], f"pools.ppo: {NAMED} gpus; did you mean gpu?"),
        (["pools.default=nosuchpool", "pools.ppo=gpu"], f"pools.default: {NAMED} nosuchpool; there are cpu, gpu"),
        (["pools.ppo=control"], f"pools.ppo: {NAMED} control; there are cpu, gpu"),
    ],
)
@pytest.mark.usefixtures("_servers")
def test_a_pool_that_takes_no_steps_ends_a_run_before_its_steps(settings: list[str], words: str) -> None:
    def steps(*_: Any) -> None:
        raise AssertionError("nothing is begun, nor planned")

    with pytest.raises(InputError) as refused:
        runner.run_pipeline(parse(RlhfRecipe, read_recipe(TINY, settings), "x"), steps)
    assert str(refused.value) == words
    with pytest.raises(InputError) as refused:
        rounds.rounds.fn(tiny_rounds(*settings))
    assert str(refused.value) == words


@pytest.mark.usefixtures("_servers")
def test_a_pool_that_takes_no_steps_is_not_deployed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(home, "server", lambda: "http://somewhere")
    assert main([*DEPLOY, "--set", "pools.ppo=gpus", "--every", "1h"]) == 2
    assert capfd.readouterr().err == f"error: pools.ppo: {NAMED} gpus; did you mean gpu?\n"


@pytest.mark.usefixtures("_servers")
def test_pools_that_take_steps_and_none_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    runner.check_pools(parse(RlhfRecipe, read_recipe(TINY, ["pools.ppo=gpu", "pools.sft="]), "x"))
    monkeypatch.setattr(runner, "server", lambda: None)
    runner.check_pools(parse(RlhfRecipe, read_recipe(TINY, ["pools.ppo=nosuchpool"]), "x"))
