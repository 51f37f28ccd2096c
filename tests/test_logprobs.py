"""Log-probs do not depend on how sequences are laid out (contract 1), nor on the weights' type (contract 7)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.data.batching import TokenBatch, pack, pad, split_by_length
from stages.errors import InputError
from stages.models import logprobs
from stages.models.logprobs import TokenLogProbs, check_log_probs
from stages.objectives.likelihood import nll_loss

VOCABULARY = 61
PAD, BOS, EOS = 0, 1, 2
LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}
# Windows shorter than the sequences, scalings and caps far from 1, so that leaving one out shows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": LLAMA,
    "mistral": LLAMA | {"sliding_window": 4},
    "gemma2": LLAMA | {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    "granite": LLAMA | {"logits_scaling": 3.0},
    "cohere": LLAMA | {"logit_scale": 0.25},
}


def tiny_model(family: str, **fields: Any) -> PreTrainedModel:
    """A random model of a family in eval mode: every parameter is random, norms and biases too."""
    known = FAMILIES[family] | {"initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(family, **known | {"vocab_size": VOCABULARY} | fields)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def random_sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, size=length) for length in lengths]


@torch.no_grad()
def plain_logps(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """The oracle: transformers' own logits of one sequence alone."""
    ids_T = torch.from_numpy(ids)
    logp_TV = model(ids_T[None], use_cache=False).logits[0].float().log_softmax(-1)
    return logp_TV[:-1].gather(-1, ids_T[1:, None]).squeeze(1)


def left_padded(sequences: list[np.ndarray]) -> TokenBatch:
    width = max(map(len, sequences))
    ids_BT = torch.full((len(sequences), width), PAD)
    attention_BT, target_BT, positions_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    for b, ids in enumerate(sequences):
        start = width - len(ids)
        ids_BT[b, start:] = torch.from_numpy(ids)
        attention_BT[b, start:] = 1
        target_BT[b, start + 1 :] = 1
        positions_BT[b, start:] = torch.arange(len(ids))
    return TokenBatch(ids_BT, positions_BT, attention_BT, target_BT, tuple(range(len(sequences))))


