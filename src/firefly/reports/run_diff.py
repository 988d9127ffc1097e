"""`firefly runs diff`: why two runs differ.

Told in the order of what explains most: what is trained, how it is computed (which rounding alone should show), what
has no effect; and then how far the losses went together.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from firefly.config import TRAINING_DEFAULTS, UNUSED, own_fields
from firefly.reports.runs import clock, compact, nearby, number, paragraph, size, state_name
from firefly.runs.records import RunRecord, finite, mapping, series
from firefly.translation import translate

# Configuration keys that say how something is computed. Whatever is in neither list counts as changing what is trained.
COMPUTING_KEYS = {
    "tokens_per_microbatch",
    "gradient_checkpointing",
    "nf4_cache",
    "fp16",
    "bf16",
    "use_cpu",
    "tf32",
    "precompute_reference",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "full_determinism",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
}
# Keys that train nothing: places (what lies there is compared by its hash), limits on rows, evaluation, saving, logs.
IDLE_KEYS = {
    "output_dir",
    "resume_from_checkpoint",
    "model_name_or_path",
    "model_revision",
    "hub",
    "trust_remote_code",
    "train_file",
    "eval_file",
    "template_name",
    "max_malformed_rows",
    "max_lost_share",
    "tokenize_num_workers",
    "per_device_eval_batch_size",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "do_train",
    "do_eval",
    "do_predict",
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "include_num_input_tokens_seen",
    "skip_memory_metrics",
}
IDLE_PREFIXES = ("logging_", "save_", "hub_", "push_to_hub", "log_", "trackio_")
# Their product is compared, as the examples of a step.
STEP_KEYS = {"per_device_train_batch_size", "gradient_accumulation_steps"}

PACKAGES_FIRST = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "accelerate")
HARDWARE = ("device", "gpu", "cpu", "cpu_capability", "threads")
TOLERANCES = ("1e-6", "1e-3")
"""How closely losses are asked to agree: by rounding alone, and to the eye."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same: `a` of the first run, `b` of the second; None is what was not set or recorded."""

    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Agreement:
    """How far the training losses of two runs go together, over the steps that both logged.

    Attributes:
        steps: how many steps were compared.
        until: tolerance → the last step up to which all losses lie within it; None if not even the first does.
        first: the first step at which they differ at all, with both losses; None if they never do.
        largest: the largest gap, and the step where it is.
    """

    steps: int
    last: int | None
    until: dict[str, int | None]
    first: tuple[int, float, float] | None
    largest: tuple[float, int] | None


@dataclass(frozen=True)
class RunDiff:
    """Two runs beside each other.

    Attributes:
        trained, computed, idle: differences in what is trained, in how it is computed, and in what trains nothing.
        same: names of what is equal in both.
        unknown: names of what only one of them recorded.
        outcome: name → (of the first run, of the second).
    """

    a: RunRecord
    b: RunRecord
    trained: list[Difference]
    computed: list[Difference]
    idle: list[Difference]
    same: list[str]
    unknown: list[str]
    agreement: Agreement
    outcome: dict[str, tuple[float | None, float | None]]

    def as_dict(self) -> dict[str, Any]:
        """The value that `firefly runs diff --json` prints."""
        agreement = asdict(self.agreement)
        agreement |= {name: agreement[name] and list(map(finite, agreement[name])) for name in ("first", "largest")}
        outcome = {name: [finite(value) for value in pair] for name, pair in self.outcome.items()}
        return {
            "a": self.a.as_dict(),
            "b": self.b.as_dict(),
            "trained": [asdict(item) for item in self.trained],
            "computed": [asdict(item) for item in self.computed],
            "without_effect": [asdict(item) for item in self.idle],
            "same": self.same,
            "not_recorded_in_both": self.unknown,
            "losses": agreement,
            "outcome": outcome,
        }


def compare_runs(a: RunRecord, b: RunRecord) -> RunDiff:
    """What differs between two runs, and how far their losses agree."""
    trained, same_parts, unknown = _compare_identities(a, b)
    keys = compare_configs(a, b)
    trained += keys["trained"]
    if not keys["trained"]:
        same_parts.append("configuration")
    computed = [item for read in COMPUTED for item in _differences(read(a), read(b))]
    told = {item.what for item in computed}  # what a key resolved to says more than the key
    computed += [item for item in keys["computed"] if item.what not in told]
    held_out = _hash("eval_data")(a), _hash("eval_data")(b)
    if held_out[0] != held_out[1]:
        keys["idle"].insert(0, Difference("eval_data", *held_out))
    elif held_out[0]:
        same_parts.append("eval_data")
    for name, read in (("versions", _versions), ("hardware", _hardware)):
        if read(a) == read(b) and any(read(a).values()):
            same_parts.append(name)
    return RunDiff(
        a=a,
        b=b,
        trained=trained,
        computed=computed,
        idle=keys["idle"],
        same=same_parts,
        unknown=unknown,
        agreement=compare_losses(series(a.metrics, "loss"), series(b.metrics, "loss")),
        outcome={name: (ours, outcome_of(b)[name]) for name, ours in outcome_of(a).items()},
    )


