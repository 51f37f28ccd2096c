"""The divergence from a teacher at a batch's targets, against plain transformers' two forwards on each sequence alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_logprobs import FAMILIES, PAD, VOCABULARY, by_sequence, left_padded, random_sequences, tiny_model
from torch import nn
from transformers import PreTrainedModel

from stages.data.batching import TokenBatch, pack, pad
from stages.models import divergence, logprobs
from stages.models.divergence import TokenDivergence
from stages.models.logprobs import heads_at_targets
from stages.objectives.distillation import Direction

DIRECTIONS: tuple[Direction, ...] = ("forward_kl", "reverse_kl")
both = pytest.mark.parametrize("direction", DIRECTIONS)
WIDER = 2 * VOCABULARY


def other_model(family: str = "llama", **fields: Any) -> PreTrainedModel:
    """A teacher: as the family's tiny model, with other weights."""
    model = tiny_model(family, **fields)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def plain_kl(student: Any, teacher: Any, ids: np.ndarray, direction: Direction) -> torch.Tensor:
    """The oracle: of all tokens but the first, from both models' own logits of one sequence alone, in float64."""
    ids_1T = torch.from_numpy(ids)[None]
    size = min(student.config.vocab_size, teacher.config.vocab_size)
    logits = [model(ids_1T, use_cache=False).logits[0, :-1, :size].double() for model in (student, teacher)]
    student_TV, teacher_TV = logits[0].log_softmax(-1), logits[1].detach().log_softmax(-1)
    p_TV, q_TV = (teacher_TV, student_TV) if direction == "forward_kl" else (student_TV, teacher_TV)
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1)


@both
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_layout_gives_each_sequence_what_it_has_alone(family: str, direction: Direction) -> None:
    student, teacher = tiny_model(family), other_model(family)
    module, sequences = TokenDivergence(student, teacher, direction), random_sequences([5, 13, 1, 8])
    everything, firsts = tuple(range(4)), [1] * 4
    batches = [pad(sequences, firsts, PAD, everything), pack(sequences, firsts, PAD, everything), left_padded(sequences)]
    expected = [plain_kl(student, teacher, ids, direction) for ids in sequences]
    for batch in batches:
        kl_BT = module(batch)
        assert kl_BT.dtype == torch.float32
        for found_T, expected_T in zip(by_sequence(kl_BT, batch), expected, strict=True):
            torch.testing.assert_close(found_T.double(), expected_T, atol=1e-5, rtol=1e-5)
    assert all(expected_T.min() > 1e-3 for expected_T in expected if len(expected_T))


@both
def test_a_teacher_of_another_family_and_a_wider_vocabulary(direction: Direction) -> None:
    student, teacher = tiny_model("gemma2"), other_model("gpt2", vocab_size=WIDER)
    for one, other in ((student, teacher), (teacher, student)):
        one.requires_grad_()
        [ids] = random_sequences([9])
        kl_BT = TokenDivergence(one, other, direction)(pad([ids], [4], PAD, (0,)))
        torch.testing.assert_close(kl_BT[0, 4:].double(), plain_kl(one, other, ids, direction)[3:], atol=1e-5, rtol=1e-5)
        assert not kl_BT[0, :4].any()


