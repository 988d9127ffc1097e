"""The engines that are compared: their programs, what they need, and the tunings worth trying on a CPU."""

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


# Engine → layouts of its SFT, the one known to be good first.
_SFT_LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "trl": (
        *_layouts("padding_free", 2, 4, 8),
        *_layouts("packed", 1, 2),
        *_layouts("grouped", 8),
        *_layouts("padded", 1, 2),
    ),
    "llamafactory": (*_layouts("padded", 1, 2, 4), *_layouts("packed", 1), *_layouts("grouped", 4)),
    "plain": (*_layouts("padded", 1, 2, 4, 8), *_layouts("grouped", 4, 8)),
}
# What earlier sweeps found best (results/sft_lora_sweep.json, of a CPU with bf16 instructions). There eager attention,
# which is matrix products, beats sdpa for every peer and task; without them, for TRL's short rows alone.
_KNOWN_IN_BF16: Mapping[tuple[str, str], Layout] = {
    ("trl", "lora"): Layout(kind="packed", batch_size=1),
    ("trl", "qlora"): Layout(kind="packed", batch_size=1),
    ("trl", "full"): Layout(kind="padded", batch_size=1),
}
LONG = 512
"""Tokens beyond which eager attention, which keeps the square of a row's length, takes tens of gigabytes in float32."""


def layouts(name: str, case: Case) -> tuple[Layout, ...]:
    """Layouts worth trying, all exact: a row never sees another. The first is the one to begin with."""
    if case.task == "dpo":
        found = _layouts("padded", 1, 2)
    elif case.task == "pretrain":
        # Blocks are full, so there is nothing to pack; TRL keeps a block's documents apart in this layout alone.
        found = _layouts("padding_free" if name == "trl" and case.isolated else "padded", 1, 2)
    elif case.max_tokens > LONG:
        # Rows fill their length, so padding is small.
        found = tuple(sorted(_SFT_LAYOUTS[name], key=lambda layout: (layout.kind != "padded", layout.batch_size)))
    else:
        found = _SFT_LAYOUTS[name]
    # Packs are checked against their rows with the adapter off, and full fine-tuning has none.
    in_order = [layout for layout in found if layout.kind != "packed" or case.mode != "full"]
    return tuple(layout for layout in in_order if not case.examples_per_step % layout.batch_size)


def precisions(case: Case, has_bf16: bool) -> tuple[str, ...]:
    """Precisions worth trying; trained weights are float32 in each, so full fine-tuning has no bfloat16 of its own.

    Where bf16 is fast, float32 came to two thirds and a half of it (`sft_lora_sweep.json`) and is left out.
    """
    if not has_bf16:
        return ("float32",)
    return ("autocast",) if case.mode == "full" else ("bfloat16", "autocast")


def known_good(name: str, case: Case, has_bf16: bool) -> Tuning:
    """The tuning of a run without a sweep."""
    if name == "firefly":
        return Tuning(name="firefly")
    precision, layout, attention = precisions(case, has_bf16)[0], layouts(name, case)[0], "sdpa"
    short = case.task == "sft" and case.max_tokens <= LONG
    if has_bf16 and short:
        layout = _KNOWN_IN_BF16.get((name, case.mode), layout)
    if has_bf16 or (short and name == "trl"):
        attention = "eager"
    return Tuning(
        name=f"{precision}, {layout.name}, {attention}, freed memory kept",
        arguments=f"--precision {precision} {layout.arguments} --attention {attention}",
        environment=KEEP_FREED_MEMORY,
    )


def in_order(tuning: Tuning, precision: str, case: Case, name: str) -> Tuning:
    """A tuning whose every step holds our rows, for the losses alone."""
    layout = next(layout for layout in layouts(name, case) if layout.kind not in ("packed", "grouped"))
    return Tuning(
        name="our rows in every step",
        arguments=f"--precision {precision} {layout.arguments}",
        environment=tuning.environment,
    )


def default_tuning(name: str, case: Case, has_bf16: bool) -> Tuning:
    """What a user gets who sets nothing: padded batches, and where the engine says so activation checkpointing."""
    precision = "autocast" if has_bf16 and name != "plain" else "float32"
    checkpointing = "" if name == "plain" else " --gradient_checkpointing"
    kind = layouts(name, case)[0].kind if case.task == "pretrain" else "padded"
    batch_size = 1 if case.task == "dpo" else min(8, case.examples_per_step)
    return Tuning(
        name="default", arguments=f"--precision {precision} --layout {kind} --batch_size {batch_size}{checkpointing}"
    )
