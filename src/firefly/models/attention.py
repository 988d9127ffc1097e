"""Packed segments in any transformers model: one registered attention function, and a probe that it isolates them.

`segments` packs many examples into one row; each token attends to its own example only. Architectures that cannot do
that, or fail the probe, run `solo`: one example per microbatch through the model's own attention. Both are exact.

A prepared model attends to segments in calls that pass some. In any other, as in `generate`, it runs unchanged, with
its own attention, masks and cache. Nothing outside of that one model is changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from firefly.errors import UsageError
from firefly.files import one_line
from firefly.models.causal_lm import CausalLM
from firefly.models.kernels.segment_attention import AttentionSettings, attend
from firefly.models.precision import compute_type
from firefly.models.probing import agree, attempt, decoder, evaluating
from firefly.segments import Segment, segment_positions

NAME = "firefly_segments"
ISOLATABLE_LAYERS = {"full_attention", "sliding_attention"}
WITHOUT_EFFECT = {"position_ids", "cache_position", "logits_to_keep", "token_type_ids", "mm_token_type_ids"}
"""Tensors that models pass to the attention function and that it may ignore."""


SAME_OPERATIONS = 0.1
"""Tolerances between two passes that differ in what a segment must not see: nothing is rounded otherwise, but where a
neighbour's tokens choose other experts and these multiply arrays of other shapes."""

WHOLE_MODEL = 20.0
"""Tolerances between two ways through all layers, whose roundings add up. In bf16 they also turn a router's choice over
now and then, which puts one token far off: of tiny models of every architecture the right ones were up to 13 tolerances
apart (in fp32: 0.01), the first wrong one 38."""

ATTRIBUTE = "firefly_segments"
"""Where a model, its decoder and its attention modules keep their `SegmentedModel`."""


@dataclass(eq=False)
class SegmentedModel(AttentionSettings):
    """What makes one model attend to segments.

    Attributes:
        own: the configuration of each attention module as it was: its like now names our attention function.
        configs: those of the decoder and of models inside it, from outside in.
        running: whether a pass with segments is under way.
        windows: sliding windows that reached the attention function (see `isolation_fault`).
    """

    own: dict[nn.Module, PreTrainedConfig] = field(default_factory=dict)
    configs: list[PreTrainedConfig] = field(default_factory=list)
    running: bool = False
    windows: set[int | None] = field(default_factory=set)


def segmented(model: CausalLM) -> SegmentedModel | None:
    """What makes a transformers model attend to segments; None in the solo layout."""
    return vars(model).get(ATTRIBUTE)


def use_crossover(model: CausalLM, tokens: int) -> None:
    """Let a CPU compute segments of up to so many tokens by matmuls, in this transformers model."""
    used = segmented(model)
    if used is not None:
        used.crossover = tokens


