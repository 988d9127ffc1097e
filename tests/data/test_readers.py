"""Files to records: each knows its line, and nothing that is broken is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.readers import read_records
from firefly.errors import UsageError

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
    return [(record.source.line, record.problem or record.value) for record in read_records(path)]


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        list(read_records(path))
    return str(caught.value)


LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


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
    ],
)
def test_records_come_in_file_order_with_their_lines(write, content, name, lines):
    assert read(write(content, name)) == list(zip(lines, ROWS, strict=True))


def test_one_object_is_one_record_and_empty_files_have_none(write):
    assert read(write('\n{"text":\n "a"}', "d.json")) == [(2, {"text": "a"})]
    assert read(write("", "d.json")) == read(write(" \n\n", "d.jsonl")) == read(write("[ ]\n", "e.json")) == []


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


def test_a_json_file_that_is_not_utf8_names_the_line(write):
    ((line, problem),) = read(write(b'[\n {"text": "a"},\n {"text": "\xff"}\n]', "d.json"))
    assert (line, "not UTF-8" in str(problem)) == (3, True)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
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
    with pytest.raises(UsageError, match=r"\*\.csv .* \.jsonl, \.json"):
        read_records(write("a,b", "d.csv"))
    with pytest.raises(UsageError, match="train_file"):
        read_records(Path("x" * 5000))
    with pytest.raises(UsageError, match="train_file"):
        read_records(Path("/dev/null/d.jsonl"))


@given(
    st.binary(max_size=300) | st.text(alphabet='[]{}":, \n\\ua1é', max_size=60).map(str.encode),
    st.sampled_from(["d.jsonl", "d.json"]),
)
def test_any_bytes_are_records_problems_or_a_usage_error(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        records = list(read_records(path))
    except UsageError as error:
        records = str(error)
    if isinstance(records, str):
        assert str(path) in records
        return
    places = [record.source.line for record in records]
    assert places == sorted(places)
    assert all(1 <= place <= content.count(b"\n") + 1 for place in places)


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
