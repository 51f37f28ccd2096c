"""Sampling: rows that do not fit, and rows of many kinds."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import sampling
from conftest import request_for
from sampling import (
    COLUMNS,
    Make,
    Rows,
    config,
    digest,
    long_row,
    metrics,
    only,
    samples,
)

from stages.data.parquet import read_rows, read_schema, write_rows
from stages.errors import InputError
from stages.request import run_stage

threads = sampling.threads
rows = sampling.rows
prompts = sampling.prompts
drawn = sampling.drawn


def test_prompts_that_fill_the_context_are_dropped_and_counted(
    init_folder: Path, rows: Rows, dataset: Make, tmp_path: Path
) -> None:
    # First, last, a whole batch of its own, and one beside a prompt that fits; a prompt of 126 leaves room for two tokens.
    given = [long_row(128), rows[0], rows[1], long_row(126), long_row(129), long_row(300), *rows[2:5], long_row(140)]
    run = run_stage(request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=dataset(given, "prompts")))
    records = samples(run)
    kept = [row["id"] for row in (*rows[:2], long_row(126), *rows[2:5])]
    assert [r["id"] for r in records] == [one for one in kept for _ in range(3)]
    assert metrics(run)["prompts_dropped"] == 4
    assert metrics(run)["samples"] == 18
    assert all(1 <= r["length"] <= 2 for r in records if r["id"] == "long 126")


@pytest.mark.parametrize("count", [1, 5])
def test_no_prompt_that_fits_is_an_error(init_folder: Path, dataset: Make, tmp_path: Path, count: int) -> None:
    given = dataset([long_row(128 + number) for number in range(count)], "prompts")
    request = request_for("sample", tmp_path / "run", config(), policy=init_folder, prompts=given)
    with pytest.raises(InputError, match="every prompt fills the model's context"):
        run_stage(request)
    assert not (tmp_path / "run" / "outputs.json").exists()


TYPES: dict[str, pa.DataType] = {
    "level": pa.int32(),
    "share": pa.float32(),
    "tags": pa.list_(pa.string()),
    "source": pa.struct([("name", pa.string()), ("page", pa.int64())]),
    "seen": pa.timestamp("us", tz="UTC"),
    "links": pa.map_(pa.string(), pa.int64()),  # rows give it as a list of tuples, whose type nobody can guess
    "never": pa.int64(),
}


def test_columns_keep_their_types_when_the_first_rows_are_null(init_folder: Path, rows: Rows, tmp_path: Path) -> None:
    given = [row | dict.fromkeys(TYPES) for row in rows]
    # Three states' worth of rows without any of them: a part of their own each.
    given[7] |= {"level": 3, "share": 0.5, "tags": ["a", None], "source": {"name": "x", "page": 4}, "links": [("a", 1)]}
    (tmp_path / "prompts").mkdir()
    write_rows(tmp_path / "prompts", given, types=TYPES)
    found = []
    for save_every in (1, 100):
        chosen = config(runtime={"save_every": save_every})
        request = request_for("sample", tmp_path / f"{save_every}", chosen, policy=init_folder, prompts=tmp_path / "prompts")
        found.append(run_stage(request))
    assert digest(found[0]) == digest(found[1])
    schema = read_schema(found[0].folder / "outputs" / "samples")
    assert {name: schema.field(name).type for name in TYPES} == TYPES
    assert schema.field("prompt").type == read_schema(tmp_path / "prompts").field("prompt").type
    assert schema.field("sample").type == schema.field("length").type == pa.int64()
    assert [only(r, *COLUMNS, *TYPES) for r in samples(found[0])[::3]] == given


def test_columns_of_other_samples_are_replaced_or_left_out(
    init_folder: Path, rows: Rows, prompts: Path, dataset: Make, tmp_path: Path
) -> None:
    """Samples can be drawn for rows that are samples themselves, whatever these columns hold."""
    other = {"step": "a", "sample": [1], "completion": 2.5, "length": "b", "finish": 7, "policy": {"of": "x"}}
    other |= {"reward": 0.5, "rewards.answer": 1.0, "kl": 0.1, "advantage": "c"}
    given = dataset([other | row for row in rows], "given")
    runs = [
        run_stage(request_for("sample", tmp_path / name, config(), policy=init_folder, prompts=folder))
        for name, folder in (("one", prompts), ("other", given))
    ]
    assert digest(runs[0]) == digest(runs[1])


def test_rows_with_one_id_keep_their_places(init_folder: Path, dataset: Make, tmp_path: Path) -> None:
    prompts = [{"id": "a", "prompt": "1+2"}, {"id": "b", "prompt": "3"}, {"id": "a", "prompt": "4+5"}]
    folder = dataset(prompts, "prompts")
    request = request_for("sample", tmp_path / "run", config(samples=1), policy=init_folder, prompts=folder)
    run = run_stage(request)
    assert [row["prompt"] for row in read_rows(run.folder / "outputs" / "samples")] == ["1+2", "3", "4+5"]
