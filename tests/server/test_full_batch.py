"""Many prompts through the door: the batch stays full."""

from __future__ import annotations

import threading
from typing import Any

from serving import FakeEngine, FakeTicket, generator_of

from firefly.generation import GenerationSettings


def test_a_long_answer_at_the_head_does_not_keep_others_from_being_handed_in() -> None:
    """Answers are told in order, but one that waits for its turn holds no place in the batch."""
    engine = FakeEngine("done")
    handed_in = engine.submit

    def submit(request: Any, deliver: Any) -> Any:
        if engine.tickets:
            return handed_in(request, deliver)
        engine.tickets.append(FakeTicket(request, deliver))  # the first never ends
        return engine.tickets[0]

    engine.submit = submit  # type: ignore[method-assign]
    answers = generator_of(engine).generate([[1]] * 100, GenerationSettings(max_new_tokens=4))
    threading.Timer(0.5, lambda: engine.tickets[0].cancel()).start()
    assert next(answers)[0].finish_reason == "cancelled"
    assert len(engine.tickets) == 100
    answers.close()
