"""Preference optimisation without a reward model: SFT, then DPO or any of its family, measured on held-out prompts.

corpus -> base, demonstrations -> sft, prompts -> samples -> labels (or preferences)       see flows/beginning.py
preferences -> reward_model                     if there is such a step: it labels, and measures
sft, preferences -> reference                   its log-probs, once for all methods that read pairs; reference-FORM for others
each method, all from the same SFT model:
    offline     preferences -> NAME
    curriculum  preferences -> NAME, NAME-2, ...            Curry-DPO: the farthest pairs first, each part from the last policy
    online      policy -> NAME-samples -> NAME-labels -> NAME, and again from the policy that came of it
    spin        the same, where each sample loses to the demonstration of its prompt
    -> evaluate-NAME, against SFT

The reference of a method's later parts is its last policy or SFT, as its `reference` says; lineage shows which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from flows.beginning import Beginning, BeginningRecipe, begin, both, prepared
from flows.forms import recipe_flow
from flows.inputs import DpoInputs
from flows.iterations import again
from flows.places import given, made
from flows.runner import Definition, run_pipeline
from stages.artifacts import digest_of
from stages.specs.base import Config
from stages.specs.evaluate import EvaluateConfig
from stages.specs.label import LabelConfig
from stages.specs.log_probs import LogProbsConfig
from stages.specs.preference import Form, Objective, Pairing, PreferenceConfig
from stages.specs.reward_model import RewardModelConfig
from stages.specs.sample import SampleConfig
from tasks import preference_plots
from tasks.execute import StepResult
from tasks.home import configure_environment
from tasks.pipeline import Pipeline, Source
from tasks.store import Store


class Method(Config):
    """One way from the SFT model to an aligned one."""

    name: str = Field(
        default="dpo", pattern=r"^[a-z][\w-]*$", title="Name", description="Of its step; `evaluate-NAME` measures what it made."
    )
    objective: Objective = Field(default_factory=Objective, title="Objective", description="The loss and its coefficients.")
    how: Literal["offline", "curriculum", "online", "spin"] = Field(
        default="offline",
        title="How",
        description="offline: on the preferences; curriculum: on parts of them, from far to near (Curry-DPO, rl4llm 80); "
        "online: on samples of its own, labelled anew; spin: on demonstrations against samples of its own (arXiv 2401.01335).",
    )
    iterations: int = Field(
        default=1, ge=1, title="Iterations", description="Parts of a curriculum, or rounds of sampling and training."
    )
    reference: Literal["last", "first"] = Field(
        default="last", title="Reference", description="Of every iteration: the last one's policy, or always the SFT model."
    )
    lr: float | None = Field(
        default=None, gt=0, title="Learning rate", description="In place of the step preference's; losses differ in scale."
    )

    @model_validator(mode="after")
    def _possible(self) -> Method:
        if self.how == "offline" and self.iterations > 1:
            raise ValueError(f"{self.name}: offline is one pass from the SFT model; iterations are for the other ways")
        if self.how == "curriculum" and self.objective.feeding.form != "pairs":
            raise ValueError(f"{self.name}: a curriculum is of pairs, which {self.objective.name} does not learn from")
        if self.how == "spin" and self.objective.name not in ("spin", "dpo"):
            raise ValueError(f"{self.name}: spin trains by the objective spin (DPO's loss), not by {self.objective.name}")
        return self


class DpoRecipe(BeginningRecipe):
    """SFT, then methods that learn from preferences without RL; every model is measured on held-out prompts."""

    inputs: DpoInputs = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=DpoInputs, title="Inputs", description="What the steps begin with, by reference."
    )
    preference: PreferenceConfig = Field(
        title="preference", description="How every method trains, but for what the method says itself."
    )
    methods: list[Method] = Field(
        default_factory=lambda: [Method()],
        min_length=1,
        title="Methods",
        description="What is made of the same SFT model and preferences, side by side.",
    )
    resample: SampleConfig | None = Field(
        default=None,
        title="resample",
        description="Online and spin: how a policy is sampled to learn from its own completions.",
    )
    relabel: LabelConfig | None = Field(
        default=None,
        title="relabel",
        description="Online: who prefers among these; without a `reward` the reward model, which the recipe then trains.",
    )
    reward_model: RewardModelConfig | None = Field(
        default=None,
        title="reward_model",
        description="Learns a reward from the preferences: it labels online samples, where relabel has no `reward`, and "
        "measures every policy, deciding who wins where evaluate has no judge.",
    )
    evaluate: EvaluateConfig = Field(title="evaluate", description="How every model is measured.")

    @model_validator(mode="after")
    def _complete(self) -> DpoRecipe:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"methods: {', '.join(names)}: two have one name")
        ways = {method.how for method in self.methods}
        if ways & {"online", "spin"} and self.resample is None:
            raise ValueError("methods that are online or spin need the step resample")
        if "online" in ways and self.relabel is None:
            raise ValueError("online methods need the step relabel")
        if self.relabel is not None and self.relabel.reward is None and not self.has("reward_model"):
            raise ValueError("relabel needs a `reward`, or the step reward_model in its place, or inputs.reward_model")
        if "spin" in ways and not self.has("demonstrations"):
            raise ValueError("methods that are spin need the step demonstrations, or inputs.demonstrations_train in its place")
        return self

    @property
    def reads_demonstrations(self) -> bool:
        return super().reads_demonstrations or any(method.how == "spin" for method in self.methods)


@dataclass(frozen=True)
class Road:
    """A pipeline, its recipe, what all methods begin with, the model that labels, if one does, and SFT's log-probs by the
    form of the preferences."""

    pipeline: Pipeline
    recipe: DpoRecipe
    begun: Beginning
    labeller: Source
    log_probs: dict[Form, dict[str, Source]] = field(default_factory=dict)


def steps(pipeline: Pipeline, recipe: DpoRecipe) -> None:
    """The steps in order."""
    begun = begin(pipeline, recipe, prepared(pipeline, recipe))
    base, sft, judge, learnt_from = begun.base, begun.sft, None, both(begun.preferences)
    if recipe.has("reward_model"):
        judge = made(pipeline, recipe, "reward_model", model=sft, **learnt_from)["checkpoint"]

    def measure(name: str, policy: Source, **against: Source) -> None:
        prompts = begun.data["prompts"]["heldout"]
        against |= {"prompts": prompts, "reward_model": judge}
        pipeline.step(f"evaluate-{name}", "evaluate", recipe.evaluate, policy=policy, **against)

    if base is not None:
        measure("base", base)
    measure("sft", sft, reference=base, opponent=base)
    by_model = recipe.relabel is not None and recipe.relabel.reward is None
    road = Road(pipeline, recipe, begun, judge if by_model else None)
    for method in recipe.methods:
        measure(method.name, _trained(road, method), reference=sft, opponent=sft)


def _trained(road: Road, method: Method) -> Source:
    """The policy that a method ends with."""
    sft = policy = road.begun.sft
    for number in range(1, method.iterations + 1):
        config = _config(road.recipe.preference, method, number)
        reference = policy if method.reference == "last" else sft
        sources: dict[str, Source] = both(road.begun.preferences)
        if method.how in ("online", "spin"):
            sources["train"] = _own(road, method, number, policy)
        elif reference is sft and config.objective.feeding.reference:
            sources |= _log_probs(road, config)
        step = method.name if number == 1 else f"{method.name}-{number}"
        policy = road.pipeline.step(step, "preference", config, policy=policy, reference=reference, **sources)["checkpoint"]
    return policy


def _config(shared: PreferenceConfig, method: Method, number: int) -> PreferenceConfig:
    """How an iteration of a method trains."""
    form, pairing = method.objective.feeding.form, shared.pairing
    if method.how == "curriculum":
        pairing = pairing.model_copy(update={"parts": method.iterations, "part": number})
    found: dict[str, Any] = {"objective": method.objective, "pairing": pairing if form == "pairs" else Pairing()}
    if form != "segments":
        found["aspects"] = None
    if method.lr is not None:
        found["optimizer"] = shared.optimizer.model_copy(update={"lr": method.lr})
    return again(shared.model_copy(update=found), number)


def _own(road: Road, method: Method, number: int, policy: Source) -> Source:
    """Preferences among a policy's own samples, or of demonstrations over these."""
    recipe, end = road.recipe, "" if number == 1 else f"-{number}"
    assert recipe.resample is not None
    prompts = road.begun.data["prompts" if method.how == "online" else "demonstrations"]["train"]
    config, judge = LabelConfig(heldout=0), {"demonstrations": prompts}
    if method.how == "online":
        assert recipe.relabel is not None
        config, judge = again(recipe.relabel, number), {"reward_model": road.labeller}
    drawn = {"policy": policy, "prompts": prompts}
    samples = road.pipeline.step(f"{method.name}-samples{end}", "sample", again(recipe.resample, number), **drawn)["samples"]
    return road.pipeline.step(f"{method.name}-labels{end}", "label", config, samples=samples, **judge)["train"]


