"""run.json: everything needed to say what a run was, and why another one differs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from firefly.console import take_notices
from firefly.errors import FireflyError
from firefly.files import atomic_file
from firefly.ranks import is_first
from firefly.runs.interruption import is_interruption
from firefly.runs.records import FAILED, FINISHED, INTERRUPTED, read_object

PACKAGES = (
    "firefly-llm",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "liger-kernel",
    "triton",
    "datasets",
    "pyarrow",
    "numpy",
    "safetensors",
    "jinja2",
)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it: a reader sees the whole file or none. The first rank writes."""
    if not is_first():
        return
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    # A file name that is no UTF-8 has characters that cannot be written (PEP 383): as escapes they can, in JSON, too.
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def recorded_end(output_dir: Path) -> Iterator[None]:
    """Write into run.json how what is done inside ends, and the notices that were given meanwhile.

    An exception goes on as it came: this only records it.
    """
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # the error is what the user has to hear of
            if is_interruption(error):
                _record_end(output_dir, INTERRUPTED)
            else:
                _record_end(output_dir, FAILED, describe_error(error))
        raise
    _record_end(output_dir, FINISHED)


def describe_error(error: BaseException) -> dict[str, Any]:
    """What run.json says of a failure: its code (None: it has none), type and message, and of an error of ours what
    the message is made of."""
    if isinstance(error, FireflyError):
        return {"code": error.code, "type": type(error).__name__, "message": str(error), **error.phrase.as_json()}
    code = None
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        code = "cli.out_of_memory"
    return {"code": code, "type": type(error).__name__, "message": str(error)}


def _record_end(output_dir: Path, state: str, error: dict[str, Any] | None = None) -> None:
    if not is_first():
        return
    _add_to_manifest(output_dir, {"state": state, "ended": time.time(), "error": error})


def _add_to_manifest(output_dir: Path, found: dict[str, Any]) -> None:
    """Write what was found, and the notices that were given meanwhile, into run.json."""
    path = output_dir / "run.json"
    manifest = read_object(path)
    write_json(path, manifest | found | {"notices": [*manifest.get("notices", []), *take_notices()]})


def record_memory(output_dir: Path, found: dict[str, int]) -> None:
    """Write into run.json what memory was forecast and what was measured. The first rank writes."""
    if not is_first():
        return
    path = output_dir / "run.json"
    manifest = read_object(path)
    write_json(path, manifest | {"memory": manifest.get("memory", {}) | found})


def record_comparison(output_dir: Path, found: dict[str, Any] | None) -> None:
    """Write into run.json and train_results.json what the comparison with the model before the run found (None: it
    came to nothing), and its notices into the first. The first rank writes."""
    if not is_first():
        return
    values = {} if found is None else {"comparison": found}
    _add_to_manifest(output_dir, values)
    if found is not None:
        path = output_dir / "train_results.json"
        write_json(path, read_object(path) | values)


def package_versions() -> dict[str, str | None]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}}


def hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or sys.platform


def git_commit(folder: Path) -> str | None:
    """The commit of the working tree that `folder` lies in, with a "+" if files differ from it; None outside git."""
    command = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, timeout=10)
        if head.returncode:
            return None
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"], capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.decode("ascii").strip() + ("+" if changed.stdout.strip() else "")


def adapter_hash(place: str) -> str:
    """Identify a saved adapter: its settings and all bytes of its weights."""
    folder = Path(place).expanduser()
    digest = hashlib.sha256()
    for file in sorted([folder / "adapter_config.json", *folder.glob("adapter_model.*")]):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
