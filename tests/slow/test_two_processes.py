"""Several processes under torchrun on the CPU train as one process does (contract 8)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, request_for  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file

from stages.data.chain_sum import bare, worked
from stages.models.load import load_policy, save_policy
from stages.models.reward import new_reward_model, save_reward_model

pytestmark = pytest.mark.slow
Row = dict[str, Any]
# So few tokens that the ranks have several micro-batches each, and not equally many.
RUNTIME = {"device": "cpu", "threads": 1, "micro_batch_tokens": 70, "save_every": 3, "log_every": 1}


def metrics(folder: Path, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Each metric of interest in the order in which it was logged."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    logged = [event["metrics"] for event in lines if event["event"] == "metrics"]
    return {name: [values[name] for values in logged if name in values] for name in names}


def assert_alike(
    stage: str,
    config: Row,
    inputs: dict[str, Path],
    folder: Path,
    lengths: dict[str, int],
    many: int = 2,
    runtime: Row | None = None,
) -> None:
    """Run a stage on one process and on many: each metric named in `lengths` has so many values, and the same ones."""
    found = {}
    for processes in (1, many):
        request = request_for(
            stage, folder / f"{processes} processes", config | {"runtime": RUNTIME | (runtime or {})}, **inputs
        )
        request.folder.mkdir(parents=True)
        file = request.folder / "request.json"
        file.write_text(request.model_dump_json())
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "stages"]
        with subprocess.Popen([sys.executable, *launcher, str(file)], cwd=ROOT) as child:
            try:
                assert child.wait(timeout=200) == 0
            finally:
                child.terminate()  # Ranks that wait for each other for ever end with their launcher.
        found[processes] = metrics(request.folder, tuple(lengths))
        assert (request.folder / "outputs.json").is_file()
        assert {name: len(values) for name, values in found[processes].items()} == lengths
    for name, values in found[1].items():
        assert found[many][name] == pytest.approx(values, abs=1e-5), name


# The second case: one rank has no row of a step's batch, nor of the held-out rows, and the head has weights of its own.
@pytest.mark.parametrize(("batch_size", "heldout_rows", "epochs"), [(10, 11, 2), (1, 1, 1)])
def test_two_processes_give_the_losses_of_one(
    init_folder: Path,
    chain_rows: list[Row],
    dataset: Callable[..., Path],
    tmp_path: Path,
    batch_size: int,
    heldout_rows: int,
    epochs: int,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    spec = (init_folder / "init.yaml").read_text()
    assert "tie_word_embeddings: true" in spec
    (model / "init.yaml").write_text(spec.replace("tie_word_embeddings: true", "tie_word_embeddings: false"))
    inputs = {"model": model, "train": dataset(chain_rows[:32], "train"), "heldout": dataset(chain_rows[32:], "heldout")}
    config: Row = {
        "steps": 6,
        "batch_size": batch_size,
        "max_length": 96,
        "heldout_rows": heldout_rows,
        "generations": 4,
        "optimizer": {"lr": 1e-2},
        "sampling": {"max_new_tokens": 4},
    }
    lengths = {"loss": 6, "grad_norm": 6, "heldout_loss_before": 1, "heldout_loss": epochs}
    assert_alike("sft", config, inputs, tmp_path, lengths)


# With a batch of one, one rank has no row of it; of three ranks, one has no held-out completion either.
@pytest.mark.parametrize(
    ("form", "batch_size", "held", "many"),
    [("pairs", 10, 11, 2), ("rankings", 10, 11, 2), ("rankings", 1, 1, 2), ("pairs", 1, 1, 3)],
)
def test_a_reward_model_on_many_processes_is_that_of_one(
    init_folder: Path,
    chain_rows: list[Row],
    dataset: Callable[..., Path],
    tmp_path: Path,
    form: str,
    batch_size: int,
    held: int,
    many: int,
) -> None:
    rows = []
    for row in chain_rows:
        texts = [worked(row["problem"]), bare(30), bare(40)]
        ranking = {"completions": texts, "ranks": [1, 3, 2]}
        rows.append({"prompt": row["prompt"]} | ({"chosen": texts[0], "rejected": texts[1]} if form == "pairs" else ranking))
    inputs = {"model": init_folder, "train": dataset(rows[:32], "train"), "heldout": dataset(rows[32 : 32 + held], "heldout")}
    config: Row = {"steps": 6, "batch_size": batch_size, "max_length": 96, "optimizer": {"lr": 1e-2}, "bootstrap": 200}
    measured = 6 // -(-32 // batch_size) + 1
    lengths = {"loss": 6, "grad_norm": 6, "heldout_loss_before": 1, "pair_accuracy_before": 1}
    lengths |= {"heldout_loss": measured, "pair_accuracy": measured}
    assert_alike("reward_model", config, inputs, tmp_path, lengths, many)


# With a batch of one, one rank has no row of it; of three ranks, one has no held-out row either.
@pytest.mark.parametrize(("batch_size", "held", "many", "packed"), [(10, 11, 2, False), (1, 1, 2, True), (1, 1, 3, False)])
def test_a_process_model_on_many_processes_is_that_of_one(
    init_folder: Path,
    chain_rows: list[Row],
    dataset: Callable[..., Path],
    tmp_path: Path,
    batch_size: int,
    held: int,
    many: int,
    packed: bool,
) -> None:
    rows = []
    for row in chain_rows:
        steps = worked(row["problem"]).split(";")
        labels = [float(place % 3 == 0) for place in range(len(steps))]
        rows.append({"prompt": row["prompt"], "completions": steps, "labels": labels})
    inputs = {"model": init_folder, "train": dataset(rows[:32], "train"), "heldout": dataset(rows[32 : 32 + held], "heldout")}
    config: Row = {"steps": 6, "batch_size": batch_size, "max_length": 96, "optimizer": {"lr": 1e-2}, "bootstrap": 200}
    measured = 6 // -(-32 // batch_size) + 1
    lengths = {"loss": 6, "grad_norm": 6, "heldout_loss_before": 1, "heldout_loss": measured, "step_accuracy": measured}
    config["step_separator"] = ";"
    assert_alike("reward_model", config, inputs, tmp_path, lengths, many, runtime={"packed": packed})


# With a batch of three in two minibatches, one rank has no completion of a minibatch.
@pytest.mark.parametrize("batch_size", [10, 3])
def test_ppo_on_two_processes_is_that_of_one(
    init_folder: Path, chain_rows: list[Row], dataset: Callable[..., Path], tmp_path: Path, batch_size: int
) -> None:
    reward = new_reward_model(init_folder, seed=1)
    reward.calibrate(0.3, 1.5)
    (tmp_path / "reward").mkdir()
    save_reward_model(reward, tmp_path / "reward")
    inputs = {"policy": init_folder, "reward": tmp_path / "reward", "prompts": dataset(chain_rows[:20], "prompts")}
    rate = {"lr": 1e-2, "warmup": 0.0}
    config: Row = {"steps": 4, "batch_size": batch_size, "epochs": 2, "minibatches": 2, "sampling": {"max_new_tokens": 8}}
    config |= {"optimizer": rate, "critic": {"optimizer": rate}, "bootstrap": "value", "entropy_bonus": 0.01}
    names = ("reward", "kl", "entropy", "explained_variance", "length", "truncated", "policy_loss", "value_loss", "grad_norm")
    names += ("critic_grad_norm", "clip_fraction", "ratio_max", "old_policy_kl", "old_policy_kl_coefficient")
    assert_alike("ppo", config | {"trust_region": "adaptive_kl"}, inputs, tmp_path, dict.fromkeys(names, 4))
    # One rank has no demonstration of an update.
    inputs["ptx"] = dataset([row | {"completion": bare(30)} for row in chain_rows[20:30]], "ptx")
    more = {"ptx": {"weight": 0.5, "batch_size": 1}, "critic": {"shared": True, "coefficient": 0.3, "optimizer": rate}}
    names += ("ptx_loss",)
    assert_alike("ppo", config | more, inputs, tmp_path / "more", dict.fromkeys(names, 4))


LENGTH: Row = {"name": "length", "weight": 3.0}
SEVERAL: Row = {"epochs": 2, "minibatches": 2, "reference_kl": {"coefficient": 0.1}}
PAIRS: Row = {"objective": "ranked_pairs", "refill": {"rounds": 1}, "reference_kl": {"coefficient": 0.1}}


# With one prompt a step, one rank samples nothing; with pairs it has, of one group, nothing to compute either.
@pytest.mark.parametrize(
    ("changes", "prompts", "packed"),
    [(SEVERAL, 5, False), (PAIRS, 3, True), ({"aggregate": "sequence"}, 1, False), (PAIRS, 1, False)],
)
def test_grpo_on_two_processes_is_that_of_one(
    init_folder: Path,
    chain_rows: list[Row],
    dataset: Callable[..., Path],
    tmp_path: Path,
    changes: Row,
    prompts: int,
    packed: bool,
) -> None:
    reward = new_reward_model(init_folder, seed=1)
    reward.calibrate(0.3, 1.5)
    (tmp_path / "reward").mkdir()
    save_reward_model(reward, tmp_path / "reward")
    rows = [row | {"kind": "sum" if place % 2 else "chat"} for place, row in enumerate(chain_rows[:20])]
    inputs = {"policy": init_folder, "prompts": dataset(rows, "prompts")}
    config: Row = {"steps": 4, "prompts": prompts, "group": 3, "sampling": {"max_new_tokens": 8}, "rewards": [LENGTH]}
    config |= {"optimizer": {"lr": 1e-2, "warmup": 0.0, "eps": 1e-5}} | changes
    verifier = {"name": "math", "timeout": 60.0}  # each process has workers of its own, for what it has drawn
    if prompts > 1:
        # A learned part, and groups without spread, whose completions are measured, but not run in the update.
        inputs["reward_model"] = tmp_path / "reward"
        config["rewards"] = [{"name": "answer"}, {"name": "reward_model", "where": {"kind": "sum"}}]
    config["rewards"] = [*config["rewards"], verifier]
    names = (
        "reward",
        "rewards.math",
        "kl",
        "length",
        "truncated",
        "groups",
        "groups_without_spread",
        "rewards_missing",
        "policy_loss",
    )
    names += ("grad_norm", "clip_fraction", "ratio_max", "old_policy_kl", *(["kl_loss"] if "reference_kl" in changes else []))
    assert_alike("grpo", config, inputs, tmp_path, dict.fromkeys(names, 4), runtime={"packed": packed})
    one, two = (load_file(tmp_path / f"{count} processes/outputs/checkpoint/model.safetensors") for count in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)


# With a batch of one, one rank draws nothing.
@pytest.mark.parametrize(("objective", "batch_size", "packed"), [("forward_kl", 5, False), ("reverse_kl", 1, True)])
def test_distillation_on_two_processes_is_that_of_one(
    init_folder: Path,
    chain_rows: list[Row],
    dataset: Callable[..., Path],
    tmp_path: Path,
    objective: str,
    batch_size: int,
    packed: bool,
) -> None:
    save_policy(load_policy(init_folder, seed=7), tmp_path / "teacher")
    inputs = {"model": init_folder, "teacher": tmp_path / "teacher", "train": dataset(chain_rows[:20], "train")}
    inputs["heldout"] = dataset(chain_rows[32:], "heldout")
    config: Row = {"steps": 4, "batch_size": batch_size, "heldout_rows": 3, "generations": 2, "sampling": {"max_new_tokens": 4}}
    config |= {"objective": objective, "source": "student", "student_sampling": {"max_new_tokens": 8}}
    config["optimizer"] = {"lr": 1e-2, "warmup": 0.0, "eps": 1e-5}
    lengths = {"loss": 4, "grad_norm": 4, "heldout_loss_before": 1, "heldout_loss": 1}
    assert_alike("distill", config, inputs, tmp_path, lengths, runtime={"packed": packed})
    one, two = (load_file(tmp_path / f"{count} processes/outputs/checkpoint/model.safetensors") for count in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)
