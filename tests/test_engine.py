"""Generation: what is sampled, its log-probs, where it stops, and that the batch has no say in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logprobs import FAMILIES, PAD, VOCABULARY, tiny_model
from transformers import DynamicCache, PreTrainedModel

from stages.data.batching import pad
from stages.errors import InputError
from stages.models.load import LoadedPolicy
from stages.models.logprobs import TokenLogProbs
from stages.rollouts import engine
from stages.rollouts.engine import Completion, draw, generate, truncate
from stages.rollouts.seeds import sample_seed
from stages.specs.common import Sampling

STOPS = (2, 3, 4)


class PadOnly:
    """As much of a tokenizer as the engine reads."""

    pad_token_id = PAD


def policy_of(model: PreTrainedModel, stops: Sequence[int] = STOPS) -> LoadedPolicy:
    tokenizer: Any = PadOnly()
    return LoadedPolicy(model, tokenizer, tuple(stops))


@pytest.fixture(scope="module")
def policy() -> LoadedPolicy:
    return policy_of(tiny_model("llama"))


def random_prompts(count: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCABULARY, size=rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def seeds_for(count: int) -> list[int]:
    return [sample_seed(0, 0, f"row {i}", 0) for i in range(count)]


def assert_same(one: Sequence[Completion], other: Sequence[Completion]) -> None:
    assert [(c.ids, c.finish) for c in one] == [(c.ids, c.finish) for c in other]
    for a, b in zip(one, other, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-5)


def forward_logps(policy: LoadedPolicy, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """The training forward's log-probs of a completion."""
    ids = np.array([*prompt, *completion.ids])
    with torch.no_grad():
        return TokenLogProbs(policy.model)(pad([ids], [len(prompt)], PAD, (0,)), temperature)[0, len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_has_no_say_in_what_is_sampled(family: str) -> None:
    policy = policy_of(tiny_model(family))
    prompts, seeds, sampling = random_prompts(20), seeds_for(20), Sampling(max_new_tokens=12)
    together = generate(policy, prompts, seeds, sampling, 256)
    assert {c.finish for c in together} == {"stop", "length"}
    assert len({tuple(c.ids) for c in together}) > 10
    for size in (1, 3):
        assert_same(generate(policy, prompts, seeds, sampling, size), together)
    order = np.random.default_rng(1).permutation(20).tolist()
    shuffled = generate(policy, [prompts[i] for i in order], [seeds[i] for i in order], sampling, 7)
    assert_same(shuffled, [together[i] for i in order])


def test_samples_of_one_prompt_differ_by_their_seeds(policy: LoadedPolicy) -> None:
    prompt, sampling = random_prompts(1)[0], Sampling(max_new_tokens=12)
    drawn = generate(policy, [prompt] * 8, seeds_for(8), sampling, 256)
    assert len({tuple(c.ids) for c in drawn}) == 8
    assert_same(generate(policy, [prompt], [seeds_for(8)[5]], sampling, 256), [drawn[5]])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probs_are_those_of_the_training_forward(family: str, temperature: float) -> None:
    policy = policy_of(tiny_model(family))
    prompts = random_prompts(24)
    drawn = generate(policy, prompts, seeds_for(24), Sampling(temperature=temperature, max_new_tokens=14), 256)
    assert len({len(c.ids) for c in drawn}) > 3
    for prompt, completion in zip(prompts, drawn, strict=True):
        expected = forward_logps(policy, prompt, completion, temperature)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-5, rtol=0)


def test_log_probs_come_before_anything_is_cut_off(policy: LoadedPolicy) -> None:
    prompts = random_prompts(6)
    drawn = generate(policy, prompts, seeds_for(6), Sampling(top_k=3, top_p=0.5, max_new_tokens=8), 256)
    for prompt, completion in zip(prompts, drawn, strict=True):
        expected = forward_logps(policy, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_that_of_transformers(family: str) -> None:
    policy = policy_of(tiny_model(family))
    model: Any = policy.model
    prompts = random_prompts(12)
    drawn = generate(policy, prompts, seeds_for(12), Sampling(temperature=0, max_new_tokens=15), 256)
    for prompt, completion in zip(prompts, drawn, strict=True):
        ids = torch.tensor([prompt])
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 15, "eos_token_id": list(STOPS), "pad_token_id": PAD}
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
        assert completion.ids == whole[len(prompt) :]
        assert completion.finish == ("stop" if whole[-1] in STOPS else "length")
        # Greedy log-probs are the policy's own, at temperature 1.
        expected = forward_logps(policy, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-5, rtol=0)