def _compare_identities(a: RunRecord, b: RunRecord) -> tuple[list[Difference], list[str], list[str]]:
    """Which identities differ, which are the same, and which only one of the runs recorded."""
    differing, equal, unknown = [], [], []
    for name, read in IDENTITIES.items():
        ours, theirs = read(a), read(b)
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None:
            unknown.append(name)
        elif ours == theirs:
            equal.append(name)
        else:
            differing.append(Difference(name, ours, theirs))
            if name == "data":
                differing += _differences(_counts(a), _counts(b))
    return differing, equal, unknown


# ---- what a run was ----


def _hash(name: str) -> Callable[[RunRecord], Any]:
    return lambda run: mapping(run.passport.get("hashes")).get(name)


def _base(run: RunRecord) -> Any:
    weights = mapping(mapping(run.passport.get("hashes")).get("base_weights"))
    return weights.get("sha256") or weights.get("commit")


def _examples_per_step(run: RunRecord) -> int | None:
    sizes = [run.config.get(name) for name in sorted(STEP_KEYS)]
    ranks = run.passport.get("world_size", 1)  # one, before it was recorded
    if not all(isinstance(number, int) for number in (*sizes, ranks)):
        return None
    return math.prod((*sizes, ranks))  # type: ignore[arg-type]


def _seed(run: RunRecord) -> Any:
    return run.config.get("seed", run.passport.get("seed"))  # a seed that nobody set is in the passport alone


def _counts(run: RunRecord) -> dict[str, Any]:
    return {name: run.data.get(name) for name in COUNTS}


def _resolved(run: RunRecord) -> dict[str, Any]:
    """What was chosen, without the size of the step, which is an identity."""
    resolved = mapping(run.passport.get("resolved"))
    return {name: value for name, value in resolved.items() if name not in ("examples_per_step", "world_size")}


def _ranks(run: RunRecord) -> dict[str, Any]:
    return {"world_size": run.passport.get("world_size")}


def _hardware(run: RunRecord) -> dict[str, Any]:
    return {name: mapping(run.passport.get("hardware")).get(name) for name in HARDWARE}


def _versions(run: RunRecord) -> dict[str, Any]:
    versions = mapping(run.passport.get("versions"))
    return {name: versions[name] for name in dict.fromkeys((*PACKAGES_FIRST, *versions)) if name in versions}


def _commit(run: RunRecord) -> dict[str, Any]:
    return {"firefly_commit": run.passport.get("firefly_commit")}


COMPUTED = (_resolved, _ranks, _hardware, _versions, _commit)

# What identifies a run, most telling first; the names are codes of the catalogue, after `runs.part_`.
IDENTITIES: dict[str, Callable[[RunRecord], Any]] = {
    "task": lambda run: run.config.get("task_type"),
    "mode": lambda run: run.config.get("train_mode"),
    "base": _base,
    "data": _hash("data"),
    "template": lambda run: mapping(run.passport.get("template")).get("sha256"),
    "tokenizer": _hash("tokenizer"),
    "seed": _seed,
    "examples_per_step": _examples_per_step,
}
IDENTITY_KEYS = {"task_type", "train_mode", "seed", *STEP_KEYS}
COUNTS = ("rows", "kept", "cut", "train_examples", "tokens", "target_tokens")
"""What data_report.json says of different data."""


def compare_configs(a: RunRecord, b: RunRecord) -> dict[str, list[Difference]]:
    """Differing keys by what they change: "trained", "computed" or "idle".

    A key that one of them does not name is at its default: the one recorded with the run or, of a run from before such
    a key or before defaults were recorded, the other run's, or today's.
    """
    recorded = [mapping(run.passport.get("defaults")) for run in (a, b)]
    today = {name: spec.default for name, (_, spec) in own_fields().items()} | TRAINING_DEFAULTS
    ours, theirs = (today | other | own | run.config for run, own, other in ((a, *recorded), (b, *reversed(recorded))))
    groups: dict[str, list[Difference]] = {"trained": [], "computed": [], "idle": []}
    for name in dict.fromkeys((*ours, *theirs)):
        value, other = _plain(ours.get(name)), _plain(theirs.get(name))
        if value == other or name in IDENTITY_KEYS:
            continue
        unused = _unused(name, a.config) and _unused(name, b.config)
        idle = name in IDLE_KEYS or name.startswith(IDLE_PREFIXES) or unused
        group = "computed" if name in COMPUTING_KEYS else "idle" if idle else "trained"
        groups[group].append(Difference(name, value, other))
    return groups


