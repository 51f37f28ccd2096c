"""What training loops share: the step's gradient, the schedule, weight decay, and the resume state."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_logprobs import PAD, VOCABULARY, random_sequences, tiny_model
from transformers import PreTrainedModel

from stages.data.batching import TokenBatch, micro_batches, pad, target_count
from stages.data.tokens import TokenTable
from stages.errors import InputError
from stages.models.logprobs import TokenLogProbs
from stages.objectives.likelihood import nll_loss
from stages.run import Run
from stages.specs.base import Runtime
from stages.specs.common import Optimizer
from stages.training import state
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, rate, set_threads
from stages.training.step import optimization_step

LENGTHS, PROMPTS = [9, 4, 17, 6, 12, 2, 9], [3, 1, 9, 5, 0, 1, 4]


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    path = tmp_path / "rows.arrow"
    sequences = random_sequences(LENGTHS)
    TokenTable.write(path, ((s.tolist(), p, 10 + i) for i, (s, p) in enumerate(zip(sequences, PROMPTS, strict=True))))
    return TokenTable(path)


class Loop:
    """A training loop's objects over a tiny model, and one step of it on a table's rows."""

    def __init__(self, model: PreTrainedModel, optimizer: Optimizer | None = None, steps: int = 4) -> None:
        self.accelerator: Accelerator = accelerator_for(Runtime(device="cpu"))
        module = TokenLogProbs(model).train()
        config = optimizer or Optimizer(lr=0.1, max_grad_norm=1e9)
        made, self.scheduler = make_optimizer([(config, module.parameters())], steps)
        prepared: Any = self.accelerator.prepare(module, made)
        self.module, self.optimizer = prepared
        self.accelerator.register_for_checkpointing(self.scheduler)

    def step(self, table: TokenTable, indices: list[int], tokens: int = 10_000, packed: bool = False, clip: float = 1e9) -> Any:
        total = target_count(table, indices, "completion")
        return optimization_step(
            self.accelerator,
            self.module,
            self.optimizer,
            self.scheduler,
            list(micro_batches(table, indices, "completion", tokens, packed, PAD)),
            lambda batch: nll_loss(self.module(batch), batch.target_BT, total),
            {"grad_norm": (list(self.module.parameters()), clip)},
            lambda: "step 1, rows [10]",
        )

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.module.parameters() if p.grad is not None])

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in self.module.parameters()])


def plain_loss(model: Any, table: TokenTable, indices: list[int]) -> torch.Tensor:
    """The oracle: each sequence alone through transformers, its completion's tokens summed, over the count of them all."""
    total, count = torch.zeros(()), 0
    for i in indices:
        ids_T = torch.tensor(table.ids(i))
        first = max(1, int(table.prompt_lengths[i]))
        logp_TV = model(ids_T[None].long(), use_cache=False).logits[0].log_softmax(-1)
        total = total - sum((logp_TV[t - 1, ids_T[t]] for t in range(first, len(ids_T))), torch.zeros(()))
        count += len(ids_T) - first
    return total / count


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 20, 40, 10_000])
def test_the_gradient_does_not_depend_on_micro_batches(table: TokenTable, tokens: int, packed: bool) -> None:
    indices = list(range(len(LENGTHS)))
    model = tiny_model("llama")
    expected = plain_loss(model, table, indices)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loop = Loop(tiny_model("llama"))
    metrics = loop.step(table, indices, tokens, packed)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    torch.testing.assert_close(loop.gradient(), gradient, atol=1e-6, rtol=1e-5)


def test_the_gradient_is_clipped_to_its_global_norm(table: TokenTable) -> None:
    loop, free = Loop(tiny_model("llama")), Loop(tiny_model("llama"))
    norm = free.step(table, [0, 1, 2])["grad_norm"]
    assert loop.step(table, [0, 1, 2], clip=norm / 3)["grad_norm"] == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(loop.gradient(), free.gradient() / 3, atol=1e-6, rtol=1e-5)


def broken(kind: str, value: torch.Tensor) -> torch.Tensor:
    """A loss that is not finite, or one that is, with a gradient that is not."""
    return value * float(kind) if kind in ("nan", "inf") else value + (value - value.detach()).abs().sqrt()


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(table: TokenTable, kind: str) -> None:
    loop = Loop(tiny_model("llama"))
    loop.step(table, [0, 1])
    before, moments = loop.weights(), [v["exp_avg"].clone() for v in loop.optimizer.state.values()]
    batches = list(micro_batches(table, [0, 1, 2], "completion", 1, False, PAD))
    assert len(batches) == 3
    calls: list[int] = []

    def loss(batch: Any) -> torch.Tensor:
        calls.append(1)
        value = nll_loss(loop.module(batch), batch.target_BT)
        return broken(kind, value) if len(calls) == 2 else value

    with pytest.raises(InputError, match=r"^step 7, rows \[3, 5\] of train: .*(nan|inf).*weights were not changed"):
        optimization_step(
            loop.accelerator,
            loop.module,
            loop.optimizer,
            loop.scheduler,
            batches,
            loss,
            {"grad_norm": (list(loop.module.parameters()), 1.0)},
            lambda: "step 7, rows [3, 5] of train",
        )
    assert torch.equal(loop.weights(), before)
    assert all(torch.equal(a, v["exp_avg"]) for a, v in zip(moments, loop.optimizer.state.values(), strict=True))
    assert loop.scheduler.last_epoch == 1


