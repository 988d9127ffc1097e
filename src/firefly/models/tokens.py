"""Tokens that a model did not have: the tokenizer learns them, and the embeddings get rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from firefly.console import notice
from firefly.errors import UsageError
from firefly.models.unread import read_here


def add_tokens(tokenizer: Any, tokens: Sequence[str] | None) -> list[int]:
    """Add those of `tokens` that the tokenizer lacks, as special tokens; return the ids of what was added.

    Raises:
        UsageError: the tokenizer is Python code of a model family, whose special tokens are fixed.
    """
    if not tokens:
        return []
    if not tokenizer.is_fast:
        raise UsageError(
            "tokens.slow_tokenizer",
            "add_tokens: the tokenizer {name} is Python code with fixed special tokens; none can be added.",
            name=tokenizer.name_or_path,
        )
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    missing = [token for token in dict.fromkeys(tokens) if token not in known]
    # Not normalized and not stripped: the token is its text, wherever it stands.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    there = [token for token in dict.fromkeys(tokens) if token in known]
    if there:
        notice(
            "tokens.known",
            "add_tokens: the tokenizer has {tokens} already; their embeddings are left as they are.",
            tokens=", ".join(there),
        )
    return [tokenizer.convert_tokens_to_ids(token) for token in missing]


def fit_embeddings(model: Any, tokenizer: Any, added: Sequence[int] = ()) -> list[int]:
    """Give each id of the tokenizer a row in embeddings and head; return the ids whose rows are new.

    Rows are new where the matrix was too short, and where a token of `added` took a row that lay unused. Matrices are
    never shortened: many models have more rows than tokens, in multiples that suit the hardware.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    new = sorted({*added, *range(rows, len(tokenizer))})
    if not new:
        return []
    read_here(_matrices(model))
    resize_embeddings(model, max(rows, len(tokenizer)))
    used = min(rows, len(tokenizer) - len(set(added)))
    # A random row in the head may win against every word the model knows. With the mean of the trained rows the new
    # token's logit is the mean logit, so what the model says is as good as unchanged when training starts.
    for weight in _matrices(model):
        with torch.no_grad():
            weight[new] = weight[:used].float().mean(0).to(weight.dtype)
    notice(
        "tokens.grown",
        "{count} tokens are new to the model; the embedding has {rows} rows.",
        count=len(new),
        rows=model.get_input_embeddings().weight.shape[0],
    )
    return new


def resize_embeddings(model: Any, rows: int) -> None:
    """Give embeddings and head `rows` rows: the last ones go, or new ones come at the mean of the others."""
    before = model.get_input_embeddings().weight.shape[0]
    if before == rows:
        return
    read_here(_matrices(model))
    model.resize_token_embeddings(rows, mean_resizing=False)
    for weight in _matrices(model) if rows > before else ():
        with torch.no_grad():
            weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def vocabulary_ends(model: Any) -> list[nn.Module]:
    """The input embedding and the head."""
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


def is_tied(model: Any) -> bool:
    """Whether the head's weight is the embedding's."""
    ends: list[Any] = vocabulary_ends(model)
    return len(ends) == 2 and ends[0].weight is ends[1].weight


def _matrices(model: Any) -> list[nn.Parameter]:
    """What has one row per token: the embedding, and the head with its bias if they are not the same."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = [embedding.weight, *([] if head is None else [head.weight, head.bias])]
    return list({id(weight): weight for weight in found if weight is not None}.values())
