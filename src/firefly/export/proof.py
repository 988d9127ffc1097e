"""What every export has in common: limits by number type, the time of its stages, and the verdict on what was read
back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firefly.console import notice
from firefly.errors import UsageError, VerificationError
from firefly.export.agreement import Agreement, Limits
from firefly.runs.manifest import write_json

LIMITS = {
    "f32": Limits(kl=1e-4, usual=(0, 1e-6), tie=0.01, agreement=1, gap=0.05),
    "f16": Limits(kl=1e-3, usual=(1e-7, 1e-5), tie=0.02, agreement=1, gap=0.05),
    "bf16": Limits(kl=1e-2, usual=(1e-6, 1e-3), tie=0.05, agreement=0.97),
    "q8_0": Limits(kl=1e-2, usual=(1e-4, 5e-3), tie=0.05, agreement=0.95),
    "q6_k": Limits(kl=5e-2, usual=(1e-3, 2e-2), tie=0.05, agreement=0.9),
    "q5_k_m": Limits(kl=2e-1, usual=(3e-3, 1e-1), tie=0.1, agreement=0.8),
    "q4_k_m": Limits(kl=3e-1, usual=(1e-2, 1e-1), tie=0.1, agreement=0.75),
}
"""By number type. A file beyond them is not what its type says it is."""

FAILED = ".failed"


class ExportFailed(VerificationError):
    """An engine read the export back and it is not the trained model; `found` is the report."""

    def __init__(self, code: str, text: str, /, *, found: dict[str, Any], **values: object) -> None:
        super().__init__(code, text, **values)
        self.found = found


@dataclass
class Stages:
    """Seconds of an export by stage, in their order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def check_type(number_type: str) -> None:
    """
    Raises:
        UsageError: no such type.
    """
    if number_type not in LIMITS:
        raise UsageError(
            "export.type", "--type = {value!r}; choose one of: {choices}.", value=number_type, choices=", ".join(LIMITS)
        )


@contextmanager
def named_if_it_fails(written: Path, target: Path) -> Iterator[None]:
    """Where a number is wrong, or the engine does not even read what was written, it is kept as the failure that it
    is."""
    try:
        yield
    except VerificationError:
        if written.exists():
            written.replace(failed_name(target))
        raise


def failed_name(target: Path) -> Path:
    return target.with_name(target.name + FAILED)


def settle(
    target: Path,
    written: Path,
    report_file: Path,
    report: dict[str, Any],
    found: Agreement | None,
    limits: Limits,
    stages: Stages,
) -> dict[str, Any]:
    """Give what was written its name, or that of a failure, and write the report.

    Raises:
        VerificationError: it is not the trained model.
    """
    problems = found.problems(limits) if found else []
    place, failed = target, failed_name(target)
    if problems:
        place = failed
    else:
        failed.unlink(missing_ok=True)
    report = {
        **report,
        "file": str(place),
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
    written.replace(place)
    write_json(report_file, report)
    if found is None:
        notice(
            "export.unverified",
            "{path} is written and NOT verified: no engine is here that reads it back (docs/export.md).",
            path=target,
        )
        return report
    if problems:
        raise ExportFailed(
            "export.failed",
            "{path}: {engine} does not answer as the trained model does: {problems}. It was renamed to {failed}; the "
            "figures are in {report}.",
            path=target,
            engine=found.engine,
            problems="; ".join(map(str, problems)),
            failed=failed,
            report=report_file,
            found=report,
        )
    notice(
        "export.done",
        "{path}: read back by {engine}: {figures}",
        path=target,
        engine=found.engine,
        figures=found.figures(limits),
    )
    return report
