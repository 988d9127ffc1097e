"""Cached results of probes and measurements of an architecture, so that the next run with it starts sooner.

The cache key is everything that a result depends on: the model's configuration and class, its parameters' shapes and
types, library versions, the code of firefly.models and the device. Weights do not count: whether segments are isolated,
and what a token stores for backward, follow from the computation alone. Models with remote code are probed every time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from firefly.console import notice
from firefly.errors import UsageError
from firefly.files import atomic_file, cache_folder, first_line, make_cache, source_hash
from firefly.models.attention import choose_layout, segmented, use_segments
from firefly.models.dry_run import measure_activations
from firefly.models.kernels.segment_attention import GEMM_LONGEST, measure_crossover
from firefly.models.memory import Activations
from firefly.models.precision import Rates
from firefly.models.products import Products, measure_rates
from firefly.models.reach import Unreached, find_unreached

CODE = Path(__file__).parent
"""What results are those of."""

KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d", "fla", "kernels")
"""Where they are installed, some layers' weights are computed with by a kernel and the layers are not called."""


def cached_layout(model: Any) -> tuple[str, str]:
    """As `attention.choose_layout`, cached."""
    path = _path("layout", model, [])
    found = _read(path)
    if found is None:
        layout, reason = choose_layout(model)
        _write(path, {"layout": layout, "reason": reason})
        return layout, reason
    if found["layout"] == "segments":
        use_segments(model)
    return found["layout"], found["reason"]


def cached_unreached(model: Any) -> Unreached:
    """As `reach.find_unreached`, cached; empty for a model that cannot be run on text alone."""
    path = _path("reach", model, [name for name in KERNEL_PACKAGES if find_spec(name)])
    found = _read(path)
    if found is None:
        try:
            unreached = find_unreached(model)
        except Exception as error:  # code that a model brings along may raise anything
            notice(
                "adapter.reach_unknown",
                "the model does not run on a short row of text, so what text reaches in it is not known and all of it "
                "is trained: {problem}",
                problem=f"{type(error).__name__}: {error}".partition("\n")[0],
            )
            return Unreached()
        found = {"modules": sorted(unreached.modules), "parameters": sorted(unreached.parameters)}
        _write(path, found)
    return Unreached(frozenset(found["modules"]), frozenset(found["parameters"]))


def cached_activations(model: Any, layout: str, autocast: torch.dtype | None, longest: int) -> Activations:
    """As `dry_run.measure_activations`, cached.

    Raises:
        UsageError: the architecture's own code does not run under autocast (DBRX adds rows of two types).
    """
    dropout = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    used = segmented(model)
    crossover = None if used is None else used.crossover
    path = _path("activations", model, [layout, str(autocast), longest, dropout, crossover])
    found = _read(path)
    if found is None:
        try:
            measured = measure_activations(model, layout, autocast, longest)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if autocast is None:
                raise
            kind, name = model.config.model_type, str(autocast).removeprefix("torch.")
            raise UsageError(
                "precision.no_autocast",
                "model_type {kind}: its code does not run in {name} beside float32 weights, as full fine-tuning "
                'computes ({problem}). Write "bf16": false, or train an adapter.',
                kind=kind,
                name=name,
                problem=str(error),
            ) from error
        _write(path, asdict(measured))
        return measured
    return Activations(**found)


def cached_crossover(model: Any, device: torch.device, compute: torch.dtype) -> int:
    """Tokens up to which this CPU computes this model's attention faster by matmuls; 0 where there is no choice.

    Measured once for heads of a shape, so that a plan and the run it is for agree, however busy the machine is.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    described = getattr(config, "head_dim", None) or getattr(config, "hidden_size", None)
    if device.type != "cpu" or compute not in GEMM_LONGEST or not heads or not described:
        return 0
    shape = heads, getattr(config, "num_key_value_heads", None) or heads, *_head_widths(config)
    path = _file("attention", [*shape, str(compute), *_measured_by()])
    found = _read(path)
    if found is None:
        found = {"tokens": measure_crossover(*shape, compute)}
        _write(path, found)
    return int(found["tokens"])


def cached_rates(products: Products) -> dict[str, Rates]:
    """As `products.measure_rates`, cached: once for a machine, its threads in use and the shapes of a model, so that
    all runs, plans and answers of it agree."""
    found = known_rates(products)
    if found is None:
        measured = measure_rates(products)
        try:
            _write(_rates_file(products), {name: asdict(rates) for name, rates in measured.items()})
        except (OSError, UsageError) as error:
            notice(
                "precision.not_kept",
                "how fast this CPU is in float32 and in bfloat16 could not be kept ({problem}): the next command "
                "measures it again.",
                problem=first_line(error),
            )
        return measured
    return found


def known_rates(products: Products) -> dict[str, Rates] | None:
    """Those that `cached_rates` has measured before; None where it has not."""
    found = _read(_rates_file(products))
    return None if found is None else {name: Rates(**rates) for name, rates in found.items()}


def _rates_file(products: Products) -> Path:
    shares = [(one.rows, one.outputs, one.inputs, share) for one, share in products.shares().items()]
    return _file("products", [shares, *_measured_by()])


def cached_bytes(kind: str, model: Any, rests_on: list[Any], count: Callable[[], int]) -> int:
    """The result of `count` for this transformers model and what else it depends on, cached."""
    path = _path(kind, model, rests_on)
    found = _read(path)
    if found is None:
        found = {"bytes": count()}
        _write(path, found)
    return int(found["bytes"])


def _measured_by() -> list[Any]:
    """What computes on this CPU now: a time that was measured holds for it alone."""
    cores = torch.backends.cpu.get_cpu_capability(), os.cpu_count(), torch.get_num_threads()
    return [_processor(), *cores, torch.__version__, source_hash(CODE)]


def _processor() -> list[str]:
    """What tells this machine's CPU from others that share the cache: /proc/cpuinfo of the first one but for what
    changes by the minute."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return [platform.machine(), platform.processor()]
    return [line for line in first.splitlines() if not line.startswith(("cpu MHz", "bogomips", "BogoMIPS"))]


def _head_widths(config: Any) -> tuple[int, int]:
    """Widths of a head's queries and of its values. Latent attention (DeepSeek-V2 and its kin) has two, and writes
    the width of the rotary part alone as `head_dim`."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    unrotated, rotated = (getattr(config, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    latent = None if unrotated is None or rotated is None else unrotated + rotated
    return latent or width, getattr(config, "v_head_dim", None) or latent or width


def _path(kind: str, model: Any, parts: list[Any]) -> Path | None:
    """The cache file of a probe of this model; None where no key identifies it."""
    if type(model).__module__.startswith("transformers_modules"):
        return None
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    device = next(model.parameters()).device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = torch.__version__, transformers.__version__, source_hash(CODE)
    whole = [f"{type(model).__module__}.{type(model).__qualname__}", config, shapes, hardware, versions, parts]
    return _file(kind, whole)


def _file(kind: str, rests_on: list[Any]) -> Path:
    """The cache file of a probe that depends on all of this."""
    digest = hashlib.sha256(json.dumps(rests_on, default=str, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "probes" / f"{kind}-{digest[:32]}.json"


def _read(path: Path | None) -> dict[str, Any] | None:
    """What lies there; None where nothing readable does."""
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path | None, found: dict[str, Any]) -> None:
    if path is None:
        return
    make_cache(path.parent)
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(found), encoding="utf-8")
