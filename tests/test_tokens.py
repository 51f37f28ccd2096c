"""Token tables: what was written comes back by index, over several batches, or the file is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.tokens import TokenTable

Sequence = tuple[list[int], int, int]
SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=5), st.integers(0, 9), st.integers(0, 2**40)), max_size=20
)


def assert_holds(table: TokenTable, sequences: list[Sequence]) -> None:
    assert len(table) == len(sequences)
    assert table.lengths.tolist() == [len(ids) for ids, _, _ in sequences]
    assert table.prompt_lengths.tolist() == [prompt for _, prompt, _ in sequences]
    assert table.rows.tolist() == [row for _, _, row in sequences]
    assert [table.ids(index).tolist() for index in range(len(sequences))] == [ids for ids, _, _ in sequences]


@settings(max_examples=40, deadline=None)
@given(SEQUENCES, st.integers(1, 7))
def test_sequences_come_back_over_any_number_of_batches(sequences: list[Sequence], batch: int) -> None:
    with TemporaryDirectory() as folder, patch("stages.data.tokens.ROWS_PER_BATCH", batch):
        path = Path(folder) / "table.arrow"
        TokenTable.write(path, iter(sequences))
        assert_holds(TokenTable(path), sequences)
        assert [one.name for one in Path(folder).iterdir()] == ["table.arrow"]


def test_more_than_two_batches_of_the_real_size(tmp_path: Path) -> None:
    sequences: list[Sequence] = [([n, n + 1][: 1 + n % 2], n % 2, 2 * n) for n in range(9000)]
    TokenTable.write(tmp_path / "table.arrow", iter(sequences))
    table = TokenTable(tmp_path / "table.arrow")
    assert_holds(table, sequences)
    assert table.ids(8999).tolist() == [8999, 9000]
    assert (table.ids(0).dtype, table.lengths.dtype.kind) == (np.dtype(np.int32), "i")


def test_ids_are_not_copied(tmp_path: Path) -> None:
    TokenTable.write(tmp_path / "table.arrow", [([1, 2, 3], 1, 0)])
    table = TokenTable(tmp_path / "table.arrow")
    assert np.shares_memory(table.ids(0), table.ids(0))


def test_an_empty_table(tmp_path: Path) -> None:
    TokenTable.write(tmp_path / "table.arrow", [])
    assert_holds(TokenTable(tmp_path / "table.arrow"), [])


def test_equal_sequences_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        TokenTable.write(tmp_path / name, [([1, 2], 1, 0), ([3], 0, 1)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def failing() -> Iterator[Sequence]:
        yield [9], 0, 0
        raise RuntimeError("killed")

    path = tmp_path / "table.arrow"
    with pytest.raises(RuntimeError, match="killed"):
        TokenTable.write(path, failing())
    assert not path.exists()
    TokenTable.write(path, [([1, 2], 1, 0)])
    with pytest.raises(RuntimeError, match="killed"):
        TokenTable.write(path, failing())
    assert_holds(TokenTable(path), [([1, 2], 1, 0)])


def test_an_id_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OverflowError, ValueError)):
        TokenTable.write(tmp_path / "table.arrow", [([2**31], 0, 0)])
    assert not (tmp_path / "table.arrow").exists()
