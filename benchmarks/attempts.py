"""Ways to make a step on a CPU faster that were tried, each with what was expected of it, and what came out.

    python benchmarks/attempts.py [NAME …] [--seconds 60] [--data_dir ../shared/data]

The same step of SmolLM2-135M is computed in one process by each way in turns, A-B-B-A, so that a slow minute of the
machine hits all of them; ratios are of neighbours. Ways that are no part of the product are timed by themselves.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import versions
from reporting import new_report, saver
from step_profile import configuration

from firefly.config import load_config
from firefly.models.kernels import segment_attention, token_nll
from firefly.tasks.base import Task
from firefly.training import train

HERE = Path(__file__).resolve().parent
WIDTH, VOCABULARY, TOKENS = 576, 49_152, 1_962
"""SmolLM2-135M's, and how many tokens its first step of 8 rows of alpaca_en_demo has, about."""

PAIRS: Mapping[str, Any] = {"task_type": "dpo", "per_device_train_batch_size": 4, "max_seq_length": 1024}


WAYS_IN_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    f"{rows}, up to {whole} as one": {
        "segment_attention.BLOCKS": segment_attention.BLOCKS | {torch.bfloat16: segment_attention.Blocks(rows, whole)}
    }
    for rows, whole in ((192, 256), (192, 192), (192, 320), (256, 256), (128, 128))
}


@dataclass(frozen=True)
class Attempt:
    """Ways to compute a step: constants of kernels' modules and their values, the first way being compared with."""

    expected: str
    ways: Mapping[str, Mapping[str, Any]]
    data: str = "alpaca_en_demo.json"
    settings: Mapping[str, Any] = field(default_factory=dict)


STEPS = {
    "blocks_sft": Attempt(
        "smaller blocks of queries touch fewer keys, larger ones are fewer calls: 2 % for rows of 245 tokens",
        WAYS_IN_BLOCKS,
    ),
    "blocks_dpo": Attempt(
        "the same for pairs of 1,000 tokens: 5 % less",
        WAYS_IN_BLOCKS,
        "dpo_en_demo.json",
        PAIRS,
    ),
    "rows_of_mlp": Attempt(
        "larger chunks of rows are fewer calls, smaller ones stay nearer in the cache: 1 % either way",
        {f"{rows}": {"gated_mlp.CPU_ROWS": rows} for rows in (512, 384, 1024, 2048)},
    ),
    "dropout": Attempt(
        "a mask takes 3.6 ns a number to draw and 3 × 0.6 to apply, 260 million numbers a step: 1.7 × as long",
        {
            "points": {"dropout.MOST_BY_POINTS": 0.5},
            "mask": {"dropout.MOST_BY_POINTS": 0.0},
            "none": dict.fromkeys(("lora_linear.probability", "gated_mlp.probability"), lambda _: 0.0),
        },
        settings={"lora_dropout": 0.05},
    ),
    "fp32_attention": Attempt(
        "attention is 15 % of a step in float32, and products take 0.75 of sdpa's time: 4 % less",
        {
            "sdpa": {"segment_attention.GEMM_LONGEST": {torch.float32: 0}},
            "products": {"segment_attention.GEMM_LONGEST": {torch.float32: 512}},
        },
        settings={"bf16": False},
    ),
}


