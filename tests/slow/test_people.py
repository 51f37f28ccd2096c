"""People label in a real browser: the page from disk, keyboard and mouse, and a reward model trained on what they said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from asking import HOSTILE, PROMPTS, ask, asked, hostile_rows, page_of  # pyright: ignore[reportMissingImports]
from conftest import INIT  # pyright: ignore[reportMissingImports]
from labelling import many  # pyright: ignore[reportMissingImports]
from playwright.sync_api import Browser, BrowserContext, Locator, Page
from test_cli import posttrain, stages  # pyright: ignore[reportMissingImports]

from stages.data.parquet import read_rows
from tasks.execute import execute
from tasks.home import configure_environment
from tasks.plan import StepCall
from tasks.references import resolve
from tasks.store import Store

pytestmark = pytest.mark.slow
RUNTIME = {"device": "cpu", "threads": 1}
SFT = {"steps": 20, "batch_size": 8, "generations": 2, "sampling": {"max_new_tokens": 4}, "optimizer": {"lr": 1e-3}}


@pytest.fixture
def watched() -> list[str]:
    """What a page did that it must not do: errors, dialogs, and requests other than for itself."""
    return []


def opened(context: BrowserContext, path: Path, watched: list[str]) -> Page:
    page = context.new_page()
    page.on("console", lambda message: watched.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: watched.append(f"error: {error}"))
    page.on("dialog", lambda dialog: watched.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: watched.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    return page


def start(page: Page, name: str) -> None:
    """As a person does whose name has letters that are keys elsewhere."""
    page.keyboard.type(name)
    page.keyboard.press("Enter")


def place(page: Page) -> str:
    return page.inner_text("#place")


def shown(page: Page) -> tuple[str, str]:
    left, right = (page.text_content(f"#{side}") for side in ("left", "right"))
    assert left is not None
    assert right is not None
    return left, right


def better(page: Page) -> str:
    """The side with the longer text, or the one that comes first in the alphabet."""
    left, right = shown(page)
    return "left" if (-len(left), left) < (-len(right), right) else "right"


def downloaded(page: Page, folder: Path) -> list[dict[str, Any]]:
    with page.expect_download() as download:
        page.click("#download")
    folder.mkdir(exist_ok=True)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def step(name: str, stage: str, config: dict[str, Any], **inputs: Any) -> Any:
    return execute.fn(StepCall(recipe="before", name=name, stage=stage, config=config, inputs=inputs, pipeline="")).artifacts


def run(state: Path, folder: Path, flow: str, name: str, config: dict[str, Any], **inputs: str) -> tuple[dict[str, Any], str]:
    """One stage by the command, as a recipe of its own: what it says of the stage, and all that it prints."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"flow": flow, "name": name, "inputs": inputs, flow: config}))
    done = posttrain(state, "run", str(path), "--json")
    return stages(done)[flow], done.stderr


