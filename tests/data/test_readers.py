"""Files to records: each knows its line, and nothing that is broken is passed over."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import firefly
from firefly.data import readers
from firefly.data.readers import READERS, json_files
from firefly.errors import UsageError


def read_records(*arguments, **options):
    """The records without the blank lines, which have a test of their own."""
    return (record for record in readers.read_records(*arguments, **options) if not record.blank)


def read_text(*arguments, **options):
    return (record for record in readers.read_text(*arguments, **options) if not record.blank)


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_blank_lines_are_marked_and_are_no_records(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n', encoding="utf-8")
    found = [(record.source.line, record.blank) for record in readers.read_records(path)]
    assert found == [(1, False), (2, True), (3, True), (4, False)]


ROWS = [{"text": "first"}, {"text": "二"}, {"text": "third\nline"}]


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: str | bytes, name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def read(path: Path) -> list[tuple[int, object]]:
    """(line, value or problem) of each record."""
    return [
        (record.source.line, str(record.problem) if record.problem else record.value) for record in read_records(path)
    ]


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        list(read_records(path))
    return str(caught.value)


LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def gzipped(text: str) -> bytes:
    """Without the time of day: the bytes name the tests, and parallel workers must collect the same names."""
    return gzip.compress(text.encode(), mtime=0)


@pytest.mark.parametrize(
    ("content", "name", "lines"),
    [
        (LINES, "d.jsonl", [1, 2, 3]),
        (LINES + "\n", "d.jsonl", [1, 2, 3]),
        (LINES.replace("\n", "\r\n"), "d.jsonl", [1, 2, 3]),
        ("\n\n" + LINES.replace("\n", "\n \n") + "\n\n", "d.jsonl", [3, 5, 7]),
        ("\ufeff" + LINES, "d.jsonl", [1, 2, 3]),
        (LINES, "D.JSONL", [1, 2, 3]),
        (json.dumps(ROWS, ensure_ascii=False), "d.json", [1, 1, 1]),
        (json.dumps(ROWS, indent=2), "d.json", [2, 5, 8]),
        ("\ufeff\n" + json.dumps(ROWS, indent=2), "d.json", [3, 6, 9]),
        (LINES, "d.json", [1, 2, 3]),
        ("\n" + LINES, "d.json", [2, 3, 4]),
        (LINES, "d.ndjson", [1, 2, 3]),
        (gzipped(LINES), "d.jsonl.gz", [1, 2, 3]),
        (gzipped(LINES[:40]) + gzipped(LINES[40:]), "d.jsonl.gz", [1, 2, 3]),
        (gzipped("\ufeff" + json.dumps(ROWS, indent=2)), "d.json.gz", [2, 5, 8]),
        (gzipped(LINES), "d.json.gz", [1, 2, 3]),
        ('text\nfirst\n二\n"third\nline"\n', "d.csv", [2, 3, 4]),
        ('text\nfirst\n二\n"third\nline"\n', "d.tsv", [2, 3, 4]),
    ],
)
def test_records_come_in_file_order_with_their_lines(write, content, name, lines):
    assert read(write(content, name)) == list(zip(lines, ROWS, strict=True))


def test_one_object_is_one_record_and_empty_files_have_none(write):
    assert read(write('\n{"text":\n "a"}', "d.json")) == [(2, {"text": "a"})]
    empty = {
        "d.json": "",
        "d.jsonl": " \n\n",
        "e.json": "[ ]\n",
        "d.csv": "",
        "e.csv": "\n\n",
        "f.csv": "a,b\n",
        "d.txt": "\n",
    }
    assert [read(write(content, name)) for name, content in empty.items()] == [[]] * len(empty)


def test_braces_percent_signs_and_line_separators_stay(write):
    rows = [{"text": text} for text in ("{x} {{y}} %s $HOME {% raw %}", "a\u2028b\u2029c\x85d\x0ce", "\\n \\u0041")]
    assert [
        value for _, value in read(write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "d.jsonl"))
    ] == rows
    assert [value for _, value in read(write(json.dumps(rows, ensure_ascii=False), "d.json"))] == rows


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "open', "not valid JSON: Unterminated string starting at (column 10)"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON: Extra data (column 15)"),
        (b"{'text': 'a'}", "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8 text (byte 10)"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"1" * 5000 + b"}", "integer string conversion"),
        (b"\x00", "not valid JSON"),
        (b'{"text": "a\tb"}', "Invalid control character at (column 12)"),
    ],
)
def test_a_line_that_is_no_record_is_named_and_its_neighbours_are_read(write, line, problem):
    path = write(b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}\n', "d.jsonl")
    before, broken, after = read(path)
    assert (before, after) == ((1, {"text": "before"}), (4, {"text": "after"}))
    assert broken[0] == 3
    assert problem in str(broken[1])


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('[\n {"text": "a"},\n {"text": "b" "c"},\n {"text": "d"}\n]', 3, "delimiter"),
        ('[\n {"text": "a"},\n {"text":\n  oops},\n {"text": "d"}\n]', 4, "Expecting value"),
        ('[\n {"text": "a"},\n {"text": "b"}\n', 4, "not closed"),
        ('[\n {"text": "a"},\n {"text": "b', 3, "Unterminated"),
        ("[\n 1,\n" + "[" * 100_000, 3, "too deeply"),
        ('[\n 1,\n {"text": ' + "1" * 5000 + "}]", 3, "integer string conversion"),
        ('[{"text": "a"}]\n\n[{"text": "b"}]\n', 3, "after the closing ]"),
        ('[{"text": "a"}],\n', 1, "after the closing ]"),
    ],
)
def test_a_list_that_breaks_off_is_refused_at_its_line_for_the_rest_cannot_be_counted(write, content, line, problem):
    path = write(content, "d.json")
    message = refused(path)
    assert message.startswith(f"{path}:{line}: ")
    assert problem in message


def test_a_list_that_is_not_utf8_is_refused_at_its_line(write):
    path = write(b'[\n {"text": "a"},\n {"text": "\xff"}\n]', "d.json")
    assert refused(path).startswith(f"{path}:3: the text is not UTF-8")
    path = write('[\n {"text": "a"},\n {"text": "好"}\n]'.encode("gbk"), "d.json")
    assert "iconv" in refused(path)
    assert refused(write("[1, 2]\n二".encode()[:-1], "d.json")).startswith(f"{path}:2: ")


def test_lines_named_json_that_are_not_utf8_are_problems_of_their_own(write):
    lines = read(write(b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', "d.json"))
    assert lines == [(1, {"text": "a"}), (2, "not UTF-8 text (byte 10)"), (3, {"text": "b"})]
    assert read(write(b'{"text": "\xff"}\n{"text": "b"}\n', "d.json")) == [(1, lines[1][1]), (2, lines[2][1])]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.txt"])
@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + b"x" * 50,
        b"PAR1" + b"x" * 50,
        b"\x1f\x8b" + b"x" * 50,
        '{"text": "a"}'.encode("utf-16"),
        b"\x08\x00\x00\x00{}",
    ],
)
def test_a_binary_file_is_one_mistake_and_not_many_rows(write, content, name):
    assert "is not a text file" in refused(write(content, name))


def test_a_missing_file_a_folder_and_an_unknown_kind_are_refused_at_once(write, tmp_path):
    with pytest.raises(UsageError, match=r"eval_file = .*none\.jsonl does not exist"):
        read_records(tmp_path / "none.jsonl", "eval_file")
    with pytest.raises(UsageError, match="is a folder"):
        read_records(tmp_path)
    with pytest.raises(UsageError, match=r"\*\.xlsx .* \.jsonl, \.json"):
        read_records(write("a,b", "d.xlsx"))
    with pytest.raises(UsageError, match="train_file"):
        read_records(Path("x" * 5000))
    with pytest.raises(UsageError, match="train_file"):
        read_records(Path("/dev/null/d.jsonl"))


@given(
    st.binary(max_size=300) | st.text(alphabet='[]{}":, \n\\ua1é', max_size=60).map(str.encode),
    st.sampled_from([f"d{suffix}" for suffix in READERS]),
    st.booleans(),
)
def test_any_bytes_are_records_problems_or_a_usage_error(tmp_path_factory, content, name, packed):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(gzip.compress(content) if packed and name.endswith(".gz") else content)
    try:
        records = list(read_records(path))
    except UsageError as error:
        records = str(error)
    if isinstance(records, str):
        assert str(path) in records
        return
    places = [record.source.line for record in records]
    assert places == sorted(places)
    line_ends = content.count(b"\n") + content.count(b"\r")
    assert all(1 <= place <= line_ends + 1 for place in places)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_whatever_was_written_as_json_is_read_back(tmp_path_factory, values, indent, ascii_only):
    folder = tmp_path_factory.getbasetemp()
    (folder / "w.json").write_text(json.dumps(values, indent=indent), encoding="utf-8")
    assert [record.value for record in read_records(folder / "w.json")] == values
    lines = "".join(json.dumps(value) + "\n" for value in values)
    (folder / "w.jsonl").write_text(lines, encoding="utf-8")
    assert [(record.source.line, record.value) for record in read_records(folder / "w.jsonl")] == list(
        enumerate(values, 1)
    )


def outcome(path: Path) -> tuple[list[tuple[int, object]], str | None]:
    """The records of a file up to the place where it is refused, and how it is."""
    records = []
    try:
        for record in read_records(path):
            records.append((record.source.line, record.problem or record.value))
    except UsageError as error:
        return records, str(error)
    return records, None


def test_the_column_of_an_error_counts_from_the_start_of_its_line(write):
    content = '[{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}, {"text": "bbbbbbbbbbbbbbbbbbbbbbbb" "c"}]'
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(content)
    assert f"(column {caught.value.colno})" in refused(write(content, "d.json"))


@pytest.mark.parametrize("name", ["d.json", "d.json.gz"])
def test_a_list_that_is_too_large_to_be_read_at_once_is_refused_and_lines_are_not(write, monkeypatch, name):
    def written(text: str) -> Path:
        return write(gzipped(text) if name.endswith(".gz") else text, name)

    whole = json.dumps(ROWS)
    monkeypatch.setattr(json_files, "MOST_BYTES", len(whole))
    assert [value for _, value in read(written(whole))] == ROWS
    assert "jq -c" in refused(written(whole + " "))
    assert [value for _, value in read(written(LINES + "\n" + LINES))] == ROWS * 2
    assert [value for _, value in read(written("{\n" + LINES + "\n" + LINES))][1:] == (ROWS * 2)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.json.gz"])
@pytest.mark.parametrize("harm", [lambda data: data[:-1000], lambda data: data[:3000] + b"\0" * 999 + data[3999:]])
def test_a_damaged_archive_is_refused_where_reading_stops(write, name, harm):
    packed = gzip.compress("\n".join(json.dumps({"text": str(n**50)}) for n in range(5_000)).encode())
    path = write(harm(packed), name)
    records, message = outcome(path)
    assert message is not None
    assert message.startswith(f"{path}:{len(records) or 1}: from about here the file cannot be read")
    assert "Copy or download it again" in message


def test_a_file_that_is_no_archive_and_an_archive_in_an_archive_are_refused(write):
    assert "Not a gzipped file" in refused(write(LINES, "d.jsonl.gz"))
    assert "is not a text file" in refused(write(gzip.compress(gzip.compress(LINES.encode())), "d.jsonl.gz"))


@pytest.mark.parametrize("suffix", [suffix for suffix in READERS if not suffix.endswith(".gz")])
def test_a_git_lfs_pointer_is_called_so(write, suffix):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    assert "git lfs pull" in refused(write(pointer, f"d{suffix}"))


# tables of text


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a,b\n1,2\n3,4\n", [(2, {"a": "1", "b": "2"}), (3, {"a": "3", "b": "4"})]),
        ("\ufeffa,b\r\n1,2\r\n3,4", [(2, {"a": "1", "b": "2"}), (3, {"a": "3", "b": "4"})]),
        ('\ufeff"a" , b\n1,2\n', None),
        ('"a", b \n1,2\n', [(2, {"a": "1", "b": "2"})]),
        ("a,b\r1,2\r3,4\r", [(2, {"a": "1", "b": "2"}), (3, {"a": "3", "b": "4"})]),
        ('\na\n\n"x\ny\r\n""z"""\n\nlast\n', [(4, {"a": 'x\ny\r\n"z"'}), (8, {"a": "last"})]),
        ("a,b\n,2\n1,\n , \n", [(2, {"b": "2"}), (3, {"a": "1"}), (4, {"a": " ", "b": " "})]),
        (",a\n0,x\n1,y\n", [(2, {"a": "x"}), (3, {"a": "y"})]),
        ("a,,\n0,x,\n", [(2, {"a": "0"})]),
    ],
)
def test_a_csv_row_is_an_object_of_its_filled_cells(write, content, rows):
    path = write(content, "d.csv")
    if rows is None:
        assert "delimiter" in refused(path) or "expected after" in refused(path)
    else:
        assert read(path) == rows


