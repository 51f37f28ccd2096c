"""What the tests of GRPO share: rewards of their own, a bench that runs the stage, and the oracle of a step's numbers."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import request_for
from ppo_bench import (
    ADAM,
    ROWS,
    Folders,
    StageBench,
    classifier,
    folder,
    four_models,
    language,
    merged,
    plain_logp,
)

import stages.grpo
from stages.request import run_stage
from stages.rewards import REWARDS
from stages.rewards.base import RewardEntry, Row, Score
from stages.rollouts.sample import Sample
from stages.run import Listener, Run
from stages.specs.grpo import GrpoConfig

# Every other prompt is of another kind, for a part of a reward that is for some rows alone.
PROMPTS = [row | {"kind": "chat" if place % 2 else "sum"} for place, row in enumerate(ROWS)]
CONFIG: dict[str, Any] = {"steps": 2, "prompts": 4, "group": 4, "sampling": {"max_new_tokens": 8}, "optimizer": ADAM}
CONFIG |= {"rewards": [{"name": "code", "args": {"gaps": 9}}]}
# Two or three completions a micro-batch.
CONFIG["runtime"] = {"device": "cpu", "threads": 1, "save_every": 100, "micro_batch_tokens": 50}


def code(completions: Sequence[str], rows: Sequence[Row], *, values: int = 7, gaps: int = 0) -> list[Score | None]:
    """A number from 0 to 1 that the text's letters say, one of so many; none for about one in `gaps` completions."""
    sums = [sum(place * ord(letter) for place, letter in enumerate(text, start=3)) for text in completions]
    return [None if gaps and one % gaps == 0 else Score(one % values / (values - 1)) for one in sums]


def stepped(completions: Sequence[str], rows: Sequence[Row], *, gaps: int = 0) -> list[Score | None]:
    """Every third character ends a step, which its letter rates; what is left over is a step that rates nothing."""
    found: list[Score | None] = []
    for text, whole in zip(completions, code(completions, rows, gaps=gaps), strict=True):
        ends = list(range(2, len(text), 3))
        scores = [ord(text[end]) % 5 / 4 for end in ends]
        found.append(None if whole is None else Score(sum(scores), step_scores=scores, step_ends=ends))
    return found


def fails(completions: Sequence[str], rows: Sequence[Row]) -> list[Score | None]:
    raise ArithmeticError("no verdict today")


def grpo_folders(init_folder: Path, root: Path) -> Folders:
    """PPO's models, its prompts with a kind each."""
    found = four_models(init_folder, root)
    return found | {"reward_model": found["reward"], "prompts": folder(root / "kinds", PROMPTS)}


