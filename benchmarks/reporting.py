"""The result file of a benchmark and the words around its numbers, the same for each."""

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from measuring import git_commit, hardware
from processes import Result

HERE = Path(__file__).resolve().parent
PUBLISHABLE_PAIRS = 3
PUBLISHABLE_SECONDS = 60


def new_report(benchmark: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Begin the result file with what a reader needs before any number."""
    return {
        "benchmark": benchmark,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": git_commit(HERE.parent),
        "hardware": hardware(),
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
    }


def saver(path: Path, report: dict[str, Any]) -> Callable[[], None]:
    """Return a function that writes the report as it stands: hours of runs survive a failure."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        path.write_text(json.dumps(without_folders(report), indent=1) + "\n", encoding="utf-8")

    return save


def without_folders(value: Any) -> Any:
    """Cut absolute paths down to their last part: where a machine keeps its files is nobody's concern."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def parse_assignments(texts: Sequence[str]) -> dict[str, str]:
    """Read `NAME=VALUE NAME=VALUE`."""
    if wrong := [text for text in texts if "=" not in text]:
        raise SystemExit(f"{wrong[0]!r} is no NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def too_short_to_publish(
    pairs: Sequence[tuple[Result, Result]],
    least_pairs: float = PUBLISHABLE_PAIRS,
    least_seconds: float = PUBLISHABLE_SECONDS,
) -> list[str]:
    """Say so when runs are too few or too short for a number to be quoted."""
    shortest = min(result["steady_seconds"] for pair in pairs for result in pair)
    if len(pairs) >= least_pairs and shortest >= least_seconds:
        return []
    return [
        f"not publishable: {len(pairs)} pairs, and {shortest:.0f} s of steady state in the shortest run; "
        f"it takes {least_pairs} pairs and {least_seconds} s"
    ]


def gigabytes(num_bytes: int) -> str:
    """Write bytes as gigabytes."""
    return f"{num_bytes / 1e9:.2f} GB"