def test_a_tsv_keeps_commas_and_quoted_tabs(write):
    assert read(write('a\tb\n1,5\t"x\ty"\n', "d.tsv")) == [(2, {"a": "1,5", "b": "x\ty"})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"1", "1 cells under a header of 2"),
        (b"1,2,3", "3 cells under a header of 2"),
        (b"1,2,", "3 cells under a header of 2"),
        (b'"x" y,2', "cannot be read: ',' expected after"),
        (b"1,\xff\xfe", "b is not UTF-8 text"),
        ("好,2".encode("gbk"), "a is not UTF-8 text"),
        (b"1,\0", "b has a NUL byte"),
    ],
)
def test_a_csv_row_that_is_broken_is_named_and_its_neighbours_are_read(write, line, problem):
    before, broken, after = read(write(b'a,b\n"x\ny",2\n' + line + b"\n3,4\n", "d.csv"))
    assert (before, after) == ((2, {"a": "x\ny", "b": "2"}), (5, {"a": "3", "b": "4"}))
    assert broken[0] == 4
    assert problem in str(broken[1])


def test_a_quote_that_is_not_closed_may_hide_rows_and_is_refused_at_its_row(write):
    path = write('a,b\n1,2\n"3,4\n5,6\n"7",8\n', "d.csv")
    assert refused(path).startswith(f"{path}:3: the row that begins here")
    path = write('a,b\n1,2\n"3,4\n5,6\n', "d.csv")
    assert refused(path).startswith(f"{path}:3: the row that begins here")
    assert "unexpected end" in str(read(write('a,b\n1,2\n"3,4', "d.csv"))[1])


