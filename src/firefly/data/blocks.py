"""Pretraining examples: blocks of equal length cut out of the stream document, EOS, document, EOS, …

The documents lie in their cache once, whatever the block length; a block is looked up, not stored.
"""

from __future__ import annotations

import numpy as np

from firefly.data.examples import ExampleCounts, Examples, digest
from firefly.data.schema import Source, Tokens


class Blocks:
    """Blocks of `size` tokens over the documents of each source in turn; a source's last block may be shorter.

    Attributes:
        documents: the documents, each ending in EOS.
        fingerprint: hash of the blocks in their order, as that of `Examples`.
        isolated: whether a document (or the part of one that a block holds) is a segment of its own; otherwise a block
            is one segment and documents see those before them, as classic pretraining has it.
    """

    def __init__(self, documents: Examples, size: int, isolated: bool) -> None:
        self.documents = documents
        self.size = size
        self.isolated = isolated
        self.files, self.ledgers, self.ledger = documents.files, documents.ledgers, documents.ledger
        self.names, self.hashes = documents.names, documents.hashes
        lengths = documents.index["length"].astype(np.int64)
        self._ends = np.cumsum(lengths)  # of documents in the stream
        self._starts = self._ends - lengths
        borders = np.flatnonzero(np.diff(documents.sources, prepend=-1))  # documents that open a source
        opens = [*self._starts[borders].tolist(), int(self._ends[-1]) if len(lengths) else 0]
        spans = [np.arange(opens[n], opens[n + 1], size) for n in range(len(borders))]
        self._first = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)  # each block's place
        lasts = [np.append(span[1:], opens[n + 1]) for n, span in enumerate(spans)]
        self._last = np.concatenate(lasts) if lasts else np.zeros(0, dtype=np.int64)
        stream = digest(documents.index["digest"], self._first, self._last)
        self.fingerprint = f"{stream}-{'isolated' if isolated else 'joined'}"
        source_of = [np.full(len(span), documents.sources[borders[n]]) for n, span in enumerate(spans)]
        self.sources = np.concatenate(source_of).astype(np.int32) if spans else np.zeros(0, dtype=np.int32)
        self.counts = self._count()

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: int) -> Tokens:
        first, last = int(self._first[index]), int(self._last[index])
        document = self._document_at(first)
        pieces, starts, place = [], [], first
        while place < last:
            begin, end = int(self._starts[document]), min(int(self._ends[document]), last)
            starts.append(place - first)
            pieces.append(self.documents[document].input_ids[place - begin : end - begin])
            place, document = end, document + 1
        ids = np.concatenate(pieces)
        return Tokens(ids, ids, tuple(starts) if self.isolated else (0,))

    def _document_at(self, place: int) -> int:
        return int(np.searchsorted(self._ends, place, side="right"))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each block, int64 (blocks,)."""
        return self._last - self._first

    @property
    def targets(self) -> np.ndarray:
        """Trained tokens of each block, int64 (blocks,): all but the first of each segment."""
        return self.counts.targets

    def _count(self) -> ExampleCounts:
        segments = np.ones(len(self), dtype=np.int64)
        if self.isolated:
            inside = np.searchsorted(self._starts, self._last) - np.searchsorted(
                self._starts, self._first, side="right"
            )
            segments += inside  # documents that begin behind the block's first token
        none = np.zeros(len(self), dtype=np.int64)
        return ExampleCounts(
            self.lengths, self.lengths - segments, self.lengths, none, none, none, segments, self.sources
        )

    def longest_text(self) -> tuple[int, int]:
        """(tokens of the longest segment, the number of its block); (0, 0) without blocks."""
        starts = [self._starts] if self.isolated else []
        borders = np.unique(np.concatenate([self._first, self._last, *starts])) if len(self) else self._first
        pieces = np.diff(borders)
        if not len(pieces):
            return 0, 0
        longest = int(pieces.argmax())
        return int(pieces[longest]), int(np.searchsorted(self._first, borders[longest], side="right")) - 1

    def place(self, index: int) -> Source:
        """File and line of the row that a block begins in."""
        return self.documents.place(self._document_at(int(self._first[index])))
