"""What PPO samples: prompts that come twice, and prompts that do not fit."""

from __future__ import annotations

from typing import Any

import ppo_bench
import pytest
from ppo_bench import (
    ROWS,
    Bench,
    Folders,
    events,
    folder,
    records,
)

from stages.errors import InputError
from stages.models.load import load_policy, save_checkpoint
from stages.models.reward import new_reward_model

folders = ppo_bench.folders
bench = ppo_bench.bench


def test_a_prompt_that_comes_twice_is_sampled_anew(bench: Bench) -> None:
    run = bench.train(batch_size=4, inputs={"prompts": folder(bench.path / "one", ROWS[:1])})
    drawn = [(row["step"], row["sample"]) for row in records(run)]
    assert drawn == [(step, sample) for step in (0, 1) for sample in range(4)]
    bench.train("other", batch_size=4, seed=1, steps=1, inputs={"prompts": bench.path / "one"})
    assert len({tuple(sample.completion.ids) for moment in bench.moments for sample in moment.rollouts.samples}) == 12


def test_prompts_that_do_not_fit_are_dropped_and_counted(bench: Bench) -> None:
    # Another model reads 24 tokens: a prompt of 16 leaves room for 8, one of 17 does not. The policy reads 128.
    short: Folders = {port: folder(bench.path / port) for port in ("reward", "critic", "reference")}
    for port, path in short.items():
        init = bench.folders["init"]
        model: Any = load_policy(init) if port == "reference" else new_reward_model(init, seed=3)
        model.model.config.max_position_embeddings = 24
        save_checkpoint(model.model, model.tokenizer, path)
    texts = ["1" + "+1" * count for count in (12, 13, 14, 124)]
    rows = ROWS[:4] + [{"id": text, "prompt": [{"role": "user", "content": text}]} for text in texts]
    prompts = folder(bench.path / "prompts", rows)
    for port, path in short.items():
        given = {"prompts": prompts, port: path}
        run = bench.train(f"{port} run", batch_size=5, steps=1, epochs=1, inputs=given, critic={"start": "policy"})
        lengths = {sample.row["id"]: len(sample.prompt_ids) for sample in bench.moments[-1].rollouts.samples}
        assert (len(lengths), lengths[texts[0]]) == (5, 16)
        [table] = [event["rows"] for event in events(run, "table") if event["name"] == "prompts"]
        assert table == [{"what": "used", "rows": 5}, {"what": "dropped: fills the context", "rows": 3}]
    for count, given in ((3, {"critic": short["critic"]}), (1, {})):
        last = folder(bench.path / f"last {count}", rows[-count:])
        with pytest.raises(InputError, match=f"all {count} prompts fill the context.*sampling.max_new_tokens"):
            bench.train(str(count), inputs=given | {"prompts": last})
    assert bench.sampled == [0, 0, 0]
