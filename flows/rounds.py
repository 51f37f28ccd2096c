"""Iterative RLHF (rl4llm 4.1.5): a champion is sampled, its samples are labelled, and what learns from them takes its place if
it is better. One run is one round; a schedule, or a person, starts the next.

corpus -> base, demonstrations -> sft           in the first round, when the recipe makes its own first champion
prompts -> fresh                                the round's slice of an endless stream of the training prompts
champion, fresh -> samples -> labels            or, when people label: samples -> questions, and their answers -> answers
labels -> preferences, heldout_preferences      all so far, and the round's: a new version of each
preferences, samples -> reward_model            if there is such a step: anew, or going on from the last round's
champion, fresh -> ppo or grpo; or champion, labels -> preference
evaluate-champion, evaluate-candidate           on the held-out prompts, the champion being the candidate's opponent
the gate -> the alias `champion` moves to the candidate, or stays

A round is a record (tasks/rounds.py), written before its steps. One that failed or was killed is gone on with by the next
start, on the same slice and inputs, also when the recipe was edited; one that waits for people's labels by a start with
`labels`. A start while another process runs a round of the same name ends at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefect.client.schemas.objects import State
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.states import Completed
from rich.console import Console

from flows.beginning import prepare
from flows.forms import recipe_flow
from flows.iterations import again
from flows.rounds_recipe import RoundsRecipe
from flows.runner import Definition, begun, check_pools, losses
from stages.artifacts import Model
from stages.errors import InputError
from stages.specs.prepare import PrepareConfig, Slice
from tasks import display
from tasks.exclusive import BusyError
from tasks.execute import StepResult
from tasks.home import configure_environment, server
from tasks.live import show_table
from tasks.pipeline import Outputs, Pending, Pipeline, Source
from tasks.promote import judge, promote
from tasks.references import resolve
from tasks.round_report import as_rows, figures, print_rounds, rounds_plot
from tasks.rounds import Outcome, Round, Rounds, alone
from tasks.store import Store


@dataclass(frozen=True)
class Made:
    """What a round's steps made: the candidate, and by name what the next round goes on from."""

    candidate: Source
    left: dict[str, Source]


Pin = Callable[[Model, Model], object]


def steps(pipeline: Pipeline, recipe: RoundsRecipe, now: Round, pin: Pin = lambda *_: None) -> Made | None:
    """The steps in order; None when people have to label first. `pin` hears of the first champion and model, once made."""
    prompts = prepare(pipeline, "prompts", recipe.prompts, pipeline.input("prompts"))
    heldout, demonstrations = prompts["heldout"], None
    if recipe.demonstrations is not None:
        source = pipeline.input("demonstrations")
        demonstrations = prepare(pipeline, "demonstrations", recipe.demonstrations, source, heldout)
    champion, first = _champion(pipeline, recipe, now, heldout, demonstrations, pin)
    cut = Slice(seed=recipe.stream.seed, start=now.start, count=now.count)
    fresh = prepare(pipeline, "fresh", PrepareConfig(form="prompts", slice=cut), prompts["train"])["train"]
    drawn = {"policy": champion, "prompts": fresh}
    samples = pipeline.step("samples", "sample", again(recipe.samples, now.number), **drawn)["samples"]
    labels = _labelled(pipeline, recipe, now, samples)
    if labels is None:
        return None
    train, held = _preferences(pipeline, recipe, now, labels, heldout)

    learned: Source = now.inputs.get("reward_model")
    if recipe.reward_model is not None:
        last = now.inputs.get("last_reward_model", learned or champion)
        start = {"champion": champion, "first": first, "last": last}[recipe.reward_model_from]
        learnt_from = {"train": train, "heldout": held, "samples": samples}
        learnt_from["demonstrations"] = demonstrations["train"] if demonstrations is not None else None
        made = pipeline.step("reward_model", "reward_model", again(recipe.reward_model, now.number), model=start, **learnt_from)
        learned = made["checkpoint"]

    reference = champion if recipe.reference == "champion" else first
    taught = {"policy": champion, "reference": reference}
    if recipe.ppo is not None:
        made = pipeline.step("ppo", "ppo", again(recipe.ppo, now.number), **taught, reward=learned, prompts=fresh)
    elif recipe.grpo is not None:
        judge = {"reward_model": learned} if "reward_model" in recipe.rewards else {}
        made = pipeline.step("grpo", "grpo", again(recipe.grpo, now.number), **taught, **judge, prompts=fresh)
    else:
        assert recipe.preference is not None
        pairs = labels["train"] if recipe.learn_from == "round" else train
        config = again(recipe.preference, now.number)
        made = pipeline.step("preference", "preference", config, **taught, train=pairs, heldout=held)
    candidate = made["checkpoint"]

    measured = {"prompts": heldout, "reward_model": learned}
    far = reference if reference != champion else None
    pipeline.step("evaluate-champion", "evaluate", recipe.evaluate, policy=champion, reference=far, **measured)
    against = {"policy": candidate, "reference": reference, "opponent": champion}
    pipeline.step("evaluate-candidate", "evaluate", recipe.evaluate, **against, **measured)
    trained = learned if recipe.reward_model is not None else None
    return Made(candidate, {"train": train, "heldout": held, "last_reward_model": trained})


