"""Training a process reward model through its request: TRL's loss, truncated prefixes, layouts, what is dropped or refused."""

from __future__ import annotations

import json
import math
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import reward_bench
import torch
import torch.nn.functional as F
from reward_bench import Fit, Make, Row, checkpoint, series, tables, tokens
from test_sft import Rows, counts, digests, events

from stages.data.chain_sum import sloppy, worked
from stages.errors import InputError
from stages.models.reward import RewardModel, load_reward_model
from stages.request import run_stage
from stages.run import Run

request_of = reward_bench.request_of
fit = reward_bench.fit
reward = reward_bench.reward
pairs = reward_bench.pairs
FIRST = {"steps": 1, "step_separator": ";"}


@pytest.fixture
def labelled(chain_rows: Rows) -> Rows:
    """24 completions of one to six steps, some soft labels among them; every third was cut off."""
    rng, rows = random.Random(0), []
    for place, row in enumerate(chain_rows[:24]):
        steps = (worked if place % 2 else lambda p: sloppy(p, rng))(row["problem"]).split(";")
        steps = steps if place % 5 else steps[:1]
        labels = [rng.choice([0.0, 1.0, 0.25]) for _ in steps]
        ends = {"finish": "length" if place % 3 == 0 else "stop"}
        rows.append({"id": row["id"], "prompt": row["prompt"], "completions": steps, "labels": labels, **ends})
    return rows


def sequences(reward: RewardModel, rows: Rows, separator: str = ";") -> list[tuple[list[int], list[int]]]:
    """Each row's tokens and where its steps end: words are tokens, so the steps' own tokens count them."""

    def length(text: str) -> int:
        ids: Any = reward.tokenizer(text, add_special_tokens=False)["input_ids"]
        return len(ids)

    found = []
    for row in rows:
        ids = tokens(reward, row, separator.join(row["completions"]), row["finish"])
        start = len(tokens(reward, row, "", "length"))
        ends = [start + end - 1 for end in accumulate(length(step + separator) for step in row["completions"])]
        found.append((ids, [*ends[:-1], len(ids) - 1]))
    return found


