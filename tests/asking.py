"""What the tests of people's labels share: texts that try to break the page, the stages on rows, answers as people give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from conftest import request_for
from labelling import Rows, group

from stages.data.parquet import read_rows, write_rows
from stages.data.questions import PAGE
from stages.request import run_stage
from stages.run import Run

# Pairs of texts: markup, ends of blocks, escapes of JSON and JavaScript, control characters, nothing, very much.
HOSTILE: Sequence[tuple[str, str]] = (
    ("</script><script>document.title = 'taken'</script>", "<!--<script>"),
    ('<img src=x onerror="document.title = 1"> <b>bold</b>', "</div></main><h1>Right is better</h1>"),
    ('"}],"digest":"x"} \\u003c/script> \\" \\', "{{data}} {{script}} {{style}} {{policy}} ]]>"),
    ("right \u202eto left\u202c, \u2066isolated, a nul \x00, a bell \x07, an escape \x1b[31m", "שלום, עולם \u2028\u2029 مرحبا"),
    ("", " \n\t "),
    ("word " * 4000, "x" * 5000),
    ("line\n" * 60, "\r\ncarriage\rreturns\r\n"),
    ("🙂👩\u200d👩\u200d👧 e\u0301 ﷽", "&lt;b&gt; &amp; &#x3c;"),
)
PROMPTS: Sequence[Any] = (
    "</script><h1>prompt</h1>",
    [{"role": "system", "content": "</script>"}, {"role": "<b>user</b>", "content": "a\n\nb " * 200}],
)


def hostile_rows(prompt: Any) -> Rows:
    """Samples whose every pair is one of `HOSTILE`, each of a prompt of its own."""
    return [
        row | {"id": f"hostile {number}", "prompt": _numbered(prompt, number)}
        for number, pair in enumerate(HOSTILE)
        for row in group("", *pair, reward=0.5, policy="secret policy")
    ]


def _numbered(prompt: Any, number: int) -> Any:
    if isinstance(prompt, str):
        return f"{prompt} {number}"
    return [*prompt[:-1], prompt[-1] | {"content": f"{prompt[-1]['content']} {number}"}]


def ask(folder: Path, rows: Rows, **config: Any) -> Run:
    """Run `questions` on rows, in a folder of its own."""
    folder.mkdir()
    (folder / "samples").mkdir()
    write_rows(folder / "samples", rows)
    return run_stage(request_for("questions", folder / "run", config, samples=folder / "samples"))


def asked(run: Run) -> Rows:
    return list(read_rows(run.folder / "outputs" / "questions"))


def page_of(run: Run) -> Path:
    return run.folder / "outputs" / "questions" / PAGE


def answer(folder: Path, questions: Run, files: Mapping[str, str | Rows], **config: Any) -> Run:
    """Run `answers` on files of answers (their text, or rows), in a folder of its own."""
    given = folder / "files"
    given.mkdir(parents=True)
    for name, rows in files.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (given / name).write_text(text, "utf-8")
    paths = {"questions": questions.folder / "outputs" / "questions", "answers": given}
    return run_stage(request_for("answers", folder / "run", {"heldout": 0} | config, **paths))


def given(annotator: str, questions: Rows, choices: str, **more: Any) -> Rows:
    """An annotator's answers to the first questions, by their first letters: l, r, t, s; a blank answers nothing."""
    names = {"l": "left", "r": "right", "t": "tie", "s": "skip"}
    pairs = [(row["id"], names[letter]) for row, letter in zip(questions, choices, strict=False) if letter != " "]
    return [{"question": question, "annotator": annotator, "choice": choice} | more for question, choice in pairs]


class Reading(HTMLParser):
    """An HTML page as a browser takes it apart: its tags, the text of each script and style, all other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        attributes = self.tags[-1][1] if self.tags else {}
        if self.cdata_elem is not None:
            if self.blocks and self.blocks[-1][0] is attributes:
                self.blocks[-1] = (attributes, self.blocks[-1][1] + data)
            else:
                self.blocks.append((attributes, data))
        else:
            self.text += data

    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        [text] = [text for attributes, text in self.blocks if attributes.get("id") == "data"]
        return json.loads(text)
