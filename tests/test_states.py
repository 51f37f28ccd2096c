"""Saved states that leave the machine: what another one goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.files import Folder
from tasks.plan import has_progress
from tasks.states import States
from tasks.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that counts as a server's, whose files lie here."""
    monkeypatch.setattr("tasks.states.server", lambda: "http://somewhere")
    return Store(tmp_path)


def new_run(store: Store) -> str:
    return store.begin("r", "s", {"key": "k", "stage": "s", "step": "s", "recipe": "r"}, {"config": {}})


def save(folder: Path, name: str, content: str) -> None:
    """A stage's newest state: those before are gone."""
    for old in (folder / "state").glob("step-*"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    (folder / "state" / name).mkdir(parents=True)
    (folder / "state" / name / "weights").write_text(content)


def found(folder: Path) -> dict[str, str]:
    return {path.name: (path / "weights").read_text() for path in sorted((folder / "state").iterdir())}


def test_another_machine_goes_on_from_the_newest_state(store: Store, tmp_path: Path) -> None:
    run_id, here, there = new_run(store), tmp_path / "here", tmp_path / "there"
    assert not has_progress(store, run_id)
    save(here, "step-00000002", "two")
    States(store, run_id, here).send()
    save(here, "step-00000004", "four")
    States(store, run_id, here).send()
    assert has_progress(store, run_id)
    States(store, run_id, there).fetch()
    assert found(there) == {"step-00000004": "four"}
    kept = store.root / "artifacts" / "r" / run_id / "artifacts" / "state"
    assert sorted(path.name for path in kept.iterdir()) == ["newest.json", "step-00000004"], "one state is kept"
    # A folder that is nearer to the end keeps its own.
    save(there, "step-00000004.001", "four, later")
    States(store, run_id, there).fetch()
    assert found(there) == {"step-00000004.001": "four, later"}
    # One that lags behind is brought on.
    save(there, "step-00000002", "two")
    States(store, run_id, there).fetch()
    assert found(there)["step-00000004"] == "four"


def test_what_a_stage_writes_on_does_not_reach_what_was_sent(store: Store, tmp_path: Path) -> None:
    run_id, here, there = new_run(store), tmp_path / "here", tmp_path / "there"
    save(here, "step-00000002", "two")
    States(store, run_id, here).send()
    save(here, "step-00000004", "four")
    States(store, run_id, there).fetch()
    assert found(there) == {"step-00000002": "two"}
    (there / "state" / "step-00000002" / "weights").write_text("other")
    States(store, run_id, tmp_path / "third").fetch()
    assert found(tmp_path / "third") == {"step-00000002": "two"}


def test_a_send_that_dies_leaves_the_state_before(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id, here, there = new_run(store), tmp_path / "here", tmp_path / "there"
    save(here, "step-00000002", "two")
    States(store, run_id, here).send()
    save(here, "step-00000004", "four")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "write", die)
        with pytest.raises(KeyboardInterrupt):
            States(store, run_id, here).send()
    States(store, run_id, there).fetch()
    assert found(there) == {"step-00000002": "two"}
    States(store, run_id, here).send()
    States(store, run_id, there).fetch()
    assert found(there)["step-00000004"] == "four"


def test_a_complete_run_keeps_no_state(store: Store, tmp_path: Path) -> None:
    run_id, here = new_run(store), tmp_path / "here"
    save(here, "step-00000002", "two")
    states = States(store, run_id, here)
    states.send()
    states.forget()
    states.forget()
    assert not has_progress(store, run_id)
    States(store, run_id, tmp_path / "there").fetch()
    assert not (tmp_path / "there").exists()


def test_without_a_server_nothing_is_sent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run_id, here = new_run(store), tmp_path / "here"
    save(here, "step-00000002", "two")
    States(store, run_id, here).send()
    assert not (store.root / "artifacts" / "r" / run_id / "artifacts" / "state").exists()