def _champion(
    pipeline: Pipeline, recipe: RoundsRecipe, now: Round, heldout: Source, demonstrations: Outputs | None, pin: Pin
) -> tuple[Source, Source]:
    """The champion, and the model that the first round began with; both are pinned once they are known."""
    if "champion" in now.inputs:
        return now.inputs["champion"], now.inputs["first"]
    model: Source = pipeline.input("model")
    if recipe.base is not None and recipe.corpus is not None:
        corpus = prepare(pipeline, "corpus", recipe.corpus, pipeline.input("corpus"), heldout)
        sources = {"train": corpus["train"], "heldout": corpus["heldout"]}
        model = pipeline.step("base", "sft", recipe.base, model=model, **sources)["checkpoint"]
    if recipe.sft is not None and demonstrations is not None:
        sources = {"train": demonstrations["train"], "heldout": demonstrations["heldout"]}
        model = pipeline.step("sft", "sft", recipe.sft, model=model, **sources)["checkpoint"]
    if isinstance(model, Model):
        pin(model, model)
    return model, model


def _labelled(pipeline: Pipeline, recipe: RoundsRecipe, now: Round, samples: Source) -> Outputs | None:
    """The round's preferences; None when people have not given theirs yet."""
    if recipe.labels is not None:
        judge = now.inputs.get("reward_model") if recipe.labels.reward is None else None
        return pipeline.step("labels", "label", again(recipe.labels, now.number), samples=samples, reward_model=judge)
    assert recipe.questions is not None
    asked = pipeline.step("questions", "questions", again(recipe.questions, now.number), samples=samples)["questions"]
    if "answers" not in now.inputs:
        return None
    return pipeline.step("answers", "answers", recipe.answers, questions=asked, answers=now.inputs["answers"])


def _preferences(
    pipeline: Pipeline, recipe: RoundsRecipe, now: Round, labels: Outputs, heldout: Source
) -> tuple[Source, Source]:
    """All preferences so far and the round's, those to learn from and those held out, each a new version."""
    before: dict[str, Source] = {part: now.inputs.get(part) for part in ("train", "heldout")}
    if "preferences" in now.inputs:
        config = recipe.preferences or PrepareConfig(heldout=0.1)
        given = prepare(pipeline, "first_preferences", config, now.inputs["preferences"], heldout)
        before = {part: given[part] for part in before}

    def joined(name: str, part: str, exclude: Source) -> Source:
        parts = [one for one in (before[part], labels[part]) if one is not None]
        if not parts:
            return None
        sources = dict(zip(("source", "also"), parts, strict=False))
        # The champion may have said nothing, and lost by it.
        return pipeline.step(name, "prepare", PrepareConfig(keep_empty=True), **sources, exclude=exclude)["train"]

    held = joined("heldout_preferences", "heldout", heldout)
    # A prompt that is held out among some of them is so among all.
    return joined("preferences", "train", held), held


def _draft(store: Store, recipe: RoundsRecipe, publish: bool) -> Round:
    """The round that a start is about: the last one while it has not ended, else the next one, not written yet."""
    known = Rounds(store, recipe.name)
    last = known.last()
    if last is not None and not last.ended:
        return last
    stream = {"prepared": recipe.prompts.identity(), "seed": recipe.stream.seed}
    return known.draft(recipe.name_of_champion, recipe.references(), stream, recipe.stream.per_round, publish)


def plan(recipe: RoundsRecipe, from_step: str | None = None) -> Pipeline:
    """What a start would do now."""
    store = Store(configure_environment())
    return _planned(store, recipe, _draft(store, recipe, publish=False), from_step)


def _planned(store: Store, recipe: RoundsRecipe, now: Round, from_step: str | None) -> Pipeline:
    pipeline = Pipeline(recipe.name, store, now.inputs, now.id, recipe.launch, only_plan=True, from_step=from_step)
    steps(pipeline, recipe, now)
    pipeline.check_from_step()
    return pipeline


