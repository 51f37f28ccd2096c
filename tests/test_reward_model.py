"""The reward model through its request: TRL's loss and brute force, what is dropped, where it starts."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reward_bench
import torch
import torch.nn.functional as F
from conftest import recorded
from reward_bench import Fit, Make, checkpoint, long_text, pair_loss, plain, series, tables, tokens
from safetensors.torch import load_file
from test_sft import Rows, counts, metrics, sequences_in

import stages.models.reward
import stages.training.comparisons
from stages.data.batching import RowOrder, TokenBatch
from stages.data.chain_sum import bare
from stages.data.preferences import PreferenceTable
from stages.models.load import load_policy, save_policy
from stages.models.reward import RewardModel, new_reward_model
from stages.request import run_stage
from stages.run import Run
from stages.specs.reward_model import RewardModelConfig
from stages.training.comparisons import preference_loss

request_of = reward_bench.request_of
fit = reward_bench.fit
pairs = reward_bench.pairs
rankings = reward_bench.rankings
reward = reward_bench.reward


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[TokenBatch]:
    """Every micro-batch that the stage trains on."""
    return recorded(monkeypatch, stages.training.comparisons, "preference_batches")


def trained(batches: list[TokenBatch]) -> list[list[int]]:
    """The sequences of padded batches, in the order of the table. Each lies in one batch, once."""
    indices = [index for batch in batches for index in batch.indices]
    assert sorted(indices) == list(range(len(indices)))
    return [ids for _, (ids, _) in sorted(sequences_in(batches).items())]


def assert_step(run: Run, model: Any, loss: torch.Tensor) -> None:
    """The only step's loss and gradient are those of `loss`."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(one.double().square().sum().item() for one in gradients))
    assert series(run, "loss", "grad_norm") == [pytest.approx(loss.item(), abs=1e-5), pytest.approx(norm, rel=1e-4)]


# The loss.


@pytest.mark.parametrize(("margin", "center"), [(0, 0), (1, 0), (0.5, 0.3)])
def test_the_first_step_is_trl_s(fit: Fit, pairs: Rows, reward: RewardModel, margin: float, center: float) -> None:
    from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer  # three seconds

    changes = {"steps": 1, "batch_size": 48, "runtime": {"micro_batch_tokens": 200}}
    run = fit(changes | {"margin_weight": margin, "center_weight": center}, pairs)
    rows = [{f"{name}_ids": tokens(reward, row, row[name]) for name in ("chosen", "rejected")} for row in pairs]
    if margin:
        rows = [one | {"margin": margin * row["margin"]} for one, row in zip(rows, pairs, strict=True)]
    trainer: Any = SimpleNamespace(
        model=reward.model,
        args=SimpleNamespace(center_rewards_coefficient=center or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    expected: Any = RewardTrainer.compute_loss(trainer, reward.model, DataCollatorForPreference(reward.pad_id)(rows))
    assert_step(run, reward.model, expected)


def test_a_step_on_rankings_is_brute_force(fit: Fit, rankings: Rows, reward: RewardModel, batches: list[TokenBatch]) -> None:
    run = fit({"steps": 1, "batch_size": 24, "runtime": {"micro_batch_tokens": 250}}, rankings)
    losses = []
    for row in rankings:
        one_K, ranks = plain(reward.model, [tokens(reward, row, text) for text in row["completions"]]), row["ranks"]
        ordered = [(a, b) for a, b in permutations(range(len(ranks)), 2) if ranks[a] < ranks[b]]
        losses.append(torch.stack([-F.logsigmoid(one_K[a] - one_K[b]) for a, b in ordered]).mean())
    assert_step(run, reward.model, torch.stack(losses).mean())
    # Each completion is scored once, however many pairs it is in, and beside those of its row.
    assert trained(batches) == [tokens(reward, row, text) for row in rankings for text in row["completions"]]
    assert len(batches) > 5
    assert all(batch.ids_BT.numel() <= 250 for batch in batches)
    # A rank that is left without rows adds nothing, with a gradient of zeros.
    one_B = torch.ones(1, requires_grad=True)
    nothing = preference_loss(RewardModelConfig(), PreferenceTable(run.work / "train"), one_B, (), 24)
    assert (nothing.item(), torch.autograd.grad(nothing, one_B)[0].tolist()) == (0, [0])


def test_pairs_and_rankings_of_two_train_alike(fit: Fit, pairs: Rows) -> None:
    # Every second ranking has its worse completion first.
    two = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]][::turn], "ranks": [1, 2][::turn]}
        for row, turn in zip(pairs, [1, -1] * 24, strict=True)
    ]
    names = ("loss", "grad_norm", "heldout_loss", "pair_accuracy", "calibration_error")
    of_pairs, of_rankings = (series(fit({}, rows[:32], rows[32:]), *names) for rows in (pairs, two))
    assert len(of_pairs) == 11
    assert of_rankings == pytest.approx(of_pairs, abs=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_the_machine_changes_nothing(fit: Fit, pairs: Rows, rankings: Rows, batches: list[TokenBatch], kind: str) -> None:
    rows = pairs if kind == "pairs" else rankings
    uses = [{}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 150, "packed": True}, {"packed": True, "save_every": 9}]
    found, shapes, states = [], [], []
    torch.set_num_threads(2)
    for use in uses:
        batches.clear()
        run = fit({"batch_size": 10, "runtime": use}, rows[4:], rows[:4])
        found.append(series(run, "loss", "grad_norm", "heldout_loss", "pair_accuracy"))
        shapes.append([(len(batch.ids_BT), len(batch.indices)) for batch in batches])
        states += [path.name for path in (run.folder / "state").iterdir()]
    assert torch.get_num_threads() == 1
    assert len(found[0]) >= 10
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-5)
    # The last step is saved, whether or not its turn has come.
    assert states == ["step-00000004"] * 4
    # One batch a step; one row of data a batch; several batches of one packed row; one packed row.
    assert len(shapes[0]) == len(shapes[3]) == 4
    assert len(shapes[1]) == 40
    assert 8 < len(shapes[2]) < 40
    assert {height for height, _ in shapes[2] + shapes[3]} == {1}


