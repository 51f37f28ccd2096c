"""What people have (TRL's columns, messages, HH-RLHF's dialogues) as canonical rows, and errors that name row and column."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.schemas import canonical, parse_dialogue, prompt_text, row_id
from stages.errors import InputError

DATA = Path(__file__).parent / "data"
Row = dict[str, Any]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = said("user", "What color is the sky?")
BLUE, GREEN = said("assistant", "It is blue."), said("assistant", "It is green.")
SYSTEM = said("system", "Be brief.")

# The formats of TRL's documentation (dataset_formats), and what each must become.
FORMATS: dict[str, tuple[Row, Row]] = {
    "language modelling": ({"text": "The sky is blue."}, {"prompt": "", "completion": "The sky is blue."}),
    "conversational language modelling": ({"messages": [ASKED, BLUE]}, {"prompt": [ASKED], "completion": "It is blue."}),
    "messages of several turns": (
        {"messages": [SYSTEM, ASKED, GREEN, said("user", "Sure?"), BLUE], "source": "x"},
        {"prompt": [SYSTEM, ASKED, GREEN, said("user", "Sure?")], "completion": "It is blue.", "source": "x"},
    ),
    "messages beside a prompt that repeats the first one (H4's datasets)": (
        {"prompt": ASKED["content"], "messages": [ASKED, BLUE]},
        {"prompt": [ASKED], "completion": "It is blue."},
    ),
    "prompt only": ({"prompt": "The sky is"}, {"prompt": "The sky is"}),
    "conversational prompt only": ({"prompt": [ASKED]}, {"prompt": [ASKED]}),
    "prompt and completion": (
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": "The sky is", "completion": " blue."},
    ),
    "conversational prompt and completion": (
        {"prompt": [ASKED], "completion": [BLUE]},
        {"prompt": [ASKED], "completion": "It is blue."},
    ),
    "explicit preference": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "margin": 0.5},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "margin": 0.5},
    ),
    "explicit conversational preference": (
        {"prompt": [ASKED], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [ASKED], "chosen": "It is blue.", "rejected": "It is green."},
    ),
    "explicit preference that repeats the prompt": (
        {"prompt": ASKED["content"], "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"prompt": ASKED["content"], "chosen": "It is blue.", "rejected": "It is green."},
    ),
    "implicit preference": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    "implicit preference whose answers start alike": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black.", "text": "kept"},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black.", "text": "kept"},
    ),
    "implicit conversational preference": (
        {"chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"prompt": [ASKED], "chosen": "It is blue.", "rejected": "It is green."},
    ),
    "unpaired": (
        {"prompt": "The sky is", "completion": " green.", "label": False},
        {"prompt": "The sky is", "completion": " green.", "label": False},
    ),
    "conversational unpaired": (
        {"prompt": [ASKED], "completion": [BLUE], "label": True},
        {"prompt": [ASKED], "completion": "It is blue.", "label": True},
    ),
    "rankings": (
        {"prompt": "The sky is", "completions": [" blue.", " green.", " red."], "ranks": [1, 2, 2]},
        {"prompt": "The sky is", "completions": [" blue.", " green.", " red."], "ranks": [1, 2, 2]},
    ),
    "messages with more keys than role and content": (
        {"prompt": [ASKED | {"name": None}], "completion": [BLUE | {"tool_calls": None}]},
        {"prompt": [ASKED], "completion": "It is blue."},
    ),
    "a source's own id": ({"id": 7, "prompt": "a", "answer": 7}, {"prompt": "a", "answer": 7}),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant: Blue.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant: Green.\n\nReally.",
        },
        {
            "prompt": [said("user", "Hi"), said("assistant", "Hello."), said("user", "Sky?")],
            "chosen": "Blue.",
            "rejected": "Green.\n\nReally.",
        },
    ),
    "HH-RLHF with its prompt apart": (
        {"prompt": "\n\nHuman: Sky?\n\nAssistant:", "chosen": " Blue.", "rejected": " Green."},
        {"prompt": [said("user", "Sky?")], "chosen": " Blue.", "rejected": " Green."},
    ),
    "HH-RLHF with its prompt apart and a space": (
        {"prompt": "\n\nHuman: Sky?\n\nAssistant: ", "chosen": "Blue.", "rejected": "Green."},
        {"prompt": [said("user", "Sky?")], "chosen": "Blue.", "rejected": "Green."},
    ),
}


@pytest.mark.parametrize(("row", "expected"), FORMATS.values(), ids=FORMATS)
def test_each_format_becomes_canonical(row: Row, expected: Row) -> None:
    before = json.dumps(row)
    made = canonical(row, "row 1")
    assert made == expected
    assert canonical(made, "again") == expected
    assert json.dumps(row) == before, "the source's row was changed"


TURNS = st.lists(st.text("ab:H \n", max_size=5).map(str.strip), min_size=2, max_size=6)


@settings(max_examples=40)
@given(TURNS)
def test_a_dialogue_comes_back_from_its_text(turns: list[str]) -> None:
    names = [("Human", "user"), ("Assistant", "assistant")]
    text = "".join(f"\n\n{names[number % 2][0]}: {turn}" for number, turn in enumerate(turns))
    assert parse_dialogue(text, "x") == [said(names[number % 2][1], turn) for number, turn in enumerate(turns)]


def test_real_dialogues_lose_nothing() -> None:
    lines = (DATA / "hh-rlhf.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 20
    for line in lines:
        raw = json.loads(line)
        row = canonical(raw, "row 1")
        assert sorted(row) == ["chosen", "prompt", "rejected"]
        assert [message["role"] for message in row["prompt"]] == ["user", "assistant"] * (len(row["prompt"]) // 2) + ["user"]
        for name in ("chosen", "rejected"):
            turns = [*row["prompt"], said("assistant", row[name])]
            names = {"user": "Human", "assistant": "Assistant"}
            written = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
            assert re.sub(r"\s+", "", written) == re.sub(r"\s+", "", raw[name])
            assert row[name] == row[name].strip()
            assert raw[name].rstrip().endswith(row[name])


def test_real_problems_are_named_by_their_columns() -> None:
    for line in (DATA / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        with pytest.raises(InputError, match=r'row 3: no column "prompt" \(it has answer, question\)'):
            canonical(raw, "row 3")
        assert canonical({"prompt": raw["question"], "completion": raw["answer"]}, "x")["completion"] == raw["answer"]


NO_MESSAGES = '"{}" must be text or a list of messages with "role" and "content", it is '
EMPTY = '"chosen" is empty'
ERRORS: dict[str, tuple[Row, str]] = {
    "no prompt": (
        {"question": "a", "answer": "b"},
        'no column "prompt" (it has answer, question); map one with `columns: {prompt: NAME}`, '
        'or give "messages", or "chosen" and "rejected"',
    ),
    "completion without prompt": ({"completion": "b"}, 'no column "prompt" (it has completion)'),
    "text beside a completion": ({"text": "a", "completion": "b"}, 'no column "prompt" (it has completion, text)'),
    "no common start": (
        {"chosen": "blue", "rejected": "black"},
        'no column "prompt", and "chosen" and "rejected" do not start with the same words',
    ),
    "prompt a number": ({"prompt": 3}, NO_MESSAGES.format("prompt") + "int '3'"),
    "prompt null": ({"prompt": None}, NO_MESSAGES.format("prompt")),
    "prompt an empty list": ({"prompt": []}, NO_MESSAGES.format("prompt") + "list '[]'"),
    "a message without content": ({"prompt": [{"role": "user"}]}, NO_MESSAGES.format("prompt")),
    "a message whose content is null": ({"prompt": [said("user", "a") | {"content": None}]}, '"prompt" must be text or a list'),
    "prompt empty": ({"prompt": " \n"}, '"prompt" is empty'),
    "prompt empty in a pair": ({"prompt": "", "chosen": "a", "rejected": "b"}, '"prompt" is empty'),
    "messages a text": ({"messages": "a"}, '"messages" must be text or a list of messages'),
    "messages end with the user": ({"messages": [BLUE, ASKED]}, '"messages" must end with an assistant\'s turn'),
    "messages of one turn": ({"messages": [BLUE]}, NO_MESSAGES.format("prompt")),
    "completion a number": ({"prompt": "a", "completion": 3}, "\"completion\" must be text, it is int '3'"),
    "completion null": ({"prompt": "a", "completion": None}, '"completion" must be text, it is NoneType'),
    "completion empty": ({"prompt": "a", "completion": " "}, '"completion" is empty'),
    "completion a list of texts": ({"prompt": "a", "completion": ["b"]}, '"completion" must be text or a list of messages'),
    "completion of the user": (
        {"prompt": "a", "completion": [ASKED]},
        "\"completion\" must end with an assistant's turn, it ends with one of 'user'",
    ),
    "text empty": ({"text": ""}, '"completion" is empty'),
    "chosen alone": ({"prompt": "a", "chosen": "b"}, 'it has "chosen" but no "rejected"'),
    "rejected alone": ({"prompt": "a", "rejected": "b"}, 'it has "rejected" but no "chosen"'),
    "chosen empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
    "rejected null": ({"prompt": "a", "chosen": "b", "rejected": None}, '"rejected" must be text, it is NoneType'),
    "chosen messages, rejected text": ({"chosen": [ASKED, BLUE], "rejected": "b"}, NO_MESSAGES.format("rejected")),
    "chosen text, rejected messages": ({"chosen": "b", "rejected": [ASKED, BLUE]}, NO_MESSAGES.format("chosen")),
    "pair of different prompts": (
        {"chosen": [ASKED, BLUE], "rejected": [said("user", "Sky?"), GREEN]},
        '"chosen" and "rejected" differ before their last turn',
    ),
    "pair that ends with the user": (
        {"chosen": [ASKED, BLUE], "rejected": [ASKED, said("user", "Well?")]},
        '"rejected" must end with an assistant\'s turn',
    ),
    "label a number": ({"prompt": "a", "completion": "b", "label": 1}, '"label" must be true or false, it is 1'),
    "label a text": ({"prompt": "a", "completion": "b", "label": "true"}, "\"label\" must be true or false, it is 'true'"),
    "too few ranks": ({"prompt": "a", "completions": ["b", "c"], "ranks": [1]}, '1 "ranks" for 2 "completions"'),
    "ranks of nothing": ({"prompt": "a", "ranks": [1]}, '1 "ranks" for 0 "completions"'),
    "ranks null": ({"prompt": "a", "completions": ["b"], "ranks": None}, '"ranks" must be a list, it is NoneType'),
    "completions a text": ({"prompt": "a", "completions": "bc", "ranks": [1, 2]}, '"completions" must be a list, it is str'),
    "HH-RLHF empty answer": ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, EMPTY),
    "HH-RLHF different prompts": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nAssistant: b"},
        '"chosen" and "rejected" differ before their last turn',
    ),
    "HH-RLHF ends with the human": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nHuman: b"},
        '"rejected" must end with an assistant\'s turn',
    ),
}


@pytest.mark.parametrize(("row", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_names_row_and_column(row: Row, message: str) -> None:
    with pytest.raises(InputError) as error:
        canonical(row, "rows.jsonl row 12")
    assert str(error.value).startswith("rows.jsonl row 12: " + message)


def test_an_error_in_a_dialogue_names_row_and_column() -> None:
    message = 'row 12, "rejected": a dialogue must start with "\\n\\nHuman:", this one starts with \'Human: a'
    for rejected in ("Human: a", "Human: a\n\nHuman: b\n\nAssistant: c"):
        with pytest.raises(InputError, match=re.escape(message)):
            canonical({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": rejected}, "row 12")


def test_ids_are_of_the_canonical_columns_alone() -> None:
    row = {"prompt": [ASKED], "completion": "b"}
    assert re.fullmatch(r"[0-9a-f]{16}", row_id(row))
    assert row_id(row) == row_id({"completion": "b", "id": "x", "prompt": [dict(reversed(ASKED.items()))], "source": 3})
    others = [
        row | {"completion": "c"},
        row | {"label": True},
        row | {"prompt": "b"},
        {"prompt": [ASKED]},
        row | {"margin": 0.0},
    ]
    assert len({row_id(one) for one in [row, *others]}) == 6


def test_what_a_prompt_says_is_its_text_or_all_of_its_messages() -> None:
    assert prompt_text("a") == "a"
    assert prompt_text([{"role": "system", "content": "Be brief."}, ASKED]) == "Be brief.What color is the sky?"
