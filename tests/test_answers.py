"""People's answers: who decides, what is counted, how far they agree, and that what follows reads the pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import labelling
import pytest
from asking import answer, ask, asked, given
from conftest import request_for
from labelling import CONFIG, Label, Rows, chain_group, digest, events, group, many, metrics, outputs, preferences

from stages.data.preferences import PreferenceTable, encode_preferences
from stages.data.schemas import row_id
from stages.errors import InputError
from stages.models.load import load_policy
from stages.request import run_stage
from stages.run import Run
from stages.specs import STAGES

registered = labelling.registered
label = labelling.label
Answer = Callable[..., Run]


@pytest.fixture
def questions(tmp_path: Path) -> Run:
    """Six questions, of one prompt each."""
    return ask(tmp_path / "questions", [row for prompt in "abcdef" for row in group(prompt, f"{prompt}1", f"{prompt}2")])


@pytest.fixture
def answered(questions: Run, tmp_path: Path) -> Answer:
    """Run the stage on files of answers, or on each annotator's answers as letters."""
    folders = map("answers {}".format, range(99))

    def run(files: dict[str, Any], **config: Any) -> Run:
        rows = {
            name: value if isinstance(value, list) or "." in name else given(name, asked(questions), value)
            for name, value in files.items()
        }
        named = {name if "." in name else f"{name}.jsonl": value for name, value in rows.items()}
        return answer(tmp_path / next(folders), questions, named, **config)

    return run


def tables(run: Run) -> dict[str, Rows]:
    return {event["name"]: event["rows"] for event in events(run, "table")}


def counts(run: Run) -> dict[str, int]:
    return {row["what"]: row["number"] for row in tables(run)["answers"] if row["number"]}


def decided(run: Run, questions: Run) -> str:
    """The side that won each question, by its first letter, or a dash."""
    chosen = {(row["prompt"], row["chosen"]): row for row in preferences(run)}
    sides = [next((s[0] for s in ("left", "right") if (q["prompt"], q[s]) in chosen), "-") for q in asked(questions)]
    return "".join(sides)


# Pairs by hand.


def test_a_whole_row(tmp_path: Path, label: Label) -> None:
    rows = group("a", "x", "y", level=7)
    rows[0]["finish"] = "length"
    questions = ask(tmp_path / "questions", rows)
    [question] = asked(questions)
    ours = question["left"]
    files = {f"{name}.jsonl": given(name, [question], choice) for name, choice in zip("ABCD", "lrlt", strict=True)}
    [row] = preferences(answer(tmp_path / "one", questions, files))
    preference = {"prompt": "a", "chosen": ours, "rejected": question["right"], "margin": 0.25}
    finishes = {"x": "length", "y": "stop"}
    assert row == {"id": row_id(preference)} | preference | {
        "answer": "answer to a",
        "level": 7,
        "chosen_score": 0.5,
        "rejected_score": 0.25,
        "chosen_finish": finishes[ours],
        "rejected_finish": finishes[question["right"]],
        "annotators": 4,
    }
    # The form is that of `label`, in the same order.
    [labelled] = preferences(label([row | {"bonus": 1.0 * place} for place, row in enumerate(rows)], BY_BONUS))
    assert [name for name in row if name != "annotators"] == [name for name in labelled if name != "bonus"]


BY_BONUS = CONFIG | {"reward": {"name": "bonus"}}


@pytest.mark.parametrize(
    ("files", "sides", "known"),
    [
        ({"A": "lr"}, "lr----", {"answers": 2, "pairs": 2, "questions nobody answered": 4}),
        ({"A": "lltt", "B": "lrtl"}, "l-----", {"answers": 8, "pairs": 1, "even votes": 2, "ties": 1}),
        ({"A": "lllltl", "B": "llrttr", "C": "lrrttt"}, "llr---", {"answers": 18, "pairs": 3, "ties": 2, "even votes": 1}),
        # A tie is a vote: two ties against one left are a tie, and a left of one is level with it.
        ({"A": "lllr", "B": "tt r", "C": "tl  "}, "-llr--", {"answers": 9, "pairs": 3, "ties": 1, "even votes": 0}),
        ({"A": "lsss", "B": "srs "}, "lr----", {"answers": 2, "skipped": 5, "pairs": 2, "questions skipped by all": 2}),
    ],
)
def test_the_majority_decides(questions: Run, answered: Answer, files: Any, sides: str, known: dict[str, int]) -> None:
    run = answered(files)
    assert decided(run, questions) == sides
    found = counts(run)
    assert found["questions"] == 6
    assert {name: found.get(name, 0) for name in known} == known
    assert metrics(run)["rows_train"] == known["pairs"]
    undecided = ("questions nobody answered", "questions skipped by all", "ties", "even votes", "pairs")
    assert sum(found.get(name, 0) for name in undecided) == 6


