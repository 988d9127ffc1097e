"""The engines that are compared: their programs, what they need, and the tunings worth trying on a CPU."""

import json
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cases import Case
from processes import Tuning

HERE = Path(__file__).resolve().parent
# glibc hands large blocks back to the kernel at once, so every step pays for its pages again.
KEEP_FREED_MEMORY: Mapping[str, str] = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One side of a comparison."""

    label: str
    programs: Mapping[str, str]
    """Task → program in this folder; a task that is not there is not compared with this engine."""
    modules: tuple[str, ...] = ()
    """What its Python has to have."""
    arguments: str = ""
    """On its command line whatever the tuning."""


_TRL = {"sft": "trl_sft.py", "pretrain": "trl_sft.py", "dpo": "trl_dpo.py"}
_LLAMAFACTORY = {"sft": "llamafactory_sft.py", "pretrain": "llamafactory_sft.py", "dpo": "llamafactory_dpo.py"}

ENGINES: Mapping[str, Engine] = {
    "firefly": Engine(label="Firefly", programs=dict.fromkeys(("sft", "pretrain", "dpo"), "firefly_side.py")),
    "trl": Engine(label="TRL", programs=_TRL, modules=("trl", "peft", "datasets")),
    "llamafactory": Engine(label="LLaMA-Factory", programs=_LLAMAFACTORY, modules=("llamafactory",)),
    "plain": Engine(
        label="transformers + peft",
        programs={"sft": "plain_sft.py", "pretrain": "plain_sft.py"},
        modules=("transformers", "peft"),
    ),
    "trl_liger": Engine(
        label="TRL + Liger", programs=_TRL, modules=("trl", "peft", "datasets", "liger_kernel"), arguments="--liger"
    ),
    "unsloth": Engine(label="Unsloth", programs={"sft": "unsloth_sft.py"}, modules=("unsloth", "trl")),
}
CPU_ENGINES = ("firefly", "trl", "llamafactory", "plain")
HEADLINE_ENGINES = ("firefly", "trl", "llamafactory")


def reason_to_skip(name: str, case: Case, python: str) -> str | None:
    """Why an engine cannot run a case here; None if it can."""
    engine = ENGINES[name]
    if case.task not in engine.programs:
        return f"it has no side for {case.task}"
    modules = [*engine.modules, *(["bitsandbytes"] if case.mode == "qlora" else [])]
    program = f"import importlib.util as u; print(*[m for m in {modules!r} if not u.find_spec(m)])"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"its Python does not run: {error}"
    missing = done.stdout.split()
    return f"not installed in its Python: {', '.join(missing)}" if missing else None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a peer puts examples into forward passes."""

    kind: str
    batch_size: int

    @property
    def name(self) -> str:
        """The name in a report."""
        return f"{self.kind}, batch {self.batch_size}"

    @property
    def arguments(self) -> str:
        """What a side's command line calls it."""
        return f"--layout {self.kind} --batch_size {self.batch_size}"


def _layouts(kind: str, *batch_sizes: int) -> tuple[Layout, ...]:
    return tuple(Layout(kind=kind, batch_size=batch_size) for batch_size in batch_sizes)


# Engine → layouts of its SFT, in the order in which sweeps have found them good. Larger batches were slower by a third
# and more (`sft_lora_sweep.json`).
_SFT_LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "trl": (
        *_layouts("packed", 1),
        *_layouts("padding_free", 2),
        *_layouts("padded", 1),
        *_layouts("packed", 2),
    ),
    "llamafactory": (*_layouts("padded", 1, 2), *_layouts("packed", 1), *_layouts("grouped", 4)),
    "plain": (*_layouts("padded", 1, 2), *_layouts("grouped", 4), *_layouts("padded", 4, 8), *_layouts("grouped", 8)),
}
LONG = 512
"""Tokens beyond which rows mostly fill their length, so that padding is small and packing gains little."""


