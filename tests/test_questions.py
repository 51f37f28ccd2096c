"""Questions for people: which pairs, on which side, in which order; and a page that shows nothing else and cannot be broken."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from asking import HOSTILE, PROMPTS, Reading, ask, asked, hostile_rows, page_of
from conftest import ROOT
from labelling import Rows, events, group, many, within

from stages.artifacts import check, digest_of, read_manifest
from stages.data.recorded import RECORDED
from stages.errors import InputError
from stages.run import Run


def counts(run: Run) -> dict[str, int]:
    [table] = events(run, "table")
    assert table["name"] == "questions"
    return {row["what"]: row["number"] for row in table["rows"]}


def texts(rows: Rows) -> set[frozenset[str]]:
    return {frozenset((row["left"], row["right"])) for row in rows}


def test_a_whole_row(tmp_path: Path) -> None:
    rows = group("a", "x", "y", level=7, reward=0.5, left="source's own")
    rows[0]["finish"] = "length"
    [row] = asked(ask(tmp_path / "one", rows))
    sides = {"x": (0, "length"), "y": (1, "stop")}
    assert {row["left"], row["right"]} == set(sides)
    shown = {name: row[name] for name in ("prompt", "left", "right")}
    expected: dict[str, Any] = {"id": digest_of(shown)[:16], **shown, "answer": "answer to a", "level": 7}
    for side in ("left", "right"):
        expected |= {f"{side}_sample": sides[row[side]][0], f"{side}_finish": sides[row[side]][1]}
    assert row == expected
    assert row["prompt"] == "a"
    assert list(row)[:4] == ["id", "prompt", "left", "right"]
    assert not set(row) & set(RECORDED)


def test_which_pairs_are_asked(tmp_path: Path) -> None:
    rows = [*group("a", "1", "2", "3"), *group("b", "1", "1"), *group("c", "1"), *group("d", "1", "1", "2")]
    run = ask(tmp_path / "one", rows)
    assert sorted(row["prompt"] for row in asked(run)) == ["a", "d"]
    known = {"prompts": 4, "pairs of equal texts": 2, "prompts without two different completions": 2}
    assert counts(run) == known | {"pairs": 2, "pairs beyond the limit": 0}
    run = ask(tmp_path / "all", rows, pairs="all", limit=None)
    assert texts([row for row in asked(run) if row["prompt"] == "a"]) == {frozenset(pair) for pair in ("12", "13", "23")}
    assert texts([row for row in asked(run) if row["prompt"] == "d"]) == {frozenset("12")}
    # Two samples of d have one text, and people are not asked twice.
    assert counts(run) == known | {"pairs asked before": 1, "pairs": 4, "pairs beyond the limit": 0}
    [metrics] = events(run, "metrics")
    assert metrics["metrics"] == {"questions": 4, "prompts": 2}


def test_the_limit_takes_any_of_all(tmp_path: Path) -> None:
    rows = many("1", "2", "3", prompts=200)
    every, some = (asked(ask(tmp_path / f"{limit}", rows, pairs="all", limit=limit)) for limit in (None, 60))
    assert len(every) == 600
    assert some == every[:60]
    places = sorted(int(row["prompt"]) for row in some)
    assert places[0] < 40
    assert places[-1] > 160


def test_sides_order_and_choice_are_tossed_blindly(tmp_path: Path) -> None:
    rows = many("good", "bad", "worse", prompts=500)
    run = ask(tmp_path / "one", rows, pairs="all", limit=None)
    found = asked(run)
    for better, worse in (("good", "bad"), ("good", "worse"), ("bad", "worse")):
        pairs = [row for row in found if {row["left"], row["right"]} == {better, worse}]
        assert len(pairs) == 500
        assert within(sum(row["left"] == better for row in pairs) / 500, 0.5, 500)
    # Pairs of one prompt do not stand together.
    assert sum(one["prompt"] == other["prompt"] for one, other in pairwise(found)) < 20
    one = asked(ask(tmp_path / "each", rows, limit=None))
    assert within(sum({row["left"], row["right"]} == {"good", "bad"} for row in one) / 500, 1 / 3, 500)
    # Whichever sample a text is of, the page is the same.
    turned = [row for prompt in range(500) for row in group(f"{prompt}", "worse", "good", "bad", policy="other")]
    again = ask(tmp_path / "turned", turned, pairs="all", limit=None)
    assert page_of(again).read_bytes() == page_of(run).read_bytes()
    assert [row["left_sample"] for row in asked(again)] != [row["left_sample"] for row in found]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    rows = many("1", "2", prompts=60)
    first, second, other = (ask(tmp_path / name, rows, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    digests = [read_manifest(page_of(run).parent, "dataset").digest for run in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]
    assert texts(asked(first)) == texts(asked(other))
    sides = {row["prompt"]: row["left"] for row in asked(first)}
    assert 10 < sum(sides[row["prompt"]] != row["left"] for row in asked(other)) < 50
    assert sum(one["prompt"] == two["prompt"] for one, two in zip(asked(first), asked(other), strict=True)) < 10
    # More samples leave the questions that were there as they are.
    more = ask(tmp_path / "more", [*rows, *group("new", "1", "2")])
    assert {row["id"] for row in asked(first)} < {row["id"] for row in asked(more)}


def test_the_answer_alone(tmp_path: Path) -> None:
    rows = group("a", "<think>long</think><answer>4</answer>", "so <answer>5</answer> and", "<think>never ends")
    run = ask(tmp_path / "one", rows, part="answer", pairs="all")
    assert texts(asked(run)) == {frozenset("45")}
    assert counts(run)["samples without an answer to show"] == 1
    assert "long" not in page_of(run).read_text().partition('id="data">')[2].partition("</script>")[0]


def test_a_page_is_part_of_the_dataset(tmp_path: Path) -> None:
    folder = page_of(ask(tmp_path / "one", group("a", "1", "2"))).parent
    manifest = read_manifest(folder, "dataset")
    assert [entry.path for entry in manifest.files] == ["data.parquet", "page.html"]
    assert check(folder, manifest, full=True) == []
    with (folder / "page.html").open("a") as file:
        file.write(" ")
    assert [problem[:14] for problem in check(folder, manifest)] == ["page.html has "]


# The page.


@pytest.mark.parametrize("prompt", PROMPTS)
def test_no_text_gets_out_of_the_data(tmp_path: Path, prompt: Any) -> None:
    run = ask(tmp_path / "hostile", hostile_rows(prompt), instruction="<b>which</b> </script> & {{data}}?")
    harmless = ask(tmp_path / "harmless", many("1", "2", prompts=len(HOSTILE)))
    page, plain = Reading(page_of(run).read_text()), Reading(page_of(harmless).read_text())
    assert page.tags == plain.tags
    assert page.text == plain.text
    assert [text for _, text in page.blocks if text not in {text for _, text in plain.blocks}] == [page.blocks[1][1]]
    data = page.data()
    assert data["questions"] == [{name: row[name] for name in ("id", "prompt", "left", "right")} for row in asked(run)]
    assert data["instruction"] == "<b>which</b> </script> & {{data}}?"
    assert texts(data["questions"]) == set(map(frozenset, HOSTILE))
    raw = page.blocks[1][1]
    assert raw.isascii()
    assert not set("<>&") & set(raw)


def test_the_page_tells_nothing_but_texts(tmp_path: Path) -> None:
    rows = [row | {"answer": "the key", "level": 7} for row in hostile_rows("prompt")]
    text = page_of(ask(tmp_path / "one", rows)).read_text()
    data = Reading(text).data()
    assert set(data) == {"digest", "instruction", "questions"}
    assert {name for question in data["questions"] for name in question} == {"id", "prompt", "left", "right"}
    for word in ("secret policy", "the key", "reward", "sample", str(tmp_path)):
        assert word not in text


def test_nothing_is_loaded_and_only_the_own_script_runs(tmp_path: Path) -> None:
    text = page_of(ask(tmp_path / "one", group("a", "1", "2"))).read_text()
    page = Reading(text)
    assert not [(tag, name) for tag, attributes in page.tags for name in attributes if name in ("src", "href", "action")]
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|\son\w+=|innerHTML|insertAdjacent|eval\(", text)
    [policy] = [at["content"] for tag, at in page.tags if tag == "meta" and at.get("http-equiv") == "Content-Security-Policy"]
    style, _, script = (text for _, text in page.blocks)
    for name, block in (("style", style), ("script", script)):
        assert f"{name}-src 'sha256-{b64encode(sha256(block.encode()).digest()).decode()}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; ")
    assert "unsafe" not in str(policy)
    assert "{{" not in text


def test_buttons_and_texts_have_names_to_be_read_out(tmp_path: Path) -> None:
    page = Reading(page_of(ask(tmp_path / "one", group("a", "1", "2"))).read_text())
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    assert {at.get("data-choice") for at in buttons} == {"left", "right", "tie", "skip", None}
    assert all(at["type"] in ("button", "submit") for at in buttons)
    names = {str(at.get("aria-labelledby")) for _, at in page.tags if "aria-labelledby" in at}
    assert names <= {str(at["id"]) for _, at in page.tags if "id" in at}
    assert ("html", {"lang": "en"}) in page.tags
    labels = [at["for"] for tag, at in page.tags if tag == "label"]
    assert labels == [at["id"] for tag, at in page.tags if tag == "input"]


def test_colours_can_be_read() -> None:
    """WCAG's contrast of text, 4.5, and of the borders of what can be pressed, 3; by light and by dark."""
    css = (ROOT / "stages" / "data" / "questions.css").read_text()
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in css.split("@media (prefers-color-scheme: dark)")]
    assert len(schemes) == 2
    for scheme in schemes:
        for text in ("text", "dim", "accent"):
            assert all(contrast(scheme[text], scheme[back]) > 4.5 for back in ("back", "box")), text
        assert contrast(scheme["on-accent"], scheme["accent"]) > 4.5
        assert contrast(scheme["line"], scheme["back"]) > 3


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# What is refused.


def test_samples_that_make_no_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'the samples have no column "completion" \(they have id, prompt'):
        ask(tmp_path / "prompts", [{"id": "1", "prompt": "a"}])
    with pytest.raises(InputError, match=r"no question came of the samples .*'pairs of equal texts': 1.*that differ\?"):
        ask(tmp_path / "equal", group("a", "1", "1"))
    with pytest.raises(InputError, match="'id of a' do not stand side by side"):
        ask(tmp_path / "apart", [*group("a", "1", "2"), *group("b", "1", "2"), *group("a", "3")])