def by_sequence(logp_BT: torch.Tensor, batch: TokenBatch) -> list[torch.Tensor]:
    """Each sequence's log-probs, from whichever layout: its targets in order. A sequence of one token has none."""
    starts = (batch.position_ids_BT == 0) & (batch.attention_BT == 1 if batch.attention_BT is not None else True)
    numbers = starts.flatten().cumsum(0)
    kept = batch.target_BT.flatten() == 1
    assert torch.equal(logp_BT.flatten()[~kept], torch.zeros(int((~kept).sum())))
    return [logp_BT.flatten()[kept & (numbers == n + 1)] for n in range(int(numbers.max()))]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_layout_gives_each_sequence_what_it_has_alone(family: str) -> None:
    model = tiny_model(family)
    module = TokenLogProbs(model)
    sequences = random_sequences([5, 13, 1, 8, 3, 8])
    expected = [plain_logps(model, ids) for ids in sequences]
    everything, firsts = tuple(range(6)), [1] * 6
    batches = {
        "right-padded": pad(sequences, firsts, PAD, everything),
        "packed": pack(sequences, firsts, PAD, everything),
        "left-padded": left_padded(sequences),
    }
    for layout, batch in batches.items():
        for place, logp_T in enumerate(by_sequence(module(batch), batch)):
            torch.testing.assert_close(logp_T, expected[place], atol=1e-5, rtol=0, msg=lambda m, w=layout: f"{w}: {m}")
    for place, ids in enumerate(sequences):
        alone = module(pad([ids], [1], PAD, (place,)))
        torch.testing.assert_close(alone[0, 1:], expected[place], atol=1e-5, rtol=0)
    # The oracle tells: the same tokens after another sequence have other log-probs.
    assert (plain_logps(model, np.concatenate(sequences[:2]))[5:] - expected[1]).abs().max() > 0.01


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    budget=st.integers(1, 30),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_buckets_cover_every_sequence_once_with_its_own_log_probs(
    llama: PreTrainedModel, lengths: list[int], budget: int, packed: bool, seed: int
) -> None:
    sequences = random_sequences(lengths, seed)
    groups = split_by_length(lengths, budget, packed)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        batch = (pack if packed else pad)([sequences[i] for i in group], [1] * len(group), PAD, tuple(group))
        assert len(group) == 1 or batch.ids_BT.numel() <= budget
        for place, logp_T in zip(group, by_sequence(TokenLogProbs(llama)(batch), batch), strict=True):
            torch.testing.assert_close(logp_T, plain_logps(llama, sequences[place]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@torch.no_grad()
def test_the_temperature_divides_the_logits(llama: PreTrainedModel, temperature: float) -> None:
    [ids] = random_sequences([9])
    logits_TV = llama(torch.from_numpy(ids)[None]).logits[0]
    expected = (logits_TV / temperature).log_softmax(-1)[:-1].gather(-1, torch.from_numpy(ids)[1:, None]).squeeze(1)
    logp_BT = TokenLogProbs(llama)(pad([ids], [1], PAD, (0,)), temperature)
    torch.testing.assert_close(logp_BT[0, 1:], expected, atol=1e-5, rtol=0)


def test_only_targets_have_log_probs(llama: PreTrainedModel) -> None:
    sequences = random_sequences([7, 5])
    batch = pad(sequences, [4, 5], PAD, (0, 1))
    logp_BT = TokenLogProbs(llama)(batch)
    assert torch.equal((logp_BT != 0).long(), batch.target_BT)
    torch.testing.assert_close(logp_BT[0, 4:], plain_logps(llama, sequences[0])[3:], atol=1e-5, rtol=0)


def gradients(model: PreTrainedModel, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logp_BT = TokenLogProbs(model)(batch)
    nll_loss(logp_BT, batch.target_BT).backward()
    return logp_BT.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("chunk", [1, 3, 13])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_give_the_same_values_and_gradients(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    batch = pad(random_sequences([9, 6]), [2, 1], PAD, (0, 1))
    logp_BT, gradient = gradients(model, batch)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    calls = []
    whole = logprobs.head_logits
    monkeypatch.setattr(logprobs, "head_logits", lambda m, hidden: calls.append(len(hidden)) or whole(m, hidden))
    chunked_BT, chunked_gradient = gradients(model, batch)
    # 12 targets: the forward's chunks, and for more than one again in the backward pass.
    sizes = [min(chunk, 12 - start) for start in range(0, 12, chunk)]
    assert sorted(calls) == sorted(sizes * (2 if len(sizes) > 1 else 1))
    torch.testing.assert_close(chunked_BT, logp_BT, atol=1e-6, rtol=0)
    torch.testing.assert_close(chunked_gradient, gradient, atol=1e-6, rtol=1e-5)
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_weights_give_float32_log_probs(family: str) -> None:
    model: Any = tiny_model(family)
    model.to(torch.bfloat16)
    sequences = random_sequences([9, 6])
    batch = pad(sequences, [1, 1], PAD, (0, 1))
    logp_BT = TokenLogProbs(model)(batch)
    assert logp_BT.dtype == torch.float32
    assert nll_loss(logp_BT, batch.target_BT).dtype == torch.float32
    logits_BTV = model(batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False).logits
    assert logits_BTV.dtype == torch.bfloat16
    expected = logits_BTV.float().log_softmax(-1)[:, :-1].gather(-1, batch.ids_BT[:, 1:, None]).squeeze(-1)
    wanted = batch.target_BT[:, 1:] == 1
    # Normalised in float32, not in bfloat16, whose log-probs here lie 1/64 apart.
    torch.testing.assert_close(logp_BT[:, 1:][wanted], expected[wanted], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
def test_without_a_target_the_log_probs_are_zeros_that_reach_every_parameter(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=False)
    batch = pad(random_sequences([4, 2]), [4, 2], PAD, (0, 1))
    assert int(batch.target_BT.sum()) == 0
    logp_BT = TokenLogProbs(model)(batch)
    assert torch.equal(logp_BT, torch.zeros(2, 4))
    nll_loss(logp_BT, batch.target_BT, 5.0).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# Entropy.


def plain_entropy(model: Any, ids: np.ndarray, temperature: float) -> torch.Tensor:
    """The oracle: -sum p log p of the softmax at each position from which a token is drawn, in float64."""
    probs_TV = (model(torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1].double() / temperature).softmax(-1)
    return -(probs_TV * probs_TV.log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
@torch.no_grad()
def test_the_entropy_is_that_of_the_distribution_drawn_from(family: str, temperature: float) -> None:
    model, sequences = tiny_model(family), random_sequences([5, 9, 1, 4])
    firsts, everything = [2, 1, 1, 3], (0, 1, 2, 3)
    for batch in (pad(sequences, firsts, PAD, everything), pack(sequences, firsts, PAD, everything)):
        logp_BT, entropy_BT = TokenLogProbs(model).with_entropy(batch, temperature)
        expected = [plain_entropy(model, ids, temperature)[first - 1 :] for ids, first in zip(sequences, firsts, strict=True)]
        assert entropy_BT.dtype == torch.float32
        torch.testing.assert_close(entropy_BT[batch.target_BT == 1].double(), torch.cat(expected), atol=1e-5, rtol=0)
        assert not entropy_BT[batch.target_BT == 0].any()
        assert torch.equal(logp_BT, TokenLogProbs(model)(batch, temperature))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_entropy_has_a_gradient_when_it_is_asked_for(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    model, sequences = tiny_model("llama"), random_sequences([6, 4])
    parameters, batch = list(model.parameters()), pad(sequences, [1, 1], PAD, (0, 1))
    expected = sum((plain_entropy(model, ids, 0.8).sum() for ids in sequences), torch.zeros(()))
    wanted = torch.autograd.grad(expected, parameters)
    found = torch.autograd.grad(TokenLogProbs(model).with_entropy(batch, 0.8)[1].sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    logp_BT, none_BT = TokenLogProbs(model).with_entropy(batch, 0.8, entropy=False)
    assert not none_BT.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(none_BT.sum(), parameters, retain_graph=True))
    # And it leaves the log-probs' gradient alone.
    with_BT = TokenLogProbs(model).with_entropy(batch, 0.8)[0]
    assert torch.equal(with_BT, logp_BT)
    pairs = zip(torch.autograd.grad(with_BT.sum(), parameters), torch.autograd.grad(logp_BT.sum(), parameters), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_token_without_probability_has_no_part_in_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, [ids] = logprobs.head_logits, random_sequences([6])

    def cut(model: Any, hidden_NH: torch.Tensor) -> torch.Tensor:
        return whole(model, hidden_NH).index_fill(-1, torch.tensor([PAD]), -torch.inf)

    monkeypatch.setattr(logprobs, "head_logits", cut)
    model = tiny_model("llama")
    entropy_BT = TokenLogProbs(model).with_entropy(pad([ids], [1], PAD, (0,)), 1.0)[1]
    probs_TV = cut(model, model.base_model(torch.from_numpy(ids)[None]).last_hidden_state[0, :-1])[:, 1:].softmax(-1)
    torch.testing.assert_close(entropy_BT[0, 1:], -(probs_TV * probs_TV.log()).sum(-1), atol=1e-5, rtol=0)
    entropy_BT.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("entropy", [True, False])
def test_without_a_target_the_entropy_is_zeros_that_reach_every_parameter(entropy: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    found = TokenLogProbs(model).with_entropy(pad(random_sequences([3]), [3], PAD, ()), 1.0, entropy)
    for found_BT in found:
        assert torch.equal(found_BT, torch.zeros(1, 3))
        gradients = torch.autograd.grad(found_BT.sum(), list(model.parameters()), retain_graph=True)
        assert not any(gradient.any() for gradient in gradients)


def test_packed_positions_restart() -> None:
    batch = pack(random_sequences([3, 2, 4]), [1, 1, 2], PAD, (5, 6, 7))
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch.target_BT.tolist() == [[0, 1, 1, 0, 1, 0, 0, 1, 1]]
    assert batch.attention_BT is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes_for_what_is_supported(family: str) -> None:
    check_log_probs(tiny_model(family), packed=True)


def test_the_check_refuses_what_would_be_silently_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head whose scaling is not known, and a family that mixes packed sequences (Falcon's attention ignores positions)."""
    granite = tiny_model("granite")
    with monkeypatch.context() as patched:
        patched.setattr(logprobs, "head_logits", lambda model, hidden: model.get_output_embeddings()(hidden).float())
        with pytest.raises(InputError, match=r"granite: wrong by .* nats in its log-probs"):
            check_log_probs(granite, packed=False)
    fields = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}
    monkeypatch.setitem(FAMILIES, "falcon", fields)
    falcon = tiny_model("falcon")
    check_log_probs(falcon, packed=False)
    with pytest.raises(InputError, match=r"falcon: wrong by .* packed sequences: set runtime\.packed to false"):
        check_log_probs(falcon, packed=True)
