"""What PPO learns, and what its trust regions, bonus and demonstrations hold back."""

from __future__ import annotations

from typing import Any

import numpy as np
import ppo_bench
import pytest
import torch
from ppo_bench import (
    Bench,
    language,
    metrics,
    plain_logp,
    series,
)

from stages.models.load import load_policy

folders = ppo_bench.folders
bench = ppo_bench.bench


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


def test_demonstrations_hold_on_to_what_they_show(bench: Bench) -> None:
    changes: dict[str, Any] = {"steps": 6, "ptx": {"weight": 2.0, "batch_size": 11}}
    losses = series(bench.train(inputs={"ptx": bench.folders["ptx"]}, **changes), "ptx_loss")
    assert losses[-1] < losses[0] - 0.5
