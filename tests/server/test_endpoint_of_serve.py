"""What `firefly serve` answers to those that compare models by the network."""

from __future__ import annotations

import pytest
from serving import FakeEngine, generator_of, running

from firefly.data.schema import Message
from firefly.errors import UsageError
from firefly.evaluation.endpoints import Endpoint
from firefly.evaluation.measurement import GivenAnswer, Question

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_our_own_server_is_an_endpoint_for_conversations_texts_and_tools() -> None:
    messages = (
        Message.of("system", "Be kind."),
        Message.of("user", "weather?"),
        Message.of("assistant", "", reasoning="hm", tool_calls=(CALL,)),
        Message.of("tool", "sunny"),
    )
    questions = [
        Question("chat", "held_out", (Message.of("user", "你好"),)),
        Question("text", "held_out", text="Once upon"),
        Question("tools", "held_out", messages, tools=(TOOL,)),
    ]
    with running(generator_of(FakeEngine("It is sunny."))) as server:
        endpoint = Endpoint(server.address, "one", concurrency=2)
        assert endpoint.answer(questions, 12) == tuple(
            GivenAnswer(key, "It is sunny.", 7, "stop") for key in ("chat", "text", "tools")
        )
        with pytest.raises(UsageError, match="base, one, two"):
            Endpoint(server.address).answer(questions, 12)
        with pytest.raises(UsageError, match="does not serve three"):
            Endpoint(server.address, "three").answer(questions, 12)
