"""Counts and durations in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

from firefly.generation.engine import EngineStatus

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """What a server has done since it started. Used on its event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status."""
        self.prompt_tokens: Counter[str] = Counter()
        self.completion_tokens: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        """Answers by their finish reason."""
        self.request_seconds = Histogram(SECONDS)
        self.first_token_seconds = Histogram(SECONDS)
        self.token_seconds = Histogram(TOKEN_SECONDS)

    def render(self, status: EngineStatus, is_alive: bool) -> str:
        lines: list[str] = []

        def family(name: str, kind: str, help: str, samples: Mapping[str, float]) -> None:
            lines.extend((f"# HELP firefly_{name} {help}", f"# TYPE firefly_{name} {kind}"))
            lines.extend(f"firefly_{name}{labels} {value!r}" for labels, value in samples.items())

        def labelled(counter: Counter[str], label: str) -> dict[str, float]:
            return {f'{{{label}="{_escape(name)}"}}': count for name, count in sorted(counter.items())}

        def histogram(name: str, help: str, values: Histogram) -> None:
            samples, below = {}, 0
            for bound, count in zip((*map(str, values.bounds), "+Inf"), values.counts, strict=True):
                below += count
                samples[f'_bucket{{le="{bound}"}}'] = below
            family(name, "histogram", help, samples | {"_sum": values.sum, "_count": below})

        requests = {
            f'{{path="{_escape(path)}",status="{status}"}}': count
            for (path, status), count in sorted(self.requests.items())
        }
        family("requests_total", "counter", "Requests by path and status.", requests)
        family("answers_total", "counter", "Answers by finish reason.", labelled(self.finished, "reason"))
        family("prompt_tokens_total", "counter", "Tokens of prompts.", labelled(self.prompt_tokens, "model"))
        family("completion_tokens_total", "counter", "Tokens generated.", labelled(self.completion_tokens, "model"))
        family("engine_up", "gauge", "1 while the engine computes, 0 once it has failed.", {"": float(is_alive)})
        family("requests_running", "gauge", "Answers that grow.", {"": status.running})
        family("requests_waiting", "gauge", "Answers that wait for a place.", {"": status.waiting})
        family("cache_tokens", "gauge", "Size of the key-value cache, in tokens.", {"": status.cache_tokens})
        family("cache_used_tokens", "gauge", "What of it is occupied.", {"": status.cache_used})
        histogram("request_seconds", "From a request to the end of its response.", self.request_seconds)
        histogram("first_token_seconds", "From a request to its first token.", self.first_token_seconds)
        histogram("token_seconds", "Between two tokens of one answer, in the mean.", self.token_seconds)
        return "\n".join(lines) + "\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
