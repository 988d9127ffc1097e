"""The peak of a training step's memory, counted and not taken: the step runs on arrays that have shapes and no numbers.

The prepared model computes under torch's FakeTensorMode, forward and backward, and a dispatch mode follows every
storage from its birth to its death. So temporaries count, and so does the order in which things are freed; neither
does what a pass keeps for backward (`memory.measure_activations`) say.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from firefly.data.batching import PackedBatch
from firefly.models.attention import segmented, use_crossover
from firefly.models.kernels import gated_mlp, token_nll
from firefly.models.kernels.segment_attention import AttentionSettings
from firefly.models.memory import Activations, Peak, measure_activations
from firefly.models.reach import Unreached, find_unreached

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default} | {
    *(torch.ops.aten.mm.out, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
}

LAYERS, HEAD, GRADIENTS = "activations", "head", "gradients"
"""What storages are counted as."""


class NoDryRun(RuntimeError):
    """The model's computation depends on numbers, as a router's choice of experts does, so it has no dry run."""


def dry_run(
    model: Any,
    rows: Sequence[PackedBatch],
    *,
    solo: bool = False,
    autocast: torch.dtype | None = None,
    per_token: bool = False,
    accumulated: bool = False,
    card: bool = False,
) -> Peak:
    """Run a microbatch forward and backward without computing, and return its peak.

    Args:
        model: prepared (see `forwards`), adapters attached; on any device, "meta" among them. It is left as it was.
        rows: what the model is called with one after another before the backward pass.
        autocast: the type that full fine-tuning computes in, None without autocast.
        per_token: the head gives log-probabilities, as preference losses need them.
        accumulated: the gradients of an earlier microbatch are there already.
        card: compute as on a CUDA card, in larger chunks.

    Raises:
        NoDryRun: the architecture cannot.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    live = LiveBytes()
    try:
        with ExitStack() as stack:
            stack.enter_context(_without_masks(model))
            if card:
                stack.enter_context(_as_on_a_card(model))
            trained = stack.enter_context(without_numbers(model, fake, live))
            stack.enter_context(_told_apart(model, trained, live))
            for _ in range(2 if accumulated else 1):
                live.restart()
                _one_pass(model, rows, fake, live, solo, autocast, per_token)
    except Exception as error:  # whatever an architecture that looks at numbers may raise where there are none
        raise NoDryRun(str(error).partition("\n")[0]) from error
    return Peak(live.peak[LAYERS], live.peak[HEAD], live.peak[GRADIENTS], len(live.products))


def counted_activations(
    model: Any, layout: str, autocast: torch.dtype | None, longest: int, card: bool = False
) -> Activations:
    """As `memory.measure_activations`, computing nothing.

    Raises:
        NoDryRun: the architecture cannot.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with ExitStack() as stack:
            stack.enter_context(_without_masks(model))
            if card:
                stack.enter_context(_as_on_a_card(model))
            stack.enter_context(without_numbers(model, fake, LiveBytes()))
            stack.enter_context(fake)
            return measure_activations(model, layout, autocast, longest)
    except Exception as error:
        raise NoDryRun(str(error).partition("\n")[0]) from error


def unreached_without_numbers(model: Any) -> Unreached:
    """As `reach.find_unreached`, computing nothing.

    Raises:
        NoDryRun: the architecture cannot.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _without_masks(model), without_numbers(model, fake, LiveBytes()), fake:
            return find_unreached(model)
    except Exception as error:
        raise NoDryRun(str(error).partition("\n")[0]) from error


def _one_pass(
    model: Any,
    rows: Sequence[PackedBatch],
    fake: FakeTensorMode,
    live: LiveBytes,
    solo: bool,
    autocast: torch.dtype | None,
    per_token: bool,
) -> None:
    inputs = [
        {name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in each.items()}
        for each in (row.model_inputs(solo) for row in rows)
    ]
    with fake, live:
        computing = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None)
        found = []
        for each in inputs:
            with computing:
                found.append(model(**each, per_token=per_token)["logps" if per_token else "loss"].sum())
        torch.stack(found).sum().backward()


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make; `peak` holds their bytes by kind when they were most together.

    `products` are the 16-bit matrix products met, by their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = LAYERS
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.total = self.most = 0
        self.products: set[Any] = set()
        self._met: dict[int, _Met] = {}

    def restart(self) -> None:
        """Forget the peak so far, not what lives."""
        self.most, self.peak = self.total, self.live.copy()

    def ignore(self, tensor: Tensor) -> None:
        """Weights: they are there anyway."""
        storage = tensor.untyped_storage()
        self._met[storage._cdata] = _Met(weakref.ref(storage), None, 0)

    def call(self, tensor: Tensor, kind: str) -> None:
        """Count what a tensor lies in as of another kind from now on."""
        met = self._met.get(tensor.untyped_storage()._cdata)
        if met is not None and met.kind is not None:
            self.live[met.kind] -= met.size
            self.live[kind] += met.size
            met.kind = kind

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in PRODUCTS and out.element_size() == 2:
            self.products.add((function, *(tensor.shape for tensor in args if isinstance(tensor, Tensor))))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        return out

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self._met:
            return
        met = _Met(weakref.ref(storage, lambda _: self._part(number)), self.kind, size)
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
class _Met:
    reference: Any
    kind: str | None
    size: int


@contextmanager
def without_numbers(model: nn.Module, fake: FakeTensorMode, live: LiveBytes) -> Iterator[list[nn.Parameter]]:
    """The model with parameters and buffers that have no numbers; yields those that are trained."""
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
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    live.ignore(tensor)
        model.train()
        yield [parameter for parameter in made.values() if parameter.requires_grad]
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
    import copy

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


@contextmanager
def _as_on_a_card(model: Any) -> Iterator[None]:
    """Chunks as a CUDA card computes them, and attention that keeps no probabilities, as `varlen_attn` keeps none."""
    own = token_nll.BYTES_PER_CHUNK["cpu"], token_nll.ROWS_AT_A_TIME, gated_mlp.CPU_ROWS
    used = segmented(model)
    crossover = 0 if used is None else used.crossover
    token_nll.BYTES_PER_CHUNK["cpu"] = token_nll.BYTES_PER_CHUNK["cuda"]
    token_nll.ROWS_AT_A_TIME = gated_mlp.CPU_ROWS = 1 << 40
    use_crossover(model, 0)
    try:
        yield
    finally:
        token_nll.BYTES_PER_CHUNK["cpu"], token_nll.ROWS_AT_A_TIME, gated_mlp.CPU_ROWS = own
        use_crossover(model, crossover)
