"""A prompt that comes several times in a batch is read once, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import STOPS, assert_same, forward_logps, policy_of, random_prompts, seeds_for
from test_logprobs import FAMILIES, PAD, VOCABULARY, tiny_model

from stages.models.load import LoadedPolicy
from stages.rollouts.engine import Completion, generate
from stages.specs.common import Sampling

SAMPLING = Sampling(max_new_tokens=14)
# Longer and shorter than the windows of 4, two of them of one length, and one alone.
LENGTHS = [11, 2, 6, 11, 1]
# Which prompt each completion is of.
MIXED = [0, 1, 0, 3, 2, 2, 1, 0, 4, 3, 2, 0, 1, 3]


def distinct_prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(5, VOCABULARY, size=length).tolist() for length in LENGTHS]


@contextmanager
def prompts_read(policy: LoadedPolicy) -> Iterator[list[list[list[int]]]]:
    """The prompts, without padding, of each pass with which a batch begins."""
    seen: list[list[list[int]]] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given["past_key_values"].get_seq_length() == 0:
            rows = zip(given["input_ids"], given["attention_mask"], strict=True)
            seen.append([ids_T[attention_T == 1].tolist() for ids_T, attention_T in rows])

    hook = policy.model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def each_alone(policy: LoadedPolicy, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
    return [generate(policy, [prompt], [seed], sampling, 1)[0] for prompt, seed in zip(prompts, seeds, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completions_of_shared_prompts_are_those_of_each_prompt_alone(family: str, temperature: float) -> None:
    policy = policy_of(tiny_model(family))
    prompts = [distinct_prompts()[number] for number in MIXED]
    seeds, sampling = seeds_for(len(prompts)), SAMPLING.model_copy(update={"temperature": temperature})
    with prompts_read(policy) as read:
        together = generate(policy, prompts, seeds, sampling, 256)
    # Five prompts of fourteen, in order of their lengths; those of one length as they come.
    assert read == [[distinct_prompts()[number] for number in (4, 1, 2, 0, 3)]]
    assert_same(together, each_alone(policy, prompts, seeds, sampling))
    assert {one.finish for one in together} == {"stop", "length"}
    assert len({tuple(one.ids) for one in together}) > 10
    for prompt, completion in zip(prompts, together, strict=True):
        expected = forward_logps(policy, prompt, completion, temperature)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_a_group_that_batches_cut_is_read_once_in_each(family: str, size: int) -> None:
    policy = policy_of(tiny_model(family))
    prompts = [prompt for prompt in random_prompts(3, seed=1) for _ in range(4)]
    seeds = seeds_for(12)
    with prompts_read(policy) as read:
        found = generate(policy, prompts, seeds, SAMPLING, size)
    ordered = sorted(prompts, key=len)
    batches = [ordered[start : start + size] for start in range(0, 12, size)]
    assert read == [[prompt for place, prompt in enumerate(batch) if prompt not in batch[:place]] for batch in batches]
    assert_same(found, each_alone(policy, prompts, seeds, SAMPLING))


def test_different_prompts_are_all_read() -> None:
    policy = policy_of(tiny_model("llama"))
    # One the end of another; one that padding makes look like another; one that is another, backwards.
    prompts = [[7, 8], [6, 7, 8], [8, 7], [PAD, 9], [9], [PAD], [7, 8]]
    with prompts_read(policy) as read:
        found = generate(policy, prompts, seeds_for(7), SAMPLING, 256)
    assert read == [[[9], [PAD], [7, 8], [8, 7], [PAD, 9], [6, 7, 8]]]
    assert_same(found, each_alone(policy, prompts, seeds_for(7), SAMPLING))


def test_one_group_is_one_prompt() -> None:
    policy = policy_of(tiny_model("qwen2"))
    prompts = [distinct_prompts()[0]] * 9
    with prompts_read(policy) as read:
        found = generate(policy, prompts, seeds_for(9), SAMPLING, 256)
    assert read == [prompts[:1]]
    assert_same(found, each_alone(policy, prompts, seeds_for(9), SAMPLING))
    # Greedy, all are the same.
    greedy = generate(policy, prompts, seeds_for(9), Sampling(temperature=0, max_new_tokens=14), 256)
    assert len({tuple(one.ids) for one in greedy}) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_of_a_prompt_keep_within_the_context(family: str) -> None:
    fields = {"n_positions" if family == "gpt2" else "max_position_embeddings": 16}
    policy = policy_of(tiny_model(family, **fields), [VOCABULARY])
    prompts = [[5] * length for length in (15, 3, 10, 3, 15, 10, 3)]
    found = generate(policy, prompts, seeds_for(7), SAMPLING, 256)
    assert [len(one.ids) for one in found] == [1, 13, 6, 13, 1, 6, 13]
    assert_same(found, each_alone(policy, prompts, seeds_for(7), SAMPLING))


def test_every_stop_ends_its_own_copy() -> None:
    """Finished copies leave the batch while others go on."""
    policy = policy_of(tiny_model("mistral"))
    prompts, sampling = [prompt for prompt in random_prompts(4) for _ in range(8)], Sampling(max_new_tokens=40)
    found = generate(policy, prompts, seeds_for(32), sampling, 256)
    assert_same(found, each_alone(policy, prompts, seeds_for(32), sampling))
    lengths = {len(one.ids) for one in found}
    assert len(lengths) > 8
    assert all((one.ids[-1] in STOPS) == (one.finish == "stop") for one in found)
