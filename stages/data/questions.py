"""The page on which people compare: one HTML file that needs no network, made of questions.html, .css and .js beside this file.

What the page shows was written by models and strangers. It travels as JSON in a block that no text can end, is laid out by the
script as text alone, and a content security policy lets nothing run or load but that script and style.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.artifacts import digest_of

SHOWN = ("id", "prompt", "left", "right")
PAGE = "page.html"


def page(questions: Sequence[dict[str, Any]], instruction: str) -> str:
    """The page that asks `questions`, of which it holds the columns of `SHOWN` and nothing else."""
    html, style, script = (Path(__file__).with_suffix(f".{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    shown = [{name: question[name] for name in SHOWN} for question in questions]
    data = {"digest": page_digest(questions), "instruction": instruction, "questions": shown}
    # The data last: what is put in before must not be looked for in it.
    head = html.replace("{{policy}}", policy).replace("{{style}}", style).replace("{{script}}", script)
    return head.replace("{{data}}", _inert(data))


def page_digest(questions: Sequence[dict[str, Any]]) -> str:
    """Under which a browser keeps the answers: it tells the questions and their order."""
    return digest_of([question["id"] for question in questions])[:16]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(value: Any) -> str:
    """JSON in ASCII without a sign that HTML could read as markup."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")
