"""The reward model through its request: TRL's loss and brute force, what is dropped, what is written, and resuming."""

from __future__ import annotations

import json
import math
import random
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, kill_child, recorded, request_for
from safetensors.torch import load_file
from test_sft import CrashError, Rows, counts, digests, events, last_state, metrics, sequences_in
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

import stages.models.reward
import stages.reward_model
from stages.data.batching import RowOrder, TokenBatch
from stages.data.chain_sum import bare, guess, sloppy, worked
from stages.data.chat import encode
from stages.data.parquet import read_rows
from stages.data.preferences import PreferenceTable
from stages.errors import InputError
from stages.models.load import load_policy, save_policy
from stages.models.reward import RewardModel, new_reward_model, save_reward_model
from stages.request import Request, run_stage
from stages.reward_model import preference_loss
from stages.run import Event, Run
from stages.specs.reward_model import RewardModelConfig
from stages.statistics import summary

Row = dict[str, Any]
Make = Callable[..., Request]
Fit = Callable[..., Run]
CONFIG: Row = {
    "steps": 4,
    "batch_size": 8,
    "max_length": 96,
    "bootstrap": 200,
    "optimizer": {"lr": 1e-2, "warmup": 0},
    "runtime": {"device": "cpu", "threads": 1, "save_every": 2, "log_every": 1},
}