def use_segments(model: PreTrainedModel) -> SegmentedModel:
    """Let a transformers model attend to the segments of the calls that have some; no other call is changed.

    transformers looks the attention function up by a name in the configuration, and makes masks for it by the same
    name. Attention modules get configurations of their own, with our name. The model's keeps its name but for passes
    with segments: our name is unknown to the interface for masks, which then makes none, and spares the question
    whether position ids tell of packed rows, which waits for the device in every pass.
    """
    drop_segments(model)
    used = SegmentedModel()
    ours: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        own = vars(module).get("config")
        if isinstance(own, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(own) not in ours:
                ours[id(own)] = copy.deepcopy(own)
                ours[id(own)]._attn_implementation = NAME
            used.own[module], module.config = own, ours[id(own)]  # type: ignore[assignment]
            setattr(module, ATTRIBUTE, used)
    body = decoder(model)
    setattr(model, ATTRIBUTE, used)
    setattr(body, ATTRIBUTE, used)
    used.configs += model_configs(body)
    body.forward = MethodType(_forward, body)
    return used


def drop_segments(model: PreTrainedModel) -> None:
    """Undo `use_segments`."""
    used = segmented(model)
    if used is None:
        return
    for module, own in used.own.items():
        module.config = own  # type: ignore[assignment]
        delattr(module, ATTRIBUTE)
    body = decoder(model)
    delattr(model, ATTRIBUTE)
    delattr(body, ATTRIBUTE)
    del body.forward


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a decoder; with segments, no masks are made."""
    if kwargs.get("segments") is None:
        return type(self).forward(self, *args, **kwargs)
    used: SegmentedModel = getattr(self, ATTRIBUTE)
    used.running = True
    try:
        with attending_by(NAME, used.configs):
            return type(self).forward(self, *args, **kwargs)
    finally:
        used.running = False


def model_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configurations of a model and of models inside it, from outside in."""
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return list({id(part.config): part.config for part in parts}.values())


@contextmanager
def attending_by(name: str, configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """With the attention function of this name in all of a model's configurations."""
    own = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, given in own:  # in this order: what is set for a configuration is set for its parts, too
            config._attn_implementation = given


def refuse_textless(model: Any) -> None:
    """Try a model that is made for more than text on a short row of text.

    Raises:
        UsageError: it does not run without an image, or has no decoder whose last hidden states can be had.
    """
    try:
        with torch.no_grad():
            decoder(model)(**short_row(model), use_cache=False).last_hidden_state  # noqa: B018
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code that a model brings along may raise anything
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UsageError(
            "model.not_for_text",
            "{name} cannot be trained on text alone: {problem}",
            name=type(model).__name__,
            problem=problem,
        ) from error


class UnsupportedAttention(RuntimeError):
    """The model needs something that segment attention does not support; it must run in the solo layout."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: tuple[Segment, ...] | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: of packed rows, or, without segments, the one that the module would call."""
    used: SegmentedModel = getattr(module, ATTRIBUTE)
    if segments is not None:
        return attend_packed(module, query, key, value, attention_mask, segments, used, **given), None
    if used.running:
        raise UnsupportedAttention(f"{type(module).__name__} did not pass on segments")
    eager: Any = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    own = ALL_ATTENTION_FUNCTIONS.get_interface(str(used.own[module]._attn_implementation), eager)
    return own(module, query, key, value, attention_mask, **given)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: tuple[Segment, ...],
    used: SegmentedModel,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> Tensor:
    """query (1, heads, tokens, width) → (1, tokens, heads, value width), contiguous as transformers' own functions
    return it: some models (JetMoE) take views of that."""
    # Sinks, position biases, the keys that an indexer chose, a mask of the model's own: whatever else it is, it would
    # be dropped here, and where it acts in long examples alone, as an indexer does, no probe would see that.
    unread = sorted(name for name, x in others.items() if isinstance(x, Tensor) and name not in WITHOUT_EFFECT)
    if attention_mask is not None:
        unread.append("attention_mask")
    if unread:
        raise UnsupportedAttention(
            f"{type(module).__name__} attends with {', '.join(unread)}, which segments do not have"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if query.shape[0] != 1 or is_causal is False:
        raise UnsupportedAttention(f"{type(module).__name__} attends in rows or to later tokens, as segments do not")
    declared = getattr(module, "sliding_window", None)  # Qwen2-MoE passes none
    if sliding_window is None and isinstance(declared, int) and getattr(module, "is_sliding", True):
        sliding_window = declared
    used.windows.add(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Squeezed, not indexed: the gradient of an index is a copy of the whole array, in another layout. Under autocast,
    # rotary positions of fp32 weights make fp32 of queries and keys, which no 16-bit way would take.
    query, key, value = (x.squeeze(0).to(compute_type(x)) for x in (query, key, value))
    out = attend(query, key, value, segments, scale, sliding_window, softcap, dropout, used)
    return out.transpose(0, 1).contiguous()[None]


AttentionInterface.register(NAME, segment_attention)


def choose_layout(model: PreTrainedModel) -> tuple[str, str]:
    """Return ("segments" or "solo", why), leaving the model prepared accordingly.

    `model` is the transformers model itself, adapters inside it or not. The choice rests on the architecture's
    declaration, its layer types and a probe (`isolation_fault`).

    Raises:
        UsageError: the architecture is no causal language model of text, in any layout.
    """
    if model.get_output_embeddings() is not None:  # else a reward model's body is a causal language model's
        with evaluating(model):
            refuse_other_models(model)
    reason = _declared_fault(model)
    if reason is None:
        expected = _hidden(model, _probe_ids(model)[1], None)
        reason = isolation_fault(model, use_segments(model), expected)
        if reason is not None:
            drop_segments(model)
    return ("segments", "") if reason is None else ("solo", reason)


def refuse_other_models(model: PreTrainedModel) -> None:
    """See that `model` gives logits for tokens alone, and that none of them depends on a later token.

    An encoder would learn to read the answer off the next token. Gradients are asked first: where nothing is seen
    they are zero, however numbers are rounded and whichever experts are chosen. Where there are some, other later
    tokens are tried, too.

    Raises:
        UsageError: one of the two does not hold.
    """
    kind = model.config.model_type
    if kind == "reformer":  # what it hides from autograd's graph, no probe of the graph would find
        raise UsageError(
            "model.reversible",
            "model_type {kind}: its layers are reversible, with gradients that they compute outside of autograd's "
            "graph, and attend by random hashes. Such a model is not trained.",
            kind=kind,
        )
    ids = _probe_ids(model)[1]
    tokens, half = ids.shape[1], ids.shape[1] // 2
    logits, embedded = _logits_and_embeddings(model, ids, half)
    # Weighed unevenly, so that a norm behind it does not make the sum nearly the same whatever comes in.
    weights = torch.linspace(-1, 2, logits.numel(), device=logits.device).view(logits.shape)
    found = attempt(lambda: torch.autograd.grad((logits * weights).sum(), embedded, allow_unused=True))
    if found is None:  # no gradient, as with some kernels: unknown
        return
    rows = [each.float().reshape(tokens, -1) for each in found if each is not None and tokens in each.shape[:2]]
    if not any(bool(each[half:].abs().max() > 1e-6 * each.abs().max()) for each in rows):
        return
    with torch.no_grad():
        other = torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)
        moved = (model(input_ids=other, use_cache=False).logits[:, :half].float() - logits.detach()).abs().max()
    if moved <= 1e-6 * logits.detach().abs().max():
        return
    if getattr(model.config, "is_decoder", None) is False:
        raise UsageError(
            "model.encoder",
            "model_type {kind}: an encoder, whose tokens see later tokens, so that a loss on the next "
            'token would read its own answer. To train it as a decoder, write "is_decoder": true into its '
            "config.json.",
            kind=kind,
        )
    raise UsageError(
        "model.not_causal",
        "model_type {kind}: its tokens see later tokens, so a loss on the next token would read its own "
        "answer. It is no causal language model and is not trained.",
        kind=kind,
    )


def _logits_and_embeddings(model: PreTrainedModel, ids: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
    """Logits of the first `count` tokens of a row, fp32, and what its tokens were embedded as, for gradients by it.

    Raises:
        UsageError: the model cannot be computed from tokens alone, or not in its type.
    """
    embedded: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # CTRL scales it in place

    watch = model.get_input_embeddings().register_forward_hook(note)
    try:
        with torch.enable_grad():
            return model(input_ids=ids, use_cache=False).logits[:, :count].float(), embedded
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code that a model brings along may raise anything
        problem, kind = one_line(error)[:300], model.config.model_type
        if model.dtype != torch.float32 and any(word in problem for word in ("dtype", "scalar type")):
            raise UsageError(
                "precision.only_fp32",
                'model_type {kind}: its code does not run in {name} ({problem}). Write "bf16": false.',
                kind=kind,
                name=str(model.dtype).removeprefix("torch."),
                problem=problem,
            ) from error
        raise UsageError(
            "model.not_text_alone",
            "model_type {kind}: the model cannot be computed from tokens alone ({problem}). Only causal language "
            "models of text are trained.",
            kind=kind,
            problem=f"{type(error).__name__}: {problem}",
        ) from error
    finally:
        watch.remove()


def _declared_fault(model: PreTrainedModel) -> str | None:
    if not type(model).is_backend_compatible():
        return f"{type(model).__name__} has no attention interface"
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if not kinds <= ISOLATABLE_LAYERS:
        return f"layer types {', '.join(sorted(kinds - ISOLATABLE_LAYERS))}"
    return None


def isolation_fault(model: PreTrainedModel, used: SegmentedModel, expected: Tensor) -> str | None:
    """Prove on this model that segments neither leak nor change the result; return what went wrong, or None.

    Two segments are run twice with the first one's ids changed: the second's states must not move at all beyond
    rounding, and must be those of the segment alone under the model's own attention (`expected`). So must those of a
    third segment that has the beginning of the second for its prefix and goes on like it.
    """
    first, second = _probe_ids(model)
    border, end = first.shape[1], first.shape[1] + second.shape[1]
    prefix = second.shape[1] // 2
    rest = second[:, prefix:]
    segments = (
        Segment(0, border),
        Segment(border, end),
        Segment(end, end + rest.shape[1], border, border + prefix),
    )
    try:
        states = [_hidden(model, torch.cat([ids, second, rest], dim=1), segments) for ids in (first, first.flip(1) + 1)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code that a model brings along may raise anything
        return f"{type(error).__name__}: {error}"
    one, other = (state[:, border:end] for state in states)
    if not agree(one, other, scale=SAME_OPERATIONS):
        return "a segment sees its neighbour"
    if not agree(one, expected, scale=WHOLE_MODEL):
        return "a segment differs from the same tokens alone"
    if not agree(states[0][:, end:], expected[:, prefix:], scale=WHOLE_MODEL):
        return "a segment with a prefix differs from the same tokens alone"
    window = _declared_window(model)
    if window is not None and window not in used.windows:
        return f"its sliding window of {window} tokens never reaches the attention"  # and is too long for the probe
    return None


def _declared_window(model: PreTrainedModel) -> int | None:
    """The sliding window that some layer of the model is to have, by its configuration."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def short_row(model: PreTrainedModel, tokens: int = 12) -> dict[str, Any]:
    """What the model is called with for a row of one short example, in the layout that it is set to."""
    vocabulary = model.config.get_text_config().vocab_size
    positions = torch.arange(tokens, device=model.device)
    inputs: dict[str, Any] = {"input_ids": (positions * 7919 % vocabulary)[None]}
    if segmented(model) is not None:
        inputs |= {"position_ids": positions[None], "segments": (Segment(0, tokens),)}
    return inputs


def _probe_ids(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Two short rows of arbitrary ids, longer than small sliding windows."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(40, device=model.device) * 7919 % max(vocabulary - 2, 1)
    return ids[None, :17], ids[None, 17:]


def _hidden(model: PreTrainedModel, ids: Tensor, segments: tuple[Segment, ...] | None) -> Tensor:
    """Last hidden states without dropout; positions restart at every segment.

    Without segments positions are the model's own affair, as in the solo layout: not everywhere do they begin at 0.
    """
    extra: dict[str, Any] = {}
    if segments is not None:
        positions = torch.from_numpy(segment_positions(segments))[None].to(ids.device)
        extra = {"segments": segments, "position_ids": positions}
    with evaluating(model), torch.no_grad():
        return decoder(model)(input_ids=ids, use_cache=False, **extra).last_hidden_state
