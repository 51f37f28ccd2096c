"""The command as a person uses it: run, run again, change a value, kill it, mistype something."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
from conftest import ROOT

from flows.cli import main
from tasks.home import configure_environment
from tasks.lineage import trace
from tasks.store import Store

RECIPE = "tests/tiny/rlhf.yaml"
COMMAND = [sys.executable, "-m", "flows.cli"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


def posttrain(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = environment_for(state)
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def in_own_group(state: Path, log: IO[str], *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
    """The command, with settings in its environment, in a process group of its own: ctrl-C reaches it as a terminal's does."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment_for(state) | settings,
        stdout=log,
        stderr=log,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def environment_for(state: Path) -> dict[str, str]:
    ours = ("POSTTRAIN_", "PREFECT_", "MLFLOW_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {"POSTTRAIN_HOME": str(state)}


def stages(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


STEPS = ["prompts", "corpus", "demonstrations", "ptx", "base", "sft", "samples", "labels", "reward_model"]
STEPS += ["evaluate-base", "evaluate-sft", "ppo", "evaluate-ppo"]
# All evaluations: the reward model that measures even the base is trained on samples of the SFT model.
AFTER_SFT = {"sft", "samples", "labels", "reward_model", "ppo", "evaluate-base", "evaluate-sft", "evaluate-ppo"}


# A fresh process that knows nothing of posttrain: what it finds and can read.
PLAIN = """
import json, sys
from pathlib import Path
import datasets, pyarrow.parquet, transformers
found = []
for file in sorted(Path(sys.argv[1]).rglob("*.parquet")):
    rows = pyarrow.parquet.read_table(file)
    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=sys.argv[2])
    assert loaded.num_rows == rows.num_rows > 0 and loaded.column_names == rows.column_names, file
    assert [row["id"] for row in loaded] == rows["id"].to_pylist(), file
    found.append("dataset")
for file in sorted(Path(sys.argv[1]).rglob("config.json")):
    name = json.loads(file.read_text())["architectures"][0]
    model, loading = getattr(transformers, name).from_pretrained(file.parent, output_loading_info=True)
    assert not any(loading.values()), (file, loading)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent)
    chat = [{"role": "user", "content": "1+2"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model(**ids).logits.isfinite().all(), file
    found.append(name)
assert "stages" not in sys.modules
print(json.dumps(found))
"""


def test_first_run_then_second_then_changes(state: Path) -> None:
    planned = stages(posttrain(state, "run", RECIPE, "--dry-run", "--json"))
    assert [stage["action"] for stage in planned.values()] == ["run"] * len(STEPS)
    first = stages(posttrain(state, "run", RECIPE, "--json"))
    assert list(first) == STEPS
    assert {stage["status"] for stage in first.values()} == {"ran"}
    assert set(first["sft"]) >= {"name", "stage", "status", "seconds", "metrics", "artifacts"}
    assert set(first["sft"]["artifacts"]) == {"checkpoint", "generations"}
    assert first["sft"]["metrics"]["heldout_loss"] > 0
    assert 0 <= first["evaluate-sft"]["metrics"]["accuracy_low"] <= first["evaluate-sft"]["metrics"]["accuracy_high"] <= 1

    for name in ("evaluate-base", "evaluate-sft", "evaluate-ppo"):
        assert first[name]["metrics"]["reward_low"] < first[name]["metrics"]["reward"] < first[name]["metrics"]["reward_high"]

    second = stages(posttrain(state, "run", RECIPE, "--json"))
    assert {stage["status"] for stage in second.values()} == {"skipped"}
    assert [stage["artifacts"] for stage in second.values()] == [stage["artifacts"] for stage in first.values()]

    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(state / "artifacts"), str(state / "cache")],
        cwd=state,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    datasets = sum(made["kind"] == "dataset" for stage in first.values() for made in stage["artifacts"].values())
    languages, classifiers = ["LlamaForCausalLM"] * 3, ["LlamaForSequenceClassification"] * 2
    assert sorted(json.loads(done.stdout)) == sorted([*["dataset"] * datasets, *languages, *classifiers])

    entered(state)

    # What is held out is taken out of all that is trained on.
    planned = stages(posttrain(state, "run", RECIPE, "--dry-run", "--json", "--set", "prompts.heldout=0.3"))
    assert {stage["action"] for stage in planned.values()} == {"run"}
    assert planned["demonstrations"]["reason"] == "its input comes from the step prompts, which runs"

    change = ("--set", "sft.optimizer.lr=2e-3")
    planned = stages(posttrain(state, "run", RECIPE, "--dry-run", "--json", *change))
    assert {name for name, stage in planned.items() if stage["action"] == "run"} == AFTER_SFT
    assert planned["sft"]["reason"] == "optimizer.lr: 0.001 -> 0.002"
    third = stages(posttrain(state, "run", RECIPE, "--json", *change))
    assert {name for name, stage in third.items() if stage["status"] == "ran"} == AFTER_SFT

    again = stages(posttrain(state, "run", RECIPE, "--json", "--from", "sft"))
    assert {name for name, stage in again.items() if stage["status"] == "ran"} == AFTER_SFT
    digests = {output: made["digest"] for output, made in first["sft"]["artifacts"].items()}
    assert {output: made["digest"] for output, made in again["sft"]["artifacts"].items()} == digests

    shown = posttrain(state, "artifacts", "tiny-sft")
    assert "tiny-sft-generations" in shown.stdout

    mistaken = posttrain(state, "run", RECIPE, "--seed", "99", "--from", "stf")
    assert mistaken.returncode == 2
    assert "--from stf: no step has this name; there are prompts, corpus" in mistaken.stderr
    assert "ran" not in mistaken.stderr, "it was seen before anything was computed"


def entered(state: Path) -> None:
    """What the steps have made, given in their place: what follows is there already, or is made of it."""
    own = [f"{name}=models:/tiny-{name}/1" for name in ("base", "sft")]
    own += ["samples=datasets:/tiny-samples-samples/1", "ptx_train=datasets:/tiny-ptx-train/1"]
    made_by = {"prompts": "prompts", "demonstrations": "demonstrations", "preferences": "labels"}
    own += [f"{name}_{part}=datasets:/tiny-{made}-{part}/1" for name, made in made_by.items() for part in ("train", "heldout")]
    words = [word for one in own for word in ("--set", f"inputs.{one}")]
    unconfigured = [word for name in (*made_by, "samples", "labels", "sft") for word in ("--set", f"{name}=null")]
    done = posttrain(state, "run", RECIPE, "--json", "--set", "name=entered", "--set", "ppo.steps=2", *words, *unconfigured)
    found = stages(done)
    assert {name: stage["status"] for name, stage in found.items()} == {
        **dict.fromkeys(["prompts", "demonstrations", "preferences", "ptx", "base", "sft", "samples"], "given"),
        **dict.fromkeys(["reward_model", "evaluate-base", "evaluate-sft"], "skipped"),
        **dict.fromkeys(["ppo", "evaluate-ppo"], "ran"),
    }
    [line] = [line for line in done.stderr.splitlines() if "tiny-labels-train/1" in line]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == ["preferences", "given", "0.0", "", "tiny-labels-train/1"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("POSTTRAIN_HOME", str(state))
        back = {str(node): node for node in trace(Store(configure_environment()), "models:/entered-ppo/1")}
    ports = {
        port: str(next(node for node in back.values() if node.uri == uri)) for port, uri in back["entered-ppo/1"].inputs.items()
    }
    assert ports == {
        **dict.fromkeys(["policy", "reference"], "tiny-sft/1"),
        **{"reward": "tiny-reward_model/1", "prompts": "tiny-prompts-train/1", "ptx": "tiny-ptx-train/1"},
    }


def test_seeds_that_are_no_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", RECIPE, "--seeds", "0,x"])
    assert "--seeds: '0,x' must be whole numbers with commas between them" in capsys.readouterr().err


def test_seeds_are_run_in_turn_and_compared(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("flow: prepare\ninputs: {source: 'procedural:chain-sum/prompts'}\nprepare: {rows: 40, heldout: 0.5}\n")
    done = posttrain(tmp_path / "state", "run", str(recipe), "--json", "--seeds", "5,6")
    assert done.returncode == 0, done.stderr
    of_seeds = {one["seed"]: one["stages"] for one in json.loads(done.stdout)["seeds"]}
    rows = {seed: steps[0]["metrics"]["rows_heldout"] for seed, steps in of_seeds.items()}
    assert list(rows) == [5, 6]
    assert rows[5] != rows[6]
    [line] = [line for line in done.stderr.splitlines() if "rows_heldout" in line and "seed" not in line and "->" not in line][
        -1:
    ]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells[1:4] == ["rows_heldout", f"{rows[5]:.0f}", f"{rows[6]:.0f}"]
    assert float(cells[4]) == pytest.approx((rows[5] + rows[6]) / 2, abs=0.05)


def test_killed_command_goes_on_and_leaves_no_server(tmp_path: Path) -> None:
    arguments = [*COMMAND, "run", RECIPE, "--json", "--set", "base.steps=300", "--set", "base.runtime.save_every=20"]
    log = (tmp_path / "log").open("w")
    child = subprocess.Popen(arguments, cwd=ROOT, env=environment_for(tmp_path), stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/state/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(processes_of(tmp_path)) == 2, "the command and its Prefect server"
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    time.sleep(1)
    assert not processes_of(tmp_path), "the command's Prefect server died with it"

    extra = ("--set", "base.steps=300", "--set", "base.runtime.save_every=20")
    resumed = stages(posttrain(tmp_path, "run", RECIPE, "--json", *extra))
    assert [resumed[name]["status"] for name in ("corpus", "base", "sft")] == ["skipped", "resumed", "ran"]
    whole = stages(posttrain(tmp_path, "run", RECIPE, "--json", *extra, "--from", "base"))
    for name in ("base", "sft", "evaluate-sft"):
        assert whole[name]["status"] == "ran"
        before = {output: made["digest"] for output, made in resumed[name]["artifacts"].items()}
        assert {output: made["digest"] for output, made in whole[name]["artifacts"].items()} == before


def test_ctrl_c_ends_at_once_and_the_flow_run_is_not_left_running(tmp_path: Path) -> None:
    """As a terminal does it: the signal goes to the whole group of processes."""
    log = (tmp_path / "log").open("w+")
    changes = ["--set", "base.steps=3000", "--set", "base.runtime.save_every=20"]
    child = in_own_group(tmp_path, log, "run", RECIPE, *changes)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/state/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(40) == 130
    log.seek(0)
    said = log.read()
    assert "the same command goes on from the last saved state" in said
    assert "Traceback" not in said
    assert not processes_of(tmp_path)
    with sqlite3.connect(tmp_path / "prefect" / "prefect.db") as database:
        assert database.execute("select state_type from flow_run").fetchall() == [("CRASHED",)]


def processes_of(state: Path) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/environ") if belongs(path, state)]


def belongs(environ: Path, state: Path) -> bool:
    """Whether a process was started with this state folder."""
    try:
        return f"POSTTRAIN_HOME={state}\0".encode() in environ.read_bytes()
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return False


def test_nothing_but_the_document_reaches_stdout() -> None:
    """Whatever a library prints, even past Python's own stdout, goes to stderr."""
    code = (
        "import os\nfrom flows.cli import _divert_stdout\nreal = _divert_stdout()\n"
        "print('printed', flush=True)\nos.write(1, b'written\\n')\nreal.write('document')\nreal.flush()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr.split()) == ("document", ["printed", "written"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", RECIPE, "--set", "stf.epochs=1"), "unknown key stf; did you mean sft?"),
        (("run", "configs/nothing.yaml"), "no such recipe"),
        (
            ("run", RECIPE, "--dry-run", "--set", "inputs.corpus=./nothing.jsonl"),
            "inputs.corpus: ./nothing.jsonl: no such file",
        ),
        (("run", RECIPE, "--dry-run", "--from", "stf"), "--from stf: no step has this name"),
        (("run", RECIPE, "--set", "flow=rhlf"), "no flow is named 'rhlf'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = posttrain(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