def _log_probs(road: Road, config: PreferenceConfig) -> dict[str, Source]:
    """What SFT gives to the preferences: one step for all methods that read them in one form."""
    form = config.objective.feeding.form
    if form not in road.log_probs:
        step = "reference" if form == "pairs" else f"reference-{form}"
        known = given(road.pipeline, road.recipe, step, "log_probs")
        if known is None:
            asked = LogProbsConfig(form=form, max_length=config.max_length, dtype=config.dtype, runtime=config.runtime)
            sources = {"model": road.begun.sft, **both(road.begun.preferences)}
            known = road.pipeline.step(step, "log_probs", asked, **sources)
        road.log_probs[form] = {"train_log_probs": known["train"], "heldout_log_probs": known["heldout"]}
    return road.log_probs[form]


@recipe_flow
def dpo(recipe: DpoRecipe, from_step: str | None = None) -> list[StepResult]:
    """Run the pipeline; `from_step` recomputes that step and what follows from it."""
    results = run_pipeline(recipe, steps, from_step)
    return [*results[:-1], results[-1].model_copy(update={"plot": str(_compared(recipe, results))})]


def _compared(recipe: DpoRecipe, results: Sequence[StepResult]) -> Path:
    """The plot of all methods, kept with the last evaluation."""
    by_name, drawn = {result.name: result for result in results}, []
    for method in recipe.methods:
        ended, run_id = by_name[f"evaluate-{method.name}"], by_name[method.name].run_id
        # The KL of later iterations is to another reference.
        way = run_id if method.how == "offline" else None
        target = 0.5 / method.objective.coefficients["tau"] if method.objective.name == "ipo" else None
        drawn.append(preference_plots.Method(method.name, ended.metrics, way, target))
    store = Store(configure_environment())
    named = f"{recipe.name}-methods-{digest_of([result.run_id for result in results])[:8]}"
    return preference_plots.methods_plot(store, results[-1].run_id, recipe.name, drawn, store.root / "plots" / f"{named}.png")


DEFINITION = Definition(DpoRecipe, dpo, steps)
