"""Saved states of a run that any machine can go on from: where a server keeps runs, each state goes there too.

artifacts of the MLflow run/state/newest.json     the name of the newest whole state: written last
                           /state/step-N/         its files
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tasks.files import copy_by_links
from tasks.home import server
from tasks.store import Store

MARK = "state/newest.json"


class States:
    """The states of one run in one folder, and with the server."""

    def __init__(self, store: Store, run_id: str, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.address = str(store.client.get_run(run_id).info.artifact_uri)

    def fetch(self) -> None:
        """Bring the newest state here, unless it is here already."""
        name = _kept(self.store, self.address)
        if name is None or (self._newest() or "") >= name:
            return
        states = self.folder / "state"
        states.mkdir(parents=True, exist_ok=True)
        draft = states / f".draft-{name}"
        shutil.rmtree(draft, ignore_errors=True)
        self.store.files.fetch(f"{self.address}/state/{name}", draft)
        draft.rename(states / name)

    def send(self) -> None:
        """Give the newest state to the server, and take away the one before."""
        if server() is None or (name := self._newest()) is None:
            return
        before, sending = _kept(self.store, self.address), self.folder / "sending"
        shutil.rmtree(sending, ignore_errors=True)
        try:
            # The stage may save its next state, and remove this one, at any time.
            copy_by_links(self.folder / "state" / name, sending)
        except FileNotFoundError:
            return
        place = f"{self.address}/state/{name}"
        self.store.files.remove(place)
        self.store.files.share(sending, place)
        self.store.files.write(self.address, MARK, json.dumps({"name": name}).encode())
        shutil.rmtree(sending)
        if before not in (None, name):
            self.store.files.remove(f"{self.address}/state/{before}")

    def forget(self) -> None:
        """Remove what the server has: the run is complete."""
        if server() is not None:
            self.store.files.remove(f"{self.address}/state")

    def _newest(self) -> str | None:
        return max((path.name for path in (self.folder / "state").glob("step-*")), default=None)


def kept(store: Store, run_id: str) -> bool:
    """Whether the server has a state of a run."""
    return _kept(store, str(store.client.get_run(run_id).info.artifact_uri)) is not None


def _kept(store: Store, address: str) -> str | None:
    content = store.files.read(address, MARK) if server() is not None else None
    return json.loads(content)["name"] if content else None
