"""Label: preferences from samples, as an annotator would give them who sees the completions of one prompt side by side; or step
labels of each, as one gives who reads it step by step.

    score s_k of each completion: a reward, a verifier, or a learned reward model
    what the annotator sees:      o_k = s_k + noise * g_k,    g_k standard Gumbel
    pairs:                        the one with the larger o is chosen; margin = o(chosen) - o(rejected); `segments` adds the
                                  steps of both, as the reward rates them, for 2D-DPO
    rankings:                     by falling o
    steps:                        of each completion that the reward rates by steps, these and their scores, from 0 to 1

The difference of two Gumbels is logistic, so P(i over j) = sigmoid((s_i - s_j) / noise): the Bradley-Terry model (rl4llm
5.1.3); the order of several is Plackett and Luce's. Scores within `tie_within`, and equal texts, are ties: they make no pair,
and share a rank. A score of None, or one that is not finite, makes none either. Each is counted.

With demonstrations nothing is scored: each sample loses to the demonstration of its prompt, as SPIN has it (arXiv 2401.01335),
sample k to demonstration k modulo their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from stages.artifacts import digest_of
from stages.data.grouping import together
from stages.data.labels import (
    answers_alone,
    completion_columns,
    preference_row,
    segment_columns,
    types_of,
    write_split,
)
from stages.data.parquet import read_schema
from stages.data.recorded import sample_number
from stages.data.schemas import labelled_steps
from stages.data.steps import pieces
from stages.errors import InputError
from stages.models.reward import SequenceScores, load_reward_model, score_rows
from stages.rewards import require_columns, score
from stages.rewards.base import Score
from stages.rollouts.annotator import Judged, Scored, judged, tied
from stages.run import Run
from stages.specs.label import LabelConfig
from stages.training.setup import accelerator_for, count_parameters, set_threads

Row = dict[str, Any]
Scorer = Callable[[Sequence[Row]], list[Score | None]]
CHUNK = 1024
WORDS = (
    ("preference", "are there two completions a prompt that differ"),
    ("labelled completion", "does the reward rate steps"),
)
# A demonstration's completion, and how it ended.
Demonstrated = tuple[str, str | None]


def label(
    config: LabelConfig, run: Run, *, samples: Path, reward_model: Path | None = None, demonstrations: Path | None = None
) -> None:
    """Write `train` and, when a share is held out, `heldout`. Raises InputError before scoring when the reward lacks its
    column, when a sample's prompt has no demonstration, and when no preference comes of the samples."""
    counts: Counter[str] = Counter()
    if demonstrations is None:
        labelled = _labelled(config, run, samples, _scorer(config, samples, reward_model), counts)
    else:
        _require_nothing_else(config, reward_model)
        completion_columns(samples, "samples")
        labelled = _against(_demonstrations(run, demonstrations), together(run.rows(samples)), counts)
    types = {field.name: field.type for field in read_schema(samples)} | types_of(config)
    what, advice = WORDS[config.form == "steps"]
    made = write_split(run, labelled, config.heldout, types, what)
    if not any(made.values()):
        raise InputError(f"no {what} came of the samples ({dict(counts)}): {advice}?")
    if config.segments and counts["pairs without segments"] == sum(made.values()):
        raise InputError(f"no pair has segments ({dict(counts)}): does the reward rate steps?")
    run.table(f"{what}s", [{"what": one, "number": count} for one, count in counts.items()])
    if config.form == "steps":
        run.log(0, made | {"steps": counts["steps"], "steps_right": counts["steps right"] / counts["steps"]})
        return
    agreement = 1 - counts["turned by noise"] / counts["pairs ordered"]
    run.log(0, made | {"ties": counts["ties"], "agreement": agreement})


def _labelled(config: LabelConfig, run: Run, samples: Path, scorer: Scorer, counts: Counter[str]) -> Iterator[Row]:
    make = {"pairs": _pairs, "rankings": _ranking, "steps": _steps}[config.form]
    rows = run.rows(samples) if config.part == "completion" else answers_alone(run.rows(samples), counts)
    for group in _scored(rows, scorer):
        yield from make(config, group, counts)


def _require_nothing_else(config: LabelConfig, reward_model: Path | None) -> None:
    scored = config.reward or reward_model or config.noise or config.tie_within
    if scored or config.form != "pairs" or config.part != "completion":
        raise InputError(
            "with demonstrations each sample as a whole loses to one, and nothing is scored: have `form: pairs` and "
            "`part: completion`, and leave out reward, the reward model, noise and tie_within"
        )


def _demonstrations(run: Run, folder: Path) -> dict[str, list[Demonstrated]]:
    """The demonstrations of each prompt, by its hash."""
    completion_columns(folder, "demonstrations")
    found: dict[str, list[Demonstrated]] = {}
    for row in run.rows(folder):
        found.setdefault(digest_of(row["prompt"]), []).append((row["completion"], row.get("finish")))
    return found


def _against(known: dict[str, list[Demonstrated]], groups: Iterable[list[Row]], counts: Counter[str]) -> Iterator[Row]:
    """SPIN's pairs: the demonstration is chosen, the sample rejected."""
    for group in groups:
        demonstrated = known.get(digest_of(group[0]["prompt"]))
        if demonstrated is None:
            raise InputError(
                f"the prompt of the samples with id {group[0]['id']!r} has no demonstration: sample from the demonstrations' "
                "own prompts, prepared alike"
            )
        for place, row in enumerate(group):
            text, finish = demonstrated[sample_number(row, place) % len(demonstrated)]
            if row["completion"] == text:
                counts["ties"] += 1
                continue
            counts["pairs ordered"] += 1
            pair = preference_row(row, {"prompt": row["prompt"], "chosen": text, "rejected": row["completion"]})
            yield pair | {"chosen_finish": finish, "rejected_finish": row.get("finish")}