def test_it_learns_and_measures_after_each_epoch(fit: Fit, init_folder: Path, pairs: Rows, batches: list[TokenBatch]) -> None:
    # The better completion shows its work.
    rows = [row | {"rejected": bare(40)} for row in pairs]
    optimizer = {"lr": 1e-2, "warmup": 0.1, "schedule": "cosine"}
    run = fit({"seed": 3, "steps": None, "epochs": 3, "batch_size": 10, "optimizer": optimizer}, rows[:32], rows[32:])
    # 32 rows are 4 steps of 10 an epoch; 3 epochs are 96 rows, 10 steps. Each step fits one micro-batch.
    taken = [sorted(index // 2 for index in batch.indices[::2]) for batch in batches]
    assert taken == [sorted(RowOrder(32, seed=3).take(10 * step, 10)) for step in range(10)]
    assert list(metrics(run.folder, "loss")) == list(range(1, 11))
    accuracy, loss = metrics(run.folder, "pair_accuracy"), metrics(run.folder, "heldout_loss")
    assert list(accuracy) == list(loss) == [4, 8, 10]
    assert list(metrics(run.folder, "pair_accuracy_before")) == list(metrics(run.folder, "heldout_loss_before")) == [0]
    assert accuracy[10] == 1
    reward = new_reward_model(init_folder, seed=3)
    assert series(run, "heldout_loss_before") == [pytest.approx(pair_loss(reward.model, reward, rows[32:]), abs=1e-5)]
    assert loss[10] < 0.2
    # Adam does not move along a gradient that is clipped far below its epsilon.
    still = fit({"seed": 3, "optimizer": {"max_grad_norm": 1e-13}}, rows[:32], rows[32:])
    assert series(still, "heldout_loss")[-1:] == pytest.approx(series(run, "heldout_loss_before"), abs=1e-5)
    # One step of warm-up, then a cosine over the nine others.
    assert series(run, "lr") == pytest.approx([0.01, *(0.005 * (1 + math.cos(math.pi * k / 9)) for k in range(9))])
    # What was measured last is what is in the checkpoint.
    assert loss[10] == pytest.approx(pair_loss(checkpoint(run), reward, rows[32:]), abs=1e-5)


def test_bfloat16_after_float32_in_one_process(fit: Fit, pairs: Rows) -> None:
    runs = [fit({"steps": 2, "dtype": dtype}, pairs[:32], pairs[32:]) for dtype in ("float32", "bfloat16")]
    losses = [series(run, "loss")[0] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    weights = load_file(runs[1].folder / "outputs" / "checkpoint" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # Scores are not rounded to bfloat16, in which near pairs become ties.
    given = torch.tensor([row["chosen_reward"] for row in tables(runs[1])["scores"]], dtype=torch.float64)
    assert (given == given.float()).all()
    assert (given != given.bfloat16()).sum() > 10


# What it learns from.


def test_useless_rows_are_dropped(fit: Fit, pairs: Rows, reward: RewardModel, batches: list[TokenBatch]) -> None:
    row = {"prompt": pairs[0]["prompt"]}
    fits, long = (long_text(reward, row, length) for length in (60, 61))
    of_two = [("1", "2"), (long, "1"), ("1", long), (fits, "1"), ("2", "2")]
    of_three = [(("1", "2", long), (1, 2, 3)), ((long, "2", long), (1, 2, 3)), (("1", "2", "3"), (2, 2, 2))]
    # With the only one of another rank too long, the others are all tied.
    of_three += [(("2", "2", "2"), (1, 2, 3)), (("1", "2", long), (2, 2, 1)), (("1", fits, "1"), (3, 2, 1))]
    few = {"used": 2, "completions left out: too long": 2, "dropped: fewer than two completions left": 2}
    few |= {"dropped: equal completions": 1}
    more = few | {"completions left out: too long": 4, "dropped: fewer than two completions left": 1, "dropped: all tied": 2}
    cases = [
        ([row | {"chosen": a, "rejected": b} for a, b in of_two], few, ["1", "2", fits, "1"]),
        ([row | {"completions": list(k), "ranks": list(r)} for k, r in of_three], more, ["1", "2", "1", fits, "1"]),
    ]
    for rows, expected, left in cases:
        batches.clear()
        run = fit({"steps": 1, "batch_size": 2, "max_length": 60}, rows)
        assert counts(run.folder, "train rows") == counts(run.folder, "heldout rows") == expected
        assert trained(batches) == [tokens(reward, row, text) for text in left]


def test_the_model_s_context_limits_too(fit: Fit, pairs: Rows, reward: RewardModel) -> None:
    assert reward.context == 128
    rows = [pairs[0] | {"chosen": long_text(reward, pairs[0], length)} for length in (128, 129)]
    run = fit({"max_length": 4096}, rows, demonstrations=[row | {"completion": row["chosen"]} for row in rows])
    for name in ("train rows", "heldout rows"):
        assert counts(run.folder, name)["completions left out: too long"] == 1
    [row] = tables(run)["scores"]
    assert row["chosen_reward"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_truncated_completions_have_no_end(
    fit: Fit, pairs: Rows, reward: RewardModel, batches: list[TokenBatch], kind: str
) -> None:
    ends = [("stop", "length"), ("length", "stop"), ("length", "length"), ("stop", "stop")]
    rows = [pair | {"chosen_finish": a, "rejected_finish": b} for pair, (a, b) in zip(pairs[:4], ends, strict=True)]
    if kind == "rankings":
        two = [{"completions": [row["chosen"], row["rejected"]], "ranks": [1, 2]} for row in rows]
        rows = [{"prompt": rows[k]["prompt"], **two[k], "finishes": list(ends[k])} for k in range(4)]
    # A row that is dropped stands before the others.
    equal = {"chosen": "1", "rejected": "1"} if kind == "pairs" else {"completions": ["1", "1"]}
    run = fit({"steps": 1, "batch_size": 4}, [rows[3] | equal, *rows])
    cut, found = [end == "length" for one in ends for end in one], trained(batches)
    assert [ids.count(reward.stops[0]) for ids in found] == [0 if one else 1 for one in cut]
    assert [ids[-1] == reward.stops[0] for ids in found] == [not one for one in cut]
    # Each is scored at its last token, where plain transformers reads it too; when nothing sets them, rewards are raw scores.
    model = checkpoint(run)
    assert (model.config.reward_bias, model.config.reward_scale) == (0, 1)
    raw = [pytest.approx(one, abs=1e-5) for one in plain(model, found).tolist()]
    for k, row in enumerate(rows):
        a, b = raw[2 * k : 2 * k + 2]
        row |= {"chosen_reward": a, "rejected_reward": b} if kind == "pairs" else {"rewards": [a, b]}
    assert tables(run)["scores"] == rows


# Where it starts.


def test_it_starts_from_a_policy_or_reward_model(
    request_of: Make, init_folder: Path, pairs: Rows, tmp_path: Path, reward: RewardModel
) -> None:
    policy = load_policy(init_folder, seed=5)
    save_policy(policy, tmp_path / "policy")
    data = {"train": pairs[:32], "heldout": pairs[32:]}
    given = {"demonstrations": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]}
    first = run_stage(request_of({"batch_size": 32}, model=tmp_path / "policy", **data, **given))
    # The policy's weights under a new head.
    reward.model.base_model.load_state_dict(policy.model.base_model.state_dict())
    assert series(first, "loss")[0] == pytest.approx(pair_loss(reward.model, reward, pairs[:32]), abs=1e-5)
    # The reward model as it is, its head too, but for the bias, which is set anew.
    earlier = checkpoint(first)
    second = run_stage(request_of({"batch_size": 32}, model=first.folder / "outputs" / "checkpoint", **data))
    assert series(second, "loss")[0] == pytest.approx(pair_loss(earlier, reward, pairs[:32]), abs=1e-5)
    # 32 rows a step of 32: each step ends an epoch, and the last one is measured once.
    assert len(series(first, "heldout_loss")) == 4
    assert series(second, "heldout_loss_before") == pytest.approx(series(first, "heldout_loss")[-1:], abs=1e-5)
    assert earlier.config.reward_bias != 0
    assert checkpoint(second).config.reward_bias == 0
