"""The critic's values are those of plain transformers, and policy and critic train side by side as if each were alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import PadOnly, policy_of
from test_logprobs import BOS, EOS, FAMILIES, PAD, VOCABULARY, by_sequence, left_padded, random_sequences, tiny_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from stages.data.batching import TokenBatch, pack, pad
from stages.models import logprobs
from stages.models.critic import ActorCritic, TokenValues, TwoHeads, critic_from_policy
from stages.models.load import load_policy, save_policy
from stages.models.logprobs import TokenLogProbs
from stages.models.reward import RewardModel, load_reward_model, new_reward_model, save_reward_model, with_score_head

BIAS, SCALE = 0.75, -1.5
# Granite and Cohere have no sequence classifier.
CRITICS = [family for family in FAMILIES if family not in ("granite", "cohere")]


def tiny_critic(family: str, **fields: Any) -> RewardModel:
    """A random reward model of a family in eval mode, with an offset and a scale."""
    known = FAMILIES[family] | {"initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, num_labels=1, **known | fields)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokenizer: Any = PadOnly()
    critic = RewardModel(model.eval(), tokenizer, (EOS,))
    critic.calibrate(BIAS, SCALE)
    return critic


def plain_values(critic: RewardModel, ids: np.ndarray, first: int = 1) -> torch.Tensor:
    """The oracle: transformers' own score of each target's prefix alone, as a reward."""
    model: Any = critic.model
    raw = [model(torch.from_numpy(ids[:end])[None]).logits[0, 0] for end in range(first, len(ids))]
    return (torch.stack(raw) + BIAS) * SCALE if raw else torch.zeros(0)


@pytest.mark.parametrize("family", CRITICS)
@torch.no_grad()
def test_a_target_has_the_value_of_what_stands_before_it(family: str) -> None:
    critic, sequences = tiny_critic(family), random_sequences([5, 9, 1, 4])
    module = TokenValues(critic)
    expected = [plain_values(critic, ids) for ids in sequences]
    everything, firsts = (0, 1, 2, 3), [1] * 4
    for batch in (pad(sequences, firsts, PAD, everything), pack(sequences, firsts, PAD, everything), left_padded(sequences)):
        values_BT = module(batch)
        assert values_BT.dtype == torch.float32
        for found_T, expected_T in zip(by_sequence(values_BT, batch), expected, strict=True):
            torch.testing.assert_close(found_T, expected_T, atol=1e-4, rtol=0)
    assert torch.cat(expected).std() > 0.1


def test_only_targets_have_values() -> None:
    critic, sequences = tiny_critic("llama"), random_sequences([7, 5])
    for build in (pad, pack):
        batch = build(sequences, [4, 2], PAD, (0, 1))
        values_BT = TokenValues(critic)(batch)
        assert torch.equal((values_BT != 0).long(), batch.target_BT)
        expected = torch.cat([plain_values(critic, sequences[0], 4), plain_values(critic, sequences[1], 2)])
        torch.testing.assert_close(values_BT[batch.target_BT == 1], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_values_are_float32_whatever_is_multiplied_in_bfloat16() -> None:
    critic, batch = tiny_critic("llama"), pad(random_sequences([9, 6]), [1, 1], PAD, (0, 1))
    exact_BT = TokenValues(critic)(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_BT = TokenValues(critic)(batch)
    model: Any = critic.model
    model.to(torch.bfloat16)
    for values_BT in (mixed_BT, TokenValues(critic)(batch)):
        assert values_BT.dtype == torch.float32
        assert 0 < (values_BT - exact_BT).abs().max() < 0.5
        # bfloat16's 8 bits would make ties of near values.
        raw_N = (values_BT[batch.target_BT == 1] / SCALE - BIAS).double()
        assert (raw_N - raw_N.bfloat16().double()).abs().max() > 1e-4


def test_the_gradient_is_that_of_the_prefixes() -> None:
    critic, sequences = tiny_critic("gpt2"), random_sequences([6, 4])
    weights_N = torch.linspace(-1, 2, 6)
    parameters = list(critic.model.parameters())
    expected = torch.cat([plain_values(critic, sequences[0], 3), plain_values(critic, sequences[1], 1)])
    wanted = torch.autograd.grad((expected * weights_N).sum(), parameters)
    for build in (pad, pack):
        batch = build(sequences, [3, 1], PAD, (0, 1))
        found = torch.autograd.grad((TokenValues(critic)(batch)[batch.target_BT == 1] * weights_N).sum(), parameters)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def actor_critic(family: str = "llama", **fields: Any) -> ActorCritic:
    return ActorCritic(policy_of(tiny_model(family, **fields)), tiny_critic(family))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_both_parts_give_what_each_gives_alone(family: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk is not None:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    module = actor_critic(family)
    actor, critic = TokenLogProbs(tiny_model(family)), TokenValues(tiny_critic(family))
    for build in (pad, pack):
        batch = build(random_sequences([9, 6]), [2, 1], PAD, (0, 1))
        for temperature in (1.0, 0.7):
            plain_BT, expected_BT = actor(batch, temperature), critic(batch)
            logp_BT, entropy_BT = actor.with_entropy(batch, temperature)
            # Bit for bit, with entropy and without: the ratio at a step's first update is exactly 1.
            assert torch.equal(logp_BT, plain_BT)
            with_entropy, without = module(batch, temperature, entropy=True), module(batch, temperature)
            assert torch.equal(with_entropy[0], plain_BT)
            assert torch.equal(without[0], plain_BT)
            assert torch.equal(with_entropy[1], entropy_BT)
            assert not without[1].any()
            assert torch.equal(with_entropy[2], expected_BT)
            assert torch.equal(without[2], expected_BT)
            assert entropy_BT[batch.target_BT == 1].min() > 0


def gradients(module: ActorCritic | TwoHeads, batch: TokenBatch) -> dict[str, torch.Tensor]:
    module.zero_grad()
    logp_BT, entropy_BT, values_BT = module(batch, 1.0, entropy=True)
    (logp_BT.sum() + 0.5 * entropy_BT.sum() + values_BT.sum()).backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert None not in found.values(), [name for name, gradient in found.items() if gradient is None]
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_reach_every_parameter_of_both_parts(family: str) -> None:
    module, sequences = actor_critic(family, tie_word_embeddings=False), random_sequences([9, 6])
    found = gradients(module, pad(sequences, [2, 1], PAD, (0, 1)))
    assert all(gradient.any() for gradient in found.values()), [name for name, one in found.items() if not one.any()]
    ours, theirs = ({id(parameter) for parameter in part.parameters()} for part in (module.actor, module.critic))
    assert not ours & theirs
    assert ours | theirs == {id(parameter) for parameter in module.parameters()}
    assert {name.split(".")[0] for name in found} == {"actor", "critic"}


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_batch_without_targets_gives_zeros_to_every_parameter(family: str, width: int) -> None:
    """DDP waits for the gradient of each, from every process."""
    module = actor_critic(family, tie_word_embeddings=False)
    [ids] = random_sequences([width])
    batch = pad([ids], [width], PAD, ())
    assert not any(found_BT.any() for found_BT in module(batch, 1.0, entropy=True))
    for name, gradient in gradients(module, batch).items():
        assert not gradient.any(), name


def test_one_part_has_no_gradient_from_the_other() -> None:
    module, batch = actor_critic(), pad(random_sequences([5]), [1], PAD, (0,))
    module(batch, 1.0)[0].sum().backward()
    assert all(parameter.grad is None for parameter in module.critic.parameters())
    module.zero_grad()
    module(batch, 1.0)[2].sum().backward()
    assert all(parameter.grad is None for parameter in module.actor.parameters())


def two_heads(family: str, **fields: Any) -> tuple[TwoHeads, ActorCritic]:
    """Two heads on one backbone, and the same weights as a policy and a critic of their own."""
    policy = policy_of(tiny_model(family, **fields))
    critic = with_score_head(policy, seed=3)
    critic.calibrate(BIAS, SCALE)
    alone = deepcopy(critic)
    return TwoHeads(policy, critic), ActorCritic(policy_of(tiny_model(family, **fields)), alone)


@pytest.mark.parametrize("family", CRITICS)
def test_a_shared_backbone_runs_once_and_learns_from_both_heads(family: str) -> None:
    shared, apart = two_heads(family)
    calls: list[int] = []
    shared.actor.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    for build in (pad, pack) if family != "falcon" else (pad,):
        batch = build(random_sequences([9, 6]), [2, 1], PAD, (0, 1))
        for one_BT, other_BT in zip(shared(batch, 0.7, entropy=True), apart(batch, 0.7, entropy=True), strict=True):
            assert torch.equal(one_BT, other_BT)
        assert not shared(batch, 1.0, values=False)[2].any()
        calls.clear()
        found, expected = gradients(shared, batch), gradients(apart, batch)
        assert calls == [1]
        for name, gradient in found.items():
            if name == "critic.weight":
                wanted = expected["critic.model.score.weight"]
            else:
                below = name.removeprefix("actor.model.")
                wanted = expected[name] + expected.get(f"critic.model.{below}", torch.zeros(()))
            torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 5])
def test_two_heads_give_zeros_to_every_parameter_without_targets(width: int) -> None:
    module, _ = two_heads("llama", tie_word_embeddings=False)
    [ids] = random_sequences([width])
    batch = pad([ids], [width], PAD, ())
    assert not any(found_BT.any() for found_BT in module(batch, 1.0, entropy=True))
    assert not any(gradient.any() for gradient in gradients(module, batch).values())


# The critic that starts from the policy.


@pytest.fixture
def checkpoint(init_folder: Path, tmp_path: Path) -> Path:
    save_policy(load_policy(init_folder, seed=3), tmp_path / "policy")
    return tmp_path / "policy"


def test_a_critic_from_the_policy_has_its_backbone_and_expects_nothing(checkpoint: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    critic, policy = critic_from_policy(checkpoint, 0), load_policy(checkpoint)
    ours, theirs = critic.model.base_model.state_dict(), policy.model.base_model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = pad(random_sequences([7, 4]), [2, 1], critic.pad_id, (0, 1))
    values_BT = TokenValues(critic)(batch)
    assert not values_BT.any()
    # The head learns from the first step on, and then the backbone.
    values_BT.sum().backward()
    head: Any = critic.model.score
    assert head.weight.requires_grad
    assert head.weight.grad.any()

    save_reward_model(critic, tmp_path / "critic")
    loaded = load_reward_model(tmp_path / "critic")
    assert (loaded.bias, loaded.scale) == (0.0, 1.0)
    assert not TokenValues(loaded)(batch).any()
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_critic_from_random_weights_is_always_the_same(init_folder: Path) -> None:
    critics = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        critics.append(critic_from_policy(init_folder, 0))
    ours, theirs = (critic.model.state_dict() for critic in critics)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_critic_keeps_the_reward_models_scale(init_folder: Path, tmp_path: Path) -> None:
    reward = new_reward_model(init_folder, seed=2)
    reward.calibrate(BIAS, SCALE)
    save_reward_model(reward, tmp_path / "reward")
    loaded, batch = load_reward_model(tmp_path / "reward"), pad(random_sequences([7, 4]), [2, 1], reward.pad_id, (0, 1))
    values_BT = TokenValues(loaded)(batch)
    assert torch.equal(values_BT, TokenValues(reward)(batch))
    expected = plain_values(loaded, random_sequences([7, 4])[0], 2)
    torch.testing.assert_close(values_BT[0][batch.target_BT[0] == 1], expected, atol=1e-5, rtol=0)
