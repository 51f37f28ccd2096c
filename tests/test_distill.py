"""Distillation through its request: each objective's loss and gradient by hand, who draws, what falls, what is written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import distilling
import pytest
import torch
from conftest import request_for
from distilling import CASES, DRAWN, Inputs, Rows, distill, same_family, spied_collect, with_dropout, written_out
from pydantic import ValidationError
from safetensors.torch import load_file
from test_sft import config, counts, digests, encoded, events, metrics, plain_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

import stages.distill
from stages.data.batching import RowOrder
from stages.data.parquet import read_rows
from stages.errors import InputError
from stages.models.load import load_policy, save_policy
from stages.models.logprobs import TokenLogProbs
from stages.request import run_stage
from stages.rollouts.sample import sample_rows
from stages.specs.common import Sampling
from stages.specs.distill import DistillConfig

inputs = distilling.inputs
language: Any = AutoModelForCausalLM.from_pretrained


def checkpoint(folder: Path) -> Path:
    return folder / "outputs" / "checkpoint"


# An epsilon of the gradients' size leaves their norm in AdamW's first step, so that it shows how they were clipped.
ADAM: dict[str, Any] = {"eps": 0.1, "lr": 0.3, "max_grad_norm": 0.2, "schedule": "constant"}
LAYOUTS = [{}, {"packed": True, "micro_batch_tokens": 60}]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["padded", "packed"])
def test_the_first_step_is_that_of_the_loss_written_out(
    inputs: Inputs, chain_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, layout: dict[str, Any]
) -> None:
    drawn = spied_collect(monkeypatch)
    run = distill(inputs, tmp_path / "run", **CASES[case], steps=1, batch_size=6, optimizer=ADAM, runtime=layout)
    policy, student = load_policy(inputs["model"]), language(inputs["model"])
    rows = [chain_rows[:20][place] for place in RowOrder(20, 0).take(0, 6)]
    if "drawn" in case:
        [one] = drawn
        assert [row["id"] for row in one.rows] == [row["id"] for row in rows]
        samples = one.rollouts.samples
        sequences = [([*sample.prompt_ids, *sample.completion.ids], len(sample.prompt_ids)) for sample in samples]
        assert {sample.completion.finish for sample in samples} == {"stop", "length"}
    else:
        assert drawn == []
        sequences = [([*one.prompt_ids, *one.completion_ids], len(one.prompt_ids)) for one in encoded(policy, rows)]
    loss = written_out(CASES[case]["objective"], student, language(inputs["teacher"]), sequences)
    assert metrics(run.folder, "loss") == {1: pytest.approx(loss.item(), abs=1e-5)}
    names, parameters = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.cat([one.flatten() for one in gradients]).norm()
    assert metrics(run.folder, "grad_norm") == {1: pytest.approx(norm.item(), rel=1e-4)}
    now = load_file(checkpoint(run.folder) / "model.safetensors")
    for name, before, gradient in zip(names, parameters, gradients, strict=True):
        gradient = gradient * min(1.0, 0.2 / norm)
        expected = before - 0.3 * gradient / (gradient.abs() + 0.1)
        torch.testing.assert_close(now[name], expected.detach(), atol=2e-5, rtol=1e-3)


def test_loss_on_all_tokens_counts_the_prompts_too(inputs: Inputs, chain_rows: Rows, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"objective": "forward_kl", "loss_on": "all", "steps": 1, "batch_size": 20}
    run = distill(inputs, tmp_path / "run", **chosen)
    policy = load_policy(inputs["model"])
    sequences = [([*one.prompt_ids, *one.completion_ids], 1) for one in encoded(policy, chain_rows[:20])]
    loss = written_out("forward_kl", language(inputs["model"]), language(inputs["teacher"]), sequences)
    assert metrics(run.folder, "loss") == {1: pytest.approx(loss.item(), abs=1e-5)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_likelihood_of_demonstrations_is_sft(inputs: Inputs, tmp_path: Path, dtype: str) -> None:
    """To the last byte, dropout and held-out losses too; but for who has drawn the generations."""
    given = {name: inputs[name] for name in ("train", "heldout")} | {"model": with_dropout(inputs["model"], tmp_path / "model")}
    chosen = config(steps=None, epochs=2, dtype=dtype)
    runs = [run_stage(request_for(stage, tmp_path / stage, chosen, **given)) for stage in ("sft", "distill")]
    found = [{name: digest for name, digest in digests(run).items() if name.startswith("checkpoint")} for run in runs]
    assert found[0] == found[1]
    for name in ("loss", "grad_norm", "lr", "heldout_loss_before", "heldout_loss"):
        assert metrics(runs[0].folder, name) == metrics(runs[1].folder, name) != {}
    written = [list(read_rows(run.folder / "outputs" / "generations")) for run in runs]
    assert {row.pop("policy") for row in written[0]} == {"sft"}
    assert {row.pop("policy") for row in written[1]} == {"student"}
    assert written[0] == written[1]


@pytest.mark.parametrize("case", [case for case in CASES if "kl" in case])
def test_training_brings_the_student_nearer_to_the_teacher(inputs: Inputs, tmp_path: Path, case: str) -> None:
    """A student that draws meets other tokens as it learns, so that a reverse KL falls more slowly there."""
    run = distill(inputs, tmp_path / "run", **CASES[case], steps=40, batch_size=20, optimizer={"lr": 1e-2})
    loss = list(metrics(run.folder, "loss").values())
    assert sum(loss[-8:]) < (0.85 if case == "reverse_kl drawn" else 0.5) * sum(loss[:8])
    assert min(loss) >= 0


def test_the_held_out_loss_is_the_likelihood_s(inputs: Inputs, chain_rows: Rows, tmp_path: Path) -> None:
    """Whatever is trained, and without dropout; after each epoch of the prompts, and at the end."""
    given = inputs | {"model": with_dropout(inputs["model"], tmp_path / "model")}
    for case in ("reverse_kl", "forward_kl drawn"):
        run = distill(given, tmp_path / case, **CASES[case], steps=5, batch_size=10, heldout_rows=12)
        policy = load_policy(inputs["model"])
        sequences = encoded(policy, chain_rows[32:44])
        assert metrics(run.folder, "heldout_loss_before") == {0: pytest.approx(plain_loss(policy.model, sequences), abs=1e-5)}
        after = metrics(run.folder, "heldout_loss")
        assert list(after) == [2, 4, 5]
        assert after[5] == pytest.approx(plain_loss(language(checkpoint(run.folder)), sequences), abs=1e-5)
    nothing = {name: inputs[name] for name in ("model", "teacher", "train")}
    run = distill(nothing, tmp_path / "no held-out rows", **CASES["forward_kl"], steps=1)
    assert metrics(run.folder, "heldout_loss") == metrics(run.folder, "heldout_loss_before") == {}


def test_the_student_draws_afresh_in_each_step(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From itself as it is then, without dropout; a prompt that comes twice in a step is drawn anew."""
    drawn, training = spied_collect(monkeypatch), []
    forward = TokenLogProbs.forward
    original = stages.distill.TokenDivergence.forward
    monkeypatch.setattr(
        stages.distill.TokenDivergence, "forward", lambda self, batch: training.append(self.training) or original(self, batch)
    )
    assert forward is TokenLogProbs.forward
    given = inputs | {"model": with_dropout(inputs["model"], tmp_path / "model")}
    distill(given, tmp_path / "run", objective="reverse_kl", **DRAWN, steps=3, batch_size=30, seed=4, runtime={"threads": 1})
    assert [one.step for one in drawn] == [0, 1, 2]
    assert training
    assert all(training)
    assert all(one.training for one in drawn), "it was left in training mode"
    order = RowOrder(20, 4)
    rows = list(read_rows(inputs["train"]))
    texts = []
    for number, one in enumerate(drawn):
        assert [row["id"] for row in one.rows] == [rows[place]["id"] for place in order.take(30 * number, 30)]
        then = load_policy(given["model"])
        then.model.load_state_dict(one.model.state_dict())
        for sample in one.rollouts.samples:
            [again], _ = sample_rows(
                then, [sample.row], Sampling(max_new_tokens=8), seed=4, step=number, numbers=[sample.sample]
            )
            assert again.completion.ids == sample.completion.ids
        twice = [sample for sample in one.rollouts.samples if sample.sample == 1]
        assert len(twice) == 10
        texts.append({(sample.row["id"], sample.sample): sample.text for sample in one.rollouts.samples})
        assert sum(texts[-1][row, 0] != texts[-1][row, 1] for row, number in texts[-1] if number == 1) > 5
    for one, other in pairwise(drawn):
        before, after = (draw.model.get_input_embeddings().weight for draw in (one, other))
        assert not torch.equal(before, after)
    both = texts[0].keys() & texts[1].keys()
    assert sum(texts[0][key] != texts[1][key] for key in both) > len(both) / 2