def main() -> None:
    """Run the attempts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*STEPS, *ALONE], help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--data_dir", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "attempts.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = new_report("attempts", arguments) | {"versions": versions(), "attempts": {}}
    save = saver(arguments.out, report)
    for name in arguments.names:
        if name in ALONE:
            found = ALONE[name]()
        else:
            found = {"expected": STEPS[name].expected, "ways": in_turns(STEPS[name], arguments)}
        report["attempts"][name] = found
        save()
        print(json.dumps({name: found}, indent=1), flush=True)


def in_turns(attempt: Attempt, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the second step by each way, and the median ratio to the first way's neighbour."""
    seconds: dict[str, list[float]] = {way: [] for way in attempt.ways}
    own, steps = Task.backward, 0

    def backward(self: Task, model: Any, step: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            end, turn = time.perf_counter() + arguments.seconds, 0
            while turn < 3 or time.perf_counter() < end:
                for way in list(seconds) if turn % 2 else [*reversed(seconds)]:
                    with set_constants(attempt.ways[way]):
                        started = time.perf_counter()
                        own(self, model, step)
                    model.zero_gradients()
                    if turn:  # the first one prepares
                        seconds[way].append(time.perf_counter() - started)
                turn += 1
        return own(self, model, step)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Task, "backward", backward))
        # In the place of a measurement: the ways themselves limit what products are used for.
        most = max(segment_attention.GEMM_LONGEST.values())
        stack.enter_context(patch("firefly.setup.tuning.cached_crossover", lambda *_: most))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        settings = configuration("lora", arguments.data_dir / attempt.data, Path(folder, "run"))
        train(load_config(settings | {"max_steps": 2, **attempt.settings}))
    first = next(iter(seconds.values()))
    return {
        way: {
            "milliseconds": round(1e3 * statistics.median(found), 1),
            "ratio": round(statistics.median(one / other for one, other in zip(found, first, strict=True)), 3),
            "runs": len(found),
        }
        for way, found in seconds.items()
    }


@contextmanager
def set_constants(values: Mapping[str, Any]) -> Any:
    """Within the block, these constants of kernels' modules have these values."""
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch(f"firefly.models.kernels.{name}", value))
        yield


def grouped_adapters() -> dict[str, Any]:
    """The narrow products of q, k and v: three of rank 16 beside one of rank 48."""
    found: dict[str, Any] = {"expected": "one call and one pass over the input instead of three: 1 % of a step less"}
    for dtype in (torch.float32, torch.bfloat16):
        x, gradient = (torch.randn(TOKENS, WIDTH).to(dtype) for _ in range(2))
        milliseconds = {}
        for rank in (16, 48):
            a, low = torch.randn(rank, WIDTH).to(dtype), torch.randn(TOKENS, rank).to(dtype)
            works = (partial(torch.mm, x, a.T), partial(torch.mm, low.T, x), partial(gradient.addmm_, low, a))
            milliseconds[rank] = 1e3 * sum(map(fastest, works))
        found[str(dtype).removeprefix("torch.")] = {
            "three_of_16_ms": round(3 * milliseconds[16], 3),
            "one_of_48_ms": round(milliseconds[48], 3),
        }
    return found


def head_passes() -> dict[str, Any]:
    """The whole of the head's loss with its gradient, beside its two products alone."""
    found: dict[str, Any] = {
        "expected": "fusing the second product with the logits' gradient saves what is no product: 1 % of a step"
    }
    for dtype in (torch.float32, torch.bfloat16):
        head = torch.randn(VOCABULARY, WIDTH).mul_(0.05).to(dtype)
        hidden = torch.randn(1_535, WIDTH).to(dtype).requires_grad_()
        targets = torch.randint(VOCABULARY, (len(hidden),))

        whole = partial(token_nll.summed_nll, hidden, head, None, targets)
        found[str(dtype).removeprefix("torch.")] = {
            "whole_ms": round(1e3 * fastest(whole), 1),
            "products_ms": round(1e3 * fastest(partial(products_of_head, hidden.detach(), head)), 1),
        }
    return found


def products_of_head(hidden: torch.Tensor, head: torch.Tensor) -> None:
    """Logits, and their product with the head again, in the chunks of `token_nll`."""
    room = token_nll._room(hidden, head)
    for rows in token_nll._chunks(head, len(hidden)):
        torch.mm(token_nll._logits(hidden[rows], head, None, room), head)


ALONE = {"grouped_adapters": grouped_adapters, "head_passes": head_passes}


def fastest(work: Callable[[], Any], seconds: float = 2.0) -> float:
    """Seconds of the fastest of some calls."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