def test_a_header_must_be_readable_and_name_each_column_once(write):
    assert "duplicate column 'text'" in refused(write("text,a,text\n1,2,3\n", "d.csv"))
    path = write("内容,b\n1,2\n".encode("gb18030"), "d.csv")
    assert refused(path).startswith(f"{path}:1: the text is not UTF-8")


def test_a_csv_cell_may_hold_a_book_but_not_the_rest_of_a_large_file(write, monkeypatch):
    book = "word " * 400_000
    assert read(write(f"a\n{book}x\n", "d.csv")) == [(2, {"a": book + "x"})]
    monkeypatch.setattr("firefly.data.readers.tables.FIELD_LIMIT", 1000)
    path = write('a\nx\n"' + "word\n" * 1000, "d.csv")
    assert refused(path).startswith(f"{path}:3: ")


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@given(st.lists(st.lists(cells, min_size=2, max_size=2), max_size=5), st.sampled_from([",", "\t"]))
def test_whatever_was_written_as_csv_is_read_back(tmp_path_factory, rows, delimiter):
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter)
    writer.writerows([["a", "b"], *rows])
    path = tmp_path_factory.getbasetemp() / ("w.csv" if delimiter == "," else "w.tsv")
    path.write_text(written.getvalue(), encoding="utf-8", newline="")
    filled = [{name: cell for name, cell in zip("ab", row, strict=True) if cell} for row in rows]
    assert [record.value for record in read_records(path)] == filled