def test_every_stop_token_stops_and_nothing_follows_it() -> None:
    model = tiny_model("llama")
    prompts, seeds = random_prompts(60), seeds_for(60)
    sampling = Sampling(max_new_tokens=40)
    endless = generate(policy_of(model, [VOCABULARY]), prompts, seeds, sampling, 256)
    assert {(len(c.ids), c.finish) for c in endless} == {(40, "length")}
    for stops in ([2], [2, 3, 4, 30]):
        drawn = generate(policy_of(model, stops), prompts, seeds, sampling, 256)
        for completion, whole in zip(drawn, endless, strict=True):
            first = next((t for t, token in enumerate(whole.ids) if token in stops), None)
            assert completion.ids == whole.ids[: None if first is None else first + 1]
            assert completion.finish == ("length" if first is None else "stop")
        assert {c.ids[-1] for c in drawn if c.finish == "stop"} == set(stops)
        assert any(c.finish == "length" for c in drawn) or len(stops) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_prompt_has_its_own_budget_within_the_context(family: str) -> None:
    policy = policy_of(
        tiny_model(family, **{"n_positions" if family == "gpt2" else "max_position_embeddings": 32}), [VOCABULARY]
    )
    assert policy.context == 32
    prompts = [[5] * length for length in (31, 30, 25, 4, 3, 2, 2, 1, 1, 1)]
    drawn = generate(policy, prompts, seeds_for(10), Sampling(max_new_tokens=20), 256)
    assert [len(c.ids) for c in drawn] == [1, 2, 7, 20, 20, 20, 20, 20, 20, 20]
    assert {c.finish for c in drawn} == {"length"}
    for prompt, completion in zip(prompts, drawn, strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logps), forward_logps(policy, prompt, completion, 1.0), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("length", [0, 64, 65])
def test_a_prompt_that_leaves_no_room_is_refused(policy: LoadedPolicy, length: int) -> None:
    with pytest.raises(InputError, match=rf"prompt 1 has {length} tokens.* context of 64"):
        generate(policy, [[5], [5] * length], [1, 2], Sampling(), 256)


def test_finished_sequences_leave_the_batch(policy: LoadedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    select = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, keep: kept.append(len(keep)) or select(self, keep))
    generate(policy, random_prompts(40), seeds_for(40), Sampling(max_new_tokens=40), 256)
    assert len(kept) > 2
    assert kept == sorted(kept, reverse=True)
    assert kept[0] <= 30


@pytest.mark.parametrize("size", [1, 7, 40])
def test_each_completion_is_told_of_as_soon_as_it_has_ended(
    policy: LoadedPolicy, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, Completion, int]] = []
    drawn: list[int] = []
    monkeypatch.setattr(engine, "draw", lambda *given: drawn.append(len(given[0])) or draw(*given))
    prompts, seeds, sampling = random_prompts(40), seeds_for(40), Sampling(max_new_tokens=20)
    found = generate(policy, prompts, seeds, sampling, size, lambda place, one: told.append((place, one, len(drawn))))
    assert sorted(place for place, _, _ in told) == list(range(40))
    assert all(found[place] is one for place, one, _ in told)
    # Batches are of the shortest prompts first; in each, what has `n` tokens is told of between the `n`th draw and the next.
    order = sorted(range(40), key=lambda place: len(prompts[place]))
    before = 0
    for start in range(0, 40, size):
        batch = [found[place] for place in order[start : start + size]]
        times = [when - before for place, _, when in told if place in order[start : start + size]]
        assert times == sorted(len(one.ids) for one in batch)
        before += max(len(one.ids) for one in batch)
    assert len(drawn) == before


def test_what_is_told_is_done_outside_of_the_engine_s_gradients_off(policy: LoadedPolicy) -> None:
    modes: list[bool] = []
    generate(
        policy, random_prompts(5), seeds_for(5), Sampling(max_new_tokens=9), 3, lambda *_: modes.append(torch.is_grad_enabled())
    )
    assert modes == [True] * 5
    assert torch.is_grad_enabled()


