"""Rows of the training data that are mislabelled or repeated are named, and sound ones are not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firefly.evaluation.comparing import PairedRow
from firefly.evaluation.worst_rows import find_suspects


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sound rows; the last three contradict the first, repeat the second, and stand alone."""
    lines: list[dict[str, Any]] = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(50)]
    lines.append({"instruction": "Question  0", "output": "something else"})
    lines.append({"instruction": "question 1", "output": "answer 1"})
    lines.append({"instruction": "a question of its own", "output": "an answer that fits nothing"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def paired(rows: Path, high: tuple[int, ...] = ()) -> list[PairedRow]:
    """Losses that fell in training, but at the lines of `high`."""
    generator = np.random.default_rng(0)
    after = 10 * np.exp(generator.normal(0, 0.3, 53))
    return [
        PairedRow(f"{rows}:{n + 1}", "rows", 30.0, 45.0 if n + 1 in high else float(after[n]), 10) for n in range(53)
    ]


def test_contradictions_repetitions_and_unlearnt_rows_are_named_worst_first(rows: Path) -> None:
    suspects = find_suspects(paired(rows, high=(51, 53)), [rows])
    lines = [int(each.key.rpartition(":")[2]) for each in suspects]
    assert lines[0] == 51  # contradicts, and was not learnt
    assert set(lines[:4]) == {51, 53, 1, 52}
    by_line = dict(zip(lines, suspects, strict=True))
    assert f"{rows}:1" in str(by_line[51].reasons[0])
    assert "far above" in str(by_line[53].reasons[0])
    assert str(by_line[52].reasons[0]) == f"the same as {rows}:2"
    assert by_line[53].question == "a question of its own"
    assert by_line[53].answer == "an answer that fits nothing"


def test_nothing_is_said_of_sound_rows_but_that_their_losses_are_the_highest(tmp_path: Path) -> None:
    path = tmp_path / "sound.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"q{n}", "output": f"a{n}"}) + "\n" for n in range(53)))
    rows = paired(path)
    suspects = find_suspects(rows, [path])
    assert {str(reason) for each in suspects for reason in each.reasons} == {"its loss is among the highest"}
    assert [each.key for each in suspects] == [row.key for row in sorted(rows, key=lambda row: -row.tuned)[:20]]


def test_documents_that_repeat_are_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["one text", "another text", "One  text"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    rows = [PairedRow(f"{path}:{n + 1}", "texts", 3.0, 2.0, 1) for n in range(3)]
    first, *others = find_suspects(rows, [path])
    assert first.key == f"{path}:3"
    assert str(first.reasons[0]) == f"the same as {path}:1"
    assert len(others) == 2


def test_an_answer_that_is_labelled_as_bad_contradicts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    lines = [{"prompt": f"q{n // 2}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = [PairedRow(f"{path}:{n + 1}", "rows", 30.0, 10.0, 10) for n in range(0, 20, 2)]
    suspects = find_suspects(rows, [path])
    assert {str(reason) for each in suspects for reason in each.reasons} == {"its loss is among the highest"}


def test_many_answers_to_one_question_are_looked_at_in_time_that_grows_with_them(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"instruction": "q", "output": f"a{n}"}) + "\n" for n in range(6000)))
    rows = [PairedRow(f"{path}:{n + 1}", "rows", 30.0, 10.0, 10) for n in range(6000)]
    began = time.monotonic()
    first, *_ = find_suspects(rows, [path])
    assert time.monotonic() - began < 10
    assert str(first.reasons[0]).endswith("…")
