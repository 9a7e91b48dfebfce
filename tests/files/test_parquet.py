"""Parquet files of ours are sound or refused, and everybody else can read them."""

import io
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weightdyn.files.parquet import read_parquet, write_parquet


@pytest.fixture
def table():
    columns = {"step": pa.array(np.arange(500)), "x": pa.array(np.random.default_rng(0).normal(size=500))}
    return pa.table(columns).replace_schema_metadata({"made": "here"})


def test_what_was_written_comes_back_with_its_metadata(tmp_path, table):
    write_parquet(tmp_path / "t.parquet", table)
    back = read_parquet(tmp_path / "t.parquet")
    assert back.equals(table)
    assert back.schema.metadata[b"made"] == b"here"
    assert read_parquet(tmp_path / "t.parquet", ["x"]).column_names == ["x"]
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_other_readers_read_it_and_check_its_pages(tmp_path, table):
    path = tmp_path / "t.parquet"
    write_parquet(path, table)
    pd.testing.assert_frame_equal(pd.read_parquet(path), table.to_pandas())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in a page
    with pytest.raises(OSError, match=r"[Cc][Rr][Cc]|checksum"):
        pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()


def test_a_change_of_any_byte_is_seen(tmp_path, table):
    path = tmp_path / "t.parquet"
    write_parquet(path, table.slice(0, 3))
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"t\.parquet is cut short or damaged"):
            read_parquet(path)


def test_what_others_wrote_and_what_is_no_file_is_refused(tmp_path, table):
    path = tmp_path / "t.parquet"
    pq.write_table(table, path)
    with pytest.raises(ValueError, match="has no checksum, so it was not written by weightdyn"):
        read_parquet(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        read_parquet(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"t\.parquet does not exist"):
        read_parquet(path)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        read_parquet(path)