def test_margins_are_shares_of_votes(questions: Run, answered: Answer) -> None:
    run = answered({"A": "llll", "B": "llls", "C": "lrt ", "D": "lrl "})
    order = {row["prompt"]: place for place, row in enumerate(asked(questions))}
    rows = sorted(preferences(run), key=lambda row: order[row["prompt"]])
    found = [(row["margin"], row["chosen_score"], row["rejected_score"], row["annotators"]) for row in rows]
    assert found == [(1.0, 1.0, 0.0, 4), (0.75, 0.75, 0.0, 4), (1.0, 1.0, 0.0, 1)]
    assert rows[1]["prompt"] == asked(questions)[2]["prompt"]
    [row] = preferences(answered({"A": "l", "B": "l", "C": "r"}))
    assert (row["margin"], row["annotators"]) == (1 / 3, 3)


def test_a_pair_may_need_several_annotators(questions: Run, answered: Answer) -> None:
    files = {"A": "lllr", "B": "l sr", "C": "l  t"}
    assert decided(answered(files, annotators=2), questions) == "l--r--"
    run = answered(files, annotators=3)
    assert decided(run, questions) == "l--r--"
    assert counts(run)["questions with too few answers"] == 2
    assert counts(run)["questions nobody answered"] == 2


def test_the_last_answer_counts(questions: Run, answered: Answer) -> None:
    asked_ = asked(questions)
    early, late = ({"at": f"2026-01-0{day}T12:00:00.000Z"} for day in (1, 2))
    # In one file, in a later file, by time against the order of files, by a skip that takes it back.
    run = answered({"a.jsonl": [*given("A", asked_, "llll"), *given("A", asked_, "r")], "b.jsonl": given("A ", asked_, " r")})
    assert decided(run, questions) == "rrll--"
    assert counts(run) == {"questions": 6, "questions nobody answered": 2, "answers": 4, "answers given again": 2, "pairs": 4}
    run = answered({"a (1).jsonl": given("A", asked_, "rrs", **late), "a.jsonl": given("A", asked_, "llll", **early)})
    assert decided(run, questions) == "rr-l--"
    assert counts(run)["skipped"] == 1
    # The same moment in two zones is one; an answer without a time is before those with one.
    zone = {"at": "2026-01-02T14:00:00+02:00"}
    run = answered(
        {"a.jsonl": [*given("A", asked_, "llr", **late), *given("A", asked_, "r", **zone), *given("A", asked_, "rr")]}
    )
    assert decided(run, questions) == "rlr---"
    # Answers of different people replace nothing.
    assert counts(answered({"A": "ll", "B": "ll"}))["answers"] == 4


def test_neither_names_nor_times_are_in_the_pairs(answered: Answer) -> None:
    once = answered({"A": "lrt", "B": "lrl"})
    again = answered({"zoe": "lrl", "yann": "lrt"})
    assert digest(once) == digest(again)


# Agreement.


def test_agreement_of_annotators(answered: Answer, questions: Run) -> None:
    asked_ = asked(questions)
    files = {
        "anna.jsonl": given("anna", asked_, "llrtls", seconds=2.0) + given("anna", asked_, "l", seconds=9),
        "ben.jsonl": given("ben", asked_, "lrrt  ", seconds=1.0),
        "cleo.jsonl": given("cleo", asked_, "l rl  "),
        "dan.jsonl": given("dan", asked_, "     r"),
    }
    run = answered(files)
    # Of the pairs of answers to one question: lll 3 of 3, lr 0 of 1, rrr 3 of 3, ttl 1 of 3.
    found = metrics(run)
    assert found["agreement"] == 7 / 10
    # n = 11 in units of two and more: 5 l, 4 r, 2 t; they coincide 3 + 0 + 3 + 1 times.
    assert found["alpha"] == pytest.approx(1 - (1 - 7 / 11) / (1 - (5 * 4 + 4 * 3 + 2 * 1) / (11 * 10)))
    assert (found["annotators"], found["answers"], found["skipped"], found["ties"], found["even_votes"]) == (4, 13, 1, 1, 1)
    assert tables(run)["annotators"] == [
        {"annotator": "anna", "answers": 5, "skipped": 1, "unanswered": 0, "left": 3 / 4}
        | {"compared": 3, "agreement": 2 / 3, "seconds": 2.0},
        {"annotator": "ben", "answers": 4, "skipped": 0, "unanswered": 2, "left": 1 / 3}
        | {"compared": 3, "agreement": 2 / 3, "seconds": 1.0},
        {"annotator": "cleo", "answers": 3, "skipped": 0, "unanswered": 3, "left": 2 / 3}
        | {"compared": 3, "agreement": 2 / 3, "seconds": None},
        {"annotator": "dan", "answers": 1, "skipped": 0, "unanswered": 5, "left": 0.0}
        | {"compared": 0, "agreement": None, "seconds": None},
    ]


def test_one_annotator_has_nobody_to_agree_with(answered: Answer) -> None:
    run = answered({"A": "lr"})
    assert not {"agreement", "alpha"} & set(metrics(run))
    assert [event["text"] for event in events(run, "message")] == [
        "no question has answers of two annotators, so their agreement cannot be told"
    ]
    # All alike: they agree, but chance would too.
    found = metrics(answered({"A": "ll", "B": "ll"}))
    assert found["agreement"] == 1
    assert "alpha" not in found


