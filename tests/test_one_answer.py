"""One adapter, one answer: training model, merged model, generate, server and chat say the same, token for token.

Greedy, in fp32, on the real SmolLM2 with two trained adapters. Where two of them part, the two tokens are a tie.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly import train
from firefly.cli import main
from firefly.commands.chat import ChatSession
from firefly.config import ModelConfig, load_config
from firefly.data.schema import Message
from firefly.export.merge import merge
from firefly.generation import GenerationSettings, Generator
from firefly.models.loading import EMBEDDED
from tiny import run_settings

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi", reason="firefly-llm[serve] is not installed")

TIE = 1e-3
"""Two tokens whose log-probabilities are closer than this are equally likely: fp32 in another order of sums."""
GREEDY = GenerationSettings(max_new_tokens=24, temperature=0)
QUESTIONS = [
    "Who are you?",
    "Name three colours.",
    "What is the capital of France? Answer in one word.",
    "Write one sentence about the sea, the wind and a small boat that comes home late.",
    "2 + 2 =",
    "你好！请介绍一下你自己。",
    "Why is the sky blue? " * 12,
    "ok",
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for number, name in enumerate(("firefly", "pirate")):
        rows = folder / f"{name}.jsonl"
        turns = [
            {"role": "user", "content": QUESTIONS[number]},
            {"role": "assistant", "content": f"I am {name}, and I answer {'gladly' if number else 'shortly'}."},
        ]
        rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(16)), encoding="utf-8")
        given = {"train_mode": "lora", "learning_rate": 2e-3, "max_steps": 4, "seed": number, "template_name": "auto"}
        settings = run_settings(EMBEDDED, rows, folder / name, **given)
        found[name] = train(load_config(settings))
    return found


def same(found: Sequence[int], expected: Sequence[int], prompt: Sequence[int], model: Any) -> bool:
    """Whether two answers are the same up to a tie."""
    for place, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            ids = torch.tensor([[*prompt, *expected[:place]]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
            return abs(float(logits[one] - logits[other])) < TIE
    return len(found) == len(expected)


def test_an_adapter_answers_alike_wherever_it_is_asked(
    adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    from server.serving import running

    base = ModelConfig(name_or_path=EMBEDDED)
    with Generator.load(base, {name: str(path) for name, path in adapters.items()}, dtype="float32") as generator:
        prompts = [generator.encode([Message.of("user", text)], model="firefly") for text in QUESTIONS]
        reference: dict[str, list[list[int]]] = {}
        merged: dict[str, Any] = {}
        for name, path in adapters.items():
            folder = merge(base, str(path), str(tmp_path / f"merged-{name}"), dtype="float32")
            merged[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            reference[name] = []
            for prompt in prompts:
                ids = torch.tensor([prompt])
                with torch.no_grad():
                    out = merged[name].generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
                    )
                reference[name].append(out[0, len(prompt) :].tolist())
        assert reference["firefly"] != reference["pirate"]

        # alone, and sixteen at a time of two adapters
        for name in adapters:
            answers = [answer[0].token_ids for answer in generator.generate(prompts, GREEDY, model=name)]
            for found, expected, prompt in zip(answers, reference[name], prompts, strict=True):
                assert same(found, expected, prompt, merged[name])
        decode = generator.encoder_of("firefly").tokenizer.decode
        with running(generator) as server, server.client() as client, ThreadPoolExecutor(16) as threads:

            def ask(name: str, text: str) -> str:
                reply = client.chat.completions.create(
                    model=name,
                    messages=[{"role": "user", "content": text}],
                    max_tokens=24,
                    temperature=0,
                    top_p=1,
                )
                return str(reply.choices[0].message.content)

            asked = [(name, text) for text in QUESTIONS for name in adapters]
            for (name, text), heard in zip(asked, threads.map(lambda pair: ask(*pair), asked), strict=True):
                number = QUESTIONS.index(text)
                expected = decode(reference[name][number], skip_special_tokens=True)
                if heard != expected:
                    ids = generator.encoder_of(name).tokenizer.encode(heard, add_special_tokens=False)
                    assert same(ids, reference[name][number], prompts[number], merged[name])

    # the command, and chat, for one adapter that names its base
    rows = tmp_path / "asked.jsonl"
    lines = [{"messages": [{"role": "user", "content": text}]} for text in QUESTIONS]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    flags = ["--input_file", str(rows), "--output_file", str(output), "--max_new_tokens", "24", "--dtype", "float32"]
    assert main(["generate", "--adapter_name_or_path", str(adapters["pirate"]), *flags]) == 0
    answers = [json.loads(line)["answers"][0] for line in output.read_text(encoding="utf-8").splitlines()]
    for answer, expected, prompt in zip(answers, reference["pirate"], prompts, strict=True):
        assert same(answer["token_ids"], expected, prompt, merged["pirate"])
    capsys.readouterr()
    with Generator.load(ModelConfig(), str(adapters["pirate"]), dtype="float32") as generator:
        session = ChatSession(generator, GREEDY)
        session.ask(QUESTIONS[1])
        shown = decode(reference["pirate"][1], skip_special_tokens=True).strip()
        assert session.history[-1].text == shown