def _scorer(config: LabelConfig, samples: Path, folder: Path | None) -> Scorer:
    reward = config.reward
    if (reward is None) == (folder is None):
        raise InputError("label needs either `reward` in its config or a reward model as its input, and not both")
    columns = completion_columns(samples, "samples")
    if reward is not None:
        require_columns(reward.name, columns, "the samples")

        def by_rule(rows: Sequence[Row]) -> list[Score | None]:
            return score(reward.name, [row["completion"] for row in rows], rows, reward.timeout, **reward.args)

        return by_rule
    assert folder is not None
    learned = load_reward_model(folder, config.dtype)
    set_threads(config.runtime, count_parameters(learned.model))
    learned.model.to(accelerator_for(config.runtime).device).eval()  # pyright: ignore[reportArgumentType]
    module = SequenceScores(learned.model)

    def by_model(rows: Sequence[Row]) -> list[Score | None]:
        raw_B = score_rows(module, learned, rows, learned.context, config.runtime.micro_batch_tokens)
        return [Score(one) for one in learned.rewards(raw_B).tolist()]

    return by_model


def _scored(rows: Iterable[Row], scorer: Scorer) -> Iterator[list[Scored]]:
    """The samples of one prompt after another, with their scores. Raises InputError when those of a prompt are not together."""
    groups = together(rows)
    while chunk := list(islice(groups, CHUNK)):
        flat = [row for group in chunk for row in group]
        scores = iter(scorer(flat))
        yield from ([(row, next(scores)) for row in group] for group in chunk)


def _pairs(config: LabelConfig, group: Sequence[Scored], counts: Counter[str]) -> Iterator[Row]:
    kept = judged(group, config, counts)
    candidates = combinations(kept, 2) if config.pairs == "all" else [(kept[0], kept[-1])] if len(kept) > 1 else []
    for better, worse in candidates:
        if tied(config, better, worse):
            counts["ties"] += 1
            continue
        counts["pairs ordered"] += 1
        counts["turned by noise"] += better.value < worse.value
        chosen, rejected = better.row, worse.row
        pair = {"prompt": chosen["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]}
        labelled = preference_row(chosen, pair | {"margin": better.seen - worse.seen}) | {
            "chosen_score": better.value,
            "rejected_score": worse.value,
            "chosen_finish": chosen.get("finish"),
            "rejected_finish": rejected.get("finish"),
        }
        if config.segments:
            where = f"the reward's steps of a pair of the row with id {chosen['id']!r}"
            labelled |= segment_columns(pair, better.score, worse.score, where)
            counts["pairs without segments"] += labelled["chosen_ends"] is None
        yield labelled


def _ranking(config: LabelConfig, group: Sequence[Scored], counts: Counter[str]) -> Iterator[Row]:
    kept = judged(group, config, counts)
    # Ties chain: what is tied with one of a class joins it, and the best seen of a class says where it stands.
    classes: list[list[Judged]] = []
    for one in kept:
        ties = [c for c in classes if any(tied(config, other, one) for other in c)]
        joined = [member for c in ties for member in c] + [one]
        place = classes.index(ties[0]) if ties else len(classes)
        classes = [c for c in classes if c not in ties]
        classes.insert(place, joined)
    ordered = [(better, worse) for a, b in combinations(classes, 2) for better in a for worse in b]
    counts["ties"] += len(kept) * (len(kept) - 1) // 2 - len(ordered)
    counts["pairs ordered"] += len(ordered)
    counts["turned by noise"] += sum(better.value < worse.value for better, worse in ordered)
    if ordered:
        members = [(1 + sum(map(len, classes[:place])), one) for place, c in enumerate(classes) for one in c]
        ranking = {
            "prompt": kept[0].row["prompt"],
            "completions": [one.row["completion"] for _, one in members],
            "ranks": [rank for rank, _ in members],
        }
        finishes = [one.row.get("finish") for _, one in members]
        yield preference_row(kept[0].row, ranking) | {"scores": [one.value for _, one in members], "finishes": finishes}


def _steps(config: LabelConfig, group: Sequence[Scored], counts: Counter[str]) -> Iterator[Row]:
    """Step labels of a prompt's different completions. What follows the last rated step belongs to it."""
    del config
    known: set[str] = set()
    for row, one in group:
        if one is None or one.total is None or not one.step_scores or one.step_ends is None:
            counts["samples without rated steps"] += 1
        elif not row["completion"].strip():
            counts["samples without text"] += 1
        elif row["completion"] in known:
            counts["samples equal to one before"] += 1
        else:
            known.add(row["completion"])
            found = {"prompt": row["prompt"], "completions": pieces(row["completion"], one.step_ends)}
            found["labels"] = list(one.step_scores)
            labels = labelled_steps(found, f"the reward's steps of a completion of the row with id {row['id']!r}")[1]
            counts["steps"] += len(labels)
            counts["steps right"] += sum(label > 0.5 for label in labels)
            yield preference_row(row, found | {"labels": labels}) | {"finish": row.get("finish")}