# What follows.


def test_a_prompt_is_held_out_as_by_label(tmp_path: Path, label: Label) -> None:
    rows = many("1", "2", prompts=120)
    by_rule = label(rows, CONFIG | {"heldout": 0.25})
    questions = ask(tmp_path / "questions", rows)
    run = answer(tmp_path / "a", questions, {"a.jsonl": given("A", asked(questions), "l" * 120)}, heldout=0.25)
    assert outputs(run) == {"train", "heldout"}
    for name in ("train", "heldout"):
        assert {row["prompt"] for row in preferences(run, name)} == {row["prompt"] for row in preferences(by_rule, name)}
    assert metrics(run)["rows_heldout"] == len(preferences(run, "heldout")) > 10
    with pytest.raises(InputError, match="all 1 pairs were held out: lower heldout"):
        answer(tmp_path / "b", questions, {"a.jsonl": given("A", asked(questions), "l")}, heldout=0.999999)


def test_reward_models_and_prepare_read_the_pairs(tmp_path: Path, init_folder: Path) -> None:
    rows = [row for number in range(1, 9) for row in chain_group(f"{number}+2", f"{number + 2}", f"{number}")]
    questions = ask(tmp_path / "questions", rows)
    right = ["l" if row["left"] == f"{int(row['prompt'][0]['content'][0]) + 2}" else "r" for row in asked(questions)]
    run = answer(tmp_path / "a", questions, {"a.jsonl": given("A", asked(questions), "".join(right))})
    assert {(row["prompt"][0]["content"], row["chosen"]) for row in preferences(run)} == {
        (f"{number}+2", f"{number + 2}") for number in range(1, 9)
    }
    policy = load_policy(init_folder)
    assert encode_preferences(tmp_path / "table", preferences(run), policy.tokenizer, policy.stops, 128) == {"used": 8}
    assert PreferenceTable(tmp_path / "table").paired
    prepared = run_stage(request_for("prepare", tmp_path / "prepared", {}, source=run.folder / "outputs" / "train"))
    assert [row["id"] for row in preferences(prepared)] == [row["id"] for row in preferences(run)]


# What is refused.

GOOD = '{"question": "QUESTION", "annotator": "A", "choice": "left"}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + '{"question": "QUES', r"bad\.jsonl line 2: not JSON \("),
        (GOOD + "[1]", r"bad\.jsonl line 2: a row must be a JSON object, this is a list"),
        (GOOD.replace("QUESTION", "0" * 16), r"bad\.jsonl row 1: none of the 6 questions has the id '0{16}': .* another page"),
        (GOOD.replace('"QUESTION"', "[1]"), r'bad\.jsonl row 1: "question" must be .* it is \[1\]'),
        (GOOD.replace("left", "middle"), r"bad\.jsonl row 1: \"choice\" must be one of left, right, tie, skip, it is 'middle'"),
        (GOOD.replace('"left"', "1"), r'bad\.jsonl row 1: "choice" must be one of .* it is 1'),
        (GOOD + GOOD.replace('"annotator": "A", ', ""), r'bad\.jsonl row 2: an answer has .* this one has no "annotator"'),
        (GOOD.replace('"A"', '" "'), r"bad\.jsonl row 1: \"annotator\" must be a name, it is ' '"),
        (GOOD.replace('"A"', "7"), r"bad\.jsonl row 1: \"annotator\" must be a name, it is 7"),
        (GOOD.replace('"left"', '"left", "seconds": -1'), r'bad\.jsonl row 1: "seconds" must be a number from 0 up, it is -1'),
        (GOOD.replace('"left"', '"left", "seconds": true'), r'"seconds" must be a number'),
        (GOOD.replace('"left"', '"left", "seconds": NaN'), r'"seconds" must be a number'),
        (GOOD.replace('"left"', '"left", "at": "noon"'), r"bad\.jsonl row 1: \"at\" must be a time such as .* it is 'noon'"),
        ("\n", "the files of answers hold no answer: press Download"),
        (GOOD.replace("left", "tie"), r"no pair came of the answers \(.*'ties': 1.*\): is there a question"),
        (GOOD.replace("left", "skip"), r"no pair came of the answers \(.*'skipped': 1"),
    ],
)
def test_what_is_no_answer_is_named(questions: Run, answered: Answer, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        answered({"bad.jsonl": text.replace("QUESTION", asked(questions)[0]["id"])})


def test_a_dataset_that_is_no_questions_is_refused(questions: Run, tmp_path: Path, label: Label) -> None:
    (tmp_path / "files").mkdir()
    paths = {"questions": label(group("a", "1", "2")).folder / "outputs" / "train", "answers": tmp_path / "files"}
    with pytest.raises(InputError, match=r'the questions have no column "left" \(they have id, .* the stage `questions` wrote'):
        run_stage(request_for("answers", tmp_path / "run", {}, **paths))


def test_the_headline_names_what_is_measured(answered: Answer) -> None:
    assert set(STAGES["answers"].headline) <= set(metrics(answered({"A": "lr", "B": "ll"})))
