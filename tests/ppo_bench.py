"""What the tests of PPO share: four models, a bench that runs the stage and keeps what it holds inside, and the oracles."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, request_for
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import stages.ppo
from stages.artifacts import sha256_file
from stages.data.chain_sum import demonstration_rows, prompt_rows
from stages.data.parquet import read_rows, write_rows
from stages.data.schemas import row_id
from stages.models.load import load_policy, save_policy
from stages.models.reward import new_reward_model, save_reward_model
from stages.request import Request, run_stage
from stages.rollouts.sample import Sample
from stages.run import Event, Listener, Run

Folders = dict[str, Path]
ADAM = {"lr": 1e-2, "warmup": 0, "eps": 1e-5, "schedule": "constant"}
CONFIG: dict[str, Any] = {"steps": 2, "batch_size": 6, "sampling": {"max_new_tokens": 8}, "epochs": 2, "minibatches": 2}
CONFIG |= {"optimizer": ADAM, "critic": {"optimizer": ADAM}}
# Two or three completions a micro-batch.
CONFIG["runtime"] = {"device": "cpu", "threads": 1, "save_every": 100, "micro_batch_tokens": 50}
ROWS = [{"id": row_id(row), **row} for row in prompt_rows(9, seed=1)]
PTX = [{"id": row_id(row), **row} for row in demonstration_rows(11, seed=5)]


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config with some values changed; mappings are merged at every depth."""
    return config | {k: merged(config.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}


def folder(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A new folder, perhaps a dataset's."""
    path.mkdir()
    if rows:
        write_rows(path, rows)
    return path


def four_models(init_folder: Path, root: Path) -> Folders:
    """Four models of other weights each, of which the policy ends about half of its completions of 8 tokens; and nine
    prompts for batches of six: the second batch crosses the end of an epoch."""
    found = {name: folder(root / name) for name in ("policy", "reference", "reward", "critic")}
    for name, seed in (("policy", 0), ("reference", 7)):
        policy: Any = load_policy(init_folder, seed=seed)
        policy.model.get_input_embeddings().weight.data[policy.stops[0]] *= 12
        save_policy(policy, found[name])
    for name, seed, bias, scale in (("reward", 3, 0.3, 2.0), ("critic", 4, -0.2, 0.5)):
        reward = new_reward_model(init_folder, seed=seed)
        reward.calibrate(bias, scale)
        save_reward_model(reward, found[name])
    return found | {"init": init_folder, "prompts": folder(root / "prompts", ROWS), "ptx": folder(root / "ptx", PTX)}


@pytest.fixture(scope="module")
def folders(init_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return four_models(init_folder, tmp_path_factory.mktemp("models"))


def train(folders: Folders, path: Path, listener: Listener | None = None, **changes: Any) -> Run:
    inputs = {port: folders[port] for port in ("policy", "reward", "prompts")} | changes.pop("inputs", {})
    return run_stage(request_for("ppo", path, merged(CONFIG, changes), **inputs), listener)


class StageBench:
    """Runs a stage and keeps what it holds inside: each step once it is judged, each optimizer step, which steps sampled."""

    stage: Any
    run: Any

    def __init__(self, folders: Folders, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.folders, self.path, self.patch = folders, path, patch
        self.moments: list[Any] = []
        self.updates: list[Any] = []
        self.sampled: list[int] = []
        self.loop: Any = None
        self.spy("_judge", after=lambda _, *given: self.moments.append(self.judged(*given)))
        self.spy("_update", before=lambda loop, *_: setattr(self, "loop", loop))
        self.spy(
            "optimization_step",
            before=lambda *given: self.updates.append(self.updating(*given)),
            after=lambda found, *_: setattr(self.updates[-1], "measured", found),
        )
        self.spy("policy_metrics", after=lambda found, *_: self.updates[-1].told.append(dict(found)))
        self.spy("collect", after=lambda _, *given: self.sampled.append(given[5]))

    def judged(self, loop: Any, rollouts: Any, *_: Any) -> Any:
        """A step once it is judged, and the policy that drew it."""
        return SimpleNamespace(loop=loop, rollouts=rollouts, policy=deepcopy(loop.policy.model))

    def updating(self, *given: Any) -> Any:
        """An optimizer step before it is taken."""
        indices, packed = [batch.indices for batch in given[4]], given[4][0].attention_BT is None
        policy = deepcopy(self.loop.policy.model)
        return SimpleNamespace(indices=indices, chosen=sum(indices, ()), packed=packed, told=[], policy=policy)

    def spy(self, name: str, before: Any = lambda *_: None, after: Any = lambda *_: None) -> None:
        """Call something before and after a function of the stage, the latter with what it found."""
        original = getattr(self.stage, name)

        def spied(*given: Any, **named: Any) -> Any:
            before(*given)
            after(found := original(*given, **named), *given)
            return found

        self.patch.setattr(self.stage, name, spied)

    def train(self, name: str = "run", listener: Listener | None = None, **changes: Any) -> Run:
        return self.run(self.folders, self.path / name, listener, **changes)


class Bench(StageBench):
    """PPO's: with the critic, the rewards of tokens, and demonstrations that are mixed in."""

    stage, run = stages.ppo, staticmethod(train)

    def __init__(self, folders: Folders, path: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(folders, path, patch)
        self.shaped: list[torch.Tensor] = []
        self.spy("gae", after=lambda _, *given: self.shaped.append(given[0]))

    def judged(self, loop: Any, rollouts: Any, *given: Any) -> Any:
        moment = super().judged(loop, rollouts)
        moment.step, moment.shaped_BT = given[0], self.shaped[-1]
        moment.policy, moment.critic = deepcopy((loop.policy.model, loop.critic.model))
        return moment

    def updating(self, *given: Any) -> Any:
        update = super().updating(*given)
        update.mixed_in = [indices for batch, _ in given[8] for indices in batch.indices]
        update.policy, update.critic = deepcopy((self.loop.policy.model, self.loop.critic.model))
        return update


class CrashError(Exception):
    """Raised in the place of a crash."""


def until_done(train: Callable[[], Run]) -> tuple[Run, int]:
    """Start a run again after each crash, with other random numbers about; the run, and how often it crashed."""
    for crashes in range(20):
        try:
            return train(), crashes
        except CrashError:
            torch.manual_seed(1234)
    raise AssertionError("it crashes for ever")


def same(run: Run, expected: Run) -> bool:
    """Whether two runs made the same bytes and logged the same numbers."""
    return digests(run) == digests(expected) and metrics(run) == metrics(expected)


def killed(requests: Sequence[Request], states: Sequence[int]) -> None:
    """Run stages as children, each killed with -9 once it has told of so many saved states."""
    children = []
    for request in requests:
        (request.folder / "request.json").write_text(request.model_dump_json())
        command = [sys.executable, "-m", "stages", str(request.folder / "request.json")]
        children.append(subprocess.Popen(command, cwd=ROOT))
    deadline = time.monotonic() + 120
    while any(child.returncode is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.002)
        for child, request, count in zip(children, requests, states, strict=True):
            told = request.folder / "events.jsonl"
            if child.poll() is None and told.is_file() and told.read_text().count('"event": "state"') >= count:
                child.kill()
                child.wait()
    assert {child.returncode for child in children} == {-9}


@pytest.fixture
def bench(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(folders, tmp_path, monkeypatch)


def events(run: Run, kind: str) -> list[Event]:
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def metrics(run: Run) -> dict[int, dict[str, float]]:
    """Of each step, but for its seconds."""
    logged = {one["step"]: one["metrics"] for one in events(run, "metrics") if one["step"]}
    return {step: {k: v for k, v in one.items() if not k.startswith("seconds")} for step, one in logged.items()}


def series(run: Run, name: str) -> list[float]:
    return [one[name] for one in metrics(run).values()]


def digests(run: Run) -> dict[str, str]:
    root = run.folder / "outputs"
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(root.rglob("*")) if path.is_file()}


def records(run: Run) -> list[dict[str, Any]]:
    return list(read_rows(run.folder / "outputs" / "rollouts"))


# The oracles: plain transformers on each sequence alone, sums written out forwards.


language: Any = AutoModelForCausalLM.from_pretrained


classifier: Any = AutoModelForSequenceClassification.from_pretrained


close: Any = partial(pytest.approx, abs=3e-5, rel=3e-5)


def plain_logp(model: Any, sample: Sample, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of a completion's tokens, and the entropies of what they were drawn from."""
    ids_T, first = torch.tensor([*sample.prompt_ids, *sample.completion.ids]), len(sample.prompt_ids)
    logp_TV = (model(ids_T[None]).logits[0, first - 1 : -1].double() / temperature).log_softmax(-1)
    return logp_TV.gather(-1, ids_T[first:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def plain_values(model: Any, sample: Sample) -> torch.Tensor:
    """The values before each of a completion's tokens, and after the last."""
    ids_T = torch.tensor([*sample.prompt_ids, *sample.completion.ids])
    raw_T = model.score(model.base_model(ids_T[None]).last_hidden_state)[0, len(sample.prompt_ids) - 1 :, 0].double()
    return (raw_T + getattr(model.config, "reward_bias", 0.0)) * getattr(model.config, "reward_scale", 1.0)
