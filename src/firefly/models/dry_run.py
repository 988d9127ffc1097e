"""Memory of a training pass: measured on a short pass of the model itself, or counted on fake tensors.

`measure_activations` is for a run that begins: what one short pass keeps for backward, per token. `dry_run` is for a
plan: a whole step under torch's FakeTensorMode, forward and backward, in which a dispatch mode follows every storage
from its birth to its death. So temporaries count there, and so does the order in which things are freed.

(torch.distributed._tools.MemTracker does the latter, too, but replaces `UntypedStorage.resize_` for the whole process,
and does not tell the head's arrays apart.)
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from firefly.data.batching import PackedBatch
from firefly.models.attention import segmented
from firefly.models.checkpointing import decoder_layers
from firefly.models.kernels.segment_attention import GEMM_LONGEST, AttentionSettings, blocks_in
from firefly.models.kernels.target_device import sized_for
from firefly.models.memory import Activations, Peak
from firefly.models.reach import Unreached, find_unreached
from firefly.segments import Segment

LAYERS, HEAD, GRADIENTS = "activations", "head", "gradients"
"""The kinds that storages are counted by."""

PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
"""Lengths of the two examples that are measured on: the first that divides no size in the model, so that a dimension
which it divides is known to be one of tokens."""


# ---- what a short pass keeps ----


def measure_activations(model: Any, layout: str, autocast: torch.dtype | None, longest: int) -> Activations:
    """Run one short pass of a prepared model (see `heads`) and count what it keeps for backward.

    Works on any device, also on "meta", where nothing is computed. Random state and gradients stay as they were.

    Args:
        autocast: the type that full fine-tuning computes in, None without autocast.
        longest: tokens of the longest example: where attention keeps its probabilities, a token's grow with it.
    """
    used = segmented(model) if layout == "segments" else None
    by_products = 0 if used is None else min(used.crossover, GEMM_LONGEST.get(autocast or model.dtype, 0))
    if used is None or not 0 < by_products < longest:
        return _activations(model, layout, autocast, longest)
    # The longest examples that keep probabilities, or still longer ones that do not: whichever takes more.
    shorter = _activations(model, layout, autocast, by_products)
    own, used.crossover = used.crossover, 0
    try:
        longer = _activations(model, layout, autocast, longest)
    finally:
        used.crossover = own
    return replace(shorter, kept=max(shorter.kept, longer.kept), outside=max(shorter.outside, longer.outside))


def _activations(model: Any, layout: str, autocast: torch.dtype | None, longest: int) -> Activations:
    """As `measure_activations`, of examples that attention computes as it does a short one."""
    layers = decoder_layers(model)
    length = _unique_length(model)
    # Attention goes in blocks of queries, which see no keys behind their own block: half of the square in the end.
    rows = blocks_in(autocast or model.dtype).of(longest)
    seen = (longest + rows) / 2
    measured = length if layout == "segments" else 2 * length
    bytes_of = [0.0, 0.0]
    for inside, tensor in _kept(model, layers, length, layout, autocast):
        of_tokens = sum(size % length == 0 for size in tensor.shape)
        if of_tokens:  # else it is kept once, however many tokens there are
            per_token = tensor.untyped_storage().nbytes() / (2 * length)
            bytes_of[0 if inside else 1] += per_token * (seen / measured if of_tokens > 1 else 1)
    # BLT's configuration has widths for its parts alone; elsewhere embeddings may be narrower than what layers pass on.
    embedding = model.get_input_embeddings().weight
    width = getattr(model.config.get_text_config(), "hidden_size", None) or embedding.shape[-1]
    entering = width * embedding.dtype.itemsize
    return Activations(len(layers), kept=bytes_of[0] / max(len(layers), 1), entering=entering, outside=bytes_of[1])


def _unique_length(model: Any) -> int:
    """The first of PRIMES that divides no size in the model."""
    sizes = {size for p in model.parameters() for size in getattr(getattr(p, "quant_state", p), "shape", p.shape)}
    numbers = model.config.get_text_config().to_dict().values()
    sizes |= {number for number in numbers if isinstance(number, int) and not isinstance(number, bool)}
    sizes.discard(0)
    return next((prime for prime in PRIMES if all(size % prime for size in sizes)), PRIMES[-1])


def _kept(
    model: Any, layers: list[nn.Module], length: int, layout: str, autocast: torch.dtype | None
) -> list[tuple[bool, Tensor]]:
    """What a pass over two examples of `length` tokens keeps, all of them targets, and whether inside a layer."""
    device = next(model.parameters()).device
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[tuple[int, int], tuple[bool, Tensor]] = {}  # kept alive, or another tensor could take the address
    depth = 0  # above 0 while one of the layers computes

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    def note(tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if tensor.device == device and address not in own:
            seen.setdefault(address, (depth > 0, tensor.detach()))
        return tensor

    ids = torch.arange(2 * length, device=device)
    inputs: dict[str, Any] = {"input_ids": ids[None], "target_index": ids, "targets": ids}
    if layout == "segments":  # else one example a row, so one of twice the length
        segments = Segment(0, length), Segment(length, 2 * length)
        inputs |= {"position_ids": ids[None] % length, "segments": segments}
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    was_training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.enable_grad(),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
            saved_tensors_hooks(note, lambda kept: kept),
        ):
            model(**inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return list(seen.values())


def _address(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    # By the storage object itself: on "meta" and in a dry run numbers have no address.
    return (storage._cdata, storage.nbytes())


# ---- on fake tensors ----


class NoDryRun(RuntimeError):
    """The model's computation depends on values, as routing to experts does, so it has no dry run."""


