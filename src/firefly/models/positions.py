"""How long a text a model has positions for: tables of positions end, rotary ones go on beyond what was trained."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from firefly.config import ModelConfig
from firefly.models.dry_run import without_numbers
from firefly.models.loading import quiet_libraries, read_config
from firefly.models.meta_model import make_tiny_twin
from firefly.models.probing import decoder

DECLARED = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("seq_length", "context_length"),
)
"""Names under which configurations say for how many positions a model is made."""

OFFSET = 8
"""Rows of a table of positions that some models keep free at its beginning, at most: OPT has 2."""

TOKENS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)
"""A short row whose ids are no positions."""


@dataclass(frozen=True)
class Positions:
    """For how many tokens a model has positions.

    Attributes:
        most: tokens of the longest text that the model can be run on; None: of any length.
        trained: tokens that its positions are made for, rotary scaling included; None where its configuration says
            none.
    """

    most: int | None
    trained: int | None


def positions_for(model: ModelConfig, longest: int) -> Positions:
    """Whether a model can be run on a text of `longest` tokens; where its configuration declares as many, none is made.

    Otherwise a tiny twin with random weights is probed (`meta_model.make_tiny_twin`): which architectures have tables
    of positions, and where these begin, their configurations do not say.

    Raises:
        UsageError: no such model, or a configuration that transformers cannot read.
    """
    described = read_config(model)
    text = described.get_text_config()
    declared = sorted({count for name in DECLARED if isinstance(count := getattr(text, name, None), int) and count > 0})
    trained = _scaled(text, declared[0]) if declared else None
    if declared and longest <= declared[0] - OFFSET:
        return Positions(None, trained)
    try:
        with quiet_libraries(), torch.no_grad():
            most = _most(make_tiny_twin(described, model).eval(), longest, declared)
    except Exception:  # a failed probe tells nothing; remote code may raise anything
        most = None
    return Positions(most, trained)


def _scaled(text: Any, declared: int) -> int:
    """Positions that rotary scaling makes of those a model was trained on."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # Gemma 3 and others have one for each kind of layer.
    each = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    scaled = [
        int(float(part["factor"]) * (part.get("original_max_position_embeddings") or declared))
        for part in each
        if isinstance(part.get("factor"), int | float)
    ]
    return max([declared, *scaled])


def _most(twin: Any, longest: int, declared: list[int]) -> int | None:
    """Tokens of the longest text that can be run, if that is shorter than `longest`."""
    found = [count for count in (_rows_of_a_table(twin),) if count is not None and count < longest]
    if not found and _runs_at(twin, len(TOKENS)) and not _runs_at(twin, longest):
        count = _last(lambda count: _runs_at(twin, count), longest)
        if not _runs(twin, torch.zeros(count + 1, dtype=torch.long), torch.arange(count + 1)):
            found.append(count)  # tables of sines may grow with a row, and not with its positions
    shortest = _operations(twin, len(TOKENS)) if declared else None
    # A recurrent model that computes token by token has no shapes that end, and would take long.
    if shortest is not None and shortest == _operations(twin, 2 * len(TOKENS)):
        for count in (count for count in declared if count < longest):
            if _operations(twin, count) is not None and _operations(twin, count + 1) is None:
                found.append(count)
    return min(found, default=None)


def _last(works: Any, fails: int) -> int:
    """The largest count below `fails` that works."""
    good = len(TOKENS)
    while fails - good > 1:
        middle = (good + fails) // 2
        good, fails = (middle, fails) if works(middle) else (good, middle)
    return good


def _runs_at(twin: Any, count: int) -> bool:
    """Whether a short row runs at the last positions of a text of `count` tokens."""
    return _runs(twin, torch.tensor(TOKENS), torch.arange(count - len(TOKENS), count))


def _runs(twin: Any, ids: Tensor, positions: Tensor) -> bool:
    try:
        _run(twin, ids, positions)
    except (IndexError, RuntimeError):
        return False
    return True


def _run(twin: Any, ids: Tensor, positions: Tensor) -> None:
    """As a run calls a model, with positions, where it takes them."""
    body = decoder(twin)
    taken = signature(body.forward).parameters
    named = "position_ids" in taken or any(each.kind is Parameter.VAR_KEYWORD for each in taken.values())
    body(input_ids=ids[None], use_cache=False, **({"position_ids": positions[None]} if named else {}))


def _operations(twin: Any, count: int) -> int | None:
    """How many operations a text of `count` tokens takes, nothing being computed; None where arrays do not fit together
    or it depends on values."""
    made = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            made += 1
            return function(*args, **(kwargs or {}))

    try:
        with without_numbers(twin) as (fake, _), fake, Counting():
            twin.eval()
            decoder(twin)(input_ids=torch.zeros(1, count, dtype=torch.long), use_cache=False)
    except (IndexError, RuntimeError):
        return None
    return made


def _rows_of_a_table(twin: Any) -> int | None:
    """Tokens that the weights with one row for each position have rows for; None where there are no such weights."""
    tables = {parameter.data_ptr(): parameter for parameter in twin.parameters()}
    met: list[int] = []

    class Lookups(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.embedding.default and args[0].data_ptr() in tables:
                first = _first_position(args[1])
                if first is not None:
                    met.append(args[0].shape[0] - first)
            return function(*args, **(kwargs or {}))

    with Lookups():
        _run(twin, torch.tensor(TOKENS), torch.arange(len(TOKENS)))
    return min(met, default=None)


def _first_position(index: Tensor) -> int | None:
    """The first of these indices, if they count the tokens of the row."""
    row = index.reshape(-1).tolist()
    return row[0] if row == list(range(row[0], row[0] + len(TOKENS))) else None
