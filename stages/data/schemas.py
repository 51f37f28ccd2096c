"""DESIGN's row formats, and how what people have (TRL's columns, `messages`, HH-RLHF's dialogues) becomes them.

Canonical rows: `id`, `prompt` (text or messages), then by kind

    prompts          nothing more
    demonstrations   completion
    unpaired         completion, label
    preferences      chosen, rejected, margin?
    segments         preferences, and chosen_ends, chosen_scores, rejected_ends, rejected_scores (see `scored_segments`;
                     all null: not scored)
    rankings         completions, ranks
    step labels      completions (the steps of one completion, in order), labels (0 wrong .. 1 right, one a step)

and the source's other columns. Completions are text: the assistant's last turn.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise, takewhile
from typing import Any, Literal

from stages.artifacts import digest_of
from stages.errors import InputError

Row = dict[str, Any]
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
SEGMENTS = ("chosen_ends", "chosen_scores", "rejected_ends", "rejected_scores")
CANONICAL = (
    *("id", "prompt", "completion", "label", "chosen", "rejected", "margin"),
    *("completions", "ranks", "labels"),
    *SEGMENTS,
)
TEXTS = ("completion", "chosen", "rejected")


def canonical(row: Row, where: str, keep_empty: bool = False) -> Row:
    """One source row as a canonical row, without its id. Raises InputError naming row and column, also for a completion that
    is empty, if `keep_empty` does not say that it may be."""
    row = {name: value for name, value in row.items() if name != "id"}
    if "messages" in row and not row.keys() & set(TEXTS):
        # Some sources (H4's) repeat the first message as a column `prompt`.
        row = _from_messages({name: value for name, value in row.items() if name != "prompt"}, where)
    elif "text" in row and not row.keys() & {"prompt", *TEXTS}:
        row = {"prompt": "", "completion": row.pop("text"), **row}
    elif "chosen" in row and "rejected" in row:
        row = _from_pair(row, where)
    if "prompt" not in row:
        raise InputError(
            f'{where}: no column "prompt" (it has {", ".join(sorted(row))}); map one with `columns: {{prompt: NAME}}`, '
            'or give "messages", or "chosen" and "rejected"'
        )
    row["prompt"] = _prompt(row["prompt"], where)
    for name in TEXTS:
        if name in row:
            row[name] = _text(row[name], where, name, keep_empty)
    _check(row, where)
    if "labels" in row:
        row["completions"], row["labels"] = labelled_steps(row, where)
    if any(row.get(name) is not None for name in SEGMENTS):
        row |= scored_segments(row, where)
    return row


def labelled_steps(row: Row, where: str) -> tuple[list[str], list[float]]:
    """The steps of a completion and their labels, from 0 (wrong) to 1 (right). Raises InputError naming row and column."""
    steps: Any = row.get("completions")
    labels = row["labels"]
    if "ranks" in row:
        raise InputError(f'{where}: it has "ranks" and "labels"; "completions" are either a prompt\'s answers or one\'s steps')
    for name, value in (("completions", steps), ("labels", labels)):
        if not isinstance(value, list):
            raise InputError(
                f'{where}: "labels" are those of the steps in "completions", and "{name}" must be a list, '
                f"it is {type(value).__name__} {str(value)[:60]!r}"
            )
    if len(steps) != len(labels) or not steps:
        raise InputError(f'{where}: {len(labels)} "labels" for {len(steps)} "completions"; each step needs one')
    for number, (step, label) in enumerate(zip(steps, labels, strict=True), start=1):
        if not isinstance(step, str) or not step.strip():
            raise InputError(f'{where}: step {number} in "completions" must be text and not empty, it is {step!r}')
        if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            raise InputError(f'{where}: "labels" are true, false or numbers from 0 to 1; that of step {number} is {label!r}')
    return list(steps), [float(label) for label in labels]


def scored_segments(row: Row, where: str) -> dict[str, list[Any]]:
    """The segments of a pair's two completions, in the columns of `SEGMENTS`, and their scores as floats.

    `chosen_ends` are the positions in the text of the characters that end its segments, inclusive and rising; the last segment
    goes on to the end of the text. `chosen_scores` are theirs: a number each, or a list of numbers, one an aspect. None is
    below 0: they weigh log-probs, and a negative one would make its segment less likely in the chosen completion and likelier
    in the rejected. Raises InputError naming row and column.
    """
    found: dict[str, list[Any]] = {}
    for name in ("chosen", "rejected"):
        found[f"{name}_ends"] = _ends(row, where, name)
        found[f"{name}_scores"] = _scores(row, where, name, len(found[f"{name}_ends"]))
    scores = [*found["chosen_scores"], *found["rejected_scores"]]
    if len({len(score) if isinstance(score, list) else None for score in scores}) > 1:
        raise InputError(
            f'{where}: the segments of "chosen_scores" and "rejected_scores" must have one number each, or all a list with '
            f"equally many aspects; they have {scores}"
        )
    return found


def _ends(row: Row, where: str, name: str) -> list[int]:
    text = row.get(name)
    ends: Any = row.get(f"{name}_ends")
    if not isinstance(text, str):
        raise InputError(f'{where}: segments are those of a pair, and "{name}" must be text, it holds {text!r}')
    if not (isinstance(ends, list) and ends and all(type(end) is int for end in ends)):
        raise InputError(
            f'{where}: "{name}_ends" must be a list of the positions of the characters that end the segments of "{name}", '
            f"it is {str(ends)[:60]}"
        )
    if any(later <= end for end, later in pairwise(ends)):
        raise InputError(f'{where}: "{name}_ends" must rise, it is {str(ends)[:60]}; sort it, and give each end once')
    if ends[0] < 0 or ends[-1] >= len(text):
        raise InputError(
            f'{where}: "{name}_ends" must lie in "{name}", from 0 to {len(text) - 1}, it is {str(ends)[:60]}; '
            "count characters of the completion alone, without the prompt"
        )
    return list(ends)


def _scores(row: Row, where: str, name: str, segments: int) -> list[Any]:
    scores = row.get(f"{name}_scores")
    if not isinstance(scores, list) or len(scores) != segments:
        what = f"{len(scores)} scores" if isinstance(scores, list) else f"{scores!r}"
        raise InputError(f'{where}: "{name}_scores" must be a list with one score a segment, {segments}; it holds {what}')
    for number, score in enumerate(scores, start=1):
        aspects = score if isinstance(score, list) and score else [score]
        if not all(isinstance(one, int | float) and math.isfinite(one) and one >= 0 for one in aspects):
            raise InputError(
                f'{where}: "{name}_scores" are numbers from 0 up, or lists of them; that of segment {number} is {score!r}: '
                "scale the scores so that none is negative"
            )
    return [[float(one) for one in score] if isinstance(score, list) else float(score) for score in scores]


def in_form(row: Row, form: Literal["as_given", "demonstrations", "prompts"], where: str) -> Row:
    """A canonical row as a demonstration of its chosen answer, or as its prompt alone. Raises InputError when it lacks that."""
    if form == "as_given":
        return row
    others = {name: value for name, value in row.items() if name == "prompt" or name not in CANONICAL}
    if form == "prompts":
        if not prompt_text(row["prompt"]).strip():
            raise InputError(f'{where}: `form: prompts` needs a prompt, and "prompt" is empty')
        return others
    if "chosen" not in row:
        have = ", ".join(name for name in CANONICAL if name in row)
        raise InputError(
            f"{where}: `form: demonstrations` takes the chosen answer of preferences, and this row has only {have}"
        )
    return others | {"completion": row["chosen"]}


def row_id(row: Row) -> str:
    """A row's id: 16 hex digits of its canonical columns' content, so that equal rows have equal ids."""
    return digest_of({name: row[name] for name in CANONICAL if name in row and name != "id"})[:16]


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """What a prompt says, all its messages end to end."""
    return prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)


def parse_dialogue(text: str, where: str) -> list[dict[str, str]]:
    r"""HH-RLHF's `\n\nHuman: ...\n\nAssistant: ...` as messages. Raises InputError when it does not start with a turn."""
    parts = TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise InputError(f'{where}: a dialogue must start with "\\n\\nHuman:", this one starts with {text[:30]!r}')
    return [{"role": ROLES[speaker], "content": said.strip()} for speaker, said in zip(parts[1::2], parts[2::2], strict=True)]