@recipe_flow
def rounds(
    recipe: RoundsRecipe, from_step: str | None = None, labels: str | None = None
) -> list[StepResult] | State[list[StepResult]]:
    """Run one round.

    Args:
        recipe: What a round does, and where it begins.
        from_step: A step that the round computes itself, and what follows from it, though others have made the same.
        labels: People's answers (./answers.jsonl), for the round that waits for them.
    """
    store = Store(configure_environment())
    # A round that takes its process down each time must not be started for ever.
    losses()
    check_pools(recipe)
    try:
        with alone(store, recipe.name, lambda owner: _say(f"waiting for the lease of {owner}")):
            return _run(store, recipe, from_step, labels)
    except BusyError as busy:
        words = f"another process runs a round of {recipe.name} right now ({busy}); this start has nothing to do"
        return _state("AlreadyRunning", words, [])


def _run(
    store: Store, recipe: RoundsRecipe, from_step: str | None, labels: str | None
) -> list[StepResult] | State[list[StepResult]]:
    """Begin a round, or go on with the one that has not ended."""
    known, now = Rounds(store, recipe.name), _draft(store, recipe, publish=True)
    if labels is not None:
        if recipe.questions is None or not now.id:
            raise InputError(
                f"no round of {recipe.name} waits for labels: start one, of a recipe with the step questions, without them"
            )
        now = known.pin(now, answers=resolve(store, labels, "dataset"))
    elif now.state == "awaiting_labels" and "answers" not in now.inputs:
        return _waits(now, [])
    if now.outcome is None:
        # A missing input or an unknown step shows here, before anything is recorded or computed.
        _planned(store, recipe, now, from_step)
    now = known.go_on(now) if now.id else known.begin(now)
    _say(f"round {now.number} of {recipe.name}: prompts {now.start} to {now.start + now.count - 1} of the stream")
    pipeline = begun(recipe, store, now.inputs, now.id, from_step)

    def pin(champion: Model, first: Model) -> None:
        nonlocal now
        now = known.pin(now, champion=champion, first=first)

    try:
        if now.outcome is None:
            made = steps(pipeline, recipe, now, pin)
            if made is None:
                return _waits(known.wait(now), pipeline.results)
            now = known.decide(now, _outcome(recipe, made, pipeline.results))
        now = _finish(store, known, now)
    except BaseException:
        store.fail(now.id)
        raise
    if server() is not None:
        show_table(as_rows(known.all()), f"{recipe.name}-rounds", f"{recipe.name}: rounds so far")
    plot = rounds_plot(store, known.all())
    return [*pipeline.results[:-1], *(last.model_copy(update={"plot": str(plot)}) for last in pipeline.results[-1:])]


def _outcome(recipe: RoundsRecipe, made: Made, results: Sequence[StepResult]) -> Outcome:
    """The gate's verdict, and the numbers of the round's table."""
    metrics = {result.name: result.metrics for result in results}
    candidate, champion = metrics["evaluate-candidate"], metrics["evaluate-champion"]
    verdict = judge(recipe.gate, candidate, champion)
    left = {name: _known(source) for name, source in made.left.items() if source is not None}
    policy = _known(made.candidate)
    assert isinstance(policy, Model)
    return Outcome(
        passed=verdict.passed,
        reasons=verdict.reasons,
        candidate=policy,
        made=left,
        main=recipe.main,
        figures=figures(metrics, recipe.main),
    )


def _known(source: Source) -> Any:
    assert not isinstance(source, Pending)
    return source


def _finish(store: Store, known: Rounds, now: Round) -> Round:
    """Move the alias, or say why it stays; then the round has ended."""
    assert now.outcome is not None
    why = "; ".join(now.outcome.reasons)
    if not now.outcome.passed:
        return known.end(now, "kept", why)
    by = f"round {now.number} of {now.recipe}"
    promotion = promote(store, now.champion, now.outcome.candidate, now.champion_version, now.id, by)
    if promotion.version is None:
        return known.end(now, "kept", promotion.why)
    return known.end(now, "promoted", why, promotion.version)


def _waits(now: Round, results: list[StepResult]) -> State[list[StepResult]]:
    words = (
        f"round {now.number} of {now.recipe} waits for people's labels of {now.recipe}-questions-questions; start it again "
        "with `labels`, the file of their answers"
    )
    return _state("AwaitingLabels", words, results)


def _state(name: str, message: str, results: list[StepResult]) -> State[list[StepResult]]:
    """The end of a flow run that did all it could, and no round has ended."""
    _say(message)
    return Completed(name=name, message=message, data=results)


def _say(text: str) -> None:
    """A line in the terminal, and in the flow run's log where there is a flow run."""
    display.current.event("rounds", {"event": "message", "text": text})
    try:
        get_run_logger().info(text)
    except MissingContextError:
        return


def report(console: Console, recipe: RoundsRecipe) -> dict[str, Any]:
    """Show all rounds so far; what `--json` says of them."""
    every = Rounds(Store(configure_environment()), recipe.name).all()
    print_rounds(console, recipe.name, every)
    return {"rounds": [one.model_dump(mode="json") for one in every]}


DEFINITION = Definition(RoundsRecipe, rounds, steps, plan=plan, report=report)
