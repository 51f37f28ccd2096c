"""Answers: preferences by people, from what they answered on the page that `questions` wrote.

    of each annotator and question the last answer counts: left, right, tie or skip
    a question's votes: its answers that are no skip, from at least `annotators` people
    the choice with the most votes decides; a tie, or two choices level at the top, makes no pair
    margin = (votes for - votes against) / votes; a score is the share of votes

The rows are those of `label` with `form: pairs`, and how many `annotators` voted. How far these agree is told by the share of
equal answers among all pairs of answers to one question, by Krippendorff's alpha (a tie is an answer as any other, a skip
is none), and by a table that sets each against the majority of the others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from stages.data.answers import SKIP, Answer, read_answers
from stages.data.labels import PAIR_TYPES, QUESTION_TYPES, preference_row, write_split
from stages.data.parquet import read_schema
from stages.errors import InputError
from stages.run import Run
from stages.specs.answers import AnswersConfig
from stages.statistics import krippendorff_alpha, pairwise_agreement

Row = dict[str, Any]
Votes = Mapping[str, Counter[str]]


def answers(config: AnswersConfig, run: Run, *, questions: Path, answers: Path) -> None:
    """Write `train` and, when a share is held out, `heldout`. Raises InputError for answers that are not to these questions,
    naming file and row, and when no pair comes of them."""
    schema = read_schema(questions)
    if missing := [name for name in ("id", "prompt", "left", "right") if name not in schema.names]:
        raise InputError(
            f'the questions have no column "{missing[0]}" (they have {", ".join(schema.names)}): give the dataset that the '
            "stage `questions` wrote"
        )
    asked = {row["id"]: row for row in run.rows(questions)}
    given, again = read_answers(answers, asked)
    votes, counts = _votes(asked, given, again)
    types = {field.name: field.type for field in schema if field.name not in QUESTION_TYPES} | PAIR_TYPES
    made = write_split(run, _pairs(config, asked, votes, counts), config.heldout, types | {"annotators": pa.int64()}, "pair")
    if not any(made.values()):
        raise InputError(f"no pair came of the answers ({dict(counts)}): is there a question that most people answered alike?")
    people = _people(given, votes, len(asked))
    run.table("answers", [{"what": what, "number": count} for what, count in counts.items()])
    run.table("annotators", people)
    units = [list(one.elements()) for one in votes.values()]
    measured = {"agreement": pairwise_agreement(units), "alpha": krippendorff_alpha(units)}
    if measured["agreement"] is None:
        run.message("no question has answers of two annotators, so their agreement cannot be told")
    numbers = {"ties": counts["ties"], "even_votes": counts["even votes"], "annotators": len(people)}
    numbers |= {"answers": counts["answers"], "skipped": counts["skipped"]}
    run.log(0, made | numbers | {name: value for name, value in measured.items() if value is not None})


def _votes(asked: Mapping[str, Row], given: Sequence[Answer], again: int) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """The votes of each question, without skips, and counts of what became of questions and answers."""
    votes: dict[str, Counter[str]] = {question: Counter() for question in asked}
    for answer in given:
        votes[answer.question][answer.choice] += 1
    skipped = sum(one.pop(SKIP, 0) for one in votes.values())
    skipped_by_all = {answer.question for answer in given} - {question for question, one in votes.items() if one}
    return votes, Counter(
        {
            "questions": len(asked),
            "questions nobody answered": sum(not one for one in votes.values()) - len(skipped_by_all),
            "questions skipped by all": len(skipped_by_all),
            "questions with too few answers": 0,
            "answers": len(given) - skipped,
            "answers given again": again,
            "skipped": skipped,
            "ties": 0,
            "even votes": 0,
            "pairs": 0,
        }
    )


def _pairs(config: AnswersConfig, asked: Mapping[str, Row], votes: Votes, counts: Counter[str]) -> Iterator[Row]:
    for question, row in asked.items():
        count = votes[question].total()
        if not count:
            continue
        if count < config.annotators:
            counts["questions with too few answers"] += 1
            continue
        choice = _majority(votes[question])
        if choice is None or choice == "tie":
            counts["even votes" if choice is None else "ties"] += 1
            continue
        counts["pairs"] += 1
        chosen, rejected = ("left", "right") if choice == "left" else ("right", "left")
        scores = {side: votes[question][side] / count for side in (chosen, rejected)}
        # Of whole numbers, so that 2 of 3 against 1 is one third and not a bit more.
        margin = (votes[question][chosen] - votes[question][rejected]) / count
        pair = {"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected], "margin": margin}
        source = {name: value for name, value in row.items() if name not in QUESTION_TYPES}
        yield preference_row(source, pair) | {
            "chosen_score": scores[chosen],
            "rejected_score": scores[rejected],
            "chosen_finish": row.get(f"{chosen}_finish"),
            "rejected_finish": row.get(f"{rejected}_finish"),
            "annotators": count,
        }


def _majority(votes: Counter[str]) -> str | None:
    """The choice with more votes than any other, or None."""
    (first, most), *others = votes.most_common(2)
    return None if others and others[0][1] == most else first


def _people(given: Sequence[Answer], votes: Votes, asked: int) -> list[Row]:
    """A row an annotator: how many questions were answered, how often the left was chosen of those two, the agreement with
    the majority of the others, and the median of the seconds."""
    of: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in given:
        of[answer.annotator].append(answer)
    rows = []
    for name in sorted(of):
        chosen = [answer for answer in of[name] if answer.choice != SKIP]
        others = [(answer.choice, votes[answer.question] - Counter([answer.choice])) for answer in chosen]
        agreed = [choice == _majority(rest) for choice, rest in others if rest and _majority(rest) is not None]
        sides = Counter(answer.choice for answer in chosen)
        either = sides["left"] + sides["right"]
        seconds = [answer.seconds for answer in chosen if answer.seconds is not None]
        rows.append(
            {
                "annotator": name,
                "answers": len(chosen),
                "skipped": len(of[name]) - len(chosen),
                "unanswered": asked - len(of[name]),
                "left": sides["left"] / either if either else None,
                "compared": len(agreed),
                "agreement": sum(agreed) / len(agreed) if agreed else None,
                "seconds": median(seconds) if seconds else None,
            }
        )
    return rows
