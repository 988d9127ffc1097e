"""Reward models: a scalar head in place of the one over the vocabulary, saved as transformers' sequence classifiers.

transformers scores a text at its last token that is no padding. Training scores every text at its very last token; that
is the same one, unless the text ends in the padding token itself (see `padding_beside`).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from firefly.errors import UsageError
from firefly.models.probing import decoder

HEAD = "score"
"""What transformers calls the head of its sequence classifiers on decoders."""


def scores(model: Any) -> bool:
    """Whether a transformers model is a sequence classifier of one number."""
    return isinstance(getattr(model, HEAD, None), nn.Module) and model.config.num_labels == 1


def refuse_other_classifiers(model: Any) -> None:
    """See that the head is a linear layer on the decoder's last hidden states, as the name `score` says.

    Raises:
        UsageError: it is another one.
    """
    if not (scores(model) and isinstance(getattr(model, HEAD), nn.Linear)):
        raise UsageError(
            "model.no_scores",
            "{name} cannot be trained as a reward model: it has no linear head `score` of one number.",
            name=type(model).__name__,
        )


def install_score_head(model: Any) -> str:
    """Let `model(..., target_index=…)` return {"scores": (targets,) fp32}: the score of each text that ends there.

    The head computes in fp32 whatever the rest does: scores of a pair differ by less than 16 bit can tell.
    """
    model.forward = MethodType(_forward, model)
    return HEAD


def _forward(self: Any, *args: Any, target_index: Tensor | None = None, **kwargs: Any) -> Any:
    if target_index is None:
        return type(self).forward(self, *args, **kwargs)
    given = {name: value for name, value in kwargs.items() if name not in ("targets", "per_token")}
    output = decoder(self)(*args, use_cache=False, **given)
    hidden = output.last_hidden_state[0].index_select(0, target_index)
    with torch.autocast(hidden.device.type, enabled=False):
        found = getattr(self, HEAD)(hidden.float())
    return {"scores": found.view(-1), "router_logits": getattr(output, "router_logits", None)}


def padding_beside(tokenizer: Any, ends: Iterable[int]) -> int | None:
    """The id of a padding token that no text ends in; None where the tokenizer has none such.

    The tokenizer's own comes first, then its other special tokens.

    Args:
        ends: the last tokens of texts.
    """
    taken = set(ends)
    known = [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    return next((token for token in known if token is not None and token not in taken), None)
