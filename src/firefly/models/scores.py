"""Reward models: a scalar head in place of the one over the vocabulary, saved as transformers' sequence classifiers.

transformers scores a text at its last token that is no padding. Training scores every text at its very last token; that
is the same one, unless the text ends in the padding token itself (see `padding_beside`).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from firefly.errors import UsageError
from firefly.models.attention import ATTRIBUTE
from firefly.models.probing import decoder

HEAD = "score"
"""What transformers calls the head of its sequence classifiers on decoders."""

ADAPTER_TASK = "SEQ_CLS"
"""peft's word for an adapter of such a model, which brings the trained head along."""

KEPT = (ATTRIBUTE, "hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")
"""What a model says of its body."""


def scores(model: Any) -> bool:
    """Whether a transformers model is a sequence classifier of one number."""
    return isinstance(getattr(model, HEAD, None), nn.Module) and model.config.num_labels == 1


def as_classifier(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A sequence classifier of one number on the body of a causal language model, its head new and random.

    The body is the same modules, however they were loaded and prepared; the head over the vocabulary is let go.

    Args:
        dtype: of the new head.

    Raises:
        UsageError: transformers has no such classifier of this architecture.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if scores(model):
        getattr(model, HEAD).to(dtype)
        return model
    config, kind = model.config, cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None))
    prefix = getattr(kind, "base_model_prefix", "")
    body: Any = getattr(model, prefix, None)
    config.num_labels = 1
    made: Any = None
    if kind is not None and body is not None:
        with torch.device("meta"):
            made = kind(config)
    fits = type(getattr(made, prefix, None)) is type(body)
    if body is None or not fits or type(getattr(made, HEAD, None)) is not nn.Linear:
        raise UsageError(
            "model.no_classifier",
            "{name} cannot become a reward model: transformers has no classifier with a linear head on the body of "
            "{kind}.",
            name=type(model).__name__,
            kind=config.model_type,
        )
    setattr(made, prefix, body)
    device = next(body.parameters()).device
    head = nn.Linear(made.score.in_features, 1, bias=made.score.bias is not None, device=device, dtype=dtype)
    nn.init.normal_(head.weight, std=getattr(config.get_text_config(), "initializer_range", None) or 0.02)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    made.score, made.config = head, config
    for name in KEPT:
        if name in vars(model):
            setattr(made, name, vars(model)[name])
    return made.train(model.training)


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
    return {"scores": _head(self, hidden).view(-1), "router_logits": getattr(output, "router_logits", None)}


def _head(model: Any, hidden: Tensor) -> Tensor:
    """The score of each hidden state, fp32; the head computes in its own type, which is fp32 in training but where an
    engine holds the whole model in 16 bit."""
    head = getattr(model, HEAD)
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(next(head.parameters()).dtype)).float()


def scores_of(model: Any, **inputs: Any) -> Tensor:
    """The scores of texts that would end at each of their tokens, (rows, tokens, 1), fp32.

    Args:
        inputs: of the decoder.
    """
    return _head(model, decoder(model)(**inputs, use_cache=False).last_hidden_state)


def refuse_scores(model: Any, name: str) -> None:
    """
    Raises:
        UsageError: the model scores texts, where one that writes them is asked for.
    """
    if isinstance(getattr(model, HEAD, None), nn.Module) and model.get_output_embeddings() is None:
        raise UsageError(
            "model.scores",
            "{name} is a classifier ({kind}): it scores texts and writes none.",
            name=name,
            kind=type(model).__name__,
        )


def padding_beside(tokenizer: Any, ends: Iterable[int]) -> int | None:
    """The id of a padding token that no text ends in; None where the tokenizer has none such.

    The tokenizer's own comes first, then its other special tokens.

    Args:
        ends: the last tokens of texts.
    """
    taken = set(ends)
    known = [tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    return next((token for token in known if token is not None and token not in taken), None)