def test_a_person_labels_and_a_reward_model_learns(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: list[str]
) -> None:
    state = tmp_path / "home"
    monkeypatch.setenv("POSTTRAIN_HOME", str(state))
    store = Store(configure_environment())
    source = resolve(store, "procedural:chain-sum/demonstrations", "dataset")
    data = step("data", "prepare", {"rows": 60}, source=source)
    model = resolve(store, f"init:{INIT}", "model")
    sft = step("sft", "sft", SFT | {"runtime": RUNTIME}, model=model, train=data["train"])
    sampling = {"samples": 3, "sampling": {"max_new_tokens": 10}, "runtime": RUNTIME}
    samples = step("samples", "sample", sampling, policy=sft["checkpoint"], prompts=data["train"])["samples"]

    made, said = run(state, tmp_path, "questions", "people", {"limit": 20}, samples=reference_to(samples.model_dump()))
    assert made["metrics"] == {"questions": 20, "prompts": 20}
    # Rich breaks no line of a path, whatever the width of the terminal.
    [path] = re.findall(r"^questions: label them in (/.*/page\.html)$", said, re.MULTILINE)
    questions = list(read_rows(Path(path).parent))

    context = browser.new_context()
    page = opened(context, Path(path), watched)
    assert place(page) == "20 questions"
    start(page, "Tess 21z")
    expected = [label_one(page, number) for number in range(9)]
    assert place(page) == "Question 10 of 20"
    page.screenshot(path=tmp_path / "labelling.png")

    # Undo: a wrong one by a key, two by the mouse; what is chosen anew takes their place.
    page.keyboard.press("t")
    page.keyboard.press("z")
    page.click("#undo")
    page.click("#undo")
    assert place(page) == "Question 8 of 20"
    expected = [*expected[:7], *(label_one(page, number) for number in (7, 8))]
    page.keyboard.press("t")
    page.keyboard.press("s")
    page.click("[data-choice=tie]")
    page.click("[data-choice=skip]")
    expected += ["tie", "skip", "tie", "skip"]
    # A key that is held down answers once; with ctrl it is the browser's.
    page.keyboard.down("s")
    page.keyboard.down("s")
    page.keyboard.up("s")
    page.keyboard.press("Backspace")
    page.keyboard.press("Control+z")
    assert place(page) == "Question 14 of 20"

    page.reload()
    assert place(page) == "Question 14 of 20"
    # By keyboard alone, over the buttons.
    side = better(page)
    page.focus(f"[data-choice={side}]")
    page.keyboard.press("Enter")
    expected.append(side)
    # Another tab sees what this one does.
    second = opened(context, Path(path), watched)
    expected.append(label_one(page, 14))
    second.wait_for_function("document.getElementById('place').textContent === 'Question 16 of 20'")
    second.close()
    assert len(downloaded(page, tmp_path / "early")) == 15
    expected += [label_one(page, number) for number in range(15, 20)]
    assert place(page) == "All 20 questions done"
    page.screenshot(path=tmp_path / "done.png")

    rows = downloaded(page, tmp_path / "answers")
    assert [row["question"] for row in rows] == [question["id"] for question in questions]
    assert [row["choice"] for row in rows] == expected
    assert {row["annotator"] for row in rows} == {"Tess 21z"}
    assert all(0 <= row["seconds"] < 60 for row in rows)
    assert [row["at"] for row in rows] == sorted(row["at"] for row in rows)

    # A second person at the same browser starts anew, and finds own answers again.
    page.click("#change")
    start(page, "  Ben   <b> ")
    assert place(page) == "Question 1 of 20"
    for _ in range(12):
        page.keyboard.press("1" if better(page) == "left" else "2")
    assert {row["annotator"] for row in downloaded(page, tmp_path / "answers")} == {"Ben <b>"}
    page.reload()
    assert (page.inner_text("#name"), place(page)) == ("Ben <b>", "Question 13 of 20")
    names = sorted(file.name for file in (tmp_path / "answers").iterdir())
    assert [name[:8] + name[16:] for name in names] == ["answers--Ben-b-.jsonl", "answers--Tess-21z.jsonl"]
    context.close()
    assert not watched

    inputs = {"questions": reference_to(made["artifacts"]["questions"]), "answers": f"{tmp_path}/answers/*.jsonl"}
    made, _ = run(state, tmp_path, "answers", "pairs", {"heldout": 0.2}, **inputs)
    numbers = made["metrics"]
    # Tess's tie, skip, tie, skip are the answers 10 to 13; of these Ben gave the first three, and chose a side.
    assert numbers["rows_train"] + numbers["rows_heldout"] == 9 + 1 + 7
    assert (numbers["even_votes"], numbers["ties"], numbers["skipped"], numbers["answers"]) == (2, 0, 2, 18 + 12)
    assert numbers["agreement"] == pytest.approx(9 / 11)
    train, heldout = (reference_to(made["artifacts"][name]) for name in ("train", "heldout"))
    pairs = [row for one in (train, heldout) for row in read_rows(store.locate(resolve(store, one, "dataset")))]
    assert all((-len(row["chosen"]), row["chosen"]) < (-len(row["rejected"]), row["rejected"]) for row in pairs)

    config = {"steps": 10, "batch_size": 4, "optimizer": {"lr": 1e-2}, "bootstrap": 100, "runtime": RUNTIME}
    inputs = {"model": reference_to(sft["checkpoint"].model_dump()), "train": train, "heldout": heldout}
    made, _ = run(state, tmp_path, "reward_model", "rm", config, **inputs)
    assert made["status"] == "ran"
    assert 0 <= made["metrics"]["pair_accuracy"] <= 1