@pytest.fixture
def request_of(init_folder: Path, dataset: Callable[..., Path], tmp_path: Path) -> Make:
    """A request in a new folder, of the small config with some values changed (mappings are merged) and of rows."""
    numbers = count()

    def make(changes: Row, model: Path = init_folder, **data: Rows) -> Request:
        name = f"data {next(numbers)}"
        (tmp_path / name).mkdir()
        merged = CONFIG | {key: CONFIG[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
        inputs = {key: dataset(rows, f"{name}/{key}") for key, rows in data.items()}
        return request_for("reward_model", tmp_path / name / "run", merged, model=model, **inputs)

    return make


@pytest.fixture
def fit(request_of: Make) -> Fit:
    """Train on rows and return the run; they are held out too when no others are given."""
    return lambda changes, train, held=None, **more: run_stage(request_of(changes, train=train, heldout=held or train, **more))


@pytest.fixture
def pairs(chain_rows: Rows) -> Rows:
    """48 pairs of unequal lengths with margins: a worked solution is better than a wrong one or a guess."""
    rng, rows = random.Random(0), []
    for place, row in enumerate(chain_rows):
        texts = {"chosen": worked(row["problem"]), "rejected": guess(rng) if place % 3 else sloppy(row["problem"], rng)}
        rows.append({"id": row["id"], "prompt": row["prompt"], **texts, "margin": rng.uniform(0, 2)})
    return rows


@pytest.fixture
def rankings(chain_rows: Rows) -> Rows:
    """24 rankings of two to five different completions, not in order, with ties."""
    rng, rows = random.Random(0), []
    for place, row in enumerate(chain_rows[:24]):
        texts = [worked(row["problem"]), bare(30), sloppy(row["problem"], rng), bare(40), bare(50)][: 2 + place % 4]
        order = rng.sample(range(len(texts)), len(texts))
        ranks = [(1, 2, 2, 3, 3)[k] for k in order]
        rows.append({"id": row["id"], "prompt": row["prompt"], "completions": [texts[k] for k in order], "ranks": ranks})
    return rows


@pytest.fixture
def reward(init_folder: Path) -> RewardModel:
    """What training starts from."""
    return new_reward_model(init_folder, seed=0)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[TokenBatch]:
    """Every micro-batch that the stage trains on."""
    return recorded(monkeypatch, stages.reward_model, "preference_batches")


def trained(batches: list[TokenBatch]) -> list[list[int]]:
    """The sequences of padded batches, in the order of the table. Each lies in one batch, once."""
    indices = [index for batch in batches for index in batch.indices]
    assert sorted(indices) == list(range(len(indices)))
    return [ids for _, (ids, _) in sorted(sequences_in(batches).items())]


def tokens(reward: RewardModel, row: Row, text: str, finish: str = "stop") -> list[int]:
    one = encode(reward.tokenizer, row["prompt"], text, reward.stops)
    return [*one.prompt_ids, *(one.completion_ids[:-1] if finish == "length" else one.completion_ids)]


def long_text(reward: RewardModel, row: Row, length: int) -> str:
    """A completion with which its row has exactly so many tokens."""
    return "1" + "+1" * (length - len(tokens(reward, row, "1")))


def plain(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    """The oracle: transformers' own scores of a right-padded batch."""
    pad = model.config.pad_token_id
    ids_BT = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True, padding_value=pad)
    return model(input_ids=ids_BT, attention_mask=(ids_BT != pad).long()).logits[:, 0]


def pair_loss(model: Any, reward: RewardModel, rows: Rows) -> float:
    sides = [plain(model, [tokens(reward, row, row[name]) for row in rows]) for name in ("chosen", "rejected")]
    return -F.logsigmoid(sides[0] - sides[1]).mean().item()


def checkpoint(run: Run) -> Any:
    """A run's checkpoint, by plain transformers."""
    return AutoModelForSequenceClassification.from_pretrained(run.folder / "outputs" / "checkpoint").requires_grad_(False)


def tables(run: Run) -> dict[str, Rows]:
    """The run's tables, and the rows of `scores`."""
    found = {event["name"]: event["rows"] for event in events(run.folder, "table")}
    return found | {"scores": list(read_rows(run.folder / "outputs" / "scores"))}


def series(run: Run, *names: str) -> list[float]:
    """All values of these metrics, as often as they were logged."""
    logged = [event["metrics"] for event in events(run.folder, "metrics")]
    return [values[name] for name in names for values in logged if name in values]


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


# What is measured and written.


def by_length(*arguments: Any) -> np.ndarray:
    """In the place of `raw_scores`: a completion's score is its number of tokens over four."""
    return np.array([len(ids) / 4 for ids in arguments[2]])


def nll(differences: Sequence[float]) -> float:
    return float(np.mean([math.log(1 + math.exp(-one)) for one in differences]))


def test_pairs_are_measured(fit: Fit, pairs: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.reward_model, "raw_scores", by_length)
    more = [2, 1, 0, -1, 3, 0, 8, -2]  # tokens that the chosen has more than the rejected
    texts = [{"chosen": "1" + "+1" * (4 + n), "rejected": "2" + "+1" * 4} for n in more]
    margins = [0.4, 0.3, 9.0, 0.1, 0.7, 0.5, 0.8, 0.2]
    rows = [pairs[0] | two | {"margin": margin} for two, margin in zip(texts, margins, strict=True)]
    run = fit({"steps": 1, "seed": 5}, rows)
    # By confidence in bins of 0.1: 1 and -1; 2, 3 and -2; 8.
    bins = [[1, -1], [2, 3, -2], [8]]
    sure = [[1 / (1 + math.exp(-abs(n) / 4)) for n in one] for one in bins]
    right = [[n > 0 for n in one] for one in bins]
    error = sum(abs(sum(a) - sum(b)) for a, b in zip(sure, right, strict=True)) / 6
    expected = [4 / 6, 2 / 8, nll([n / 4 for n in more]), error]
    assert series(run, "pair_accuracy", "pair_ties", "heldout_loss", "calibration_error") == pytest.approx(expected)
    # This seed's 200 resamples give another interval than 100 of them, or than another seed's.
    interval = summary("of", [[1], [1], [0], [1], [1], [0]], 200, 5)
    assert series(run, "pair_accuracy_low", "pair_accuracy_high") == [interval["of_low"], interval["of_high"]]
    found = {name: [list(row.values()) for row in rows] for name, rows in tables(run).items()}
    wanted = [[0.5 + 0.1 * k, len(a), np.mean(a), np.mean(b)] for k, a, b in zip((0, 1, 3), sure, right, strict=True)]
    assert np.array(found["calibration"]) == pytest.approx(np.array(wanted))
    # From, to, pairs and accuracy; without the tied ones, of margins 9 and 0.5.
    assert found["accuracy by margin"] == [[0.1, 0.2, 2, 0], [0.3, 0.3, 1, 1], [0.4, 0.4, 1, 1], [0.7, 0.8, 2, 1]]


def test_rankings_are_measured_by_row(fit: Fit, pairs: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.reward_model, "raw_scores", by_length)
    rows = [
        {"completions": ["1+1+1", "1", "2"], "ranks": [1, 2, 2]},  # two right; the tied ones are no pair
        {"completions": ["1", "1+1", "1+1+1"], "ranks": [1, 2, 3]},  # three wrong
        {"completions": ["1", "2", "1+1"], "ranks": [3, 2, 1]},  # equal scores, and two right
        {"completions": ["3", "4"], "ranks": [1, 2]},  # nothing decided
    ]
    run = fit({"steps": 1}, [row | {"prompt": pairs[0]["prompt"], "margin": 1.0} for row in rows])
    loss = np.mean([nll([0.5, 0.5]), nll([-0.25, -0.25, -0.5]), nll([0, 0.25, 0.25]), nll([0])])
    assert series(run, "pair_accuracy", "pair_ties", "heldout_loss") == pytest.approx([2 / 3, 2 / 9, loss])
    assert "accuracy by margin" not in tables(run)


def test_rewards_are_shifted_and_scaled(fit: Fit, pairs: Rows, rankings: Rows, reward: RewardModel) -> None:
    # Of what is too long for 60 tokens, one row loses a completion, and one row, a demonstration and a sample are left out.
    held = [dict(row) for row in rankings]
    held[3] |= {"completions": [long_text(reward, held[3], 61), *held[3]["completions"][1:]]}
    held[5] |= {"completions": [long_text(reward, held[5], 61)] * len(held[5]["completions"])}
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    demonstrations[2] |= {"completion": long_text(reward, demonstrations[2], 61)}
    samples = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in pairs]
    samples = [row | {"finish": "length" if k % 3 else "stop"} for k, row in enumerate(samples)]
    samples[5] |= {"completion": long_text(reward, samples[5], 62), "finish": "length"}
    changes = {"max_length": 60, "shift_rows": 20, "scale_rows": 30, "runtime": {"micro_batch_tokens": 300}}
    run = fit(changes, rankings, held, demonstrations=demonstrations, samples=samples)

    model = checkpoint(run)
    bias, scale = model.config.reward_bias, model.config.reward_scale
    assert series(run, "reward_bias", "reward_scale") == [bias, scale]

    def rewards(sequences: list[list[int]]) -> torch.Tensor:
        return (plain(model, [ids for ids in sequences if len(ids) <= 60]) + bias) * scale

    given = rewards([tokens(reward, row, row["completion"]) for row in demonstrations[:20]])
    drawn = rewards([tokens(reward, row, row["completion"], row["finish"]) for row in samples[:30]])
    assert (len(given), len(drawn)) == (19, 29)
    assert given.mean().item() == pytest.approx(0, abs=1e-4)
    assert drawn.std(correction=0).item() == pytest.approx(1, abs=1e-4)

    records = tables(run)["scores"]
    assert [{name: value for name, value in row.items() if name != "rewards"} for row in records] == [*held[:5], *held[6:]]
    for row in records:
        sequences = [tokens(reward, row, text) for text in row["completions"]]
        expected = iter(rewards(sequences).tolist())
        assert row["rewards"] == [pytest.approx(next(expected), abs=1e-4) if len(ids) <= 60 else None for ids in sequences]
    assert records[3]["rewards"][0] is None


@pytest.mark.parametrize("bits", [0, 1])
def test_equal_scores_decide_and_scale_nothing(fit: Fit, pairs: Rows, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    # In batches of unequal sizes the last bits of one sample's scores may differ.
    alike = np.array([0.25, 0.25 + bits * np.spacing(np.float32(0.25))] * 4)
    monkeypatch.setattr(stages.reward_model, "score_rows", lambda *_: alike)
    monkeypatch.setattr(stages.reward_model, "raw_scores", lambda *arguments: np.zeros(len(arguments[2])))
    # One margin is missing: then there is no table by margin.
    held = [*pairs[:7], pairs[7] | {"margin": None}]
    run = fit({"steps": 1}, pairs, held, samples=[{"prompt": pairs[0]["prompt"], "completion": "1"}] * 8)
    assert series(run, "pair_ties", "heldout_loss", "reward_scale") == pytest.approx([1, math.log(2), 1])
    assert series(run, "pair_accuracy", "pair_accuracy_before") == []
    assert "accuracy by margin" not in tables(run)
    [message] = events(run.folder, "message")
    assert "all have one score" in message["text"]


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


# Errors.

THREE = {"completions": ["1", "2", "3"], "ranks": [1, 2, 3]}
# The first row is dropped: the message counts the rows of the source.
NO_MARGIN = [{"chosen": a, "rejected": "2", "margin": m} for a, m in (("2", 1.0), ("1", 0.0), ("3", None), ("4", None))]


@pytest.mark.parametrize(
    ("changes", "name", "rows", "message"),
    [
        ({}, "train", [{"chosen": "1"}], r'row 1 has neither "chosen" and "rejected" .* \(it has prompt, chosen\)'),
        ({}, "train", [{"completions": ["1"]}], r'nor "completions" and "ranks" \(it has prompt, completions\)'),
        ({"max_length": 5}, "train", [{"chosen": "1", "rejected": "2"}], r"no preference fits in 5 tokens \(.*too long': 2"),
        ({}, "heldout", [{"chosen": "1", "rejected": "1"}], r"no preference .*equal completions': 1"),
        ({"margin_weight": 1}, "train", NO_MARGIN, r'row 3 of train has no "margin"'),
        ({"margin_weight": 1}, "train", [{"chosen": "1", "rejected": "2"}], r'row 1 of train has no "margin"'),
        ({"margin_weight": 1}, "train", [THREE], "are for pairs; these rows are rankings"),
        ({"center_weight": 1}, "train", [THREE], "are for pairs; these rows are rankings"),
        ({}, "samples", [{"text": "1"}], r'samples: its rows have no column "completion" \(they have prompt, text\)'),
        ({}, "demonstrations", [{"completion": "+1" * 96}], "demonstrations: no completion fits in 96 tokens"),
    ],
)
def test_what_does_not_go_together(request_of: Make, pairs: Rows, changes: Row, name: str, rows: Rows, message: str) -> None:
    data = {"train": pairs, "heldout": pairs} | {name: [{"prompt": pairs[0]["prompt"]} | row for row in rows]}
    with pytest.raises(InputError, match=message):
        run_stage(request_of({"steps": 1} | changes, **data))


def test_a_model_whose_scores_would_be_misread_is_refused(fit: Fit, pairs: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.models.reward, "last_tokens", lambda batch: batch.position_ids_BT == 0)
    with pytest.raises(InputError, match=r"wrong by .* in its scores: this family is not supported"):
        fit({}, pairs)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_loss_that_is_not_finite_stops_with_its_rows(request_of: Make, pairs: Rows) -> None:
    # Row 2 is dropped: the message counts the rows of the source.
    rows = [*pairs[:2], pairs[2] | {"chosen": "1", "rejected": "1"}, *pairs[3:9]]
    changes = {"center_weight": 1, "optimizer": {"lr": 1e30}, "runtime": {"save_every": 1}}
    request = request_of(changes, train=rows, heldout=pairs[9:])
    with pytest.raises(InputError, match=r"step 2, rows \[1, 2, 4, 5, 6, 7, 8, 9\] of train: loss is .*(nan|inf)"):
        run_stage(request)
    [state] = (request.folder / "state").iterdir()
    assert state.name == "step-00000001"


# Resuming: the same bytes whenever the stage dies.


@pytest.fixture
def data(pairs: Rows) -> dict[str, Rows]:
    given = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    return {"train": pairs[:32], "heldout": pairs[32:], "demonstrations": given, "samples": given[::2]}


@pytest.fixture
def forgetful(init_folder: Path, tmp_path: Path) -> Path:
    """A reward model with dropout: training draws random numbers, and what was loaded is in evaluation mode."""
    spec = (init_folder / "init.yaml").read_text()
    (tmp_path / "init.yaml").write_text(spec.replace("model:", "model:\n  attention_dropout: 0.5", 1))
    save_reward_model(new_reward_model(tmp_path, seed=0), tmp_path / "forgetful")
    return tmp_path / "forgetful"


def test_the_same_config_gives_the_same_bytes(request_of: Make, data: dict[str, Rows], forgetful: Path) -> None:
    one, other, changed = (digests(run_stage(request_of({"seed": seed}, model=forgetful, **data))) for seed in (0, 0, 1))
    assert one == other
    assert {"checkpoint/model.safetensors", "checkpoint/config.json", "scores/data.parquet"} <= set(one)
    for name in ("checkpoint/model.safetensors", "scores/data.parquet"):
        assert changed[name] != one[name]


def test_measuring_is_without_dropout(request_of: Make, data: dict[str, Rows], forgetful: Path) -> None:
    run = run_stage(request_of({"steps": 1, "batch_size": 32}, model=forgetful, **data))
    reward = new_reward_model(forgetful, seed=0)
    reward.model.eval()
    assert series(run, "heldout_loss_before") == [pytest.approx(pair_loss(reward.model, reward, data["heldout"]), abs=1e-5)]
    assert abs(series(run, "loss")[0] - pair_loss(reward.model, reward, data["train"])) > 1e-4


def test_a_run_that_fails_after_every_step_ends_as_one_that_does_not(
    request_of: Make, data: dict[str, Rows], forgetful: Path
) -> None:
    changes = {"steps": 6, "runtime": {"save_every": 1}}
    expected = run_stage(request_of(changes, model=forgetful, **data))
    request = request_of(changes, model=forgetful, **data)

    def crash(event: Event) -> None:
        if event["event"] == "state":
            raise CrashError

    for _ in range(6):
        with pytest.raises(CrashError):
            run_stage(request, crash)
    resumed = run_stage(request, crash)
    assert [event["step"] for event in events(resumed.folder, "state")] == [1, 2, 3, 4, 5, 6]
    assert [event["name"] for event in events(resumed.folder, "table")] == list(tables(expected))[:-1]
    assert digests(resumed) == digests(expected)
    names = ("loss", "grad_norm", "lr", "heldout_loss_before", "heldout_loss", "reward_bias", "reward_scale")
    assert series(resumed, *names) == series(expected, *names)


def test_a_killed_child_resumes_to_the_same_bytes(request_of: Make, data: dict[str, Rows]) -> None:
    changes = {"steps": 40, "runtime": {"save_every": 1}}
    expected, request = run_stage(request_of(changes, **data)), request_of(changes, **data)
    command = kill_child(request, lambda: last_state(request.folder) >= 5)
    assert 5 <= last_state(request.folder) < 40

    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    killed = Run(request.folder, {})
    assert digests(killed) == digests(expected)
    assert metrics(killed.folder, "loss") == metrics(expected.folder, "loss")
    made = {"checkpoint": "model", "scores": "dataset"}
    assert json.loads((request.folder / "outputs.json").read_text()) == {"key": request.key, "outputs": made}
