"""The gradient of a GRPO minibatch is that of its loss written out completion by completion."""

from __future__ import annotations

from collections import Counter
from typing import Any

import grpo_bench
import pytest
import torch
from grpo_bench import Bench, by_hand
from ppo_bench import merged, metrics, plain_logp

from stages.rollouts import groups
from stages.specs.grpo import GrpoConfig

folders = grpo_bench.folders
bench = grpo_bench.bench
rewards_of_tests = grpo_bench.rewards_of_tests

SEVERAL: dict[str, Any] = {"epochs": 2, "minibatches": 2}
GAPS = [{"name": "code", "args": {"gaps": 5, "values": 3}}]
STEPS = [{"name": "stepped", "args": {"gaps": 9}}]
K2, K3 = ({"coefficient": 0.3, "estimator": name} for name in ("k2", "k3"))
PENALISED = {"how": "penalise", "penalty": 0.5, "window": 4}
GRADIENTS: dict[str, dict[str, Any]] = {
    "token": {"sampling": {"temperature": 0.7}, "reference_kl": {"measure": False}},
    "token, several": SEVERAL | {"clip_low": 0.1, "clip_high": 0.3, "sampling": {"temperature": 0.7}},
    "sequence": {"aggregate": "sequence", "rewards": GAPS, "reference_kl": K3},
    "sequence, several, k3": SEVERAL | {"aggregate": "sequence", "reference_kl": K3, "truncation": {"how": "mask"}},
    "sequence, several": SEVERAL | {"aggregate": "sequence", "rewards": [{"name": "code", "args": {"values": 2}}]},
    "constant": {
        "aggregate": "constant",
        "scale": "none",
        "rewards": [{"name": "code", "args": {"values": 2}}],
        "truncation": {"how": "mask"},
        "runtime": {"packed": True},
    },
    "constant, several, k2": SEVERAL | {"aggregate": "constant", "reference_kl": K2, "scale": "rloo", "rewards": GAPS},
    "in the reward": SEVERAL | {"reference_kl": {"coefficient": 0.2, "place": "reward"}, "truncation": PENALISED},
    "pairs": {"objective": "ranked_pairs", "pair_beta": 0.5, "rewards": GAPS, "sampling": {"temperature": 0.7}},
    "pairs, mask": {"objective": "ranked_pairs", "truncation": {"how": "mask"}},
    "pairs, several, k3": SEVERAL | {"objective": "ranked_pairs", "reference_kl": K3, "runtime": {"packed": True}},
    "process": {"supervision": "process", "rewards": STEPS, "truncation": {"how": "mask"}, "reference_kl": K2},
    "process, several": SEVERAL | {"supervision": "process", "rewards": STEPS, "aggregate": "sequence"},
    "refill": SEVERAL | {"refill": {"rounds": 2}, "rewards": [{"name": "code", "args": {"values": 2, "gaps": 4}}], "group": 3},
    "refill, k3": {"refill": {"rounds": 1}, "rewards": [{"name": "code", "args": {"values": 2}}], "group": 2}
    | {"reference_kl": K3},
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_the_gradient_is_that_of_the_loss_written_out(bench: Bench, case: str) -> None:
    # An epsilon of the gradients' size leaves their norm in AdamW's first step, so that it shows how they were clipped.
    adam = {"eps": 0.1, "lr": 0.3, "max_grad_norm": 0.2}
    sizes = {"optimizer": adam, "steps": 1, "prompts": 5, "runtime": {"micro_batch_tokens": 40}}
    changes = merged(sizes, GRADIENTS[case])
    run = bench.train(inputs={"reference": bench.folders["reference"]}, **changes)
    [moment], config, optimizer = bench.moments, bench.moments[0].loop.config, bench.moments[0].loop.config.optimizer
    hand, every = by_hand(config, moment, bench.folders), []
    passes = [groups.minibatches(config, moment.rollouts, 0, epoch) for epoch in range(config.epochs)]
    minibatches = [part.tolist() for one in passes for part in one]
    assert all(sorted(index for part in one for index in part.tolist()) == counted(config, hand) for one in passes)
    after = [update.policy for update in bench.updates[1:]] + [bench.loop.policy.model]
    assert len(minibatches) == len(bench.updates) == len(after)
    assert max(len(update.indices) for update in bench.updates) > 1
    for number, (members, update) in enumerate(zip(minibatches, bench.updates, strict=True)):
        found = written_out(config, moment.rollouts, members, update, hand)
        gradients = torch.autograd.grad(found["loss"], parameters := list(update.policy.parameters()))
        found["grad_norm"] = norm = torch.cat([one.flatten() for one in gradients]).norm()
        for before, now, grad in zip(parameters, after[number].parameters(), gradients, strict=True) if number == 0 else []:
            grad = grad * min(1.0, optimizer.max_grad_norm / norm)
            torch.testing.assert_close(now, before - optimizer.lr * grad / (grad.abs() + 0.1), atol=2e-5, rtol=1e-3)
        every.append({name: torch.as_tensor(value).item() for name, value in found.items()})
        assert {name: every[-1][name] for name in update.measured} == pytest.approx(update.measured, rel=2e-4, abs=1e-5)
    [logged] = metrics(run).values()
    expected = {name: sum(one[name] for one in every) / len(every) for name in every[0] if name in logged}
    expected["ratio_max"] = max(one["ratio_max"] for one in every)
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert expected.keys() >= {"policy_loss", "grad_norm", "clip_fraction", "old_policy_kl"}
    assert ("kl_loss" in logged, logged["lr"]) == (config.reference_kl.penalised_in == "loss", 0.3)
    if config.epochs > 1 and config.objective == "grpo":
        assert logged["clip_fraction"] > 0.03


def counted(config: GrpoConfig, hand: list[dict[str, Any]]) -> list[int]:
    """The completions that the loss is a mean of: those with a reward, but for what is masked or replaced."""
    kept = [index for index, one in enumerate(hand) if one["reward"] is not None]
    kept = [index for index in kept if not (config.truncation.how == "mask" and hand[index]["truncated"])]
    return [index for index in kept if hand[index]["spread"] or not config.refill.rounds]


def written_out(config: GrpoConfig, rollouts: Any, kept: list[int], update: Any, hand: list[dict[str, Any]]) -> dict[str, Any]:
    """The loss of a minibatch, completion by completion, and what is logged of it."""
    one_update, kl = config.epochs * config.minibatches == 1, config.reference_kl
    low, high = 1 - config.clip_low, 1 + config.clip_high
    losses: dict[str, list[torch.Tensor]] = {"policy_loss": [], "kl_loss": []}
    sums: Any = Counter()
    top, summed = 0.0, {}
    for index in kept:
        advantages_T, ref_logp_T, old_T = (hand[index][name] for name in ("advantages", "ref_logp", "logp"))
        logp_T = plain_logp(update.policy, rollouts.samples[index], config.sampling.temperature)[0]
        ratio_T, summed[index] = (logp_T - old_T).exp(), logp_T.sum()
        # The gain is flat where the clip stops it.
        stopped_T = ((advantages_T > 0) & (ratio_T > high)) | ((advantages_T < 0) & (ratio_T < low))
        gain_T = torch.where(stopped_T, ratio_T.clamp(low, high).detach() * advantages_T, ratio_T * advantages_T)
        log_T = logp_T - ref_logp_T
        if kl.estimator == "k2":
            kl_T = log_T**2 / 2 * (1.0 if one_update else ratio_T.detach())
        else:
            kl_T = ((-log_T).exp() - 1 + log_T) * (1.0 if one_update else ratio_T)
        shrink = hand[index]["length"] if config.aggregate == "sequence" else 1
        losses["policy_loss"].append(-gain_T.sum() / shrink)
        losses["kl_loss"].append(kl_T.sum() / shrink)
        if index in update.chosen:
            top = max(top, ratio_T.max().item())
            moved = {"clip_fraction": stopped_T.sum(), "old_policy_kl": (ratio_T - 1 - (logp_T - old_T)).sum()}
            sums.update(moved | {"run": hand[index]["length"]})
    # Completions whose loss is 0 whatever the policy are not run, but divide.
    tokens = sum(hand[index]["length"] for index in kept)
    total = {"sequence": len(kept), "token": tokens, "constant": len(kept) * config.sampling.max_new_tokens}[config.aggregate]
    found: dict[str, Any] = {name: torch.stack(parts).sum() / total for name, parts in losses.items()}
    if pairs := [(i, j) for i in kept for j in kept if config.objective == "ranked_pairs" and better(hand[i], hand[j])]:
        margins = torch.stack([config.pair_beta * (summed[i] - summed[j]) for i, j in pairs])
        found["policy_loss"] = -margins.sigmoid().log().mean()
    in_loss = kl.coefficient > 0 and kl.place == "loss"
    found["loss"] = found["policy_loss"] + (kl.coefficient * found["kl_loss"] if in_loss else 0.0)
    idle = [not hand[index]["spread"] if pairs else not hand[index]["advantages"].any() for index in kept]
    taught = kept if kl.coefficient else [index for index, nothing in zip(kept, idle, strict=True) if not nothing]
    assert sorted(update.chosen) == taught
    return found | {name: sums[name] / sums["run"] for name in ("clip_fraction", "old_policy_kl")} | {"ratio_max": top}


def better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["id"] == other["id"] and one["reward"] > other["reward"] + 1e-5