def prefix_scores(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
    """The oracle: transformers' own score of each prefix that ends with a step (a causal model sees no more)."""
    return [torch.cat([model(input_ids=torch.tensor([ids[: end + 1]])).logits[:, 0] for end in ends]) for ids, ends in rows]


def assert_step(run: Run, model: Any, loss: torch.Tensor) -> None:
    """The only step's loss and gradient are those of `loss`."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(one.double().square().sum().item() for one in gradients))
    assert series(run, "loss", "grad_norm") == [pytest.approx(loss.item(), abs=1e-5), pytest.approx(norm, rel=1e-4)]


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_step_is_cross_entropy_on_prefixes(fit: Fit, labelled: Rows, reward: RewardModel, packed: bool) -> None:
    run = fit(FIRST | {"batch_size": 24, "runtime": {"micro_batch_tokens": 150, "packed": packed}}, labelled)
    scores_N = torch.cat(prefix_scores(reward.model, sequences(reward, labelled)))
    labels_N = torch.tensor([label for row in labelled for label in row["labels"]])
    assert len(labels_N) > 60
    loss = -(labels_N * F.logsigmoid(scores_N) + (1 - labels_N) * F.logsigmoid(-scores_N)).mean()
    assert_step(run, reward.model, loss)
    assert counts(run.folder, "train rows") == {"used": 24, "steps": len(labels_N)}


def test_the_first_step_is_trl_s(fit: Fit, labelled: Rows, reward: RewardModel) -> None:
    """As TRL's PRMTrainer makes its rows and its loss (trl.experimental.prm; not in the installed release): prompt, each
    step with the separator behind it, the last too; its label at its last token, -100 elsewhere; two logits, cross-entropy."""
    rows = [
        row | {"labels": [float(label > 0.5) for label in row["labels"]], "finish": "length"}
        | {"completions": [*row["completions"][:-1], row["completions"][-1] + ";"]}
        for row in labelled
    ]  # fmt: skip
    run = fit(FIRST | {"batch_size": 24}, rows)
    losses, words = [], reward.tokenizer
    for row, given in zip(rows, labelled, strict=True):
        ids, labels = tokens(reward, row, "", "length"), [-100] * len(tokens(reward, row, "", "length"))
        for step, label in zip(given["completions"], row["labels"], strict=True):
            pieces: Any = [*words.encode(step, add_special_tokens=False), *words.encode(";", add_special_tokens=False)]
            ids, labels = [*ids, *pieces], [*labels, *[-100] * (len(pieces) - 1), int(label)]
        states_TH = reward.model.base_model(torch.tensor([ids])).last_hidden_state[0]
        scores_T = reward.model.score(states_TH)[:, 0]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        logits_TV = torch.stack([torch.zeros_like(scores_T), scores_T], -1)
        losses.append(F.cross_entropy(logits_TV, torch.tensor(labels), reduction="sum"))
    assert_step(run, reward.model, torch.stack(losses).sum() / sum(len(row["labels"]) for row in rows))


def test_the_machine_changes_nothing(fit: Fit, labelled: Rows) -> None:
    uses = [{}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 150, "packed": True}, {"packed": True, "save_every": 9}]
    changes = {"batch_size": 10, "step_separator": ";"}
    found = [
        series(fit(changes | {"runtime": use}, labelled[4:], labelled[:4]), "loss", "grad_norm", "heldout_loss") for use in uses
    ]
    assert len(found[0]) >= 10
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-5)


def test_held_out_steps_get_the_scores_of_the_checkpoint(fit: Fit, labelled: Rows, reward: RewardModel) -> None:
    held = [*labelled[:7], labelled[7] | {"completions": ["+1" * 96], "labels": [1.0]}]
    run = fit({"step_separator": ";", "runtime": {"micro_batch_tokens": 90}}, labelled[8:], held)
    assert counts(run.folder, "heldout rows")["dropped: too long"] == 1
    model, written = checkpoint(run), tables(run)["scores"]
    assert [{name: row[name] for name in held[0]} for row in written] == held[:7]
    for row, expected in zip(written, prefix_scores(model, sequences(reward, held[:7])), strict=True):
        assert row["step_scores"] == pytest.approx(torch.sigmoid(expected).tolist(), abs=1e-5)
    config = json.loads((run.folder / "outputs" / "checkpoint" / "config.json").read_text())
    assert config["reward_step_separator"] == ";"
    assert not {"reward_bias", "reward_scale"} & config.keys()


def test_it_learns(fit: Fit, chain_rows: Rows) -> None:
    # A step that takes away is wrong.
    rng, rows = random.Random(0), []
    for row in chain_rows:
        steps = [rng.choice("+-") + rng.choice("12") for _ in range(rng.randint(1, 6))]
        labels = [step[0] == "+" for step in steps]
        rows.append({"prompt": row["prompt"], "completions": steps, "labels": labels, "finish": "length"})
    optimizer = {"lr": 1e-2, "warmup": 0.1, "schedule": "cosine"}
    run = fit({"steps": None, "epochs": 15, "optimizer": optimizer, "step_separator": ""}, rows[:36], rows[36:])
    assert series(run, "heldout_loss")[-1] < 0.5 * series(run, "heldout_loss_before")[0]
    assert series(run, "step_accuracy")[-1] > 0.9
    assert len(series(run, "step_accuracy_before")) == 1
    # 36 rows in batches of 8 are 5 steps an epoch, 68 in all, the last one at the end.
    assert len(series(run, "step_accuracy")) == len(series(run, "step_accuracy_wrong")) == 14
    assert len(series(run, "loss")) == 68


# What it starts from, and what it makes of it.


def test_it_starts_from_either_kind_of_reward_model(fit: Fit, request_of: Make, labelled: Rows, pairs: Rows) -> None:
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    of_pairs = fit({}, pairs, demonstrations=demonstrations)
    assert checkpoint(of_pairs).config.reward_bias != 0
    data = {"train": labelled, "heldout": labelled, "demonstrations": demonstrations, "samples": demonstrations}
    of_steps = run_stage(request_of(FIRST, model=of_pairs.folder / "outputs" / "checkpoint", **data))
    made = load_reward_model(of_steps.folder / "outputs" / "checkpoint", rates="steps")
    assert (made.step_separator, made.bias, made.scale) == (";", 0.0, 1.0)
    assert any("demonstrations and samples are not used" in event["text"] for event in events(of_steps.folder, "message"))
    assert series(of_steps, "reward_bias") == []
    again = run_stage(request_of({}, model=of_steps.folder / "outputs" / "checkpoint", train=pairs, heldout=pairs))
    assert load_reward_model(again.folder / "outputs" / "checkpoint").step_separator is None


def test_a_model_of_the_other_kind_is_refused(fit: Fit, labelled: Rows, reward_model: Path) -> None:
    folder = fit(FIRST, labelled).folder / "outputs" / "checkpoint"
    with pytest.raises(InputError, match=r"^checkpoint: a process reward model, .* to the reward `process_model`$"):
        load_reward_model(folder)
    with pytest.raises(InputError, match=r"^reward model: a reward model of whole completions, .* rows with \"completions\""):
        load_reward_model(reward_model, rates="steps")
    assert load_reward_model(folder, rates=None).step_separator == ";"


# Resuming.


def test_a_run_that_fails_after_every_step_ends_as_one_that_does_not(request_of: Make, labelled: Rows) -> None:
    changes = {"steps": 3, "step_separator": ";", "runtime": {"save_every": 1}}
    data = {"train": labelled[4:], "heldout": labelled[:4]}
    expected, request = run_stage(request_of(changes, **data)), request_of(changes, **data)

    def crash(event: Row) -> None:
        if event["event"] == "state":
            raise InterruptedError

    for _ in range(3):
        with pytest.raises(InterruptedError):
            run_stage(request, crash)
    assert digests(run_stage(request, crash)) == digests(expected)


# What it cannot be trained on.

STEPS = {"completions": ["1;", "2"], "labels": [1.0, 0.5]}


@pytest.mark.parametrize(
    ("changes", "name", "row", "message"),
    [
        ({"margin_weight": 1}, "train", {}, "are for pairs; these rows label steps: set both to 0"),
        ({"center_weight": 1}, "train", {}, "are for pairs; these rows label steps: set both to 0"),
        ({"max_length": 5}, "train", {}, r"no row with step labels fits in 5 tokens \(.*dropped: too long': 2"),
        ({}, "train", {"completions": ["hello"], "labels": [1]}, r"no row .* spell another text': 2"),
        ({}, "heldout", {"labels": [1.0]}, r'row 2: 1 "labels" for 2 "completions"'),
        ({}, "train", {"labels": [1.0, 1.5]}, r'row 2: "labels" .* that of step 2 is 1.5'),
        ({}, "train", {"completions": ["1", " "]}, r"row 2: step 2 in \"completions\" must be text and not empty, it is ' '"),
        ({}, "train", {"labels": None}, r'row 2 has no "labels" \(it has prompt, completions, labels\); a process'),
    ],
)
def test_what_does_not_go_together(request_of: Make, labelled: Rows, changes: Row, name: str, row: Row, message: str) -> None:
    fine = {"prompt": labelled[0]["prompt"]} | STEPS
    whole = {"completions", "labels"} <= row.keys()
    rows = [fine | row] * 2 if whole else [fine, fine | row]
    with pytest.raises(InputError, match=message):
        run_stage(request_of(FIRST | changes, **({"train": [fine], "heldout": [fine]} | {name: rows})))


def test_held_out_rows_of_another_kind_are_refused(request_of: Make, labelled: Rows, pairs: Rows) -> None:
    with pytest.raises(InputError, match='row 1 has no "completions"'):
        run_stage(request_of(FIRST, train=labelled, heldout=pairs))
    with pytest.raises(InputError, match='row 1 has neither "chosen" and "rejected" nor "completions" and "ranks"'):
        run_stage(request_of({"steps": 1}, train=pairs, heldout=labelled))