# Parquet

CHATS = [
    {
        "messages": [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "答"}],
        "score": 0.5,
    },
    {"messages": [{"role": "user", "content": "q2"}], "score": None, "system": ""},
    {"messages": None, "score": 1.0, "system": "s"},
]


def test_parquet_rows_are_objects_without_their_nulls(tmp_path):
    pq.write_table(
        pa.Table.from_pylist(
            CHATS,
            pa.schema(
                {
                    "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()})),
                    "score": pa.float64(),
                    "system": pa.string(),
                }
            ),
        ),
        tmp_path / "d.parquet",
    )
    first = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "答"}]
    second = [{"role": "user", "content": "q2"}]
    assert read(tmp_path / "d.parquet") == [
        (1, {"messages": first, "score": 0.5}),
        (2, {"messages": second, "system": ""}),
        (3, {"score": 1.0, "system": "s"}),
    ]


def test_a_null_in_a_struct_is_no_key_at_any_depth_and_one_in_a_map_or_a_list_is_a_null(tmp_path):
    deep = pa.struct({"a": pa.string(), "b": pa.struct({"c": pa.int64(), "d": pa.string()})})
    schema = pa.schema(
        {
            "nested": pa.list_(pa.struct({"inner": pa.large_list(deep), "x": pa.string()})),
            "fixed": pa.list_(deep, 2),
            "map": pa.map_(pa.string(), deep),
            "numbers": pa.map_(pa.int32(), pa.string()),
            "texts": pa.list_(pa.string()),
        }
    )
    rows = [
        {
            "nested": [{"inner": [{"a": "1", "b": {"c": None, "d": "2"}}, None], "x": None}, {"inner": None, "x": "y"}],
            "fixed": [{"a": None, "b": None}, {"a": "3", "b": {"c": 4, "d": None}}],
            "map": [("k", {"a": None, "b": {"c": 5, "d": None}}), ("null", None)],
            "numbers": [(1, "one"), (2, None)],
            "texts": ["t", None],
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == [
        (
            1,
            {
                "nested": [{"inner": [{"a": "1", "b": {"d": "2"}}, None]}, {"x": "y"}],
                "fixed": [{}, {"a": "3", "b": {"c": 4}}],
                "map": {"k": {"b": {"c": 5}}, "null": None},
                "numbers": {"1": "one", "2": None},
                "texts": ["t", None],
            },
        )
    ]


def test_a_map_that_holds_a_key_twice_is_a_row_that_cannot_be_read(tmp_path):
    maps = pa.array([[("k", "1")], [("k", "1"), ("k", "2")], [("j", "3")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"map": maps}), tmp_path / "d.parquet")
    first, second, third = read_records(tmp_path / "d.parquet")
    assert (first.value, third.value) == ({"map": {"k": "1"}}, {"map": {"j": "3"}})
    assert "'k' stands in the map twice" in str(second.problem)


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "row_group_size": 100}, {"use_dictionary": False}])
def test_parquet_rows_are_counted_over_batches_and_row_groups(tmp_path, options):
    rows = [{"text": f"{n}"} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "D.PARQUET", **options)
    assert read(tmp_path / "D.PARQUET") == list(enumerate(rows, start=1))
    pq.write_table(pa.Table.from_pylist([], pa.schema({"text": pa.string()})), tmp_path / "empty.parquet")
    assert read(tmp_path / "empty.parquet") == []