def test_generations_are_the_trained_student_s(inputs: Inputs, chain_rows: Rows, tmp_path: Path) -> None:
    run = distill(inputs, tmp_path / "run", **CASES["forward_kl"])
    records = list(read_rows(run.folder / "outputs" / "generations"))
    trained = load_policy(checkpoint(run.folder))
    sampling = DistillConfig.model_validate(config()).sampling
    samples, _ = sample_rows(trained, chain_rows[32:37], sampling, seed=0, step=6)
    assert [(record["id"], record["completion"]) for record in records] == [(one.row["id"], one.text) for one in samples]
    assert {(record["step"], record["policy"]) for record in records} == {(6, "student")}


# Who the teacher can be.


def test_a_likelihood_has_no_teacher_and_a_kl_has_one(inputs: Inputs, tmp_path: Path) -> None:
    alone = {name: inputs[name] for name in ("model", "train")}
    with pytest.raises(InputError, match="objective reverse_kl compares distributions: give the teacher's checkpoint"):
        run_stage(request_for("distill", tmp_path / "none", config(objective="reverse_kl"), **alone))
    superfluous = request_for("distill", tmp_path / "superfluous", config(), **alone, teacher=inputs["teacher"])
    with pytest.raises(InputError, match="there is an input teacher, but objective likelihood reads its outputs alone"):
        run_stage(superfluous)
    with pytest.raises(ValidationError, match="source: student needs objective forward_kl or reverse_kl"):
        DistillConfig.model_validate({"source": "student"})