@pytest.fixture(scope="module")
def folders(init_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return grpo_folders(init_folder, tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True, scope="module")
def rewards_of_tests() -> Any:
    """The rewards above, by name."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (code, stepped, fails):
            patch.setitem(REWARDS, function.__name__, RewardEntry(f"grpo_bench:{function.__name__}", version=1))
        yield


def train(folders: Folders, path: Path, listener: Listener | None = None, **changes: Any) -> Run:
    inputs = {port: folders[port] for port in ("policy", "prompts")} | changes.pop("inputs", {})
    return run_stage(request_for("grpo", path, merged(CONFIG, changes), **inputs), listener)


class Bench(StageBench):
    """GRPO's: with the steps whose completions were all sampled, and which numbers of tokens each step computed anew."""

    stage, run = stages.grpo, staticmethod(train)

    def __init__(self, folders: Folders, path: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(folders, path, patch)
        self.measured: list[tuple[int, str]] = []
        self.complete: list[int] = []
        self.spy("_sample", after=lambda _, *given: self.complete.append(given[3].step))
        self.spy("measure", after=lambda _, *given: self.measured.append((self.sampled[-1], *given[2])))


@pytest.fixture
def bench(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(folders, tmp_path, monkeypatch)


# The oracle: each sequence alone, groups and steps in loops.


@torch.no_grad()
def by_hand(config: GrpoConfig, moment: Any, folders: Folders) -> list[dict[str, Any]]:
    """All numbers of each completion of a step, float64. A reward that there is not is None."""
    reference, judge = language(folders["reference"]), classifier(folders["reward"])
    found: list[dict[str, Any]] = []
    for sample in moment.rollouts.samples:
        logp_T, ref_logp_T = (plain_logp(model, sample, config.sampling.temperature)[0] for model in (moment.policy, reference))
        cut, length = sample.completion.finish == "length", len(logp_T)
        one: dict[str, Any] = {"id": sample.row["id"], "logp": logp_T, "ref_logp": ref_logp_T, "length": length}
        one |= {"kl": (logp_T - ref_logp_T).sum().item(), "truncated": cut, "parts": {}, "steps": []}
        for part in config.rewards:
            if all(sample.row[column] == value for column, value in part.where.items()):
                one["parts"][part.key] = score = _score(part.name, part.args, sample, moment, judge)
                for end, value in _steps(sample, score) if part.weight else []:
                    one["steps"].append((_token(moment, sample, end), part.weight * value))
        weighted = [(part.weight, one["parts"][part.key]) for part in config.rewards if part.key in one["parts"]]
        one["reward"] = None
        if all(score is not None for weight, score in weighted if weight):
            one["reward"] = sum(weight * score.total for weight, score in weighted if weight)
        if config.truncation.how == "penalise":
            begins = config.sampling.max_new_tokens - config.truncation.window
            share = 1.0 if cut else max(0.0, (length - begins) / config.truncation.window) if config.truncation.window else 0.0
            one["parts"]["overlong"] = Score(-config.truncation.penalty * share)
            one["reward"] = None if one["reward"] is None else one["reward"] - config.truncation.penalty * share
        found.append(one)
    _advantages(config, found)
    return found


def _score(name: str, args: dict[str, Any], sample: Sample, moment: Any, judge: Any) -> Score | None:
    if name in ("length", "answer"):
        right = f"<answer>{sample.row['answer']}</answer>" in sample.text
        return Score(-0.001 * len(sample.text) if name == "length" else float(right))
    if name in ("code", "stepped"):
        return {"code": code, "stepped": stepped}[name]([sample.text], [sample.row], **args)[0]
    # The judge reads the text, which other tokens may spell than were sampled.
    ids = moment.loop.policy.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
    ids = [*sample.prompt_ids, *ids, *(moment.loop.policy.stops[:1] if sample.completion.finish == "stop" else [])]
    raw = judge.score(judge.base_model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].double()
    return Score(((raw + judge.config.reward_bias) * judge.config.reward_scale).item())


def _steps(sample: Sample, score: Score | None) -> list[tuple[int, float]]:
    if score is None or score.total is None:
        return []
    if score.step_scores is None or score.step_ends is None:
        return [(len(sample.text) - 1, score.total)]
    return list(zip(score.step_ends, score.step_scores, strict=True))


def _token(moment: Any, sample: Sample, end: int) -> int:
    """The token that a character of the completion's text belongs to; its last one's is the last, EOS included."""
    ids = sample.completion.ids
    if end >= len(sample.text) - 1:
        return len(ids) - 1
    texts = (moment.loop.policy.tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1))
    return next(place for place, text in enumerate(texts) if len(text) > end)


def _advantages(config: GrpoConfig, found: list[dict[str, Any]]) -> None:
    """Put into each completion its tokens' advantages, and whether its group's rewards differ."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        groups[one["id"]].append(one)
    for group in groups.values():
        known = [one for one in group if one["reward"] is not None]
        spread = len({round(one["reward"], 5) for one in known}) > 1
        for one in group:
            one |= {"spread": spread and one["reward"] is not None, "advantages": torch.zeros(one["length"]).double()}
        if config.supervision == "process":
            every = [value for one in known for _, value in one["steps"]]
            for one in known if len(set(every)) > 1 else []:
                for end, value in one["steps"]:
                    one["advantages"][: end + 1] += (value - statistics.mean(every)) / (statistics.stdev(every) + 1e-6)
            continue
        taken = config.reference_kl.coefficient if config.reference_kl.place == "reward" else 0.0
        shaped = [one["reward"] - taken * one["kl"] for one in known]
        for one, reward in zip(known, shaped, strict=True) if len({round(reward, 5) for reward in shaped}) > 1 else []:
            mean, others = statistics.mean(shaped), (sum(shaped) - reward) / (len(shaped) - 1)
            scaled = {
                "std": (reward - mean) / (statistics.stdev(shaped) + 1e-6),
                "none": reward - mean,
                "rloo": reward - others,
            }
            one["advantages"] += scaled[config.scale]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
