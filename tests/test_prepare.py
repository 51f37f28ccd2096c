"""`prepare`: a split that stays, held-out prompts kept out of training, and a count for every row left out."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import request_for
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts import read_manifest
from stages.data.parquet import read_rows
from stages.errors import InputError
from stages.request import run_stage

DATA = Path(__file__).parent / "data"
Row = dict[str, Any]


class Prepared:
    """What a run of `prepare` made: the rows of its outputs and the counts it recorded."""

    def __init__(self, folder: Path, events: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.train, self.heldout = self._rows("train"), self._rows("heldout")
        self.counts = {row["what"]: row["rows"] for event in events if event["event"] == "table" for row in event["rows"]}
        self.metrics = {
            name: value for event in events if event["event"] == "metrics" for name, value in event["metrics"].items()
        }

    def _rows(self, name: str) -> list[Row]:
        folder = self.folder / "outputs" / name
        return list(read_rows(folder)) if any(folder.glob("*")) else []


def write_source(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepare(folder: Path, source: Path | list[Row], exclude: Path | None = None, **config: Any) -> Prepared:
    """Run the stage in `folder / "run"`."""
    source = write_source(folder / "source", source) if isinstance(source, list) else source
    inputs = {"source": source} if exclude is None else {"source": source, "exclude": exclude}
    heard: list[dict[str, Any]] = []
    run_stage(request_for("prepare", folder / "run", config, **inputs), heard.append)
    return Prepared(folder / "run", heard)


@contextmanager
def prepared(source: list[Row], **config: Any) -> Iterator[Prepared]:
    with TemporaryDirectory() as folder:
        yield prepare(Path(folder), source, **config)


def prompts(rows: list[Row]) -> list[Any]:
    return [row["prompt"] for row in rows]


def numbered(count: int) -> list[Row]:
    return [{"prompt": f"prompt {n}", "completion": f"completion {n}"} for n in range(count)]


# Some of these stand on either side at every share used here, so that no example is refused for an empty training set.
FIXED = numbered(12)
SOME_ROWS = st.lists(
    st.fixed_dictionaries({"prompt": st.sampled_from("abcdefgh"), "completion": st.sampled_from("xy")}), max_size=8
)


def test_without_a_share_all_rows_are_for_training(tmp_path: Path) -> None:
    made = prepare(tmp_path, FIXED)
    assert [{name: row[name] for name in ("prompt", "completion")} for row in made.train] == FIXED
    assert made.heldout == []
    assert (made.counts, made.metrics) == ({"read": 12, "training": 12}, {"rows_train": 12.0, "rows_heldout": 0.0})
    assert json.loads((tmp_path / "run" / "outputs.json").read_text())["outputs"] == {"train": "dataset"}


def test_the_share_is_about_what_was_asked_for(tmp_path: Path) -> None:
    made = prepare(tmp_path, numbered(2000), heldout=0.25)
    assert abs(len(made.heldout) / 2000 - 0.25) < 0.04  # four standard errors
    assert len(made.train) + len(made.heldout) == 2000
    assert made.metrics == {"rows_train": len(made.train), "rows_heldout": len(made.heldout)}
    assert json.loads((tmp_path / "run" / "outputs.json").read_text())["outputs"] == {"train": "dataset", "heldout": "dataset"}


@settings(max_examples=30, deadline=None)
@given(SOME_ROWS, SOME_ROWS, SOME_ROWS)
def test_adding_rows_never_moves_an_old_row(before: list[Row], old: list[Row], after: list[Row]) -> None:
    with prepared([*FIXED, *old], heldout=0.4) as first, prepared([*before, *old, *FIXED, *after], heldout=0.4) as second:
        for side in ("train", "heldout"):
            assert {row["id"] for row in getattr(first, side)} <= {row["id"] for row in getattr(second, side)}
        assert not {row["id"] for row in second.train} & {row["id"] for row in second.heldout}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"prompt": st.sampled_from("abcdef"), "problem": st.integers(0, 5)}), max_size=12),
    st.none() | st.integers(1, 3),
)
def test_heldout_prompts_are_never_in_train(rows: list[Row], max_heldout: int | None) -> None:
    """The split is by another column than the prompt, so that prompts do collide across it."""
    rows = [*rows, *({"prompt": f"fixed {n}", "problem": 10 + n} for n in range(12))]
    config: dict[str, Any] = {"heldout": 0.5, "split_by": "problem", "deduplicate": False}
    with prepared(rows, **config) as made, prepared(rows, **config, max_heldout=max_heldout) as limited:
        assert not set(prompts(made.train)) & set(prompts(made.heldout))
        problems = {row["problem"] for row in made.heldout}
        assert Counter((row["prompt"], row["problem"]) for row in made.heldout) == Counter(
            (row["prompt"], row["problem"]) for row in rows if row["problem"] in problems
        )
        kept = [row for row in rows if row["problem"] not in problems and row["prompt"] not in prompts(made.heldout)]
        assert [(row["prompt"], row["problem"]) for row in made.train] == [(row["prompt"], row["problem"]) for row in kept]
        removed = len(rows) - len(made.heldout) - len(kept)
        assert made.counts.get("removed from training: prompt is held out", 0) == removed
        assert limited.train == made.train, "a prompt held out beyond the limit came back into training"
        assert limited.heldout == made.heldout[:max_heldout]


def test_the_split_is_the_same_whatever_stands_beside_the_prompt(tmp_path: Path) -> None:
    questions = [{"question": f"prompt {n}", "answer": str(n)} for n in range(40)]
    one = prepare(tmp_path / "one", numbered(40), heldout=0.5)
    two = prepare(tmp_path / "two", questions, heldout=0.5, columns={"prompt": "question"})
    assert prompts(one.heldout) == prompts(two.heldout) != []
    assert prompts(one.train) == prompts(two.train) != []


def test_split_by_keeps_rows_together_and_must_exist(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {n}", "completion": "c", "topic": n % 10} for n in range(60)]
    made = prepare(tmp_path, rows, heldout=0.4, split_by="topic")
    topics = [{row["topic"] for row in side} for side in (made.train, made.heldout)]
    assert all(topics)
    assert not topics[0] & topics[1]
    with pytest.raises(InputError, match='`split_by` names the column "group"; the rows have id, prompt, completion, topic'):
        prepare(tmp_path / "other", rows, heldout=0.4, split_by="group")


def test_max_heldout_keeps_the_first_and_counts_the_rest(tmp_path: Path) -> None:
    all_of_them = prepare(tmp_path / "all", numbered(60), heldout=0.5)
    made = prepare(tmp_path / "some", numbered(60), heldout=0.5, max_heldout=7)
    assert made.heldout == all_of_them.heldout[:7]
    assert made.train == all_of_them.train
    left_out = len(all_of_them.heldout) - 7
    assert left_out > 0
    assert made.counts["held out beyond max_heldout, left out"] == left_out
    assert made.counts["held out"] == 7


@pytest.mark.parametrize("chat", [False, True])
def test_exclude_removes_prompts_from_training(tmp_path: Path, dataset: Callable[..., Path], chat: bool) -> None:
    unwanted = [f"prompt {n}" for n in (0, 5, 99)]
    exclude = dataset([{"prompt": [{"role": "user", "content": text}] if chat else text} for text in unwanted])
    made = prepare(tmp_path, FIXED, exclude, chat=chat, system="s" if chat else None)
    assert len(made.train) == (12 if chat else 10), "a system message makes another prompt"
    made = prepare(tmp_path / "again", FIXED, exclude, chat=chat)
    assert [row["completion"] for row in made.train] == [f"completion {n}" for n in range(12) if n not in (0, 5)]
    assert made.counts == {"read": 12, "training": 10, "removed from training: prompt is held out": 2}


def test_exclude_leaves_the_heldout_rows(tmp_path: Path, dataset: Callable[..., Path]) -> None:
    alone = prepare(tmp_path / "alone", FIXED, heldout=0.5)
    exclude = dataset([{"prompt": prompts(alone.heldout)[0]}, {"prompt": prompts(alone.train)[0]}])
    made = prepare(tmp_path / "excluding", FIXED, exclude, heldout=0.5)
    assert made.heldout == alone.heldout
    assert made.train == alone.train[1:]


def test_duplicates_are_counted(tmp_path: Path) -> None:
    rows = [*FIXED, FIXED[3] | {"source": "again"}, FIXED[3] | {"completion": "another"}, FIXED[4]]
    made = prepare(tmp_path, rows)
    assert [row["completion"] for row in made.train] == [f"completion {n}" for n in range(12)] + ["another"]
    assert list(made.train[3]) == ["id", "prompt", "completion"], "the first of equal rows is kept"
    assert made.counts == {"read": 15, "duplicates": 2, "training": 13}
    kept = prepare(tmp_path / "kept", rows, deduplicate=False)
    assert (len(kept.train), kept.counts) == (15, {"read": 15, "training": 15})
    assert len({row["id"] for row in kept.train}) == 13


def test_each_filter_counts_what_it_took(tmp_path: Path) -> None:
    rows = [
        {"prompt": "ab", "completion": "1234", "lang": "en"},
        {"prompt": "abc", "completion": "123", "lang": "en"},
        {"prompt": "abcdef", "completion": "12345", "lang": "en"},
        {"prompt": "abcdefg", "completion": "1234", "lang": "en"},
        {"prompt": "abcd", "completion": "12", "lang": "en"},
        {"prompt": "abcd", "completion": "123456", "lang": "en"},
        {"prompt": "abcd", "completion": "1234", "lang": "de"},
        {"prompt": "abcd", "completion": "1235", "lang": 3},
    ]
    filters = {"min_prompt_chars": 3, "max_prompt_chars": 6, "min_completion_chars": 3, "max_completion_chars": 5}
    made = prepare(tmp_path, [*rows[:7], rows[7] | {"lang": "fr"}], filters=filters | {"equals": {"lang": "en"}})
    assert prompts(made.train) == ["abc", "abcdef"]
    assert made.counts == {
        "read": 8,
        "filtered: prompt too short": 1,
        "training": 2,
        "filtered: prompt too long": 1,
        "filtered: completion too short": 1,
        "filtered: completion too long": 1,
        "filtered: lang is not en": 2,
    }
    with pytest.raises(InputError, match=r'`filters.equals` names the column "language"; the rows have id, prompt, completion'):
        prepare(tmp_path / "other", rows, filters={"equals": {"language": "en"}})


def test_filters_see_both_sides_of_a_pair(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "1", "rejected": "123"},
        {"prompt": "b", "chosen": "123", "rejected": "1"},
        {"prompt": "c", "chosen": "12", "rejected": "21", "label": True},
    ]
    made = prepare(tmp_path, rows, filters={"min_completion_chars": 2, "equals": {"label": "True"}})
    assert prompts(made.train) == ["c"]
    assert made.counts["filtered: completion too short"] == 2


def test_filtered_rows_hold_nothing_out(tmp_path: Path) -> None:
    """A row that is left out by a filter does not take its prompt out of training, though it is on the held-out side."""
    config: dict[str, Any] = {"heldout": 0.5, "split_by": "topic", "filters": {"max_completion_chars": 99}}
    rows = [row | {"topic": n} for n, row in enumerate(FIXED)]
    alone = prepare(tmp_path / "alone", rows, **config)
    long = {"prompt": alone.train[0]["prompt"], "completion": "x" * 100, "topic": alone.heldout[0]["topic"]}
    made = prepare(tmp_path / "filtered", [long, *rows], **config)
    assert (made.train, made.heldout) == (alone.train, alone.heldout)
    unfiltered = prepare(tmp_path / "unfiltered", [long, *rows], heldout=0.5, split_by="topic")
    assert unfiltered.train == alone.train[1:]


def test_columns_are_mapped_and_others_kept_in_order(tmp_path: Path) -> None:
    rows = [{"z": 1, "question": "q", "id": 9, "solution": "s", "a": None}]
    made = prepare(tmp_path, rows, columns={"prompt": "question", "completion": "solution"})
    assert [list(row) for row in made.train] == [["id", "prompt", "completion", "a", "z"]]
    assert made.train == [{"id": made.train[0]["id"], "prompt": "q", "completion": "s", "a": None, "z": 1}]
    assert re.fullmatch("[0-9a-f]{16}", made.train[0]["id"])


@pytest.mark.parametrize("order", [["prompt", "question"], ["question", "prompt"]])
def test_a_mapped_column_wins_over_one_of_its_name(tmp_path: Path, order: list[str]) -> None:
    row = {"prompt": "of the source", "question": "asked for"}
    made = prepare(tmp_path, [{name: row[name] for name in order}], columns={"prompt": "question"})
    assert prompts(made.train) == ["asked for"]


def test_one_column_may_become_two_and_two_may_swap(tmp_path: Path) -> None:
    made = prepare(tmp_path / "two", [{"q": "a", "r": "b"}], columns={"prompt": "q", "problem": "q"})
    assert [(row["prompt"], row["problem"], row["r"]) for row in made.train] == [("a", "a", "b")]
    made = prepare(
        tmp_path / "swap",
        [{"chosen": "a", "rejected": "b", "prompt": "p"}],
        columns={"chosen": "rejected", "rejected": "chosen"},
    )
    assert [(row["chosen"], row["rejected"]) for row in made.train] == [("b", "a")]


def test_a_mapped_column_that_is_absent_is_named(tmp_path: Path) -> None:
    message = r'rows.jsonl row 2: no column "question", which `columns` maps \(it has prompt\)'
    with pytest.raises(InputError, match=message):
        prepare(tmp_path, [{"question": "a"}, {"prompt": "b"}], columns={"prompt": "question"})


def test_chat_and_system(tmp_path: Path) -> None:
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
    cases: list[tuple[Row, dict[str, Any], Any]] = [
        ({"prompt": "a"}, {}, "a"),
        ({"prompt": "a"}, {"chat": True}, [user]),
        ({"prompt": "a"}, {"chat": True, "system": "s"}, [system, user]),
        ({"prompt": [user]}, {"chat": True}, [user]),
        ({"prompt": [user]}, {"system": "s"}, [system, user]),
        ({"prompt": "a"}, {"system": "s"}, "a"),
    ]
    for number, (row, config, expected) in enumerate(cases):
        assert prompts(prepare(tmp_path / str(number), [row], **config).train) == [expected]


def gsm8k(folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(DATA / "gsm8k.jsonl", folder)
    return folder


@pytest.mark.parametrize("columns", [{"prompt": "question"}, {"prompt": "question", "completion": "answer"}])
def test_gsm8k_answers_are_extracted(tmp_path: Path, columns: dict[str, str]) -> None:
    made = prepare(tmp_path, gsm8k(tmp_path / "source"), columns=columns, extract="gsm8k", chat=True)
    raw = [json.loads(line) for line in (DATA / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in made.train] == [row["answer"].split("#### ")[1].replace(",", "") for row in raw]
    assert [row["answer"] for row in made.train[:3]] == ["72", "10", "5"]
    assert prompts(made.train) == [[{"role": "user", "content": row["question"]}] for row in raw]
    if "completion" in columns:
        assert [row["completion"] for row in made.train] == [row["answer"] for row in raw]


@pytest.mark.parametrize(
    ("text", "answer"), [("So\n#### 1,234,000", "1234000"), ("#### -3.5 \n", "-3.5"), ("#### 1\nno\n####  x y ", "x y")]
)
def test_gsm8k_answers_are_cleaned(tmp_path: Path, text: str, answer: str) -> None:
    made = prepare(tmp_path, [{"prompt": "a", "completion": text}], extract="gsm8k")
    assert [(row["answer"], row["completion"]) for row in made.train] == [(answer, text)]


@pytest.mark.parametrize("text", ["no answer", "#### 3\nand more", "####"])
def test_gsm8k_without_an_answer_names_the_row(tmp_path: Path, text: str) -> None:
    rows = [{"prompt": "a", "completion": "#### 1"}, {"prompt": "b", "completion": text}]
    with pytest.raises(InputError, match=r'rows\.jsonl row 2: no "#### answer" at the end of '):
        prepare(tmp_path, rows, extract="gsm8k")


def test_dialogues_become_messages(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    shutil.copy(DATA / "hh-rlhf.jsonl", tmp_path / "source")
    made = prepare(tmp_path, tmp_path / "source", heldout=0.3)
    rows = made.train + made.heldout
    assert (len(rows), len(made.heldout) > 0) == (20, True)
    for row in rows:
        assert list(row) == ["id", "prompt", "chosen", "rejected"]
        assert [message["role"] for message in row["prompt"]] == ["user", "assistant"] * (len(row["prompt"]) // 2) + ["user"]
    one = next(row for row in rows if row["prompt"][0]["content"] == "Is it possible to download a car?")
    assert (one["chosen"], one["rejected"]) == (
        "I\u2019m not sure what you mean. Can you clarify?",
        "I\u2019m sorry, I don\u2019t understand.",
    )


def test_text_and_messages_do_not_mix(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    message = r'rows\.jsonl row 2: "prompt" is {}, earlier rows had the other kind; set `chat: true`'
    with pytest.raises(InputError, match=message.format("a list of messages")):
        prepare(tmp_path / "one", rows)
    with pytest.raises(InputError, match=message.format("text")):
        prepare(tmp_path / "two", rows[::-1])
    assert [prompt[0]["content"] for prompt in prompts(prepare(tmp_path / "chat", rows, chat=True).train)] == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([], {}, "no row is left for training: the source is empty"),
        (
            FIXED,
            {"filters": {"min_prompt_chars": 99}},
            "no row is left for training: {'read': 12, 'filtered: prompt too short': 12}",
        ),
        (FIXED, {"heldout": 0.999999}, "no row is left for training: {'read': 12, 'held out': 12}"),
    ],
    ids=["empty", "all filtered", "all held out"],
)
def test_nothing_to_train_on_is_refused(tmp_path: Path, rows: list[Row], config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(tmp_path, rows, **config)
    assert not (tmp_path / "run" / "outputs.json").exists()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    config: dict[str, Any] = {"columns": {"prompt": "question", "completion": "answer"}, "extract": "gsm8k", "heldout": 0.3}
    digests = []
    for name in ("one", "two"):
        made = prepare(tmp_path / name, gsm8k(tmp_path / name / "source"), **config)
        assert made.heldout
        digests.append([read_manifest(made.folder / "outputs" / side, "dataset").digest for side in ("train", "heldout")])
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[0][1]


def test_a_second_try_in_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    first = prepare(tmp_path, FIXED, heldout=0.5)
    digest = read_manifest(first.folder / "outputs", "dataset").digest
    prepare(tmp_path, tmp_path / "source", heldout=0.5)
    assert read_manifest(first.folder / "outputs", "dataset").digest == digest


def test_procedural_rows_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "procedural.json").write_text('{"name": "chain-sum/demonstrations", "version": 1}')
    made = prepare(tmp_path, tmp_path / "source", rows=300, seed=2, heldout=0.125, split_by="problem", max_heldout=10)
    assert len(made.heldout) == 10
    assert made.counts["read"] == 300
    assert not {row["problem"] for row in made.train} & {row["problem"] for row in made.heldout}
    assert list(made.train[0]) == ["id", "prompt", "completion", "answer", "problem"]


def test_unusable_rows_stop_or_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "", "rejected": "e"}]
    with pytest.raises(InputError, match=r'row 2: "chosen" is empty'):
        prepare(tmp_path / "refuse", rows)
    done = prepare(tmp_path / "drop", rows, unusable="drop")
    assert prompts(done.train) == ["a"]
    assert done.counts['unusable: "chosen" is empty'] == 1


# One source of preferences in other forms.

PAIR: Row = {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 0.5, "label": True, "source": "people"}
FORMS = ("as_given", "demonstrations", "prompts")


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        ("as_given", ["id", "prompt", "label", "chosen", "rejected", "margin", "source"]),
        ("demonstrations", ["id", "prompt", "completion", "source"]),
        ("prompts", ["id", "prompt", "source"]),
    ],
)
def test_the_form_says_which_columns_stay(tmp_path: Path, form: str, columns: list[str]) -> None:
    [row] = prepare(tmp_path, [PAIR], form=form).train
    assert list(row) == columns
    assert row.get("completion", "good") == "good"
    direct = [{name: row[name] for name in columns if name != "id"}]
    assert row == prepare(tmp_path / "direct", direct).train[0], "the id is of what is left"


def test_a_prompt_alone_drops_every_other_canonical_column(tmp_path: Path) -> None:
    rows = [
        PAIR,
        {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "r", "completion": "c", "label": False},
    ]
    made = [prepare(tmp_path / str(number), [row], form="prompts").train[0] for number, row in enumerate(rows)]
    assert [{name: row[name] for name in row if name not in ("id", "source")} for row in made] == [
        {"prompt": "p"},
        {"prompt": "q"},
        {"prompt": "r"},
    ]


def test_prompts_and_demonstrations_that_repeat_collapse(tmp_path: Path) -> None:
    rows = [PAIR, PAIR | {"rejected": "worse"}, PAIR | {"chosen": "better"}]
    kept = {form: prepare(tmp_path / form, rows, form=form) for form in FORMS}
    assert {form: len(made.train) for form, made in kept.items()} == {"as_given": 3, "demonstrations": 2, "prompts": 1}
    assert kept["prompts"].counts == {"read": 3, "training": 1, "duplicates": 2}
    assert [row["completion"] for row in kept["demonstrations"].train] == ["good", "better"]


def test_filters_see_the_rows_in_their_form(tmp_path: Path) -> None:
    long = [PAIR | {"rejected": "x" * 50}]
    filters = {"max_completion_chars": 10}
    with pytest.raises(InputError, match="completion too long"):
        prepare(tmp_path / "as_given", long, filters=filters)
    for form in FORMS[1:]:
        assert len(prepare(tmp_path / form, long, filters=filters, form=form).train) == 1


def test_an_answer_is_extracted_before_the_completion_goes(tmp_path: Path) -> None:
    [row] = prepare(tmp_path, [{"prompt": "1+1", "completion": "two #### 2"}], extract="gsm8k", form="prompts").train
    assert {name: row[name] for name in row if name != "id"} == {"prompt": "1+1", "answer": "2"}


@pytest.mark.parametrize(
    ("row", "form", "message"),
    [
        ({"prompt": "q", "completion": "c"}, "demonstrations", "this row has only prompt, completion"),
        ({"prompt": "q"}, "demonstrations", "rows.jsonl row 2: `form: demonstrations` takes the chosen answer of preferences"),
        ({"text": "a book"}, "prompts", 'rows.jsonl row 2: `form: prompts` needs a prompt, and "prompt" is empty'),
    ],
)
def test_a_row_that_lacks_what_its_form_needs_is_named(tmp_path: Path, row: Row, form: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(tmp_path / "refuse", [PAIR, row], form=form)
    assert len(prepare(tmp_path / "drop", [PAIR, row], form=form, unusable="drop").train) == 1


def test_one_share_gives_each_prompt_one_side_in_every_form(tmp_path: Path) -> None:
    """What the recipe for HH-RLHF stands on: filters and limits differ, the sides do not."""
    rows = [{"prompt": f"prompt {n}", "chosen": "a" * (n % 7 + 1), "rejected": "b" * (n % 5 + 1)} for n in range(200)]
    made = [
        prepare(tmp_path / "pairs", rows, heldout=0.3, filters={"max_completion_chars": 4}),
        prepare(tmp_path / "demonstrations", rows, heldout=0.3, form="demonstrations", max_heldout=5),
        prepare(tmp_path / "prompts", rows, heldout=0.3, form="prompts"),
    ]
    train, heldout = ({prompt for one in made for prompt in prompts(getattr(one, side))} for side in ("train", "heldout"))
    assert len(train) > 100
    assert len(heldout) > 40
    assert not train & heldout


BARE, FULL = {"prompt": "a"}, {"prompt": "b", "completion": "c"}
LACKS, HAS = 'no column "completion", which the first row has', 'a column "completion", which the first row has not'


@pytest.mark.parametrize(("rows", "words"), [([FULL, BARE], LACKS), ([BARE, FULL], HAS)])
def test_rows_of_another_kind_than_the_first_are_unusable(tmp_path: Path, rows: list[Row], words: str) -> None:
    with pytest.raises(InputError, match=f"rows.jsonl row 2: {words}$"):
        prepare(tmp_path / "refuse", rows)
    done = prepare(tmp_path / "drop", rows, unusable="drop")
    assert [row["prompt"] for row in done.train] == [rows[0]["prompt"]]
    assert done.counts[f"unusable: {words}"] == 1
    # What a filter leaves out may be of any kind; a margin may be there or not.
    kept = prepare(tmp_path / "filter", [row | {"of": row["prompt"]} for row in rows], filters={"equals": {"of": "a"}})
    assert [row["prompt"] for row in kept.train] == ["a"]
    pairs = [{"prompt": name, "chosen": "yes", "rejected": "no"} for name in "ab"]
    assert len(prepare(tmp_path / "margin", [pairs[0], pairs[1] | {"margin": 0.5}]).train) == 2