def dry_run(
    model: Any,
    rows: Sequence[PackedBatch],
    *,
    solo: bool = False,
    autocast: torch.dtype | None = None,
    per_token: bool = False,
    accumulated: bool = False,
    device: str = "cpu",
) -> Peak:
    """Run a microbatch forward and backward without computing, and return its peak.

    Args:
        model: prepared (see `forwards`), adapters attached; on any device, "meta" among them. It is left as it was.
        rows: what the model is called with one after another before the backward pass.
        autocast: the type that full fine-tuning computes in, None without autocast.
        per_token: the head gives log-probabilities, as preference losses need them.
        accumulated: the gradients of an earlier microbatch are there already.
        device: "cpu" or "cuda", whose chunks are computed in.

    Raises:
        NoDryRun: the architecture cannot.
    """
    live = LiveBytes()
    with _no_dry_run(), without_numbers(model, device) as (fake, trained), _told_apart(model, trained, live):
        for tensor in (*model.parameters(), *model.buffers()):
            live.ignore(tensor)
        inputs = [
            {name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in each.items()}
            for each in (row.model_inputs(solo) for row in rows)
        ]
        for _ in range(2 if accumulated else 1):
            live.restart()
            with fake, live:
                found = []
                for each in inputs:
                    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                        output = model(**each, per_token=per_token)
                    found.append(next(output[name] for name in ("scores", "logps", "loss") if name in output).sum())
                torch.stack(found).sum().backward()
                del found
    return Peak(live.peak[LAYERS], live.peak[HEAD], live.peak[GRADIENTS])


def counted_activations(
    model: Any, layout: str, autocast: torch.dtype | None, longest: int, device: str = "cpu"
) -> Activations:
    """As `measure_activations`, computing nothing.

    Raises:
        NoDryRun: the architecture cannot.
    """
    with _no_dry_run(), without_numbers(model, device) as (fake, _), fake:
        return measure_activations(model, layout, autocast, longest)


def unreached_without_numbers(model: Any) -> Unreached:
    """As `reach.find_unreached`, computing nothing.

    Raises:
        NoDryRun: the architecture cannot.
    """
    with _no_dry_run(), without_numbers(model) as (fake, _), fake:
        return find_unreached(model)


