"""Losses of rows and of plain texts under a model that is not trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from firefly.config import DataConfig, RecordKind
from firefly.console import notice
from firefly.data.blocks import Blocks
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.examples import ExampleCounts, Examples
from firefly.data.ledger import MALFORMED
from firefly.data.schema import IGNORE, Example, Source, TokenPair, Tokens
from firefly.errors import UsageError
from firefly.evaluation.measurement import RowLoss
from firefly.evaluation.probes import ProbeText
from firefly.evaluation.scoring import TargetScores, score_targets

READ_AS: dict[RecordKind, RecordKind] = {"labelled": "conversation"}
"""Of labelled answers the good ones count, as demonstrations."""


class WholeDocuments:
    """Documents as they are, each cut at a length, where training has blocks: two tokenizers cut the same documents
    into blocks that hold other texts."""

    def __init__(self, documents: Examples, longest: int) -> None:
        self.documents, self.longest = documents, longest
        self.names = documents.names

    @property
    def counts(self) -> ExampleCounts:
        return self.documents.counts

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Tokens:
        example = self.documents[index]
        assert isinstance(example, Tokens)
        return Tokens(example.input_ids[: self.longest], example.labels[: self.longest])

    def place(self, index: int) -> Source:
        return self.documents.place(index)


Rows = Examples | Blocks | WholeDocuments


def load_rows(data: DataConfig, encoder: Encoder, kind: RecordKind, hub: str, whole_documents: bool = False) -> Rows:
    """The examples of `data.train_file`, prepared as for training.

    Args:
        whole_documents: see `WholeDocuments`.

    Raises:
        UsageError: the rows cannot be read, one is malformed, or none of them is left.
    """
    examples = load_split(data, encoder, READ_AS.get(kind, kind), hub).train
    for ledger in examples.ledgers:
        if ledger.lost[MALFORMED]:
            raise UsageError(
                "evaluation.malformed",
                "{count} malformed row(s) in {file}.{rows}\nCorrect or remove them.",
                count=ledger.lost[MALFORMED],
                file=ledger.file,
                rows=ledger.list(MALFORMED),
            )
    lost = sum(examples.ledger.lost.values())
    if not len(examples):
        raise UsageError(
            "evaluation.no_rows",
            "{files}: none of {rows} row(s) can be compared.{lost}",
            files=", ".join(ledger.file for ledger in examples.ledgers),
            rows=examples.ledger.rows,
            lost=examples.ledger.list(*examples.ledger.lost),
        )
    if lost:
        notice(
            "evaluation.lost_rows",
            "{lost} of {rows} rows are not compared.{list}",
            lost=lost,
            rows=examples.ledger.rows,
            list=examples.ledger.list(*examples.ledger.lost, most=3),
        )
    if whole_documents and isinstance(examples, Blocks):
        return WholeDocuments(examples.documents, data.max_seq_length)
    return examples


def row_losses(
    model: Any, rows: Rows, tokenizer: Any, tick: Callable[[int], None] = lambda done: None
) -> tuple[RowLoss, ...]:
    """The loss of each example under the model: of its targets or, of a pair, of the better answer's.

    Args:
        model: see `score_targets`.
        tokenizer: that made the examples; it tells how many bytes of text the targets are.
        tick: called with each number of texts that are done, of which a pair has two.
    """
    sides = (side for number in range(len(rows)) for side in _sides(rows[number]))
    scores = score_targets(model, sides, tick=tick)
    found = []
    for number in range(len(rows)):
        example = rows[number]
        scored = [next(scores) for _ in _sides(example)]
        source = int(rows.counts.sources[number])
        found.append(
            RowLoss(
                key=row_key(rows, number),
                source=rows.names[source] if source < len(rows.names) else str(source),
                total=scored[0].total,
                targets=len(scored[0].logps),
                size=_bytes_of(_sides(example)[0], tokenizer),
                prefers=_prefers(scored) if isinstance(example, TokenPair) else None,
            )
        )
    return tuple(found)


def row_key(rows: Rows, number: int) -> str:
    """The place of an example's row. A block has its number besides: a long document makes many of them."""
    place = str(rows.place(number))
    return f"{place}#block{number + 1}" if isinstance(rows, Blocks) else place


def text_losses(
    model: Any, encoder: Encoder, texts: Sequence[ProbeText], longest: int | None = None
) -> tuple[RowLoss, ...]:
    """The loss of plain texts, each behind the special tokens that the tokenizer puts in front of one.

    Args:
        longest: tokens of the model's context; texts that have more are left out.
    """
    tokens = {each: np.asarray(encoder.encode_text(each.text), dtype=np.int32) for each in texts}
    fitting = [each for each in texts if longest is None or len(tokens[each]) <= longest]
    if len(fitting) < len(texts):
        notice(
            "evaluation.long_texts",
            "{count} of {total} general texts have more tokens than the model's context of {longest} and are left out.",
            count=len(texts) - len(fitting),
            total=len(texts),
            longest=longest,
        )
    scores = score_targets(model, [Tokens(tokens[each], tokens[each]) for each in fitting])
    return tuple(
        RowLoss(each.key, each.language, scored.total, len(scored.logps), len(each.text.encode()))
        for each, scored in zip(fitting, scores, strict=True)
    )


def _sides(example: Example) -> tuple[Tokens, ...]:
    return example.sides if isinstance(example, TokenPair) else (example,)


def _prefers(scored: Sequence[TargetScores]) -> bool:
    """Whether the better answer is the likelier one for each of its tokens, so that its length does not decide."""
    chosen, rejected = (each.total / max(len(each.logps), 1) for each in scored)
    return chosen < rejected


def _bytes_of(tokens: Tokens, tokenizer: Any) -> int:
    trained = tokens.labels[tokens.labels != IGNORE]
    return len(tokenizer.decode(trained.tolist(), skip_special_tokens=True).encode("utf-8", "replace"))
