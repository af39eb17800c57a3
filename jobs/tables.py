"""Rows as tables for Parquet files: their types, and what to do where rows differ in them."""

import itertools
import json
from collections.abc import Callable, Iterator

import pyarrow as pa

BATCH = 5_000  # rows


def batches(rows: Iterator[dict]) -> Iterator[list[dict]]:
    return iter(lambda: list(itertools.islice(rows, BATCH)), [])


def schema_of(rows: Callable[[], Iterator[dict]], text: tuple[str, ...] = (), nulls: bool = False) -> pa.Schema:
    """Types that hold every row: a column of several types becomes text, and one without values unless `nulls`. The
    columns `text` come first."""
    schemas = [pa.schema([(name, pa.string()) for name in text])]
    for batch in batches(rows()):
        names = dict.fromkeys(itertools.chain.from_iterable(batch))
        schemas.append(pa.schema([(name, _type_of([row.get(name) for row in batch])) for name in names]))
    return common_schema(schemas, nulls)


def common_schema(schemas: list[pa.Schema], nulls: bool = False) -> pa.Schema:
    """One schema for tables of all of these; a column without any value is text, unless `nulls`."""
    same_name: dict[str, list[pa.Schema]] = {}
    for field in itertools.chain.from_iterable(schemas):
        same_name.setdefault(field.name, []).append(pa.schema([field]))
    types = {name: _common_type(fields) for name, fields in same_name.items()}
    unknown = pa.null() if nulls else pa.string()
    return pa.schema([(name, unknown if pa.types.is_null(common) else common) for name, common in types.items()])


def _common_type(fields: list[pa.Schema]) -> pa.DataType:
    try:
        return pa.unify_schemas(fields, promote_options="permissive").types[0]
    except pa.ArrowException:  # no type holds them all
        return pa.string()


def _type_of(values: list) -> pa.DataType:
    try:
        return pa.array(values).type
    except pa.ArrowException:  # values of several types
        return pa.string()


def table_of(rows: list[dict], schema: pa.Schema) -> pa.Table:
    """Rows as a table; other values in a text column are written as JSON."""
    columns = {field.name: [row.get(field.name) for row in rows] for field in schema}
    for field in schema:
        if pa.types.is_string(field.type):
            columns[field.name] = [v if isinstance(v, str | None) else json_of(v) for v in columns[field.name]]
    return pa.table(columns, schema=schema)


def json_of(value) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
