"""One source of preferences in other forms: demonstrations, and prompts alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from preparing import Row, prepare, prompts
from pydantic import ValidationError

from stages.errors import InputError

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


# Templates.


def test_a_template_stands_around_the_prompt(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "1+1?"}, {"prompt": "{prompt} {x}"}]
    made = prepare(tmp_path, rows, template="Q: {prompt} {y}\nA:")
    assert [row["prompt"] for row in made.train] == ["Q: 1+1? {y}\nA:", "Q: {prompt} {x} {y}\nA:"]
    chat = prepare(tmp_path / "chat", rows, template="Q: {prompt}", chat=True)
    assert chat.train[0]["prompt"] == [{"role": "user", "content": "Q: 1+1?"}]


def test_the_template_of_r1_zero(tmp_path: Path) -> None:
    [row] = prepare(tmp_path, [{"prompt": "1+1?"}], template="r1-zero").train
    assert row["prompt"].startswith("A conversation between User and Assistant. The user asks a question,")
    assert "i.e., <think> reasoning process here </think><answer> answer here </answer>.\n" in row["prompt"]
    assert row["prompt"].endswith("\nUser: 1+1?. Assistant:")


def test_a_template_is_for_text_and_needs_a_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl row 1: `template` is for text"):
        prepare(tmp_path, [{"prompt": [{"role": "user", "content": "a"}]}], template="r1-zero")
    with pytest.raises(ValidationError, match="template"):
        prepare(tmp_path / "none", [{"prompt": "a"}], template="Q: A:")