@contextmanager
def _no_dry_run() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # code that depends on values may raise anything on fake tensors
        raise NoDryRun(str(error).partition("\n")[0]) from error


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations allocate; `peak` holds their bytes by kind at the highest total."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = LAYERS
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.total = self.most = 0
        self._met: dict[int, _Storage] = {}

    def restart(self) -> None:
        """Forget the peak so far, not what lives."""
        self.most, self.peak = self.total, self.live.copy()

    def ignore(self, tensor: Tensor) -> None:
        """Weights: they are there anyway."""
        storage = tensor.untyped_storage()
        self._met[storage._cdata] = _Storage(weakref.ref(storage), None, 0)

    def call(self, tensor: Tensor, kind: str) -> None:
        """Count what a tensor lies in as of another kind from now on."""
        met = self._met.get(tensor.untyped_storage()._cdata)
        if met is not None and met.kind is not None:
            self.live[met.kind] -= met.size
            self.live[kind] += met.size
            met.kind = kind

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        return out

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self._met:
            return
        met = _Storage(weakref.ref(storage, lambda _: self._part(number)), self.kind, size)
        self._met[number] = met
        self.live[self.kind] += size
        self.total += size
        if self.total > self.most:
            self.most, self.peak = self.total, self.live.copy()

    def _part(self, number: int) -> None:
        met = self._met.pop(number, None)
        if met is not None and met.kind is not None:
            self.live[met.kind] -= met.size
            self.total -= met.size


@dataclass(slots=True)
class _Storage:
    reference: Any
    kind: str | None
    size: int


@contextmanager
def without_numbers(model: nn.Module, device: str = "cpu") -> Iterator[tuple[FakeTensorMode, list[nn.Parameter]]]:
    """The model in training mode with fake parameters and buffers; yields the mode to compute under and the trained
    parameters. Nothing outside of this model, and of this thread, is changed.

    Args:
        device: "cpu" or "cuda", whose chunks kernels compute in; the arrays are a CPU's.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    own: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    was_training = model.training
    try:
        with fake:
            for module in model.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        own.append((module._parameters, name, parameter))
                        if id(parameter) not in made:
                            made[id(parameter)] = _empty_like(parameter)
                        module._parameters[name] = made[id(parameter)]
                for name, buffer in list(module._buffers.items()):
                    if buffer is not None:
                        own.append((module._buffers, name, buffer))
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        model.train()
        with sized_for(device), _without_masks(model):
            yield fake, [parameter for parameter in made.values() if parameter.requires_grad]
    finally:
        model.train(was_training)
        for place, name, value in own:
            place[name] = value


def _empty_like(parameter: Any) -> nn.Parameter:
    """Made under the fake mode: an empty parameter, of a 4-bit weight with the constants that go with it."""
    made = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        made.quant_state = _empty_state(state)  # type: ignore[attr-defined]
    return made


def _empty_state(state: Any) -> Any:
    made = copy.copy(state)
    for name in ("absmax", "code", "offset"):
        value = getattr(made, name, None)
        if isinstance(value, Tensor):
            setattr(made, name, torch.empty(value.shape, dtype=value.dtype))
    if getattr(made, "state2", None) is not None:
        made.state2 = _empty_state(made.state2)
    return made


@contextmanager
def _told_apart(model: Any, trained: Sequence[nn.Parameter], live: LiveBytes) -> Iterator[None]:
    """What the head makes and gradients of weights are counted by themselves."""

    def enter(*_: Any) -> None:
        live.kind = HEAD

    def leave(*_: Any) -> None:
        live.kind = LAYERS

    def gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.call(parameter.grad, GRADIENTS)

    handles: list[Any] = [parameter.register_post_accumulate_grad_hook(gradient) for parameter in trained]
    head = model.get_output_embeddings()
    if head is not None:
        handles += [head.register_forward_pre_hook(enter), head.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_masks(model: Any) -> Iterator[None]:
    """Attention keeps a few masks for later calls: none without numbers may be left behind."""
    used = segmented(model)
    settings = AttentionSettings() if used is None else used
    kept, settings.masks = settings.masks, {}
    try:
        yield
    finally:
        settings.masks = kept