def gradients(module: nn.Module, batch: TokenBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    kl_BT = module(batch)
    return kl_BT.detach(), list(torch.autograd.grad(kl_BT.sum(), list(module.parameters())))


@both
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_give_the_gradient_of_the_plain_sum(direction: Direction, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_model("llama"), other_model(vocab_size=WIDER)
    sequences = random_sequences([7, 5])
    batch = pad(sequences, [2, 1], PAD, (0, 1))
    module = TokenDivergence(student, teacher, direction)
    whole_BT, whole = gradients(module, batch)
    plain = (
        plain_kl(student, teacher, sequences[0], direction)[1:].sum()
        + plain_kl(student, teacher, sequences[1], direction).sum()
    )
    for found, expected in zip(whole, torch.autograd.grad(plain, list(student.parameters())), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    # As many logits as the wider of the two has.
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * WIDER)
    calls: list[int] = []
    original = divergence.token_kl
    monkeypatch.setattr(divergence, "token_kl", lambda s, t, d: calls.append(len(s)) or original(s, t, d))
    chunked_BT, chunked = gradients(module, batch)
    sizes = [min(chunk, 9 - start) for start in range(0, 9, chunk)]
    assert sorted(calls) == sorted(sizes * (2 if len(sizes) > 1 else 1))
    torch.testing.assert_close(chunked_BT, whole_BT, atol=1e-6, rtol=0)
    for found, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@both
def test_the_teacher_is_no_part_of_the_module(direction: Direction) -> None:
    student, teacher = tiny_model("llama"), other_model().train()
    module = TokenDivergence(student, teacher, direction)
    assert {id(one) for one in module.parameters()} == {id(one) for one in student.parameters()}
    assert {name.removeprefix("student.") for name in module.state_dict()} == set(student.state_dict())
    assert len(list(module.children())) == 1
    module.train()
    assert student.training
    assert not teacher.training
    before = [one.clone() for one in teacher.parameters()]
    module(pad(random_sequences([6]), [1], PAD, (0,))).sum().backward()
    for one, old in zip(teacher.parameters(), before, strict=True):
        assert one.grad is None
        assert not one.requires_grad
        assert torch.equal(one, old)
    assert any(one.grad is not None and one.grad.any() for one in student.parameters())


@both
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_a_target_zeros_reach_every_parameter(direction: Direction, family: str) -> None:
    """DDP waits for the gradient of each, the head's too."""
    student, teacher = tiny_model(family, tie_word_embeddings=False), other_model(family)
    kl_BT = TokenDivergence(student, teacher, direction)(pad(random_sequences([4, 2]), [4, 2], PAD, ()))
    assert torch.equal(kl_BT, torch.zeros(2, 4))
    kl_BT.sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@both
def test_bfloat16_weights_give_float32(direction: Direction) -> None:
    student: Any = tiny_model("llama")
    teacher: Any = other_model()
    batch = pad(random_sequences([9]), [1], PAD, (0,))
    exact_BT = TokenDivergence(student, teacher, direction)(batch)
    rough_BT = TokenDivergence(student.to(torch.bfloat16), teacher.to(torch.bfloat16), direction)(batch)
    assert rough_BT.dtype == torch.float32
    assert rough_BT.tolist() != exact_BT.tolist()
    torch.testing.assert_close(rough_BT, exact_BT, atol=0.2, rtol=0.2)


# What both heads share.


def test_heads_see_each_target_with_the_state_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: numbers that say where they come from, several of them, from several models' states, in chunks."""
    batch = pad([np.array([10, 11, 12, 13]), np.array([20, 21])], [2, 1], PAD, (0, 1))
    one_BTH = torch.arange(8.0).reshape(2, 4, 1)
    other_BTH = -10 * one_BTH.expand(2, 4, 3)
    seen: list[tuple[list[int], list[float]]] = []

    def head(ids_N: torch.Tensor, one_NH: torch.Tensor, other_NH: torch.Tensor) -> torch.Tensor:
        seen.append((ids_N.tolist(), one_NH[:, 0].tolist()))
        assert other_NH.shape == (len(ids_N), 3)
        return torch.stack([ids_N.float(), one_NH[:, 0], other_NH.sum(-1)])

    numbers_KBT = heads_at_targets(head, 3, 5, batch, one_BTH, other_BTH)
    assert numbers_KBT.tolist() == [
        [[0, 0, 12, 13], [0, 21, 0, 0]],
        [[0, 0, 1, 2], [0, 4, 0, 0]],
        [[0, 0, -30, -60], [0, -120, 0, 0]],
    ]
    assert seen == [([12, 13, 21], [1.0, 2.0, 4.0])]
    seen.clear()
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 11)
    assert torch.equal(heads_at_targets(head, 3, 5, batch, one_BTH, other_BTH), numbers_KBT)
    assert seen == [([12, 13], [1.0, 2.0]), ([21], [4.0])]
