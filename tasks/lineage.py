"""From a registered artifact back to the rows, configs, commits and versions that made it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from stages.artifacts import Dataset, Kind, Model, handle
from stages.errors import InputError
from stages.specs import STAGES
from tasks.display import print_wide
from tasks.entries import OUTPUTS, published
from tasks.references import REGISTERED, expand, registered_version
from tasks.store import Store

COMMIT, DIRTY = "mlflow.source.git.commit", "-dirty"
VERSION = "posttrain.version."


class Making(BaseModel):
    """The run that made an artifact. `config` holds what differs from the stage's defaults, by path."""

    run_id: str
    recipe: str
    step: str
    stage: str
    version: int | None
    commit: str | None
    dirty: bool
    started: str
    seconds: float | None
    config: dict[str, Any]
    packages: dict[str, str]


class Node(BaseModel):
    """An artifact with what made it. `inputs` are other nodes' addresses by port; `source` is what an ingested one was read
    from; `problems` say what is gone or damaged, and then other fields may be missing."""

    uri: str
    name: str
    version: str
    kind: Kind
    digest: str
    rows: int | None = None
    source: str | None = None
    made: Making | None = None
    inputs: dict[str, str] = {}
    problems: list[str] = []

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def trace(store: Store, reference: str) -> list[Node]:
    """The artifact that a reference names and all that went into it, each once, itself first.

    Raises InputError for a reference that names no registered artifact; what is damaged further back is said in its node.
    """
    text = expand(reference)
    match = REGISTERED.fullmatch(text)
    if match is None:
        raise InputError(f"{text}: a registered artifact is written models:/NAME/VERSION or datasets:/NAME/VERSION, or @ALIAS")
    kind: Kind = "model" if match.group(1) == "models" else "dataset"
    found = registered_version(store, text, match, kind)
    root = handle(
        kind, name=found.name, version=str(found.version), digest=found.tags.get("digest", ""), uri=found.source or ""
    )
    nodes: dict[str, Node] = {}
    waiting: list[Dataset | Model] = [root]
    while waiting:
        given = waiting.pop()
        if given.uri in nodes:
            continue
        node, inputs = _node(store, given)
        nodes[given.uri] = node
        waiting += reversed(inputs)
    return list(nodes.values())


def _node(store: Store, given: Dataset | Model) -> tuple[Node, list[Dataset | Model]]:
    """An artifact's node and the artifacts that it was made from."""
    node = Node(uri=given.uri, name=given.name, version=given.version, kind=given.kind, digest=given.digest)
    run = _run(store, given)
    if run is None:
        node.problems.append("its run is gone, or was none of posttrain: what made it is not known")
        return node, []
    if run.info.lifecycle_stage == "deleted":
        node.problems.append(f"its run {run.info.run_id} was deleted")
    outputs = published(run).outputs if OUTPUTS in run.data.tags else {}
    output = next((name for name, made in outputs.items() if made.uri == given.uri), None)
    if output is None:
        node.problems.append(f"its run {run.info.run_id} never completed")
    else:
        node.problems += _damage(store, given, run, output)
        node.rows = _rows(store, run, output)
    identity = store.identity(run) or {}
    if not identity:
        node.problems.append("its identity.json is gone: its config is not known")
    node.made = _making(run, identity)
    if node.made.stage == "ingest":
        node.source = str(identity.get("config", {}).get("reference", run.info.run_name))
        node.made.config = {}
        return node, []
    inputs = store.inputs(run)
    if inputs is None:
        node.problems.append("its inputs.json is gone: what it was made from is not known")
        return node, []
    node.inputs = {port: one.uri for port, one in inputs.items()}
    return node, list(inputs.values())


def _run(store: Store, given: Dataset | Model) -> Run | None:
    """The run that made an artifact, also a deleted one, or None when there is nothing left of it."""
    try:
        if given.uri.startswith("runs:/"):
            return store.client.get_run(given.uri.removeprefix("runs:/").partition("/")[0])
        model = store.client.get_logged_model(given.uri.removeprefix("models:/"))
        return store.client.get_run(str(model.source_run_id))
    except MlflowException:
        return None


