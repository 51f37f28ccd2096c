"""PPO through its request: every number against plain transformers, its gradient, how the machine is used."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import ppo_bench
import pytest
import torch
from ppo_bench import (
    PTX,
    ROWS,
    Bench,
    classifier,
    close,
    digests,
    events,
    language,
    merged,
    metrics,
    plain_logp,
    plain_values,
    records,
    series,
)
from safetensors.torch import load_file

import stages.ppo
from stages.data.batching import RowOrder
from stages.data.chat import encode
from stages.models.load import LoadedPolicy
from stages.specs.ppo import PpoConfig, Ptx

folders = ppo_bench.folders
bench = ppo_bench.bench


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
