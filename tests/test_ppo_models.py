"""The models of PPO: where the critic starts, what is trained, what is refused."""

from __future__ import annotations

import math
from typing import Any

import ppo_bench
import pytest
import torch
from conftest import INIT
from ppo_bench import (
    Bench,
    classifier,
    close,
    folder,
    language,
    metrics,
    plain_values,
    series,
)
from pydantic import ValidationError
from safetensors.torch import load_file

import stages.ppo
from stages.errors import InputError
from stages.models.load import load_policy, save_checkpoint
from stages.models.reward import new_reward_model, save_reward_model
from stages.specs.ppo import PpoConfig

folders = ppo_bench.folders
bench = ppo_bench.bench


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
