"""The house's rules about imports and the top level (DESIGN 1)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("flows", "tasks", "stages")
MODULES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TORCH = {"torch", "transformers", "accelerate", "tokenizers", "safetensors", "peft", "trl"}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(module: Path) -> set[str]:
    """First parts of modules that a file of this room must not import."""
    room = module.parts[0]
    rules = {
        "flows": {"mlflow", *TORCH, "tests"},
        "tasks": {"flows", *TORCH, "tests"},
        "stages": {"flows", "tasks", "prefect", "mlflow", "tests"},
    }[room]
    return rules | TORCH if module.parts[:2] == ("stages", "specs") else rules


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module: Path) -> None:
    wrong = {name for name in imported(ROOT / module) if name.split(".")[0] in forbidden(module)}
    assert not wrong, f"{module} imports {wrong}"


def test_stage_files_do_not_import_each_other() -> None:
    shared = {"__init__", "base", "common", "shape", "texts"}
    stages = {path.stem for path in (ROOT / "stages" / "specs").glob("*.py")} - shared
    for stage in stages:
        others = {f"stages.{other}" for other in stages - {stage}}
        names = set(imported(ROOT / "stages" / f"{stage}.py"))
        assert not [name for name in names if any(name == o or name.startswith(f"{o}.") for o in others)], stage


def test_orchestrating_side_starts_without_torch() -> None:
    code = (
        "import sys, flows.rlhf, flows.runner, tasks.report; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys, flows.cli; flows.cli.parser().format_help(); "
        "print([m for m in ('torch', 'mlflow', 'prefect', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_top_level_is_the_house() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {name.split("/")[0] for name in tracked if name and not name.startswith(".")}
    assert top <= {"pyproject.toml", "flows", "tasks", "stages", "configs", "tests", "README.md", "uv.lock", "LICENSE"}


def test_files_fit_in_a_head() -> None:
    long = {str(module): n for module in MODULES if (n := len((ROOT / module).read_text().splitlines())) > 320}
    assert not long