def rates(schedule: Any, warmup: float, steps: int) -> list[float]:
    config = Optimizer(schedule=schedule, warmup=warmup)
    return [rate(config, step, steps) for step in range(steps + 1)]


def test_the_warm_up_rises_to_the_peak_and_the_schedule_falls_to_nothing() -> None:
    assert rates("linear", 0.2, 10) == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert rates("linear", 0.0, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates("constant", 0.5, 4) == [0.5, 1, 1, 1, 1]
    half = math.sqrt(0.5)
    assert rates("cosine", 0.0, 4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2, 0])
    assert rates("cosine", 0.2, 10)[:4] == pytest.approx([0.5, 1, 1, (1 + math.cos(math.pi / 8)) / 2])
    assert rates("linear", 0.03, 1)[0] == 1


@given(
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    warmup=st.floats(0, 0.99),
    steps=st.integers(1, 200),
)
def test_no_step_is_without_a_learning_rate(schedule: str, warmup: float, steps: int) -> None:
    values = rates(schedule, warmup, steps)[:-1]
    peak = values.index(max(values))
    assert values[peak] == 1
    assert all(0 < value <= 1 for value in values)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)


def test_the_optimizer_follows_the_schedule(table: TokenTable) -> None:
    loop = Loop(tiny_model("llama"), Optimizer(lr=0.5, schedule="linear", warmup=0.5), steps=4)
    seen = []
    for _ in range(4):
        seen.append(loop.optimizer.param_groups[0]["lr"])
        loop.step(table, [0])
    assert seen == pytest.approx([0.25, 0.5, 0.5, 0.25])


def test_weight_decay_falls_on_matrices_alone() -> None:
    model = tiny_model("gpt2")
    frozen: Any = model.get_input_embeddings()
    frozen.weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = Optimizer(lr=0.5, weight_decay=0.25, warmup=0, schedule="constant")
    optimizer, _ = make_optimizer([(config, model.parameters())], 1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = parameter.ndim >= 2 and parameter.requires_grad
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.25 if shrunk else 1.0))
    assert {parameter.ndim for parameter in model.parameters()} == {1, 2}


# Two parts of one module.