def reference_to(artifact: dict[str, Any]) -> str:
    return f"{artifact['kind']}s:/{artifact['name']}/{artifact['version']}"


def label_one(page: Page, number: int) -> str:
    """Choose the better side in one of the ways there are; which it was."""
    assert place(page) == f"Question {number + 1} of 20"
    side = better(page)
    way = number % 3
    if way == 2:
        page.click(f"[data-choice={side}]")
    else:
        page.keyboard.press({"left": ("ArrowLeft", "1"), "right": ("ArrowRight", "2")}[side][way])
    return side


# Texts that would break the page, and browsers that forget.


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_hostile_texts_are_shown_as_they_are(
    browser: Browser, tmp_path: Path, watched: list[str], scheme: Any, width: int
) -> None:
    run = ask(tmp_path / "hostile", hostile_rows(PROMPTS[1]), instruction="</h1><script>document.title = 'taken'</script>")
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page = opened(context, page_of(run), watched)
    start(page, "\u202eanna")
    for number, question in enumerate(asked(run)):
        assert place(page) == f"Question {number + 1} of {len(HOSTILE)}"
        for side in ("left", "right"):
            assert as_read(page.locator(f"#{side}")) == question[side].replace("\r\n", "\n")
        texts = page.locator("#prompt .text")
        assert [as_read(texts.nth(k)) for k in range(2)] == [message["content"] for message in question["prompt"]]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out to the side"
        page.screenshot(path=tmp_path / f"{scheme}-{width}-{number}.png")
        page.keyboard.press("1")
    assert page.title() == "Which answer is better?"
    assert page.locator("script").count() == 2
    assert page.locator("img, h1 *, .box b, .box h1").count() == 0
    assert page.text_content("h1") == "</h1><script>document.title = 'taken'</script>"
    page.screenshot(path=tmp_path / f"{scheme}-{width}-end.png")
    assert not watched
    # Were a text to become markup after all, the policy would not let it run.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title = 1\">')")
    page.wait_for_timeout(200)
    assert page.title() == "Which answer is better?"
    assert "Content Security Policy" in watched[0]
    context.close()


def as_read(box: Locator) -> str:
    """The text that a box was made of: a mark is one sign again, and a note stands for nothing or white space."""
    return box.evaluate(
        """box => [...box.childNodes].map(({ className, textContent }) =>
          className === "mark" ? String.fromCodePoint(parseInt(textContent.slice(2), 16))
          : className === "nothing" ? (textContent === "empty" ? "" : " \\n\\t ")
          : textContent).join("")"""
    )


def test_a_browser_that_keeps_nothing_says_so(browser: Browser, tmp_path: Path, watched: list[str]) -> None:
    path = page_of(ask(tmp_path / "one", many("1", "2", prompts=3)))
    context = browser.new_context()
    context.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    page = opened(context, path, watched)
    start(page, "anna")
    page.keyboard.press("1")
    assert "does not keep the answers (QuotaExceededError): download them" in page.inner_text("#notice")
    assert len(downloaded(page, tmp_path / "answers")) == 1
    context.close()
    # What another program left there is not taken for answers.
    context = browser.new_context()
    page = opened(context, path, watched)
    start(page, "anna")
    page.keyboard.press("1")
    for left in ("[[]]", "{", '[{"question": "another", "choice": "left"}]'):
        page.evaluate(
            "left => localStorage.setItem(Object.keys(localStorage).find(key => key.endsWith('of anna')), left)", left
        )
        page.reload()
        assert place(page) == "Question 1 of 3"
        assert "cannot be read" in page.inner_text("#notice")
        page.keyboard.press("2")
    context.close()
    assert not watched
