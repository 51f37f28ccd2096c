"""CPO, SimPO and ORPO from logits: value and gradient by every logit are those of TRL's own trainers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer

from stages.objectives.preference import cpo, orpo, reference_free_dpo, simpo

T, V = 9, 6
CHOSEN, REJECTED = [8, 1, 4, 3], [2, 8, 4, 1]  # lengths of completions


class Batch(NamedTuple):
    logits_BTV: torch.Tensor  # chosen rows, then rejected ones
    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    labels_BT: torch.Tensor  # -100 at the prompt and the padding

    def halves(self) -> dict[str, torch.Tensor]:
        names = {"input_ids": self.ids_BT, "attention_mask": self.attention_BT, "labels": self.labels_BT}
        sides = {name: zip(("chosen", "rejected"), values.chunk(2), strict=True) for name, values in names.items()}
        return {f"{side}_{name}": rows for name, pair in sides.items() for side, rows in pair}


def batch(seed: int, chosen: list[int], rejected: list[int], prompt: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths, width = torch.tensor(chosen + rejected), T + prompt - 1
    logits = 2 * torch.randn(len(lengths), width, V, generator=generator)
    ids = torch.randint(0, V, (len(lengths), width), generator=generator)
    at = torch.arange(width)[None]
    attention = (at < prompt + lengths[:, None]).long()
    return Batch(logits, ids, attention, torch.where((at >= prompt) & (attention == 1), ids, -100))


def theirs(kind: type[CPOTrainer] | type[ORPOTrainer], given: Batch, **settings: Any) -> tuple[float, torch.Tensor]:
    """The trainer's loss, and its gradient by the logits. Its model is one whose logits are known."""
    logits = given.logits_BTV.clone().requires_grad_()
    trainer: Any = object.__new__(kind)
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda one: one)
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    trainer.pad_token_id = trainer.padding_value = 0
    trainer.alpha = trainer.label_smoothing = 0.0
    vars(trainer).update(settings)
    loss, _ = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), given.halves())
    return loss.item(), torch.autograd.grad(loss, logits)[0]


class Leaf(NamedTuple):
    logits_BTV: torch.Tensor
    sums: tuple[torch.Tensor, torch.Tensor]
    means: tuple[torch.Tensor, torch.Tensor]
    logp_BT: torch.Tensor  # of all tokens but the first


def leaf(given: Batch) -> Leaf:
    logits = given.logits_BTV.clone().requires_grad_()
    logp_BT = logits[:, :-1].log_softmax(-1).gather(-1, given.ids_BT[:, 1:, None]).squeeze(-1)
    mask_BT = given.labels_BT[:, 1:] != -100
    sums, lengths = (logp_BT * mask_BT).sum(-1), mask_BT.sum(-1)
    pc, pr = sums.chunk(2)
    mc, mr = (sums / lengths).chunk(2)
    return Leaf(logits, (pc, pr), (mc, mr), logp_BT)


def same(mine: Leaf, loss: torch.Tensor, expected: tuple[float, torch.Tensor]) -> None:
    assert loss.item() == pytest.approx(expected[0], abs=1e-5, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, mine.logits_BTV)[0], expected[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_cpo(beta: float, smoothing: float, seed: int) -> None:
    """The trainer's NLL is the mean over all tokens of the batch's chosen completions."""
    given = batch(seed, CHOSEN, REJECTED, prompt=3)
    mine = leaf(given)
    nll = -mine.sums[0] * len(CHOSEN) / sum(CHOSEN)
    expected = theirs(CPOTrainer, given, loss_type="sigmoid", beta=beta, label_smoothing=smoothing, cpo_alpha=0.6)
    same(mine, cpo(*mine.sums, beta, 0.6, nll, smoothing).mean(), expected)
    without = theirs(CPOTrainer, given, loss_type="sigmoid", beta=beta, label_smoothing=smoothing, cpo_alpha=0.0)
    mine = leaf(given)
    same(mine, reference_free_dpo(*mine.sums, beta, smoothing).mean(), without)


def test_the_papers_cpo_has_the_whole_completions_likelihood() -> None:
    """Eq. 76: the NLL is -log pi(chosen), the trainer's times the chosen's mean length."""
    given = batch(0, CHOSEN, REJECTED)
    mine = leaf(given)
    found = cpo(*mine.sums, 0.1, 1.0, -mine.sums[0])
    by_hand = F.softplus(-0.1 * (mine.sums[0] - mine.sums[1])) - mine.sums[0]
    torch.testing.assert_close(found, by_hand)
    mine = leaf(given)
    expected = theirs(CPOTrainer, given, loss_type="sigmoid", beta=0.1, cpo_alpha=sum(CHOSEN) / len(CHOSEN))
    same(mine, cpo(*mine.sums, 0.1, 1.0, -mine.sums[0]).mean(), expected)


@pytest.mark.parametrize(("beta", "gamma", "smoothing"), [(2.0, 0.5, 0.0), (2.5, 1.4, 0.1), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_simpo(beta: float, gamma: float, smoothing: float, seed: int) -> None:
    given = batch(seed, CHOSEN, REJECTED, prompt=2)
    mine = leaf(given)
    settings = {"beta": beta, "simpo_gamma": gamma, "label_smoothing": smoothing}
    expected = theirs(CPOTrainer, given, loss_type="simpo", cpo_alpha=0.0, **settings)
    same(mine, simpo(*mine.means, beta, gamma, smoothing).mean(), expected)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_orpo_where_the_two_nlls_are_one(beta: float, seed: int) -> None:
    """Chosen completions of one length, and a prompt whose only token nothing predicts."""
    given = batch(seed, [5, 5, 5, 5], REJECTED)
    mine = leaf(given)
    same(mine, orpo(*mine.means, beta).mean(), theirs(ORPOTrainer, given, beta=beta))


@pytest.mark.parametrize("seed", range(3))
def test_orpo_differs_from_the_trainers_by_its_nll(seed: int) -> None:
    """The paper's NLL is each chosen completion's mean; the trainer's that of all the tokens, prompts too."""
    given = batch(seed, CHOSEN, REJECTED, prompt=4)
    mine = leaf(given)
    tokens_BT = given.attention_BT[:4, 1:].bool()
    of_trainer, of_paper = -mine.logp_BT[:4][tokens_BT].mean(), -mine.means[0].mean()
    assert abs(of_trainer.item() - of_paper.item()) > 0.01
    same(mine, orpo(*mine.means, 0.4).mean() - of_paper + of_trainer, theirs(ORPOTrainer, given, beta=0.4))