def _damage(store: Store, given: Dataset | Model, run: Run, output: str) -> list[str]:
    try:
        return [text.removeprefix(f"{given}: ") for text in store.problems(given, run, output)]
    except MlflowException as error:
        return [f"MLflow says: {error.message}"]


def _rows(store: Store, run: Run, output: str) -> int | None:
    try:
        return store.manifest(run, output).rows
    except InputError:
        return None


def _making(run: Run, identity: dict[str, Any]) -> Making:
    tags = run.data.tags
    commit = tags.get(COMMIT)
    ended = run.info.end_time
    return Making(
        run_id=run.info.run_id,
        recipe=tags.get("posttrain.recipe", ""),
        step=tags.get("posttrain.step", ""),
        stage=tags.get("posttrain.stage", ""),
        version=identity.get("version"),
        commit=commit.removesuffix(DIRTY) if commit else None,
        dirty=commit is not None and commit.endswith(DIRTY),
        started=datetime.fromtimestamp(run.info.start_time / 1000).astimezone().isoformat(timespec="seconds"),
        seconds=round((ended - run.info.start_time) / 1000, 2) if ended else None,
        config=_differing(tags.get("posttrain.stage", ""), identity.get("config", {})),
        packages={name.removeprefix(VERSION): found for name, found in sorted(tags.items()) if name.startswith(VERSION)},
    )


def _differing(stage: str, config: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a config's identity that differ from the stage's defaults, by path; all of them for an unknown stage."""
    defaults: dict[str, Any] = {}
    if stage in STAGES:
        kind = STAGES[stage].config
        unset = {name: None for name, field in kind.model_fields.items() if field.is_required()}
        defaults = dict(_leaves(kind.model_construct(**unset).identity()))
    return {path: value for path, value in _leaves(config) if path not in defaults or defaults[path] != value}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}".lstrip("."))
    elif value != {}:
        yield path, value


def print_lineage(console: Console, nodes: list[Node]) -> None:
    """The nodes as a tree, each in full once; so is what made several of them."""
    known = {node.uri: node for node in nodes}
    tree = Tree("", hide_root=True)
    waiting: list[tuple[Tree, str, Node]] = [(tree, "", nodes[0])]
    shown: set[str] = set()
    makers: dict[str, Node] = {}
    while waiting:
        above, label, node = waiting.pop()
        head = Text(label).append(str(node), "bold").append(f"  {_described(node)}")
        branch = above.add(head)
        if node.uri in shown:
            head.append("  (above)", "dim")
            continue
        shown.add(node.uri)
        first = makers.setdefault(node.made.run_id, node) if node.made else node
        lines = _lines(node, nodes[0]) if first is node else [f"made together with {first} (above)"]
        head.append("".join(f"\n{line}" for line in lines), "dim")
        head.append("".join(f"\n{problem}" for problem in node.problems), "red")
        if first is node:
            waiting += reversed([(branch, f"{port}: ", known[uri]) for port, uri in node.inputs.items()])
    print_wide(console, tree)


def _described(node: Node) -> str:
    rows = f"{node.rows} rows" if node.rows is not None else ""
    return "  ".join(filter(None, (node.kind, rows, node.digest[:12])))


def _lines(node: Node, root: Node) -> Iterator[str]:
    """What made an artifact, in words."""
    made = node.made
    if made is None:
        return
    when = made.started[:19].replace("T", " ") + (f", took {made.seconds:.1f} s" if made.seconds is not None else "")
    commit = f"commit {made.commit[:8]}{' (dirty)' if made.dirty else ''}" if made.commit else "no commit known"
    if node.source is not None:
        yield f"ingested from {node.source}; {commit}; {when}"
    else:
        yield f"made by {made.recipe}'s step {made.step}: stage {made.stage}, version {made.version or '?'}; {commit}; {when}"
    if made.config:
        yield "with " + ", ".join(f"{path}={json.dumps(value)}" for path, value in made.config.items())
    same = root.made.packages if root.made and node is not root else {}
    packages = {name: found for name, found in made.packages.items() if same.get(name) != found}
    if packages:
        yield "under " + ", ".join(f"{name} {found}" for name, found in packages.items())
