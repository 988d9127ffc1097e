"""What is wrong with rows only when seen together: duplicates, overlap with held-out rows, one answer to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from firefly.data.examples import ExampleFile
from firefly.data.ledger import DUPLICATE, IN_EVAL, MOST_FINDINGS, REPEATED_ANSWER
from firefly.data.schema import Source
from firefly.translation import Phrase

REPEATED_SHARE, REPEATED_LEAST = 0.01, 10
"""An answer is a finding when it stands in that share of the rows, and in that many."""


def note_findings(files: Sequence[ExampleFile], held_out: Sequence[ExampleFile] = ()) -> None:
    """Write duplicates, repeated answers and rows that are also held out on the files' ledgers."""
    note_duplicates(files)
    note_duplicates(held_out)
    note_repeated_answers(files)
    note_overlap(files, held_out)


def note_duplicates(files: Sequence[ExampleFile]) -> None:
    """Every row that has the same content as an earlier one."""
    content, place = _column(files, "content"), _Places(files)
    order = np.argsort(content, kind="stable")
    ordered = content[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(first)
    original = order[starts[np.cumsum(first) - 1]] if len(order) else order
    repeated = ~first
    rows, earlier = _by_row(order[repeated], original[repeated])
    place.note_all(rows, DUPLICATE, lambda i: Phrase("the same as {place}", place=str(place.source(int(earlier[i])))))


def note_repeated_answers(files: Sequence[ExampleFile]) -> None:
    """Each answer that very many rows share, at the first of them."""
    answers, place = _column(files, "answer"), _Places(files)
    values, first, counts = np.unique(answers, return_index=True, return_counts=True)
    often = (counts >= max(REPEATED_LEAST, REPEATED_SHARE * len(answers))) & (values != 0)
    rows, counts = _by_row(first[often], counts[often])
    place.note_all(rows, REPEATED_ANSWER, lambda i: Phrase("this answer occurs in {count} rows", count=int(counts[i])))


def note_overlap(files: Sequence[ExampleFile], held_out: Sequence[ExampleFile]) -> None:
    """Every training row that is held out, too."""
    if not held_out:
        return
    content, place = _column(files, "content"), _Places(files)
    theirs, other = _column(held_out, "content"), _Places(held_out)
    values, first = np.unique(theirs, return_index=True)
    at = np.searchsorted(values, content)
    if len(values):
        rows = np.flatnonzero(values[np.minimum(at, len(values) - 1)] == content)
        place.note_all(
            rows,
            IN_EVAL,
            lambda i: Phrase(
                "the same as {place} of the evaluation data", place=str(other.source(int(first[at[rows[i]]])))
            ),
        )


def _by_row(rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the order of rows."""
    order = np.argsort(rows)
    return rows[order], values[order]


def _column(files: Sequence[ExampleFile], name: str) -> np.ndarray:
    return np.concatenate([file.rows[name] for file in files]) if files else np.zeros(0, dtype=np.uint64)


class _Places:
    """From a row's number over all files to its place."""

    def __init__(self, files: Sequence[ExampleFile]) -> None:
        self._files = files
        self._starts = np.cumsum([0, *(len(file.rows) for file in files)])

    def source(self, row: int) -> Source:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        file = self._files[number]
        return Source(file.ledger.file, int(file.rows["line"][row - self._starts[number]]))

    def note_all(self, rows: np.ndarray, cause: str, describe: Callable[[int], Phrase]) -> None:
        """Note rows (in order); `describe(i)` is the message of the i-th, asked for where a ledger will keep it."""
        ends = np.searchsorted(rows, self._starts)
        for file, first, end in zip(self._files, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            for i in range(first, min(end, first + MOST_FINDINGS)):
                file.ledger.note(self.source(int(rows[i])), cause, describe(i))
            if end - first > MOST_FINDINGS:
                file.ledger.counts[cause] += end - first - MOST_FINDINGS