def test_a_parquet_row_that_python_cannot_hold_is_named_and_its_neighbours_are_read(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c", b"d"], pa.binary()).cast(pa.string(), safe=False)
    dates = pa.array([0, 0, 2**40, 0], pa.timestamp("s"))
    pq.write_table(pa.table({"date": dates, "text": texts}), tmp_path / "d.parquet")
    first, second, third, fourth = read(tmp_path / "d.parquet")
    assert (first, fourth) == ((1, {"date": EPOCH, "text": "a"}), (4, {"date": EPOCH, "text": "d"}))
    assert second == (2, "text is not UTF-8 text")
    assert str(third[1]).startswith("the row cannot be read: date: ")


EPOCH = datetime.datetime(1970, 1, 1)


def test_a_damaged_parquet_file_is_refused_where_reading_stops(tmp_path):
    path = tmp_path / "d.parquet"
    rows = [{"text": f"{n**99}"} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, write_page_checksum=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(path).startswith(f"{path}:1: from about here")
    path.write_bytes(LINES.encode())
    assert "Parquet" in refused(path)
    path.write_bytes(b"")
    assert "Parquet" in refused(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    records, message = outcome(path)
    assert records == list(enumerate(rows, start=1))[: len(records)]
    assert 100 <= len(records) < 1000
    assert str(message).startswith(f"{path}:{len(records)}: from about here")


def test_a_parquet_file_names_each_column_once(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "d.parquet")
    assert "duplicate column 'text'" in refused(tmp_path / "d.parquet")


# text


def test_a_line_of_a_text_file_is_a_document(write):
    content = "\ufeff first \r\n\n  \t\nsecond\u2028half\x0c\n二"
    documents = [(1, {"text": " first "}), (4, {"text": "second\u2028half\x0c"}), (5, {"text": "二"})]
    assert read(write(content, "d.txt")) == documents


def test_or_the_whole_text_file_is_one(write):
    path = write("\ufeffTitle\r\n\n First paragraph.\n\n", "d.txt")
    assert [record.value for record in read_records(path, documents="file")] == [
        {"text": "Title\r\n\n First paragraph."}
    ]
    assert list(read_text(write(" \n", "d.txt"), documents="file")) == []


@pytest.mark.parametrize(
    ("line", "problem"), [(b"a\xff", "not UTF-8 text (byte 1)"), (b"a\0b", "text has a NUL byte, which is no text")]
)
def test_a_line_of_text_that_is_none_is_named(write, line, problem):
    path = write(b"before\n\n" + line + b"\nafter\n", "d.txt")
    assert read(path) == [(1, {"text": "before"}), (3, problem), (4, {"text": "after"})]
    ((source, found),) = [(record.source, str(record.problem)) for record in read_text(path, "file")]
    assert (source.line, found) == (3, problem)


# large files

MEASURE = """
import sys
from pathlib import Path
from firefly.data.readers import read_records
import pyarrow.parquet

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
rows = sum(record.problem is None for record in read_records(Path(sys.argv[1])))
assert "torch" not in sys.modules
print(rows, (peak() - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["d.jsonl", "lines.json", "d.jsonl.gz", "d.csv", "d.txt", "d.parquet"])
def test_a_file_of_60_megabytes_is_read_in_a_few(tmp_path, name):
    document = "Große Städte, 大城市, cities 😀: " * 50
    count = 60_000_000 // len(document.encode())
    path = tmp_path / name
    if name == "d.parquet":
        table = pa.table({"text": [f"{number} {document}" for number in range(count)]})
        pq.write_table(table, path, use_dictionary=False, compression="none", row_group_size=count)
    else:
        row = json.dumps({"text": document}, ensure_ascii=False)
        start, row, between, end = {
            "d.csv": ("text\n", f'"{document}"', "\n", ""),
            "d.txt": ("", document, "\n", ""),
        }.get(name, ("", row, "\n", ""))
        with gzip.open(path, "wb", 1) if name.endswith(".gz") else path.open("wb") as file:
            file.write(start.encode() + f"{row}{between}".encode() * (count - 1) + f"{row}{end}".encode())
    assert name.endswith(".gz") or path.stat().st_size > 59_000_000
    run = [sys.executable, "-c", MEASURE, str(path)]
    source = str(Path(firefly.__file__).parents[1])
    done = subprocess.run(run, capture_output=True, text=True, check=True, env={"PYTHONPATH": source})
    rows, megabytes = map(int, done.stdout.split())
    assert rows == count
    assert megabytes < 45


COUNTS = {
    "alpaca_en_demo.json": 999,
    "alpaca_zh_demo.json": 1000,
    "c4_demo.jsonl": 300,
    "dpo_en_demo.json": 300,
    "dpo_zh_demo.json": 300,
    "firefly_dpo.jsonl": 16,
    "firefly_pretrain.jsonl": 45,
    "firefly_sft.jsonl": 33,
    "glaive_toolcall_en_demo.json": 300,
    "identity.json": 91,
    "kto_en_demo.json": 300,
    "wiki_demo.txt": 30,
}


@pytest.mark.parametrize("name", COUNTS)
def test_public_files_have_the_records_that_they_are_known_to_have(shared, name):
    records = list(read_records(shared / "data" / name))
    assert len(records) == COUNTS[name]
    assert [record.problem for record in records] == [None] * len(records)
    if name.endswith(".json"):
        assert [record.value for record in records] == json.loads((shared / "data" / name).read_text(encoding="utf-8"))
