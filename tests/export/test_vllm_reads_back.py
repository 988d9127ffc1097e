"""A real vLLM over what was exported: prompts, stops and distributions are the trained ones, and damage shows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from firefly.config import ModelConfig
from firefly.data.encoding import Encoder
from firefly.data.schema import Conversation, Message
from firefly.data.templates import bind_template
from firefly.export.battery import BatteryRow
from firefly.export.vllm import Base, VllmReadBack, open_read_back, write_vllm
from firefly.generation.vllm import EngineChoice
from firefly.models.loading import EMBEDDED, load_tokenizer, resolve_model
from firefly.models.saved_adapter import open_adapter
from tiny import randomise_adapters

pytestmark = pytest.mark.slow

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, e.g. 北京",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
CONVERSATIONS = {
    "system": ((Message.of("system", "Be brief."), Message.of("user", "Why?"), Message.of("assistant", "So.")), ()),
    "turns": (
        (
            Message.of("user", "  Name three colours.\n"),
            Message.of("assistant", "Red, green and blue."),
            Message.of("user", "And another one?"),
            Message.of("assistant", "Yellow is one."),
        ),
        (),
    ),
    "chinese": ((Message.of("user", "用一句话介绍你自己。"), Message.of("assistant", "我是一个语言模型。🙂")), ()),
    "tools": (
        (
            Message.of("user", "How is the weather in Paris?"),
            Message.of("assistant", "", tool_calls=(CALL,)),
            Message.of("tool", '{"sky": "clear"}', name="get_weather", tool_call_id="call00001"),
            Message.of("assistant", "It is clear in Paris."),
        ),
        (WEATHER,),
    ),
}


@dataclass(frozen=True)
class Real:
    """vLLM over an exported folder, and the model in transformers; the base's own template was given up for Qwen's."""

    engine: VllmReadBack
    model: Any
    rows: list[BatteryRow]
    encoder: Encoder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    python = os.environ.get("FIREFLY_VLLM_PYTHON")
    if not python:
        pytest.skip("FIREFLY_VLLM_PYTHON names no interpreter that has vLLM (script/vllm_env.sh makes one)")
    folder = tmp_path_factory.mktemp("read back")
    config = ModelConfig(name_or_path=EMBEDDED)
    base = Path(resolve_model(config))
    tokenizer = load_tokenizer(config)
    encoder = Encoder(tokenizer, bind_template("qwen2.5", tokenizer))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    randomise_adapters(get_peft_model(model, settings)).save_pretrained(folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    described = json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    generation = json.loads((base / "generation_config.json").read_text())
    export = write_vllm(
        folder / "it's exported",
        "base",
        tokenizer,
        encoder,
        base=Base(str(base), described, generation),
        adapters={"tuned": open_adapter(str(folder / "adapter"))},
    )
    assert export.tool_parser == "hermes"
    rows = []
    for name, (messages, tools) in CONVERSATIONS.items():
        prompt = encoder.encode_prompt(messages[:-1], tools)
        ids = encoder.encode_rendered(encoder.render(Conversation(messages, tools)))[-1].input_ids.tolist()
        rows.append(BatteryRow(name, messages, tools, tuple(prompt), tuple(ids)))
    with open_read_back(export, EngineChoice("vllm", python)) as engine:
        yield Real(engine, model, rows, encoder)


def test_prompts_stops_and_distributions_are_those_of_the_trained_model(real: Real) -> None:
    assert real.engine.name.startswith("vLLM 0.")
    for row in real.rows:
        assert real.engine.prompt_ids(row) == list(row.prompt), row.name
        positions = range(len(row.prompt) - 1, len(row.ids))
        found = real.engine.candidates(row.ids, positions)
        with torch.no_grad():
            expected = real.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for position, candidates in zip(positions, found, strict=True):
            assert len(candidates.log_probs) >= 256
            values, tokens = expected[position].topk(64)
            ours = torch.tensor([candidates.log_probs[int(token)] for token in tokens])
            assert (ours - values).abs().max() < 1e-3
    stops = real.encoder.template.stop_ids
    assert all(real.engine.ends_at(token) for token in stops)
    assert not any(real.engine.ends_at(token) for token in range(100, 103))
    assert real.engine.tokens_per_second() > 0


def test_a_text_is_encoded_as_ours_is(real: Real) -> None:
    text = "def add(a, b):\n    return a + b  # 加"
    row = BatteryRow("text", (), (), (1,), (1,), text)
    assert real.engine.prompt_ids(row) == real.encoder.tokenizer.encode(text)


def test_a_folder_with_another_template_and_a_missing_stop_shows(real: Real, tmp_path: Path) -> None:
    """What is wrong in a folder is what the vLLM that read it says."""
    folder = tmp_path / "damaged"
    shutil.copytree(real.engine.export.folder, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are Qwen", "You are Kven"))
    (folder / "generation_config.json").write_text("{}")
    export = type(real.engine.export)(**(vars(real.engine.export) | {"folder": folder}))
    with open_read_back(export, EngineChoice("vllm", os.environ["FIREFLY_VLLM_PYTHON"])) as engine:
        by_name = {row.name: engine.prompt_ids(row) == list(row.prompt) for row in real.rows}
        assert by_name == {"system": True, "turns": False, "chinese": False, "tools": False}
        eos = real.encoder.tokenizer.eos_token_id
        missing = [token for token in real.encoder.template.stop_ids if not engine.ends_at(token)]
        assert missing == [token for token in real.encoder.template.stop_ids if token != eos]
