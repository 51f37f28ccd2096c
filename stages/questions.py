"""Questions: pairs of samples for people to compare, whose answers `answers` makes preferences of.

    for each two samples of a prompt that differ (or for two of each prompt):
        toss, by the seed and the two texts, which is shown on the left
    shuffle all, keep the first `limit`
    write the pairs as Parquet, and page.html, which shows them side by side

Blind: neither side nor order depends on which sample, policy or reward a text is of, and the page holds nothing but the
texts. A question's id is the hash of what is shown, sides included: answers can be told to be of these very questions, and
those of an earlier page still count for the questions that both have.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from stages.artifacts import digest_of
from stages.data.grouping import together
from stages.data.labels import QUESTION_TYPES, answers_alone, completion_columns, of_prompt
from stages.data.parquet import read_schema, write_rows
from stages.data.questions import PAGE, page
from stages.data.recorded import sample_number
from stages.errors import InputError
from stages.rollouts.seeds import sample_seed
from stages.run import Run
from stages.specs.questions import QuestionsConfig

Row = dict[str, Any]
# Where a pair comes in the order, and its question.
Placed = tuple[tuple[int, str], Row]


def questions(config: QuestionsConfig, run: Run, *, samples: Path) -> None:
    """Write `questions` with its page. Raises InputError when the samples have no completions, or no two that differ."""
    completion_columns(samples, "samples")
    counts: Counter[str] = Counter()
    candidates = _candidates(config, run, samples, counts)
    if config.limit is None:
        placed = sorted(candidates, key=lambda one: one[0])
    else:
        placed = heapq.nsmallest(config.limit, candidates, key=lambda one: one[0])
    asked = [question for _, question in placed]
    if not asked:
        raise InputError(f"no question came of the samples ({dict(counts)}): are there two completions a prompt that differ?")
    counts["pairs beyond the limit"] = counts["pairs"] - len(asked)
    types = {field.name: field.type for field in read_schema(samples)} | QUESTION_TYPES
    folder = run.output("questions")
    write_rows(folder, asked, types=types)
    (folder / PAGE).write_text(page(asked, config.instruction), "utf-8", newline="\n")
    run.table("questions", [{"what": one, "number": count} for one, count in counts.items()])
    run.log(0, {"questions": len(asked), "prompts": len({digest_of(question["prompt"]) for question in asked})})


def _candidates(config: QuestionsConfig, run: Run, samples: Path, counts: Counter[str]) -> Iterator[Placed]:
    """All pairs that may be asked, each two texts of a prompt once."""
    rows = run.rows(samples) if config.part == "completion" else answers_alone(run.rows(samples), counts)
    known: set[str] = set()
    for group in together(rows):
        counts["prompts"] += 1
        placed = sorted(_pairs(config, group, counts), key=lambda one: one[0])
        if not placed:
            counts["prompts without two different completions"] += 1
        for one in placed if config.pairs == "all" else placed[:1]:
            if one[1]["id"] in known:
                counts["pairs asked before"] += 1
                continue
            known.add(one[1]["id"])
            counts["pairs"] += 1
            yield one


def _pairs(config: QuestionsConfig, group: list[Row], counts: Counter[str]) -> Iterator[Placed]:
    prompt = digest_of(group[0]["prompt"])
    for pair in combinations(enumerate(group), 2):
        (_, one), (_, other) = pair
        if one["completion"] == other["completion"]:
            counts["pairs of equal texts"] += 1
            continue
        first, second = sorted(pair, key=lambda numbered: numbered[1]["completion"])
        texts = digest_of([prompt, first[1]["completion"], second[1]["completion"]])
        turned = sample_seed(config.seed, 0, f"side/{texts}", 0) % 2
        left, right = (second, first) if turned else (first, second)
        yield (sample_seed(config.seed, 0, f"order/{texts}", 0), texts), _question(left, right)


def _question(left: tuple[int, Row], right: tuple[int, Row]) -> Row:
    sides = {"left": left, "right": right}
    shown = {"prompt": left[1]["prompt"]} | {name: row["completion"] for name, (_, row) in sides.items()}
    made: Row = {"id": digest_of(shown)[:16], **shown}
    for name, (place, row) in sides.items():
        made |= {f"{name}_sample": sample_number(row, place), f"{name}_finish": row.get("finish")}
    return made | of_prompt(left[1], made)