def test_a_teacher_reads_the_student_s_tokens(inputs: Inputs, tmp_path: Path) -> None:
    teacher: Any = load_policy(inputs["teacher"])
    teacher.tokenizer.add_tokens(["another"])
    save_policy(teacher, tmp_path / "teacher")
    assert "another" in AutoTokenizer.from_pretrained(tmp_path / "teacher").get_vocab()
    with pytest.raises(InputError, match="the teacher's tokenizer differs from the policy's"):
        distill(inputs | {"teacher": tmp_path / "teacher"}, tmp_path / "run", objective="forward_kl")


def test_a_teacher_reads_as_far_as_the_student(inputs: Inputs, init_folder: Path, chain_rows: Rows, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.mkdir()
    text = (init_folder / "init.yaml").read_text()
    (short / "init.yaml").write_text(text.replace("max_position_embeddings: 128", "max_position_embeddings: 40"))
    given = inputs | {"teacher": same_family(short, tmp_path / "teacher", 7)}
    with pytest.raises(
        InputError, match="the teacher reads 40 tokens, and a demonstration may have more: set max_length to that"
    ):
        distill(given, tmp_path / "long", objective="forward_kl", max_length=41)
    run = distill(given, tmp_path / "fits", objective="forward_kl", max_length=40, steps=1)
    assert 10 < counts(run.folder, "train rows")["used"] <= 20
    # What the student may draw is to fit as well.
    policy = load_policy(inputs["model"])
    room = [40 - len(one.prompt_ids) for one in encoded(policy, chain_rows[:20])]
    limit = sorted(room)[10]
    changes: dict[str, Any] = {"objective": "forward_kl", "source": "student", "max_length": 40, "steps": 1}
    run = distill(given, tmp_path / "drawn", **changes, student_sampling={"max_new_tokens": limit})
    [told] = [one for one in events(run.folder, "table") if one["name"] == "prompts"]
    assert told["rows"][0] == {"what": "used", "rows": sum(one >= limit for one in room)}


def test_a_loss_that_is_not_finite_names_the_prompts(inputs: Inputs, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"objective": "forward_kl", **DRAWN, "batch_size": 2, "optimizer": {"lr": 1e30}}
    rows = [list(read_rows(inputs["train"]))[place]["id"] for place in RowOrder(20, 0).take(2, 2)]
    with pytest.raises(InputError, match=r"step 2, prompts .* is (nan|inf)") as caught:
        distill(inputs, tmp_path / "run", **chosen)
    assert f"step 2, prompts {sorted(rows)}: " in str(caught.value)
