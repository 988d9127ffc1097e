"""One server with a tiny random model for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="firefly-llm[serve] is not installed")
pytest.importorskip("uvicorn", reason="firefly-llm[serve] is not installed")
pytest.importorskip("openai", reason="the openai package is not installed")

from serving import Running, generator_of, running

from firefly.generation.batched import BatchedEngine, BatchLimits
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    """In float32, where two tokens are hardly ever equally likely."""
    model = tiny_model("llama", max_position_embeddings=4096)
    limits = BatchLimits(cache_tokens=4096, batch_tokens=256)
    engine = BatchedEngine(model, {"tiny": tiny_tokenizer()}, lambda name: None, 4096, limits)
    with generator_of(engine) as generator, running(generator) as found:
        yield found
