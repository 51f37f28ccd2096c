"""Generation with a KV cache: prompts sorted by length, left-padded, finished sequences dropped from the batch as it shrinks.
A prompt that comes several times is read once: its keys and values are copied to all its completions.

Each sample draws its tokens by inverting the distribution's cumulative sum at its own uniform numbers, so what is sampled
does not depend on which other samples share the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import DynamicCache

from stages.errors import InputError
from stages.models.load import LoadedPolicy
from stages.rollouts.seeds import uniforms
from stages.specs.common import Sampling


@dataclass(frozen=True)
class Completion:
    """A sampled completion. `ids` include the EOS when `finish` is `stop`; a truncated one (`length`) has none.

    `logps` are float32 log-probs of the sampled tokens under the policy at the sampling temperature (at 1 for greedy
    decoding), before top-p and top-k cut anything off.
    """

    ids: list[int]
    logps: list[float]
    finish: Literal["stop", "length"]


def generate(
    policy: LoadedPolicy,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    ended: Callable[[int, Completion], None] = lambda *_: None,
) -> list[Completion]:
    """One completion for each prompt (repeat a prompt for a group). The model must be in eval mode. `ended` is told of each as
    soon as it has ended, with its prompt's place, while others of its batch may still go on.

    Raises InputError when a prompt leaves no room for a token in the model's context.
    """
    for place, prompt in enumerate(prompts):
        if not 0 < len(prompt) < policy.context:
            raise InputError(
                f"prompt {place} has {len(prompt)} tokens: it must have one or more, "
                f"and leave room for a completion in the model's context of {policy.context}"
            )
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    done: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        seeds_B = np.array([seeds[p] for p in places], np.uint64)
        for b, completion in _generate_batch(policy, [prompts[p] for p in places], seeds_B, sampling):
            done[places[b]] = completion
            ended(places[b], completion)
    return [done[place] for place in range(len(prompts))]


@torch.no_grad()
def _generate_batch(
    policy: LoadedPolicy, prompts: Sequence[Sequence[int]], seeds_B: np.ndarray, sampling: Sampling
) -> Iterator[tuple[int, Completion]]:
    """Each row's completion, with the row's number, when it has ended."""
    model, device = policy.model, policy.model.device
    width = max(map(len, prompts))
    budget_B = torch.tensor([min(sampling.max_new_tokens, policy.context - len(prompt)) for prompt in prompts], device=device)
    steps = int(budget_B.max())
    uniforms_BT = torch.from_numpy(uniforms(seeds_B, steps)).to(device)
    stops = torch.tensor(policy.stops, device=device)

    attention_BT = torch.zeros((len(prompts), width + steps), dtype=torch.int64, device=device)
    for b, prompt in enumerate(prompts):
        attention_BT[b, width - len(prompt) : width] = 1
    sampled_BT = torch.full((len(prompts), steps), policy.pad_id, device=device)
    logps_BT = torch.zeros((len(prompts), steps), device=device)
    # The sequences still in the cache, as rows of the full batch; those among them that still want tokens.
    rows = torch.arange(len(prompts), device=device)
    open_R = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache = DynamicCache(config=model.config)
    logits_RV, positions_R = _read_prompts(policy, prompts, attention_BT[:, :width], cache)
    for t in range(steps):
        tokens_R, logps_R = draw(logits_RV, uniforms_BT[rows, t], sampling)
        live = rows[open_R]
        sampled_BT[live, t], logps_BT[live, t] = tokens_R[open_R], logps_R[open_R]
        stopped_R = torch.isin(tokens_R, stops)
        ended_R = open_R & (stopped_R | (t + 1 >= budget_B[rows]))
        open_R = open_R & ~ended_R
        attention_BT[rows, width + t] = 1
        # A sequence that is done stays where it is: past the context there may be no position to look up.
        positions_R = positions_R + open_R.long()
        count = int(open_R.sum())
        if count < len(live):
            places = rows[ended_R]
            columns = (places, sampled_BT[places, : t + 1], logps_BT[places, : t + 1], stopped_R[ended_R])
            for b, ids, logps, stopped in zip(*(column.tolist() for column in columns), strict=True):
                yield b, Completion(ids, logps, "stop" if stopped else "length")
        if count == 0:
            return
        if count <= 0.75 * len(rows):
            keep = open_R.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, open_R, tokens_R, positions_R = rows[keep], open_R[keep], tokens_R[keep], positions_R[keep]
        logits_RV = model(
            input_ids=tokens_R[:, None],
            attention_mask=attention_BT[rows, : width + t + 1],
            position_ids=positions_R[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def _read_prompts(
    policy: LoadedPolicy, prompts: Sequence[Sequence[int]], attention_BT: torch.Tensor, cache: DynamicCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill the cache; logits_BV of the first tokens, and positions_B of the prompts' last ones. Equal prompts are read once."""
    device, width = policy.model.device, attention_BT.shape[1]
    firsts: dict[tuple[int, ...], int] = {}
    same_B = [firsts.setdefault(tuple(prompt), len(firsts)) for prompt in prompts]
    chosen = torch.tensor([same_B.index(u) for u in range(len(firsts))], device=device)
    ids_UT = torch.full((len(firsts), width), policy.pad_id, device=device)
    for u, prompt in enumerate(firsts):
        ids_UT[u, width - len(prompt) :] = torch.tensor(prompt, device=device)
    attention_UT = attention_BT[chosen]
    positions_UT = (attention_UT.cumsum(-1) - 1).clamp(min=0)
    logits_UV = policy.model(
        input_ids=ids_UT,
        attention_mask=attention_UT,
        position_ids=positions_UT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    if len(firsts) == len(prompts):
        return logits_UV, positions_UT[:, -1]
    copies_B = torch.tensor(same_B, device=device)
    cache.batch_select_indices(copies_B)
    return logits_UV[copies_B], positions_UT[copies_B, -1]


def draw(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens_B, int64, and their log-probs, float32, by inverting the cumulative distribution at `uniforms_B`."""
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, _gather(logits_BV.log_softmax(-1), tokens_B)
    logp_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    probs_BV = truncate(logp_BV.exp(), sampling)
    cumulative_BV = probs_BV.double().cumsum(-1)
    goals_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    tokens_B = torch.searchsorted(cumulative_BV, goals_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B, _gather(logp_BV, tokens_B)


def truncate(probs_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Set to 0 the tokens that top-k and top-p leave out; what is left is not renormalised."""
    if 0 < sampling.top_k < probs_BV.shape[-1]:
        least_B1 = probs_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs_BV = probs_BV.masked_fill(probs_BV < least_B1, 0.0)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        drop_BV = before_BV >= sampling.top_p * sorted_BV.sum(-1, keepdim=True)
        probs_BV = probs_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), 0.0)
    return probs_BV


def _gather(logp_BV: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor:
    return logp_BV.gather(-1, tokens_B[:, None]).squeeze(1)
