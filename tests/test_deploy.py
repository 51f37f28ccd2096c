"""What `posttrain up` makes on a server, where it takes no server to see."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.automations import Automation
from prefect.events import EventTrigger

from flows import deploy as module
from flows.deploy import SILENCE, automation


@pytest.mark.parametrize("changed", [False, True])
def test_an_automation_that_is_there_already_is_left_alone(monkeypatch: pytest.MonkeyPatch, changed: bool) -> None:
    """Whoever is silent already would be forgotten by an update."""
    kept = Automation.model_validate_json(automation().model_dump_json())
    kept.id = uuid4()
    assert isinstance(kept.trigger, EventTrigger)
    if changed:
        kept.trigger.within = 2 * SILENCE
    server = SimpleNamespace(read_automations_by_name=lambda _: [kept])
    monkeypatch.setattr(module, "get_client", lambda **_: nullcontext(server))
    updated: list[Automation] = []
    monkeypatch.setattr(Automation, "update", lambda one: updated.append(one))
    module._ensure(automation())
    assert [one.id for one in updated] == ([kept.id] if changed else [])
