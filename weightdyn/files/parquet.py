"""Parquet files that are sound or refused: their pages carry checksums, and so does the file as a whole.

A page's checksum says nothing of the footer, and a parser that meets a damaged footer may end the process. So a
checksum of everything stands before the footer, where no reader of Parquet looks, and is compared before anything
is parsed. Whatever else there is under that name (a file that was cut, one of somebody else, a pipe) is
refused in words, without waiting for it.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Container, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from weightdyn.files.durable import write_file

_MARK = b"wdyn"  # then four bytes of CRC-32
_FREE_ROWS = 1_000_000  # a file may claim so many rows, ...
_ROWS_PER_BYTE = 100  # ... and so many more for each byte: measured numbers take 20 bytes a row and more


def write_parquet(path: Path, table: pa.Table) -> None:
    """Put an Arrow table under `path`, with its metadata and checksums; any reader of Parquet reads it."""
    sink = io.BytesIO()
    pq.write_table(table, sink, write_page_checksum=True)
    data = sink.getvalue()
    footer = _footer(data)
    seal = _MARK + _checksum(data[:footer], data[footer:])
    write_file(path, lambda temporary: temporary.write_bytes(data[:footer] + seal + data[footer:]))


def read_parquet(
    path: Path,
    columns: Sequence[str] | None = None,
    *,
    schema: pa.Schema | None = None,
    optional: Container[str] = (),
) -> pa.Table:
    """Read what `write_parquet` wrote.

    Args:
        path: the file.
        columns: which to read; default: all.
        optional: those of the columns that may be missing.
        schema: types that columns of these names must have; none of them may have missing values.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is damaged, or not what was expected; the message begins with the file and says why.
            What to do about it is the caller's to add.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    data = path.read_bytes()
    try:
        _check_sound(data)
        # One thread: files are small, and handing them to a pool costs more than it saves.
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if file.metadata.num_rows > _FREE_ROWS + _ROWS_PER_BYTE * len(data):
            raise ValueError(f"{file.metadata.num_rows:,} rows in {len(data):,} bytes")
        names = list(file.schema_arrow.names)
        lacking = [name for name in columns or () if name not in names and name not in optional]
        wanted = None if columns is None else [name for name in columns if name in names]
        table = file.read(columns=wanted, use_threads=False)
        table.validate(full=True)
    except Exception as error:  # whatever a parser meets
        raise ValueError(f"{path} is cut short or damaged ({error})") from None
    if lacking:
        raise ValueError(f"{path} lacks the columns {lacking}")
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError(f"{path} has a column twice: {table.column_names}")
    for field in schema or ():
        if field.name in table.column_names:
            _check_column(path, field, table.column(field.name))
    return table


def _footer(data: bytes) -> int:
    """Where the footer begins: the last eight bytes of a Parquet file are its length and "PAR1"."""
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def _checksum(*parts: bytes) -> bytes:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(4, "little")


def _check_sound(data: bytes) -> None:
    footer = _footer(data)
    if data[:4] != b"PAR1" or data[-4:] != b"PAR1" or footer < 12:
        raise ValueError("not a whole Parquet file")
    if data[footer - 8 : footer - 4] != _MARK:
        raise ValueError("it has no checksum, so it was not written by weightdyn as it is")
    if data[footer - 4 : footer] != _checksum(data[: footer - 8], data[footer:]):
        raise ValueError("its checksum does not fit")


def _check_column(path: Path, field: pa.Field, column: pa.ChunkedArray) -> None:
    if column.type != field.type:
        raise ValueError(
            f"{path} has {column.type} in the column {field.name!r}, which must hold {field.type}"
        )
    parts = [chunk.dictionary for chunk in column.chunks] if pa.types.is_dictionary(column.type) else []
    if column.null_count or any(part.null_count for part in parts):
        raise ValueError(f"{path} has missing values in the column {field.name!r}")