def _unused(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a key has no effect in a run of this configuration."""
    return any(config.get(setting) == value and name in names for setting, value, names in UNUSED)


def _plain(value: Any) -> Any:
    """JSON has lists where a configuration has tuples."""
    return list(value) if isinstance(value, tuple) else value


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Where two mappings differ; what a run of an earlier version did not record is no difference."""
    return [
        Difference(name, a[name], b[name])
        for name in a
        if a.get(name) is not None and b.get(name) is not None and a[name] != b[name]
    ]


# ---- how it went ----


def compare_losses(a: Mapping[int, float], b: Mapping[int, float]) -> Agreement:
    """How far two curves of training losses agree.

    A logged loss is the mean over the steps since the last log. Where two runs log at different steps, the same steps
    are compared: the means of the finer one are put together.
    """
    ours, theirs = _over_common_steps(a, b)
    gaps = {step: _gap(ours[step], theirs[step]) for step in ours}
    until: dict[str, int | None] = dict.fromkeys(TOLERANCES)
    for tolerance in TOLERANCES:
        for step, gap in gaps.items():
            if gap > float(tolerance):
                break
            until[tolerance] = step
    differing = [step for step, gap in gaps.items() if gap]
    largest = max(gaps, key=gaps.__getitem__, default=None)
    return Agreement(
        steps=len(gaps),
        last=max(gaps, default=None),
        until=until,
        first=(differing[0], ours[differing[0]], theirs[differing[0]]) if differing else None,
        largest=None if largest is None else (gaps[largest], largest),
    )


def _gap(a: float, b: float) -> float:
    """Distance of two losses; none between two that are no numbers, and an infinite one if only one is none."""
    if math.isfinite(a) and math.isfinite(b):
        return abs(a - b)
    return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf


def _over_common_steps(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[dict[int, float], dict[int, float]]:
    """Mean losses of both over the same steps, by the last of them."""
    if list(a) == list(b):
        return dict(a), dict(b)
    common = {step for step in a if step in b}
    return _means(a, common), _means(b, common)


def _means(points: Mapping[int, float], ends: Collection[int]) -> dict[int, float]:
    """Means over the steps up to each of `ends` since the one before, from means between logged steps."""
    result, total, previous, begun = {}, 0.0, 0, 0
    for step, loss in points.items():
        total += loss * (step - previous)
        previous = step
        if step in ends:
            result[step] = total / max(step - begun, 1)
            total, begun = 0.0, step
    return result


def outcome_of(run: RunRecord) -> dict[str, float | None]:
    """What came out of a run. Of one that did not finish, what its last log said."""
    held_out = [value for value in series(run.metrics, "eval_loss").values() if math.isfinite(value)]
    last = next((line for line in reversed(run.metrics) if "input_tokens_per_second" in line), {})
    results = run.results
    return {
        "steps": run.steps,
        "loss": run.loss,
        "train_loss": results.get("train_loss"),
        "eval_loss": run.eval_loss,
        "lowest_eval_loss": min(held_out, default=None),
        "tokens_per_second": results.get("input_tokens_per_second", last.get("input_tokens_per_second")),
        "examples_per_second": results.get("examples_per_second"),
        "peak_memory_bytes": results.get("peak_memory_bytes", last.get("memory_bytes")),
        "seconds": run.seconds,
        "seconds_to_first_step": results.get("seconds_to_first_step"),
    }


# ---- shown ----


def as_json(diff: RunDiff) -> str:
    return json.dumps(diff.as_dict(), ensure_ascii=False)


def show_diff(diff: RunDiff, console: Console) -> None:
    """Print why the two runs differ, and how."""
    for label, run in (("A", diff.a), ("B", diff.b)):
        console.print(Text.assemble((f"{label}  ", "bold"), nearby(run.folder), (f"  {state_name(run.state)}", "dim")))
    names = part_names()
    show_differences(console, translate("what is trained differs"), diff.trained, names)
    show_differences(console, translate("how it is computed differs (rounding, mostly)"), diff.computed, names)
    show_differences(console, translate("differs without an effect on training"), diff.idle, names)
    summary = []
    if diff.same:
        summary.append(translate("the same: {parts}", parts=", ".join(names[part] for part in diff.same)))
    if diff.unknown:
        summary.append(
            translate("recorded by one of them only: {parts}", parts=", ".join(names[part] for part in diff.unknown))
        )
    if any(item.what == "data" for item in diff.trained):
        summary.append(
            translate("the hash of the data covers the prepared examples: their token ids, labels and order.")
        )
    if not diff.trained:
        summary.append(
            translate(
                "nothing that is trained differs: what the losses differ by comes from how they were computed."
                if diff.computed
                else "nothing that shapes training differs, as far as both recorded it."
            )
        )
    paragraph(console, translate("in short"), summary)
    paragraph(console, translate("loss"), describe_agreement(diff.agreement))
    show_outcome(diff, console)


def part_names() -> dict[str, str]:
    """What the parts of a run are called."""
    return {
        "task": translate("task"),
        "mode": translate("train_mode"),
        "base": translate("base model"),
        "data": translate("data"),
        "template": translate("template"),
        "tokenizer": translate("tokenizer"),
        "eval_data": translate("evaluation data"),
        "seed": translate("seed"),
        "examples_per_step": translate("examples per step"),
        "configuration": translate("configuration"),
        "versions": translate("versions"),
        "hardware": translate("hardware"),
    }


def show_differences(console: Console, title: str, items: Sequence[Difference], names: Mapping[str, str]) -> None:
    if not items:
        return
    console.print()
    console.print(Text(title, style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    own = own_fields()  # where null is a value
    table.add_column("", overflow="fold")
    table.add_column("A", overflow="fold")
    table.add_column("B", overflow="fold")
    for item in items:
        nothing = "null" if item.what in own else translate("not set")
        ours, theirs = (nothing if value is None else shortened(value) for value in (item.a, item.b))
        table.add_row(Text(f"  {names.get(item.what, item.what)}"), Text(ours), Text(theirs))
    console.print(table)


def shortened(value: Any) -> str:
    """A value; of a hash or a commit, as much as tells it from others."""
    text = compact(value)
    match = re.fullmatch(r"([0-9a-f]{10})[0-9a-f]{22,}(.*)", text)
    return f"{match[1]}…{match[2]}" if match else text


def describe_agreement(found: Agreement) -> list[str]:
    """How far the losses agree, in one or two sentences."""
    if not found.steps or found.largest is None:
        return [translate("no step was logged by both.")]
    if found.first is None:
        return [
            translate(
                "the losses are identical at all {steps} common logs, up to step {last}.",
                steps=found.steps,
                last=found.last,
            )
        ]
    step, ours, theirs = found.first
    lines = []
    for tolerance, until in found.until.items():
        if until == found.last:
            lines.append(
                translate(
                    "the losses agree to {tolerance} at all {steps} common logs.",
                    tolerance=tolerance,
                    steps=found.steps,
                )
            )
            break
        if until is not None and until not in list(found.until.values())[: len(lines)]:
            lines.append(
                translate("the losses agree to {tolerance} until step {step}.", tolerance=tolerance, step=until)
            )
    if not lines:
        lines.append(
            translate("the losses do not agree to {tolerance} even at the first common log.", tolerance=TOLERANCES[-1])
        )
    values = {"a": f"{ours:.7g}", "b": f"{theirs:.7g}", "gap": f"{_gap(ours, theirs):.1e}"}
    lines.append(translate("first difference: step {step}, {a} against {b} ({gap} apart).", step=step, **values))
    gap, at = found.largest
    lines.append(translate("largest difference: {gap}, at step {step}.", gap=f"{gap:.1e}", step=at))
    return lines


def show_outcome(diff: RunDiff, console: Console) -> None:
    """A table of what came out, B against A."""
    rows = {name: pair for name, pair in diff.outcome.items() if pair != (None, None)}
    if not rows:
        return
    console.print()
    console.print(Text(translate("outcome"), style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("")
    for title in ("A", "B", "B : A"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, (ours, theirs) in rows.items():
        ratio = f"{theirs / ours:.3f}" if ours and theirs else ""
        table.add_row(f"  {name}", outcome_text(name, ours), outcome_text(name, theirs), ratio)
    console.print(table)


def outcome_text(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "seconds":
        return clock(value)
    if name == "peak_memory_bytes":
        return size(value)
    if name == "steps":
        return str(int(value))
    return number(value) if "loss" in name else f"{value:,.2f}"