class Pair(torch.nn.Module):
    """Two parts, each a matrix and a vector, whose losses have nothing in common."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

    def forward(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        x_BT = batch.ids_BT[:, :3].float()
        return self.one(x_BT).square().sum(), (self.other(x_BT) - 1).square().sum()


ONE = Optimizer(lr=0.1, schedule="linear", warmup=0.4, weight_decay=0.3, beta1=0.5, beta2=0.6, eps=1e-3)
OTHER = Optimizer(lr=0.02, schedule="cosine", warmup=0.0, weight_decay=0.0, beta1=0.95, beta2=0.99, eps=1e-6)


def pair_step(loop: Any, limits: tuple[float, float] = (1e9, 1e9), broken: str = "") -> dict[str, float]:
    parts = {"grad_norm": loop.module.one, "critic_grad_norm": loop.module.other}
    clip = {name: (list(part.parameters()), limit) for (name, part), limit in zip(parts.items(), limits, strict=True)}

    def loss(batch: TokenBatch) -> torch.Tensor:
        values = dict(zip(("one", "other"), loop.module(batch), strict=True))
        # The value stays as it is; the gradient is not a number.
        return sum((v + (v - v.detach()).abs().sqrt() if n == broken else v for n, v in values.items()), torch.zeros(()))

    batches = [pad(random_sequences([4, 3]), [1, 1], PAD, (0, 1)), pad(random_sequences([5], seed=1), [1], PAD, (2,))]
    return optimization_step(
        loop.accelerator, loop.module, loop.optimizer, loop.scheduler, batches, loss, clip, lambda: "step 1, rows [0]"
    )


class PairLoop:
    def __init__(self, steps: int = 5, names: tuple[str, ...] = ("one", "other")) -> None:
        self.accelerator: Accelerator = accelerator_for(Runtime(device="cpu"))
        module, configs = Pair(), {"one": ONE, "other": OTHER}
        # Parameters come as a generator, which can be read once.
        parts = [(configs[name], (p for p in getattr(module, name).parameters())) for name in names]
        made, self.scheduler = make_optimizer(parts, steps)
        prepared: Any = self.accelerator.prepare(module, made)
        self.module, self.optimizer = prepared

    def weights(self, name: str) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in getattr(self.module, name).parameters()]

    def gradient(self, name: str) -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in getattr(self.module, name).parameters()])


@pytest.mark.parametrize("names", [("one", "other"), ("other", "one")])
def test_each_part_keeps_its_own_settings_and_schedule(names: tuple[str, ...]) -> None:
    """As if each part had an AdamW and a schedule of its own, and its matrix alone decayed."""
    loop, oracle = PairLoop(5, names), Pair()
    separate = []
    for name, config in (("one", ONE), ("other", OTHER)):
        for parameter in getattr(oracle, name).parameters():
            decay = config.weight_decay if parameter.ndim == 2 else 0.0
            betas = (config.beta1, config.beta2)
            made = torch.optim.AdamW([parameter], lr=config.lr, betas=betas, eps=config.eps, weight_decay=decay)
            separate.append((config, made))
    for step in range(5):
        for config, made in separate:
            made.param_groups[0]["lr"] = config.lr * rate(config, step, 5)
            made.zero_grad()
        for batch in (pad(random_sequences([4, 3]), [1, 1], PAD, (0, 1)), pad(random_sequences([5], seed=1), [1], PAD, (2,))):
            sum(oracle(batch), torch.zeros(())).backward()
        for _, made in separate:
            made.step()
        pair_step(loop)
        for ours, theirs in zip(loop.module.parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert (ONE.lr * rate(ONE, 3, 5), OTHER.lr * rate(OTHER, 3, 5)) != (ONE.lr, OTHER.lr)
    assert loop.scheduler.get_last_lr() == pytest.approx([0.0] * 4)


def test_the_first_rate_is_that_of_the_first_part() -> None:
    loop = PairLoop()
    assert loop.scheduler.get_last_lr() == pytest.approx([0.05, 0.05, 0.02, 0.02])


def test_clipping_one_group_leaves_the_other_alone() -> None:
    free, clipped, both = PairLoop(), PairLoop(), PairLoop()
    norms = pair_step(free)
    assert list(norms) == ["loss", "grad_norm", "critic_grad_norm"]
    for name, part in (("grad_norm", "one"), ("critic_grad_norm", "other")):
        assert norms[name] == pytest.approx(free.gradient(part).norm().item(), rel=1e-6)
    # The norms that are told are those before the clip.
    assert pair_step(clipped, (1e9, norms["critic_grad_norm"] / 4)) == pytest.approx(norms, rel=1e-6)
    assert torch.equal(clipped.gradient("one"), free.gradient("one"))
    torch.testing.assert_close(clipped.gradient("other"), free.gradient("other") / 4, atol=0, rtol=1e-5)
    assert pair_step(both, (norms["grad_norm"] / 2, norms["critic_grad_norm"] * 2)) == pytest.approx(norms, rel=1e-6)
    torch.testing.assert_close(both.gradient("one"), free.gradient("one") / 2, atol=0, rtol=1e-5)
    assert torch.equal(both.gradient("other"), free.gradient("other"))


@pytest.mark.parametrize(("broken", "named"), [("one", "grad_norm"), ("other", "critic_grad_norm")])
def test_a_gradient_that_is_not_finite_in_either_group_stops_before_the_weights_change(broken: str, named: str) -> None:
    loop = PairLoop()
    pair_step(loop)
    before = loop.weights("one") + loop.weights("other")
    with pytest.raises(InputError, match=rf"^step 1, rows \[0\]: loss is [\d.]+,.* {named} is nan.*weights were not changed"):
        pair_step(loop, broken=broken)
    after = loop.weights("one") + loop.weights("other")
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert loop.scheduler.last_epoch == 1
    pair_step(loop)
    assert not torch.equal(loop.weights("one")[0], before[0])


def test_tied_weights_are_counted_once() -> None:
    tied, apart = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama", tie_word_embeddings=False)
    assert count_parameters(apart) - count_parameters(tied) == VOCABULARY * 16


def test_threads_are_the_asked_number_or_one_for_a_small_model() -> None:
    try:
        assert set_threads(Runtime(threads=2), 10) == torch.get_num_threads() == 2
        assert set_threads(Runtime(), 999_999) == torch.get_num_threads() == 1
        assert set_threads(Runtime(), 1_000_000) == torch.get_num_threads() >= 1
    finally:
        torch.set_num_threads(1)


def test_stages_of_one_process_may_differ_in_precision() -> None:
    assert accelerator_for(Runtime(device="cpu"), "bfloat16").mixed_precision == "bf16"
    assert accelerator_for(Runtime(device="cpu"), "float32").mixed_precision == "no"


def dropout_model() -> PreTrainedModel:
    return tiny_model("gpt2", embd_pdrop=0.5)


def test_a_restored_loop_goes_on_bit_for_bit(table: TokenTable, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    loop = Loop(dropout_model())
    assert state.load(run, loop.accelerator) is None
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    loop.step(table, [0, 1])
    state.save(run, loop.accelerator, 1, {"beta": 0.25})
    loop.step(table, [2, 3])
    loop.step(table, [4, 5])
    drawn = (random.random(), np.random.random(), torch.rand(3).tolist())

    random.seed(6)
    np.random.seed(7)
    torch.manual_seed(8)
    other = Loop(tiny_model("gpt2", embd_pdrop=0.5, initializer_range=0.1))
    torch.set_num_threads(2)
    resumed = state.load(run, other.accelerator)
    assert resumed == {"step": 1, "threads": 1, "beta": 0.25, "folder": run.load_state()}
    assert torch.get_num_threads() == 1
    other.step(table, [2, 3])
    other.step(table, [4, 5])
    assert torch.equal(other.weights(), loop.weights())
    assert (random.random(), np.random.random(), torch.rand(3).tolist()) == drawn
    assert other.scheduler.last_epoch == loop.scheduler.last_epoch == 3
    moments = [value["exp_avg_sq"] for value in loop.optimizer.state.values()]
    for one, value in zip(moments, other.optimizer.state.values(), strict=True):
        assert torch.equal(one, value["exp_avg_sq"])


def test_dropout_makes_that_test_depend_on_the_generator(table: TokenTable) -> None:
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(Loop(dropout_model()).step(table, [0, 1])["loss"])
    assert losses[0] != losses[1]


def test_only_the_newest_state_is_kept(table: TokenTable, tmp_path: Path) -> None:
    run, loop = Run(tmp_path / "run", {}), Loop(tiny_model("llama"))
    for step in (1, 2, 10):
        state.save(run, loop.accelerator, step, {})
    assert [path.name for path in (run.folder / "state").iterdir()] == ["step-00000010"]
    resumed = state.load(run, loop.accelerator)
    assert resumed is not None
    assert resumed["step"] == 10


def test_a_save_that_is_cut_short_leaves_the_last_state(
    table: TokenTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loop = Run(tmp_path / "run", {}), Loop(tiny_model("llama"))
    state.save(run, loop.accelerator, 1, {})
    weights = loop.weights()
    loop.step(table, [0])

    def cut_short(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state.json, "dumps", cut_short)
        with pytest.raises(KeyboardInterrupt):
            state.save(run, loop.accelerator, 2, {})
    resumed = state.load(run, loop.accelerator)
    assert resumed is not None
    assert resumed["step"] == 1
    assert torch.equal(loop.weights(), weights)
    state.save(run, loop.accelerator, 2, {})
    assert [path.name for path in (run.folder / "state").iterdir()] == ["step-00000002"]


def test_a_loops_own_files_are_part_of_its_state(table: TokenTable, tmp_path: Path) -> None:
    run, loop = Run(tmp_path / "run", {}), Loop(tiny_model("llama"))
    seen: list[Path] = []

    def write(folder: Path) -> None:
        assert (folder / "loop.json").is_file(), "it may read what is there"
        seen.append(folder)
        (folder / "mine").mkdir()
        (folder / "mine" / "rows.txt").write_text(f"state {len(seen)}")

    state.save(run, loop.accelerator, 1, {"a": 1}, write)
    resumed = state.load(run, loop.accelerator)
    assert resumed is not None
    assert resumed["folder"] == run.load_state()
    assert (resumed["folder"] / "mine" / "rows.txt").read_text() == "state 1"
    assert not seen[0].exists(), "the draft has become the state"

    def die(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.save(run, loop.accelerator, 2, {}, die)
    assert state.load(run, loop.accelerator) == resumed
    assert (resumed["folder"] / "mine" / "rows.txt").read_text() == "state 1"
    state.save(run, loop.accelerator, 2, {})
    last = state.load(run, loop.accelerator)
    assert last is not None
    assert not (last["folder"] / "mine").exists()


def test_only_the_main_process_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, loop = Run(tmp_path / "run", {}), Loop(tiny_model("llama"))
    seen: list[Path] = []
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    state.save(run, loop.accelerator, 1, {}, seen.append)
    assert seen == []


@pytest.mark.parametrize(("device", "there"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, device: str, there: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(InputError, match=f"runtime.device is {device}, and this machine has {there} GPUs"):
        accelerator_for(Runtime(device=device))
    with pytest.raises(ValidationError, match="device"):
        Runtime(device="gpu")
