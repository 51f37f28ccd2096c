"""`prepare`: columns, chat, answers, dialogues, filters, and a count for every row left out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from preparing import FIXED, Row, prepare, prompts

from stages.artifacts import read_manifest
from stages.errors import InputError

DATA = Path(__file__).parent / "data"


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


def test_a_prompt_is_as_long_as_what_its_messages_say(tmp_path: Path) -> None:
    rows = [{"prompt": "abcd", "completion": "x"}, {"prompt": "abcde", "completion": "x"}]
    made = prepare(tmp_path, rows, chat=True, system='"\n"', filters={"max_prompt_chars": 7})
    assert [row["prompt"][-1]["content"] for row in made.train] == ["abcd"]


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
