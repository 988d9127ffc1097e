"""`firefly export`: a format is written, read back by the engine that will run it, compared, and kept if it agrees."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.errors import UsageError, VerificationError
from firefly.export.agreement import Agreement, Limits, read_back
from firefly.export.gguf import check_numbers, convert, convert_adapter, quantize
from firefly.export.llamacpp import LlamaCpp, is_installed
from firefly.export.merge import base_type
from firefly.export.source import Source, open_source
from firefly.models.loading import resolve_model
from firefly.runs.manifest import write_json
from firefly.translation import Phrase

LIMITS = {
    "f32": Limits(kl=1e-4, usual=(0, 1e-5), tie=0.02, agreement=1, gap=0.05),
    "f16": Limits(kl=1e-3, usual=(0, 1e-4), tie=0.05, agreement=1, gap=0.05),
    "bf16": Limits(kl=1e-2, usual=(1e-5, 5e-3), tie=0.1, agreement=0.98),
    "q8_0": Limits(kl=1e-2, usual=(1e-4, 5e-3), tie=0.1, agreement=0.97),
    "q6_k": Limits(kl=5e-2, usual=(1e-3, 1e-2), tie=0.2, agreement=0.95),
    "q5_k_m": Limits(kl=1e-1, usual=(3e-3, 3e-2), tie=0.3, agreement=0.9),
    "q4_k_m": Limits(kl=3e-1, usual=(1e-2, 1e-1), tie=0.5, agreement=0.85),
}
"""By number type. A file beyond them is not what its type says it is."""

UNQUANTISED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ADAPTER_TYPE = "f32"
"""Of an adapter as GGUF; its base is proved in F16."""
FAILED = ".failed"


@dataclass
class Stages:
    """Seconds of an export by stage, in their order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def export_gguf(
    model: ModelConfig,
    adapter: str | None,
    save_path: str,
    number_type: str = "q8_0",
    adapter_alone: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write a model, or base and adapter, as a GGUF file that llama.cpp was seen to answer from as it was trained.

    What was converted lies in a folder beside the file until the file is done, so that an export that was interrupted
    goes on with the merge that it has. An earlier file stays until a good one replaces it.

    Args:
        number_type: of `LIMITS`.
        adapter_alone: write the adapter, for llama.cpp's --lora over its base.

    Returns:
        What was found (docs/export.md), also written beside the file.

    Raises:
        UsageError: model, adapter, type or path are at fault, or a package is missing.
        VerificationError: the file is not the trained model; it is kept with ".failed" behind its name.
    """
    limits = limits_of(number_type)
    target = file_to_write(save_path)
    if adapter_alone and adapter is None:
        raise UsageError(
            "export.no_adapter", "--adapter writes an adapter as GGUF: name it with --adapter_name_or_path."
        )
    stages, scratch = Stages(), target.with_name(f".{target.name}.export")
    with stages.stage("trained model"):
        source = open_source(model, adapter, force)
    scratch.mkdir(parents=True, exist_ok=True)
    written = scratch / target.name
    report: dict[str, Any] = {"format": "gguf", "type": number_type, "file": str(target)}
    with named_if_it_fails(written, target):
        if adapter_alone:
            limits, base = LIMITS["f16"], scratch / "base.gguf"
            report["type"] = ADAPTER_TYPE
            with stages.stage("convert"):
                convert(Path(resolve_model(source.model)), base, "f16")
                convert_adapter(Path(source.adapter or ""), Path(resolve_model(source.model)), written)
            found = _read_gguf(source, base, written, limits, stages)
        else:
            report |= _write_gguf(source, written, number_type, scratch, stages)
            found = _read_gguf(source, written, None, limits, stages)
    return settle(target, written, report, found, limits, stages)


@contextmanager
def named_if_it_fails(written: Path, target: Path) -> Iterator[None]:
    """Where a number is wrong or the engine does not even read the file, what was written is kept as the failure that
    it is. What was made on the way goes in any case but an interruption."""
    try:
        yield
    except VerificationError:
        if written.exists():
            written.replace(failed_name(target))
        shutil.rmtree(written.parent)
        raise


def failed_name(target: Path) -> Path:
    return target.with_name(target.name + FAILED)


def _write_gguf(source: Source, written: Path, number_type: str, scratch: Path, stages: Stages) -> dict[str, Any]:
    """Merge, convert, quantise; every number that was quantised is read back from the disk."""
    with stages.stage("merge"):
        folder = source.folder(scratch)
    if number_type in UNQUANTISED.values():
        with stages.stage("convert"):
            convert(folder, written, number_type)
        return {}
    stored = base_type(ModelConfig(name_or_path=str(folder)))
    whole = scratch / "whole.gguf"
    with stages.stage("convert"):
        convert(folder, whole, UNQUANTISED[stored])
    with stages.stage("quantise"):
        types = quantize(whole, written, number_type)
    with stages.stage("numbers"):
        check_numbers(whole, written)
    whole.unlink()
    if types.fallbacks:
        notice(
            "export.fallbacks",
            "{count} tensors have rows that are no multiple of 256 and are in another type than {type} gives them: "
            "{types}.",
            count=len(types.fallbacks),
            type=number_type.upper(),
            types=", ".join(sorted({f"{wanted} → {got}" for wanted, got in types.fallbacks.values()})),
        )
    return {"tensor_types": types.counts, "fallbacks": len(types.fallbacks)}


def _read_gguf(source: Source, file: Path, lora: Path | None, limits: Limits, stages: Stages) -> Agreement | None:
    """What llama.cpp makes of it; None where it is not installed."""
    if not is_installed():
        return None
    with stages.stage("read back"):
        longest = max(len(row.ids) for row in source.battery.rows)
        with LlamaCpp.open(file, lora, longest, torch.get_num_threads()) as engine:
            return read_back(engine, source.battery, source.expected, limits)


def settle(
    target: Path,
    written: Path,
    report: dict[str, Any],
    found: Agreement | None,
    limits: Limits,
    stages: Stages,
) -> dict[str, Any]:
    """Give what was written its name, or that of a failure, with the report beside it.

    Raises:
        VerificationError: it is not the trained model.
    """
    problems = found.problems(limits) if found else []
    failed = failed_name(target)
    report = {
        **report,
        "engine": None,
        "verified": found is not None and not problems,
        "prompt_ids_equal": None,
        "mean_kl": None,
        "usual_kl": list(limits.usual),
        "top1_agreement": None,
        "ties": None,
        **(found.report() if found else {}),
        "problems": [str(problem) for problem in problems],
        "bytes": written.stat().st_size,
        "seconds": stages.seconds,
    }
    place = failed if problems else target
    report["file"] = str(place)
    written.replace(place)
    shutil.rmtree(written.parent)
    write_json(place.with_name(place.name + ".json"), report)
    if not problems:
        for stale in (failed, failed.with_name(failed.name + ".json")):
            stale.unlink(missing_ok=True)
    if found is None:
        notice(
            "export.unverified",
            "{path} is written and NOT verified: xllamacpp, which runs llama.cpp to read it back, is not installed "
            "(pip install -e '.[export]').",
            path=target,
        )
        return report
    if problems:
        raise VerificationError(
            "export.failed",
            "{path}: {engine} does not answer as the trained model does: {problems}. The file was renamed to {failed}, "
            "the figures are beside it.",
            path=target,
            engine=found.engine,
            problems=Phrase("; ".join(["{}"] * len(problems)).format(*map(str, problems))),
            failed=failed,
        )
    notice(
        "export.done",
        "{path}: read back by {engine}: {figures}",
        path=target,
        engine=found.engine,
        figures=found.figures(limits),
    )
    return report


def limits_of(number_type: str) -> Limits:
    """
    Raises:
        UsageError: no such type.
    """
    if number_type not in LIMITS:
        raise UsageError(
            "export.type", "--type = {value!r}; choose one of: {choices}.", value=number_type, choices=", ".join(LIMITS)
        )
    return LIMITS[number_type]


def file_to_write(save_path: str) -> Path:
    """The file to write; one that is no GGUF file is left alone.

    Raises:
        UsageError: it is a folder or another kind of file.
    """
    path = Path(save_path).expanduser()
    taken = path.is_dir()
    if path.is_file():
        with path.open("rb") as file:
            taken = file.read(4) != b"GGUF"
    if taken or not path.name:
        raise UsageError(
            "export.save_path",
            "save_path = {path} is a folder or a file of another kind. Name a file to write, such as model.gguf.",
            path=path,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