def _from_messages(row: Row, where: str) -> Row:
    messages = _messages(row.pop("messages"), where, "messages")
    if messages[-1]["role"] != "assistant":
        raise InputError(f'{where}: "messages" must end with an assistant\'s turn to be a demonstration')
    return {"prompt": messages[:-1], "completion": messages[-1]["content"], **row}


def _from_pair(row: Row, where: str) -> Row:
    """Chosen and rejected that repeat the prompt (HH-RLHF, TRL's implicit prompt) give it back; the rest is the answer."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" not in row and isinstance(chosen, str) and any(name in row for name in SEGMENTS):
        raise InputError(
            f'{where}: with segments, "prompt" must be a column of its own: their ends are places in the completions'
        )
    if isinstance(chosen, str) and isinstance(rejected, str) and "prompt" not in row and TURN.match(chosen):
        chosen = parse_dialogue(chosen, f'{where}, "chosen"')
        rejected = parse_dialogue(rejected, f'{where}, "rejected"')
    if "prompt" in row:
        return row
    if isinstance(chosen, str) and isinstance(rejected, str):
        return row | _split_texts(chosen, rejected, where)
    chosen, rejected = _messages(chosen, where, "chosen"), _messages(rejected, where, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise InputError(f'{where}: "chosen" and "rejected" differ before their last turn, so they do not answer one prompt')
    return row | {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _split_texts(chosen: str, rejected: str, where: str) -> Row:
    """Two texts as the prompt that both start with, cut before a space (as TRL does), and what each says after it."""
    pairs = zip(chosen, rejected, strict=False)
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    end = max((place for place, character in enumerate(shared) if character.isspace()), default=0)
    if not chosen[:end].strip():
        raise InputError(f'{where}: no column "prompt", and "chosen" and "rejected" do not start with the same words')
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _prompt(value: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        return parse_dialogue(value.rstrip().removesuffix("\n\nAssistant:"), where) if TURN.match(value) else value
    return _messages(value, where, "prompt")


def _messages(value: Any, where: str, column: str) -> list[dict[str, str]]:
    if not (isinstance(value, list) and value and all(_is_message(item) for item in value)):
        raise InputError(
            f'{where}: "{column}" must be text or a list of messages with "role" and "content", '
            f"it is {type(value).__name__} {str(value)[:60]!r}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _text(value: Any, where: str, column: str, keep_empty: bool) -> str:
    if isinstance(value, list):
        last = _messages(value, where, column)[-1]
        if last["role"] != "assistant":
            raise InputError(f'{where}: "{column}" must end with an assistant\'s turn, it ends with one of {last["role"]!r}')
        value = last["content"]
    if not isinstance(value, str):
        raise InputError(f'{where}: "{column}" must be text, it is {type(value).__name__} {str(value)[:60]!r}')
    if not value.strip() and not keep_empty:
        raise InputError(f'{where}: "{column}" is empty')
    return value


def _check(row: Row, where: str) -> None:
    if "completion" not in row and not prompt_text(row["prompt"]).strip():
        raise InputError(f'{where}: "prompt" is empty')
    if ("chosen" in row) != ("rejected" in row):
        have, lack = ("chosen", "rejected") if "chosen" in row else ("rejected", "chosen")
        raise InputError(f'{where}: it has "{have}" but no "{lack}"')
    if "label" in row and not isinstance(row["label"], bool):
        raise InputError(f'{where}: "label" must be true or false, it is {row["label"]!r}')
    for name in ("completions", "ranks"):
        if name in row and not isinstance(row[name], list):
            raise InputError(f'{where}: "{name}" must be a list, it is {type(row[name]).__name__} {str(row[name])[:60]!r}')
    if "ranks" in row and len(row["ranks"]) != len(row.get("completions", [])):
        raise InputError(f'{where}: {len(row["ranks"])} "ranks" for {len(row.get("completions", []))} "completions"')
