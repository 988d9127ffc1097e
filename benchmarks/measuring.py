"""What all sides of a benchmark measure, in one place, so that none can measure it more kindly.

Standard library only: the peer's program imports this file inside the peer's own virtual environment.
"""

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

IGNORE_INDEX = -100
PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy"),
    *("bitsandbytes", "trl", "llamafactory", "liger-kernel", "unsloth", "firefly-llm"),
)
# The flags that decide which matrix kernels a CPU can run.
INSTRUCTION_SETS = (
    *(
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
    ),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
BF16_MATRIX_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one optimizer step consumed; in preference training a row is a pair.

    `tokens` leaves padding out, so padding can only cost time.
    """

    rows: int
    tokens: int
    target_tokens: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The one JSON line a side prints. Rates are over the steady steps: all but the first."""

    framework: str
    rows: int
    tokens: int
    target_tokens: int
    steps: int
    steady_seconds: float
    steady_rows: int
    steady_tokens: int
    rows_per_second: float
    tokens_per_second: float
    memory_after_imports_bytes: int
    peak_memory_bytes: int
    losses: list[float]
    threads: int
    versions: dict[str, str]
    settings: dict
    checks: dict


def measure(
    *,
    framework: str,
    work: Sequence[Work],
    log_times: Sequence[float],
    losses: Sequence[float],
    memory_after_imports: int,
    peak_memory: int,
    threads: int,
    settings: dict,
    checks: dict,
) -> Measurement:
    """Turn a run's log into a measurement.

    `log_times[i]` is when step i was logged; so the time between the first and the last is that of all the
    steps after the first, and only their rows and tokens are divided by it.
    """
    if not len(work) == len(log_times) == len(losses):
        raise RuntimeError(
            f"{framework}: {len(work)} steps, but {len(log_times)} times and {len(losses)} losses logged"
        )
    if len(work) < 2:
        raise RuntimeError(f"{framework}: the first step is warm-up; give rows for two steps or more")
    steady = work[1:]
    seconds = log_times[-1] - log_times[0]
    steady_rows, steady_tokens = sum(w.rows for w in steady), sum(w.tokens for w in steady)
    return Measurement(
        framework=framework,
        rows=sum(w.rows for w in work),
        tokens=sum(w.tokens for w in work),
        target_tokens=sum(w.target_tokens for w in work),
        steps=len(work),
        steady_seconds=seconds,
        steady_rows=steady_rows,
        steady_tokens=steady_tokens,
        rows_per_second=steady_rows / seconds,
        tokens_per_second=steady_tokens / seconds,
        memory_after_imports_bytes=memory_after_imports,
        peak_memory_bytes=peak_memory,
        losses=list(losses),
        threads=threads,
        versions=versions(),
        settings=settings,
        checks=checks,
    )


def print_measurement(measurement: Measurement) -> None:
    """Print the measurement as one line, the only one on standard output."""
    print(json.dumps(asdict(measurement)), flush=True)


@contextmanager
def stdout_kept_for_the_result() -> Iterator[None]:
    """Send what the training loop prints to standard error."""
    with redirect_stdout(sys.stderr):
        yield


def read_dump(path: str | Path) -> list[dict[str, list[int]]]:
    """Read the rows of a dump made by `token_dump.py` or `pair_dump.py`."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def work_of(rows: Sequence[dict[str, list[int]]]) -> Work:
    """Count rows, tokens and targets. The first token of a row is never a target: nothing predicts it."""
    return Work(
        rows=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        target_tokens=sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]),
    )


def work_of_pairs(pairs: Sequence[dict[str, list[int]]]) -> Work:
    """Count pairs; tokens as two sequences a pair, so that computing a prompt once cannot inflate a rate."""
    prompts = sum(len(pair["prompt_ids"]) for pair in pairs)
    answers = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    return Work(rows=len(pairs), tokens=2 * prompts + answers, target_tokens=answers)


def current_rss() -> int:
    """Resident memory now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss() -> int:
    """Largest resident memory of this program so far, in bytes.

    `getrusage` alone would do, but across fork and exec it inherits the parent's peak on Linux; the kernel's
    high-water mark belongs to this program only.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Versions of the packages a result depends on, of those installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict:
    """Describe the machine as a reader of the result needs to know it."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": [flag for flag in INSTRUCTION_SETS if flag in flags],
        "bf16_matrix_instructions": bool(flags & BF16_MATRIX_FLAGS),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "load_average": list(os.getloadavg()),
    }


def git_commit(folder: Path) -> str:
    """Return the commit this folder is at, with `+changes` when the work tree differs from it.

    For a copy of the files without their repository, BENCHMARK_COMMIT says which commit they are of.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return os.environ.get("BENCHMARK_COMMIT", "no commit")
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit
