"""PPO through its request: every number against plain transformers, its gradient, its trust regions, what it refuses."""

from __future__ import annotations

import json
import math
from collections import Counter
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import INIT, request_for
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import stages.ppo
from stages.artifacts import sha256_file
from stages.data.batching import RowOrder
from stages.data.chain_sum import demonstration_rows, prompt_rows
from stages.data.chat import encode
from stages.data.parquet import read_rows, write_rows
from stages.data.schemas import row_id
from stages.errors import InputError
from stages.models.load import LoadedPolicy, load_policy, save_checkpoint, save_policy
from stages.models.reward import new_reward_model, save_reward_model
from stages.request import run_stage
from stages.rollouts.sample import Sample
from stages.run import Event, Listener, Run
from stages.specs.ppo import PpoConfig, Ptx

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


class Bench:
    """Runs the stage and keeps what it holds inside: each step once it is judged, each optimizer step, which steps sampled."""

    def __init__(self, folders: Folders, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.folders, self.path, self.patch = folders, path, patch
        self.moments: list[Any] = []
        self.updates: list[Any] = []
        self.sampled: list[int] = []
        self.loop: Any = None
        shaped: list[torch.Tensor] = []

        def judged(_: Any, loop: Any, rollouts: Any, step: int) -> None:
            moment = SimpleNamespace(step=step, loop=loop, rollouts=rollouts, shaped_BT=shaped[-1])
            moment.policy, moment.critic = deepcopy((loop.policy.model, loop.critic.model))
            self.moments.append(moment)

        def updating(*given: Any) -> None:
            indices, packed = [batch.indices for batch in given[4]], given[4][0].attention_BT is None
            mixed_in = [indices for batch, _ in given[8] for indices in batch.indices]
            update = SimpleNamespace(indices=indices, chosen=sum(indices, ()), packed=packed, told=[], mixed_in=mixed_in)
            update.policy, update.critic = deepcopy((self.loop.policy.model, self.loop.critic.model))
            self.updates.append(update)

        self.spy("gae", after=lambda _, *given: shaped.append(given[0]))
        self.spy("_judge", after=judged)
        self.spy("_update", before=lambda loop, *_: setattr(self, "loop", loop))
        self.spy("optimization_step", updating, lambda found, *_: setattr(self.updates[-1], "measured", found))
        self.spy("policy_metrics", after=lambda found, *_: self.updates[-1].told.append(dict(found)))
        self.spy("collect", after=lambda _, *given: self.sampled.append(given[5]))

    def spy(self, name: str, before: Any = lambda *_: None, after: Any = lambda *_: None) -> None:
        """Call something before and after a function of the stage, the latter with what it found."""
        original = getattr(stages.ppo, name)

        def spied(*given: Any) -> Any:
            before(*given)
            after(found := original(*given), *given)
            return found

        self.patch.setattr(stages.ppo, name, spied)

    def train(self, name: str = "run", listener: Listener | None = None, **changes: Any) -> Run:
        return train(self.folders, self.path / name, listener, **changes)


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


@torch.no_grad()
def by_hand(config: PpoConfig, moment: Any, reward: Any, reference: Any) -> list[dict[str, Any]]:
    """All numbers of each completion of a step, float64."""
    found: list[dict[str, Any]] = []
    for sample in moment.rollouts.samples:
        logp_T, entropy_T = (one.numpy() for one in plain_logp(moment.policy, sample, config.sampling.temperature))
        kl_T = logp_T - plain_logp(reference, sample, config.sampling.temperature)[0].numpy()
        values_T, model = plain_values(moment.critic, sample).numpy(), float(plain_values(reward, sample)[-1])
        cut, hold = sample.completion.finish == "length", config.scoring.clip or math.inf
        missing = -config.scoring.missing_eos_penalty * cut
        one = {"rewards.model": model, "rewards.missing_eos": missing, "reward": max(-hold, min(hold, model)) + missing}
        rewards_T = -config.reference_kl * kl_T
        rewards_T[-1] += one["reward"]
        after = values_T[-1] if cut and config.bootstrap == "value" else 0.0
        one |= {"logp": logp_T, "entropy": entropy_T, "kl": kl_T.sum(), "length": len(logp_T), "truncated": cut}
        found.append(one | {"rewards": rewards_T, "values": values_T[:-1], "next": np.array([*values_T[1:-1], after])})
    if config.scoring.whiten:
        every = np.concatenate([one["rewards"] for one in found])
        for one in found:
            one["rewards"] = (one["rewards"] - every.mean()) / np.sqrt(every.var() + 1e-8) + every.mean()
    for one in found:
        delta_T = one["rewards"] + config.gamma * one["next"] - one["values"]
        fade, many = config.gamma * config.lam, len(delta_T)
        one["advantages"] = np.array([sum(fade ** (k - t) * delta_T[k] for k in range(t, many)) for t in range(many)])
        one["returns"] = one["advantages"] + one["values"]
    if config.whiten_advantages:
        every = np.concatenate([one["advantages"] for one in found])
        for one in found:
            one["advantages"] = (one["advantages"] - every.mean()) / np.sqrt(every.var() + 1e-8)
    return found


NUMBERS: dict[str, dict[str, Any]] = {
    "no reference": {},
    "value": {"bootstrap": "value", "gamma": 0.9, "lam": 0.7, "sampling": {"temperature": 0.7}},
    "clip": {"scoring": {"clip": 0.5, "missing_eos_penalty": 0.7}, "reference_kl": 0.3, "gamma": 0.95},
    "whiten": {"scoring": {"whiten": True}, "whiten_advantages": False, "bootstrap": "value"},
}


@pytest.mark.parametrize("case", NUMBERS)
def test_every_number_is_that_of_plain_transformers(bench: Bench, case: str) -> None:
    other = {} if case == "no reference" else {"reference": bench.folders["reference"]}
    run = bench.train(inputs=other, **NUMBERS[case])
    config, rows = bench.moments[0].loop.config, {row["id"]: row for row in ROWS}
    reward, reference = classifier(bench.folders["reward"]), language(other.get("reference", bench.folders["policy"]))
    written = records(run)
    assert {row["id"] for row in written[:9]} == set(rows), "an epoch has each prompt once"
    assert {row["finish"] for row in written} == {"stop", "length"}
    for step, moment in enumerate(bench.moments):
        rollouts, hand = moment.rollouts, by_hand(config, moment, reward, reference)
        names = ("rewards.model", "rewards.missing_eos", "reward", "kl", "length")
        tokenizer, stop = moment.loop.policy.tokenizer, moment.loop.policy.stops[0]
        mine, logged = written[6 * step : 6 * step + 6], metrics(run)[step + 1]
        for place, (sample, one, record) in enumerate(zip(rollouts.samples, hand, mine, strict=True)):
            ids, tokens = sample.completion.ids, slice(*(int(start) for start in rollouts.starts_B[place : place + 2]))
            for name in ("logp", "entropy", "values", "returns", "advantages"):
                assert rollouts.tokens[name][tokens].tolist() == close(one[name].tolist()), name
            assert moment.shaped_BT[place].tolist() == close([*one["rewards"], *[0.0] * (moment.shaped_BT.shape[1] - len(ids))])
            # The sampler, with its cache and left padding, saw the same log-probs (contract 6).
            assert sample.completion.logps == pytest.approx(one["logp"].tolist(), abs=1e-5)
            assert {name: record[name] for name in names} == close({name: one[name] for name in names})
            assert record["advantage"] == close(one["advantages"].mean())
            # A completion that was cut off has no EOS, and was scored without one.
            assert [k for k, token in enumerate(ids) if token == stop] == ([] if one["truncated"] else [len(ids) - 1])
            text = tokenizer.decode([token for token in ids if token != stop])
            known = {"completion": text, "policy": "policy", "step": step, "finish": "length" if one["truncated"] else "stop"}
            assert (rows[record["id"]] | known | {"sample": sample.sample}).items() <= record.items()
            if ids[-1] != tokenizer.pad_token_id:  # transformers' own score would be that before a sampled pad
                raw = reward(torch.tensor([[*sample.prompt_ids, *ids]])).logits.item()
                assert record["rewards.model"] == close((raw + 0.3) * 2.0)
        each = {name: [one[name] for one in hand] for name in (*names, "truncated")}
        tokens = {name: np.concatenate([one[name] for one in hand]) for name in ("entropy", "values", "returns")}
        expected = {name: float(np.mean(values)) for name, values in (each | tokens).items()}
        expected |= {"value": expected.pop("values"), "return": expected.pop("returns")}
        expected["reward_std"] = float(np.std(each["reward"], ddof=1))
        expected["explained_variance"] = 1 - (tokens["returns"] - tokens["values"]).var() / tokens["returns"].var()
        assert {name: logged[name] for name in expected} == close(expected)
        assert ({row["kl"] for row in mine} == {0.0}) == (not other and step == 0)
        # However numbers are laid out, there is nothing outside of the completions.
        batch = rollouts.batches([3, 1], 100, False, 0)[0]
        assert not rollouts.padded("logp")[rollouts.mask_BT == 0].any()
        assert not rollouts.lay_out("logp", batch)[batch.target_BT == 0].any()
    [before] = [event["metrics"] for event in events(run, "metrics") if event["step"] == 0]
    assert before == {f"{name}_before": metrics(run)[1][name] for name in ("reward", "length")}


RATIOS: list[dict[str, Any]] = [
    {"minibatches": 1, "sampling": {"temperature": 0.7}, "trust_region": "adaptive_kl"},
    {"minibatches": 1, "runtime": {"packed": True}},
    {"minibatches": 1, "dtype": "bfloat16"},
    {"minibatches": 3, "batch_size": 9, "sampling": {"temperature": 0.7}, "entropy_bonus": 0.1},
]


@pytest.mark.parametrize("changes", RATIOS)
def test_the_first_update_has_ratios_of_exactly_one(bench: Bench, changes: dict[str, Any]) -> None:
    run, many = bench.train(epochs=1, **changes), changes["minibatches"]
    assert len(bench.updates) == 2 * many
    for place, update in enumerate(bench.updates):
        assert len(update.told) == len(update.indices) > (many == 1)
        assert update.packed == ("runtime" in changes)
        # In every micro-batch; the later minibatches' policy has moved.
        exact = [told == {"ratio_max": 1.0, "clip_fraction": 0.0, "old_policy_kl": 0.0} for told in update.told]
        assert all(exact) if place % many == 0 else not any(exact)
    if many == 1:
        assert [series(run, name) for name in ("ratio_max", "clip_fraction", "old_policy_kl")] == [[1, 1], [0, 0], [0, 0]]
    if "dtype" in changes:  # bfloat16 multiplies, and no more: heads and weights are float32
        raw_N = bench.moments[0].rollouts.tokens["values"] / 2.0 - 0.3
        assert (raw_N - raw_N.bfloat16()).abs().max() > 1e-4
        logp_N = torch.cat([plain_logp(bench.moments[0].policy, one, 1.0)[0] for one in bench.moments[0].rollouts.samples])
        assert 1e-5 < (logp_N - bench.moments[0].rollouts.tokens["logp"]).abs().max() < 0.05
        weights = [load_file(path) for path in (run.folder / "outputs").glob("*/model.safetensors")]
        assert {tensor.dtype for one in weights for tensor in one.values()} == {torch.float32}


GRADIENTS: dict[str, dict[str, Any]] = {
    "clip": {"clip_low": 0.1, "clip_high": 0.3, "entropy_bonus": 0.3, "sampling": {"temperature": 0.7}},
    "none": {"critic": {"clip": None, "coefficient": 0.3}, "whiten_advantages": False},
    "fixed_kl": {"old_policy_kl": {"coefficient": 2.0}, "critic": {"clip": 0.05}},
    "adaptive_kl": {"old_policy_kl": {"coefficient": 0.5}, "runtime": {"packed": True}},
    "shared": {"critic": {"shared": True, "coefficient": 3.0}, "entropy_bonus": 0.1},
    "ptx": {"ptx": {"weight": 1.5, "batch_size": 5}, "sampling": {"temperature": 0.7}},
    "all of it": {"ptx": {"weight": 0.3, "batch_size": 7, "loss_on": "all"}, "critic": {"shared": True, "coefficient": 0.2}},
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_the_gradient_is_that_of_the_loss_written_out(bench: Bench, case: str) -> None:
    # An epsilon of the gradients' size leaves their norm in AdamW's first step, so that it shows how they were clipped.
    adam = {"eps": 0.1, "lr": 0.3, "max_grad_norm": 0.2}
    sizes = {"optimizer": adam, "critic": {"optimizer": adam | {"lr": 0.04, "max_grad_norm": 0.5}}}
    region = case if case in ("none", "fixed_kl", "adaptive_kl") else "clip"
    changes = merged(sizes, GRADIENTS[case]) | {"trust_region": region, "steps": 1, "batch_size": 9}
    given = {"reference": bench.folders["reference"]} | ({"ptx": bench.folders["ptx"]} if "ptx" in changes else {})
    run = bench.train(inputs=given, **changes)
    [moment], config = bench.moments, bench.moments[0].loop.config
    hand = by_hand(config, moment, classifier(bench.folders["reward"]), language(bench.folders["reference"]))
    every: list[dict[str, float]] = []
    assert [len(update.chosen) for update in bench.updates] == [5, 4, 5, 4]
    assert len(bench.updates[0].indices) > 1
    for number, update in enumerate(bench.updates):
        found = written_out(config, moment.rollouts, update, hand)
        if config.ptx is not None:
            rows = RowOrder(len(PTX), config.seed).take(number * config.ptx.batch_size, config.ptx.batch_size)
            assert sorted(update.mixed_in) == sorted(rows)
            found |= ptx_written_out(config.ptx, moment.loop.policy, update, rows)
            found["loss"] = found["loss"] + config.ptx.weight * found["ptx_loss"]
        own = "score" if config.critic.shared else ""  # with a shared backbone the critic is its head alone
        for name, settings, model in (("", config.optimizer, "policy"), ("critic_", config.critic.optimizer, "critic")):
            parts = [
                [part for at, part in getattr(one, model).named_parameters() if model == "policy" or at.startswith(own)]
                for one in (update, bench.updates[1])
            ]
            gradients = torch.autograd.grad(found["loss"], parts[0], retain_graph=True)
            norm = torch.cat([one.flatten() for one in gradients]).norm()
            found[f"{name}grad_norm"] = norm
            for before, now, grad in zip(*parts, gradients, strict=True):
                grad = grad * min(1.0, settings.max_grad_norm / norm)
                if number == 0:
                    torch.testing.assert_close(now, before - settings.lr * grad / (grad.abs() + 0.1), atol=2e-5, rtol=1e-3)
        every.append({name: torch.as_tensor(value).item() for name, value in found.items()})
        assert {name: every[-1][name] for name in update.measured} == pytest.approx(update.measured, rel=2e-4, abs=1e-5)
    [logged] = metrics(run).values()
    expected = {name: sum(one[name] for one in every) / 4 for name in every[0] if name in logged}
    expected["ratio_max"] = max(one["ratio_max"] for one in every)
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert expected.keys() >= {"clip_fraction", "old_policy_kl", "policy_loss", "value_loss", "grad_norm", "critic_grad_norm"}
    assert ("ptx_loss" in expected) == (config.ptx is not None)
    assert logged["clip_fraction"] > 0.05
    assert (logged["lr"], logged["old_policy_kl_coefficient"]) == (0.3, config.old_policy_kl.coefficient)


def written_out(config: PpoConfig, rollouts: Any, update: Any, hand: list[dict[str, Any]]) -> dict[str, Any]:
    """The loss of a minibatch, completion by completion, and what is logged of it."""
    sums: Any = Counter()
    top, low, high, reach = 0.0, 1 - config.clip_low, 1 + config.clip_high, config.critic.clip or math.inf
    for index in update.chosen:
        logp_T, entropy_T = plain_logp(update.policy, rollouts.samples[index], config.sampling.temperature)
        values_T = plain_values(update.critic, rollouts.samples[index])[:-1]
        fixed = (torch.from_numpy(hand[index][name]) for name in ("logp", "advantages", "values", "returns"))
        old_T, advantages_T, old_values_T, returns_T = fixed
        ratio_T = (logp_T - old_T).exp()
        kl_T, gain_T = ratio_T - 1 - (logp_T - old_T), ratio_T * advantages_T
        stopped_T = ((advantages_T > 0) & (ratio_T > high)) | ((advantages_T < 0) & (ratio_T < low))
        if config.trust_region == "clip":
            gain_T = torch.where(stopped_T, ratio_T.clamp(low, high).detach() * advantages_T, gain_T)
        elif config.trust_region != "none":
            gain_T = gain_T - config.old_policy_kl.coefficient * kl_T
        held_T = old_values_T + (values_T - old_values_T).clamp(-reach, reach)
        error_T = torch.maximum((values_T - returns_T) ** 2, (held_T - returns_T) ** 2)
        parts = {"policy_loss": -gain_T, "value_loss": error_T / 2, "entropy_now": entropy_T, "old_policy_kl": kl_T}
        sums.update({name: part_T.sum() for name, part_T in (parts | {"clip_fraction": stopped_T.double()}).items()})
        top = max(top, ratio_T.max().item())
    found = {name: value / sum(hand[index]["length"] for index in update.chosen) for name, value in sums.items()}
    loss = found["policy_loss"] + config.critic.coefficient * found["value_loss"] - config.entropy_bonus * found["entropy_now"]
    return found | {"loss": loss, "ratio_max": top}


def ptx_written_out(ptx: Ptx, policy: LoadedPolicy, update: Any, rows: np.ndarray) -> dict[str, Any]:
    """The mean negative log-likelihood of some demonstrations' tokens, each row alone."""
    sums: list[torch.Tensor] = []
    for row in (PTX[index] for index in rows):
        encoded = encode(policy.tokenizer, row["prompt"], row["completion"], policy.stops)
        ids_T = torch.tensor([*encoded.prompt_ids, *encoded.completion_ids])
        first = 1 if ptx.loss_on == "all" else len(encoded.prompt_ids)
        logp_TV = update.policy(ids_T[None]).logits[0, first - 1 : -1].double().log_softmax(-1)
        sums.append(-logp_TV.gather(-1, ids_T[first:, None])[:, 0])
    return {"ptx_loss": torch.cat(sums).mean()}


def test_each_pass_has_an_order_of_its_own() -> None:
    config = PpoConfig(batch_size=9, minibatches=2)
    cases = product((0, 1), repeat=3)
    orders = [stages.ppo.minibatches(config.model_copy(update={"seed": seed}), step, epoch) for seed, step, epoch in cases]
    assert len({str(order) for order in orders}) == 8
    assert all(sorted(np.concatenate(order)) == list(range(9)) for order in orders)


@pytest.mark.parametrize("more", [{}, {"critic": {"shared": True}, "ptx": {"weight": 0.5, "batch_size": 4}}])
def test_how_the_machine_is_used_does_not_change_the_metrics(bench: Bench, more: dict[str, Any]) -> None:
    packed = {"packed": True, "micro_batch_tokens": 70}
    uses = [{}, {"save_every": 1, "log_every": 2}, {"micro_batch_tokens": 1}, packed, {"generation_batch": 2}]
    given = {name: bench.folders[name] for name in more if name == "ptx"}
    first, *others = (bench.train(str(number), steps=3, runtime=use, inputs=given, **more) for number, use in enumerate(uses))
    assert (list(metrics(first)), list(metrics(others[0]))) == ([1, 2, 3], [2, 3])
    for run in others:
        for step, logged in metrics(run).items():
            assert logged == pytest.approx(metrics(first)[step], abs=1e-4, rel=1e-4)
    assert digests(others[0]) == digests(first), "a state that is saved leaves no trace"


# Trust regions, and what is learned.


def test_a_penalty_on_the_old_policy_s_kl_holds_the_policy_back(bench: Bench) -> None:
    found = []
    for name, coefficient in (("none", 1.0), ("fixed_kl", 1e-9), ("fixed_kl", 10.0)):
        changes = {"trust_region": name, "old_policy_kl": {"coefficient": coefficient}, "optimizer": {"lr": 0.02}}
        found.append(metrics(bench.train(str(coefficient), epochs=4, **changes)))
        assert {one.pop("old_policy_kl_coefficient") for one in found[-1].values()} == {coefficient}
    free, feather, held = found
    assert all(one == pytest.approx(feather[step], abs=1e-4, rel=1e-4) for step, one in free.items())
    assert held[1]["old_policy_kl"] < 0.5 * free[1]["old_policy_kl"]


@pytest.mark.parametrize("target", [1e-6, 0.03, 1e3])
def test_the_adaptive_coefficient_follows_the_kl_after_each_update(bench: Bench, target: float) -> None:
    penalty = {"trust_region": "adaptive_kl", "old_policy_kl": {"coefficient": 0.8, "target": target}}
    observed: list[float] = []
    bench.spy("_old_policy_kl", after=lambda found, *_: observed.append(found))
    run = bench.train(steps=3, sampling={"temperature": 0.7}, **penalty)
    trained = [*(moment.policy for moment in bench.moments[1:]), language(run.folder / "outputs" / "checkpoint")]
    expected, seen = [0.8], []
    for moment, after in zip(bench.moments, trained, strict=True):
        pairs = [[plain_logp(model, one, 0.7)[0] for model in (after, moment.policy)] for one in moment.rollouts.samples]
        log_ratio_N = torch.cat([new_T - old_T for new_T, old_T in pairs])
        seen.append((log_ratio_N.exp() - 1 - log_ratio_N).mean().item())
        expected.append(expected[-1] * (0.5 if seen[-1] < target / 1.5 else 2.0 if seen[-1] > target * 1.5 else 1.0))
    assert observed == pytest.approx(seen, rel=1e-3)
    assert series(run, "old_policy_kl_coefficient") == expected[:3], seen
    # The metric is the mean over the updates, of which the first is at 0.
    assert all(one < last for one, last in zip(series(run, "old_policy_kl"), seen, strict=True))


def test_an_entropy_bonus_raises_the_entropy(bench: Bench) -> None:
    none, bonus = (series(bench.train(str(bonus), steps=3, entropy_bonus=bonus), "entropy") for bonus in (0.0, 1.0))
    assert bonus[0] == none[0]
    assert bonus[2] > none[2] + 0.1


def test_the_reward_rises(bench: Bench) -> None:
    changes = {"steps": 12, "batch_size": 32, "minibatches": 4, "seed": 1, "reference_kl": 0.0, "optimizer": {"lr": 0.03}}
    more: Any = {"critic": {"start": "policy"}, "scoring": {"missing_eos_penalty": 0}, "runtime": {"micro_batch_tokens": 2000}}
    reward = series(bench.train(inputs={"policy": bench.folders["init"]}, **changes, **more), "reward")
    fresh, moment = load_policy(bench.folders["init"], seed=1).model.get_input_embeddings(), bench.moments[0]
    for one in (moment.policy, moment.loop.reference.model, moment.critic):
        assert torch.equal(one.get_input_embeddings().weight, fresh.weight), "random weights are the seed's"  # pyright: ignore
    # The mean of 96 completions strays by about 0.12.
    assert np.mean(reward[-3:]) > np.mean(reward[:2]) + 0.8


# The four models: where the critic starts, what is trained, what is refused.


@pytest.mark.parametrize("start", ["reward", "policy", "critic"])
def test_where_the_critic_starts(bench: Bench, start: str) -> None:
    given = {port: bench.folders[port] for port in ("reference", start) if port != "policy"}
    # A critic that is given is taken, whatever the config says.
    run = bench.train(steps=1, inputs=given, critic={"start": "reward" if start == "reward" else "policy"})
    [moment] = bench.moments
    loop, before, expected = moment.loop, moment.critic.state_dict(), load_file(bench.folders[start] / "model.safetensors")
    if start == "policy":
        assert not before["score.weight"].any()
        assert metrics(run)[1]["value"] == moment.rollouts.tokens["values"].abs().max() == 0.0
        expected["score.weight"] = torch.zeros(1, 16)
        expected.pop("lm_head.weight", None)
    assert before.keys() == expected.keys()
    assert all(torch.equal(before[name], expected[name]) for name in before)

    critic, policy = classifier(run.folder / "outputs" / "critic"), language(run.folder / "outputs" / "checkpoint")
    scaling = tuple(getattr(critic.config, name, None) for name in ("reward_bias", "reward_scale"))
    assert scaling == {"reward": (0.3, 2.0), "critic": (-0.2, 0.5), "policy": (None, None)}[start]
    # Both were trained in all their parts; what is written is what was trained last.
    for saved, trained, old in ((critic, loop.critic, moment.critic), (policy, loop.policy, moment.policy)):
        parts = zip(saved.parameters(), trained.model.parameters(), old.parameters(), strict=True)
        assert all(torch.equal(one, last) and not torch.equal(one, first) for one, last, first in parts)
    for frozen, name in ((loop.reward, "reward"), (loop.reference, "reference")):
        weights, kept = frozen.model.state_dict(), load_file(bench.folders[name] / "model.safetensors")
        assert all(torch.equal(one, weights[part]) for part, one in kept.items())
        assert not any(one.requires_grad for one in frozen.model.parameters())


def test_a_shared_backbone_is_saved_with_either_head_and_gone_on_with(bench: Bench) -> None:
    run = bench.train(steps=1, critic={"shared": True})
    [moment] = bench.moments
    assert moment.loop.module.critic.weight.shape == (1, 16)
    assert moment.rollouts.tokens["values"].abs().max() == 0.0, "the head starts from zeros"
    made = {name: run.folder / "outputs" / name for name in ("checkpoint", "critic")}
    policy, critic = language(made["checkpoint"]), classifier(made["critic"])
    pairs = list(zip(policy.base_model.parameters(), critic.base_model.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not torch.equal(pairs[0][0], moment.policy.base_model.get_input_embeddings().weight)
    assert critic.score.weight.abs().max() > 0

    # Head, offset and scale go on from the earlier critic, which reads the same states.
    critic.config.reward_bias, critic.config.reward_scale = 0.25, 3.0
    save_checkpoint(critic, moment.loop.policy.tokenizer, folder(bench.path / "critic"))
    given = {"policy": made["checkpoint"], "critic": bench.path / "critic"}
    again = bench.train("again", steps=1, critic={"shared": True}, inputs=given)
    for sample, start in zip(bench.moments[1].rollouts.samples, bench.moments[1].rollouts.starts_B, strict=False):
        expected_T = plain_values(classifier(bench.path / "critic"), sample)[:-1]
        found_T = bench.moments[1].rollouts.tokens["values"][start : start + len(expected_T)]
        assert found_T.tolist() == close(expected_T.tolist())
    assert classifier(again.folder / "outputs" / "critic").config.reward_scale == 3.0

    for policy in (bench.folders["policy"], bench.folders["reference"]):
        with pytest.raises(InputError, match="the critic given has another backbone than the policy"):
            bench.train(f"other {policy.name}", critic={"shared": True}, inputs=given | {"policy": policy})


@pytest.mark.parametrize(("after", "shared"), [("zero", False), ("value", False), ("value", True)])
def test_dropout_is_off(bench: Bench, after: str, shared: bool) -> None:
    given = {name: folder(bench.path / name) for name in ("policy", "reward")}
    (given["policy"] / "init.yaml").write_text(INIT.read_text().replace("model:\n", "model:\n  attention_dropout: 0.5\n"))
    save_reward_model(new_reward_model(given["policy"], seed=3), given["reward"])
    run = bench.train(epochs=1, minibatches=1, bootstrap=after, inputs=given, critic={"shared": shared})
    assert series(run, "ratio_max") == [1.0, 1.0]
    assert series(run, "kl")[0] == 0.0
    for moment, logged in zip(bench.moments, metrics(run).values(), strict=True):
        values = [plain_values(moment.critic.eval(), sample)[:-1] for sample in moment.rollouts.samples]
        assert moment.rollouts.tokens["values"].tolist() == pytest.approx(torch.cat(values).tolist(), abs=1e-5)
        # The update sees the values that were measured.
        error_N = moment.rollouts.tokens["returns"] - moment.rollouts.tokens["values"]
        assert logged["value_loss"] == pytest.approx((error_N**2).mean().item() / 2, rel=1e-5)


TOKENS, NO_SCORE, SCORE = "tokenizer differs from the policy's", ": not a reward model", ": a reward model .*, where a lang"
REFUSED = [("reward", "other", TOKENS), ("critic", "other", TOKENS), ("reference", "other", TOKENS)]
REFUSED += [
    ("reward", "policy", NO_SCORE),
    ("critic", "reference", NO_SCORE),
    ("policy", "reward", SCORE),
    ("reference", "critic", SCORE),
]


@pytest.mark.parametrize(("port", "given", "message"), REFUSED)
def test_models_that_do_not_fit_are_refused_before_any_sampling(bench: Bench, port: str, given: str, message: str) -> None:
    if given == "other":
        words = folder(bench.path / "words")
        (words / "init.yaml").write_text(INIT.read_text().replace('"<|system|>", "<|user|>"', '"<|user|>", "<|system|>"'))
        model: Any = load_policy(words) if port == "reference" else new_reward_model(words, seed=0)
        save_checkpoint(model.model, model.tokenizer, folder(bench.path / "other"))
    named = f"the {port}(_model)?'s " if given == "other" else given
    with pytest.raises(InputError, match=named + message):
        bench.train(inputs={port: bench.folders.get(given, bench.path / "other")})
    assert bench.sampled == []


def test_demonstrations_and_their_config_go_together(bench: Bench) -> None:
    with pytest.raises(InputError, match="there is a config `ptx` but no input `ptx`; PPO-ptx needs both"):
        bench.train("no input", ptx={})
    with pytest.raises(InputError, match="there is an input `ptx` but no config `ptx`"):
        bench.train("no config", inputs={"ptx": bench.folders["ptx"]})
    with pytest.raises(InputError, match='row 1 has no column "completion"'):
        bench.train("no completion", ptx={}, inputs={"ptx": bench.folders["prompts"]})
    assert bench.sampled == []


def test_a_loss_of_demonstrations_that_is_not_finite_names_their_rows(bench: Bench) -> None:
    original = stages.ppo.nll_loss
    bench.patch.setattr(stages.ppo, "nll_loss", lambda *given: original(*given) * math.nan)
    with pytest.raises(InputError, match=r"step 1, prompts \[.*\], rows \[\d+, \d+, \d+\] of ptx: loss is nan"):
        bench.train(ptx={"batch_size": 3}, inputs={"ptx": bench.folders["ptx"]})


def test_demonstrations_hold_on_to_what_they_show(bench: Bench) -> None:
    changes: dict[str, Any] = {"steps": 6, "ptx": {"weight": 2.0, "batch_size": 11}}
    losses = series(bench.train(inputs={"ptx": bench.folders["ptx"]}, **changes), "ptx_loss")
    assert losses[-1] < losses[0] - 0.5


# What is sampled.


def test_a_prompt_that_comes_twice_is_sampled_anew(bench: Bench) -> None:
    run = bench.train(batch_size=4, inputs={"prompts": folder(bench.path / "one", ROWS[:1])})
    drawn = [(row["step"], row["sample"]) for row in records(run)]
    assert drawn == [(step, sample) for step in (0, 1) for sample in range(4)]
    bench.train("other", batch_size=4, seed=1, steps=1, inputs={"prompts": bench.path / "one"})
    assert len({tuple(sample.completion.ids) for moment in bench.moments for sample in moment.rollouts.samples}) == 12


def test_prompts_that_do_not_fit_are_dropped_and_counted(bench: Bench) -> None:
    # Another model reads 24 tokens: a prompt of 16 leaves room for 8, one of 17 does not. The policy reads 128.
    short: Folders = {port: folder(bench.path / port) for port in ("reward", "critic", "reference")}
    for port, path in short.items():
        init = bench.folders["init"]
        model: Any = load_policy(init) if port == "reference" else new_reward_model(init, seed=3)
        model.model.config.max_position_embeddings = 24
        save_checkpoint(model.model, model.tokenizer, path)
    texts = ["1" + "+1" * count for count in (12, 13, 14, 124)]
    rows = ROWS[:4] + [{"id": text, "prompt": [{"role": "user", "content": text}]} for text in texts]
    prompts = folder(bench.path / "prompts", rows)
    for port, path in short.items():
        given = {"prompts": prompts, port: path}
        run = bench.train(f"{port} run", batch_size=5, steps=1, epochs=1, inputs=given, critic={"start": "policy"})
        lengths = {sample.row["id"]: len(sample.prompt_ids) for sample in bench.moments[-1].rollouts.samples}
        assert (len(lengths), lengths[texts[0]]) == (5, 16)
        [table] = [event["rows"] for event in events(run, "table") if event["name"] == "prompts"]
        assert table == [{"what": "used", "rows": 5}, {"what": "dropped: fills the context", "rows": 3}]
    for count, given in ((3, {"critic": short["critic"]}), (1, {})):
        last = folder(bench.path / f"last {count}", rows[-count:])
        with pytest.raises(InputError, match=f"all {count} prompts fill the context.*sampling.max_new_tokens"):
            bench.train(str(count), inputs=given | {"prompts": last})
    assert bench.sampled == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 2, "minibatches": 3}, r"minibatches \(3\) cannot be more than batch_size \(2\)"),
        ({"sampling": {"temperature": 0}}, "must draw from the policy itself"),
        ({"sampling": {"top_p": 0.9}}, "must draw from the policy itself"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PpoConfig.model_validate(changes)