def layouts(name: str, case: Case) -> tuple[Layout, ...]:
    """Layouts worth trying, all exact: a row never sees another. The first is the one to begin with."""
    if case.task == "dpo":
        found = _layouts("padded", 1, 2)
    elif case.task == "pretrain":
        # Blocks are full, so there is nothing to pack; TRL keeps a block's documents apart in this layout alone.
        found = _layouts("padding_free" if name == "trl" and case.isolated else "padded", 1, 2)
    elif case.max_tokens > LONG:
        found = tuple(sorted(_SFT_LAYOUTS[name], key=lambda layout: (layout.kind != "padded", layout.batch_size)))
    else:
        found = _SFT_LAYOUTS[name]
    # Packs are checked against their rows with the adapter off, and full fine-tuning has none.
    in_order = [layout for layout in found if layout.kind != "packed" or case.mode != "full"]
    return tuple(layout for layout in in_order if not case.examples_per_step % layout.batch_size)


# Precision of a peer → the type that its matrix products are computed in.
PRODUCTS: Mapping[str, str] = {
    "bfloat16": "bfloat16",
    "autocast": "bfloat16",
    "float32": "float32",
    "float16": "float16",
}
HOPELESS = 0.25
"""A type with less than this share of the fastest one's rate is not tried. With 0.4 a peer trained 0.8 as fast."""
NO_WORSE = 0.9


def precisions(case: Case, rates: Mapping[str, float]) -> tuple[str, ...]:
    """Precisions worth trying where products have these rates, the fastest first.

    Trained weights are float32 in each, so full fine-tuning has no bfloat16 of its own. float16 without loss scaling
    (transformers has none on a CPU) is tried where nothing is faster.
    """
    names = ("autocast", "float32") if case.mode == "full" else ("bfloat16", "autocast", "float32", "float16")
    least = {"float16": NO_WORSE * max(rates.values())}
    worth = [name for name in names if rates[PRODUCTS[name]] >= least.get(name, HOPELESS * max(rates.values()))]
    return tuple(sorted(worth, key=lambda name: -rates[PRODUCTS[name]]))


def peer_tuning(precision: str, layout: Layout, attention: str, *, keep_memory: bool = True) -> Tuning:
    """One way to run a peer."""
    return Tuning(
        name=f"{precision}, {layout.name}, {attention}{', freed memory kept' if keep_memory else ''}",
        arguments=f"--precision {precision} {layout.arguments} --attention {attention}",
        environment=KEEP_FREED_MEMORY if keep_memory else {},
    )


def likely_tuning(name: str, case: Case, rates: Mapping[str, float]) -> Tuning:
    """What a sweep would begin with: for trials, before there is one."""
    if name == "firefly":
        return Tuning(name="default settings")
    return peer_tuning(precisions(case, rates)[0], layouts(name, case)[0], "eager")


OWN_TOKENS = (512, 1024, 2048, 4096)


def own_tuning(precision: str | None, tokens: int | None = None) -> Tuning:
    """Firefly with settings that a user could have chosen by hand."""
    keys: dict[str, object] = {} if precision is None else {"bf16": precision == "bfloat16"}
    keys |= {} if tokens is None else {"tokens_per_microbatch": tokens}
    words = [*([precision] if precision else []), *([f"{tokens} tokens a microbatch"] if tokens else [])]
    return Tuning(name=", ".join(words), arguments=f"--overrides {shlex.quote(json.dumps(keys))}")


def in_order(tuning: Tuning, precision: str, case: Case, name: str) -> Tuning:
    """A tuning whose every step holds our rows, for the losses alone."""
    layout = next(layout for layout in layouts(name, case) if layout.kind not in ("packed", "grouped"))
    attention = "eager" if "--attention eager" in tuning.arguments else "sdpa"
    return Tuning(
        name="our rows in every step",
        arguments=f"--precision {precision} {layout.arguments} --attention {attention}",
        environment=tuning.environment,
    )


def default_tuning(name: str, case: Case, rates: Mapping[str, float]) -> Tuning:
    """What a user gets who sets nothing: padded batches, and where the engine says so activation checkpointing."""
    if name == "firefly":
        return likely_tuning(name, case, rates)
    # TRL and LLaMA-Factory's examples turn bf16 on; transformers does not.
    precision = "autocast" if rates["bfloat16"] >= HOPELESS * max(rates.values()) and name != "plain" else "float32"
    checkpointing = "" if name == "plain" else " --gradient_checkpointing"
    kind = layouts(name, case)[0].kind if case.task == "pretrain" else "padded"
    batch_size = 1 if case.task == "dpo" else min(8, case.examples_per_step)
    return Tuning(
        name="default", arguments=f"--precision {precision} --layout {kind} --batch_size {batch_size}{checkpointing}"
    )
