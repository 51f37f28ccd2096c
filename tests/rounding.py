"""What the tests of rounds share: a store, and a pipeline whose steps compute nothing but have metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from conftest import INIT, ROOT
from test_lineage import published

from flows.recipe import parse, read_recipe
from flows.rounds_recipe import RoundsRecipe
from stages.artifacts import digest_of, handle
from stages.specs import STAGES, Config
from tasks.execute import StepResult
from tasks.pipeline import Outputs, Pipeline, Source
from tasks.store import Store

TINY = ROOT / "tests" / "tiny" / "rounds.yaml"
GATE = {"win_rate": 0.5, "max_kl": 10.0, "max_length_ratio": 1.5}
GOOD = {"win_rate": 0.7, "win_rate_low": 0.6, "win_rate_high": 0.8, "kl": 1.0, "length": 20.0, "accuracy": 0.8}
WORSE = GOOD | {"win_rate": 0.5, "win_rate_low": 0.4}


def tiny(*settings: str, **changes: Any) -> RoundsRecipe:
    """The tiny recipe; a change to None takes a key away."""
    values = read_recipe(TINY, settings) | {"gate": GATE}
    values["inputs"] = values["inputs"] | {"model": f"init:{INIT}"} | changes.pop("inputs", {})
    values["inputs"] = {name: reference for name, reference in values["inputs"].items() if reference is not None}
    return parse(RoundsRecipe, {name: value for name, value in (values | changes).items() if value is not None}, "tiny")


def nothing(step: str) -> None:
    del step


class World:
    """What faked pipelines do: `measured` are the metrics by step, `before` is called with each step's name, `read` is what
    each step of the last pipeline read, `ran` the steps that were computed at all, by key."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.measured: dict[str, dict[str, float]] = {
            "evaluate-candidate": GOOD,
            "evaluate-champion": {"length": 18.0, "accuracy": 0.5},
            "reward_model": {"pair_accuracy": 0.75, "pair_accuracy_low": 0.7, "pair_accuracy_high": 0.8},
            "fresh": {"rows_train": 16.0},
            "preferences": {"rows_train": 10.0},
            "heldout_preferences": {"rows_train": 4.0},
        }
        self.before: Callable[[str], object] = nothing
        self.read: dict[str, dict[str, str]] = {}
        self.configs: dict[str, Any] = {}
        self.ran: dict[str, Any] = {}
        self.made: Counter[str] = Counter()

    def pipeline(self, *given: Any, **more: Any) -> Pipeline:
        """In the place of the class Pipeline; plans are real."""
        if more.get("only_plan"):
            return Pipeline(*given, **more)
        self.read = {}
        made = Faked(*given, **more)
        made.world = self
        return made


class Faked(Pipeline):
    """Publishes policies, which can be promoted; other outputs are handles of nothing."""

    world: World

    def step(self, name: str, stage: str, config: Config, **sources: Source) -> Outputs:
        self.world.before(name)
        given: dict[str, Any] = {port: source for port, source in sources.items() if source is not None}
        self.world.read[name] = {port: str(source) for port, source in given.items()}
        self.world.configs[name] = config
        key = digest_of([name, config.identity(), {port: source.digest for port, source in given.items()}])
        if key not in self.world.ran:
            self.world.ran[key] = self._made(name, stage, config, given, key)
        metrics = self.world.measured.get(name, {})
        fields = {"seconds": 0.0, "reason": "", "run_id": "", "metrics": metrics, "artifacts": self.world.ran[key]}
        self.results.append(StepResult(name=name, stage=stage, status="ran", **fields))
        return Outputs(name, self.world.ran[key])

    def _made(self, name: str, stage: str, config: Config, given: dict[str, Any], key: str) -> dict[str, Any]:
        if stage in ("ppo", "sft"):
            return published(self.store, name, stage, config.model_dump(mode="json"), given, self.recipe)
        self.world.made[name] += 1
        fields = {"version": str(self.world.made[name]), "digest": key}
        return {
            output: handle(kind, name=f"{self.recipe}-{name}-{output}", uri=f"runs:/{key}/{output}", **fields)
            for output, kind in STAGES[stage].outputs.items()
        }
