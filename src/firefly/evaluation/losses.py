"""Losses of rows and of plain texts under a model that is not trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from firefly.config import DataConfig, RecordKind
from firefly.data.blocks import Blocks
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.examples import Examples
from firefly.data.schema import IGNORE, Example, TokenPair, Tokens
from firefly.errors import UsageError
from firefly.evaluation.measurement import RowLoss
from firefly.evaluation.probes import ProbeText
from firefly.evaluation.scoring import TargetScores, score_targets

READ_AS: dict[RecordKind, RecordKind] = {"labelled": "conversation"}
"""Of labelled answers the good ones count, as demonstrations."""


def load_rows(data: DataConfig, encoder: Encoder, kind: RecordKind, hub: str) -> Examples | Blocks:
    """The examples of `data.train_file`, prepared as for training.

    Raises:
        UsageError: the rows cannot be read, or none of them is left.
    """
    examples = load_split(data, encoder, READ_AS.get(kind, kind), hub).train
    if not len(examples):
        raise UsageError(
            "evaluation.no_rows",
            "{files}: none of its {rows} row(s) can be compared; `firefly check --train_file FILE` says why.",
            files=data.train_file,
            rows=examples.ledger.rows,
        )
    return examples


def row_losses(model: Any, examples: Examples | Blocks, tokenizer: Any) -> tuple[RowLoss, ...]:
    """The loss of each example under the model: of its targets or, of a pair, of the better answer's.

    Args:
        model: see `score_targets`.
        tokenizer: that made the examples; it tells how many bytes of text the targets are.
    """
    sides = (side for number in range(len(examples)) for side in _sides(examples[number]))
    scores = score_targets(model, sides)
    found = []
    for number in range(len(examples)):
        example = examples[number]
        scored = [next(scores) for _ in _sides(example)]
        source = int(examples.counts.sources[number])
        found.append(
            RowLoss(
                key=str(examples.place(number)),
                source=examples.names[source] if source < len(examples.names) else str(source),
                total=scored[0].total,
                targets=len(scored[0].logps),
                size=_bytes_of(_sides(example)[0], tokenizer),
                prefers=_prefers(scored) if isinstance(example, TokenPair) else None,
            )
        )
    return tuple(found)


def text_losses(model: Any, encoder: Encoder, texts: Sequence[ProbeText]) -> tuple[RowLoss, ...]:
    """The loss of plain texts, each behind the special tokens that the tokenizer puts in front of one."""
    tokens = [_as_targets(encoder.encode_text(each.text)) for each in texts]
    scores: Iterator[TargetScores] = score_targets(model, tokens)
    return tuple(
        RowLoss(each.key, each.language, scored.total, len(scored.logps), len(each.text.encode()))
        for each, scored in zip(texts, scores, strict=True)
    )


def _as_targets(ids: Sequence[int]) -> Tokens:
    array = np.asarray(ids, dtype=np.int32)
    return Tokens(array, array.copy())


def _sides(example: Example) -> tuple[Tokens, ...]:
    return example.sides if isinstance(example, TokenPair) else (example,)


def _prefers(scored: Sequence[TargetScores]) -> bool:
    """Whether the better answer is the likelier one for each of its tokens, so that its length does not decide."""
    chosen, rejected = (each.total / max(len(each.logps), 1) for each in scored)
    return chosen < rejected


def _bytes_of(tokens: Tokens, tokenizer: Any) -> int:
    trained = tokens.labels[tokens.labels != IGNORE]
    return len(tokenizer.decode(trained.tolist(), skip_special_tokens=True).encode("utf-8", "replace"))