# The draw itself.


def grid(count: int) -> torch.Tensor:
    """Stratified numbers in [0, 1): the frequencies that they draw are the probabilities, to one part in `count` a token."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    count = 20_000
    tokens_B, logps_B = draw(logits_V.expand(count, -1), grid(count), Sampling(temperature=temperature))
    expected = (logits_V.double() / temperature).softmax(-1)
    frequencies = torch.bincount(tokens_B, minlength=50) / count
    assert (frequencies - expected).abs().max() < 1.01 / count
    torch.testing.assert_close(logps_B.double(), expected.log()[tokens_B], atol=1e-5, rtol=0)


LARGEST = 1 - 2.0**-53
logits = st.lists(st.one_of(st.floats(-30, 30, width=32), st.just(-math.inf)), min_size=1, max_size=8).filter(
    lambda values: max(values) > -math.inf
)


@settings(deadline=None)
@given(values=logits, uniform=st.one_of(st.just(0.0), st.just(LARGEST), st.floats(0, LARGEST)))
def test_a_token_without_probability_is_never_drawn(values: list[float], uniform: float) -> None:
    tokens_B, logps_B = draw(torch.tensor([values]), torch.tensor([uniform], dtype=torch.float64), Sampling())
    assert values[int(tokens_B)] > -math.inf
    assert float(logps_B) > -math.inf


@settings(deadline=None)
@given(values=logits)
def test_temperature_zero_takes_the_likeliest(values: list[float]) -> None:
    tokens_B, logps_B = draw(torch.tensor([values]), torch.tensor([0.99], dtype=torch.float64), Sampling(temperature=0))
    assert values[int(tokens_B)] == max(values)
    assert float(logps_B) == pytest.approx(float(torch.tensor(values).log_softmax(-1).max()), abs=1e-6)


def kept_tokens(weights: list[int], top_k: int, top_p: float) -> set[int]:
    """The definition: the k heaviest, then the fewest of the heaviest of these that have the share `top_p` of their weight."""
    heaviest = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or None]
    whole, kept = sum(weights[token] for token in heaviest), []
    for token in heaviest:
        if sum(weights[one] for one in kept) >= top_p * whole:
            break
        kept.append(token)
    return set(kept)


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True),
    top_k=st.integers(0, 9),
    top_p=st.integers(1, 64).map(lambda n: n / 64),
)
def test_top_k_and_top_p_keep_what_their_definition_keeps(weights: list[int], top_k: int, top_p: float) -> None:
    # Whole numbers and shares of 64: every sum and product is exact in float32.
    probs_BV = torch.tensor([weights], dtype=torch.float32) / 8192
    sampling = Sampling(top_k=top_k, top_p=top_p)
    cut_BV = truncate(probs_BV, sampling)
    kept = kept_tokens(weights, top_k, top_p)
    assert set(cut_BV[0].nonzero().flatten().tolist()) == kept
    assert torch.equal(cut_BV[0, sorted(kept)], probs_BV[0, sorted(kept)])

    tokens_B, _ = draw(probs_BV.log().expand(4000, -1), grid(4000), Sampling(top_k=top_k))
    first = kept_tokens(weights, top_k, 1.0)
    shares = torch.tensor([float(w) if token in first else 0.0 for token, w in enumerate(weights)])
    frequencies = torch.bincount(tokens_B, minlength=len(weights)) / 4000
    torch.testing.assert_close(frequencies, shares / shares.sum(), atol=1.1 / 4000, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.875, 3), (0.9, 4), (1.0, 5)])
def test_top_p_stops_where_the_share_is_reached_exactly(top_p: float, kept: int) -> None:
    probs_BV = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]])
    assert int((truncate(probs_BV, Sampling(top_p=top_p)) > 0).sum()) == kept


def test_equal_probabilities_at_the_border_of_top_k_are_all_kept() -> None:
    cut_BV = truncate(torch.tensor([[0.25, 0.125, 0.25, 0.25, 0.125]]), Sampling(top_k=2))
    assert cut_BV.tolist() == [[0.25, 0.0, 0.25, 0.25, 0.0]]
