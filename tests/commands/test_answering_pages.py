"""The commands of the pages on generating and chatting, executed; and the real small model's answers."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.cli import main
from firefly.commands import chat
from firefly.config import ModelConfig, load_config
from firefly.generation import GenerationSettings, Generator
from firefly.models.loading import embedded_model
from firefly.training import train

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "output/smollm2-135m-sft-lora"


def commands_of(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / page).read_text("utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines()]


@pytest.mark.parametrize("page", ["generate.md", "chat.md"])
def test_both_languages_have_the_same_commands(page: str) -> None:
    assert commands_of(page) == commands_of(f"zh/{page}")
    assert len(commands_of(page)) == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: with the repository's rows, and an adapter of one step."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "data").symlink_to(ROOT / "data")
    rows = str(ROOT / "data/dummy_data.jsonl")
    changes = {"train_file": rows, "output_dir": str(folder / ADAPTER), "max_steps": 1, "compare": False}
    train(load_config(ROOT / "train_args/sft/lora/smollm2-135m-sft-lora.json", changes))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_of("generate.md") + commands_of("chat.md"), ids=" ".join)
def test_each_command_of_the_pages_runs(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["Say hello in one word.", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.chdir(folder)
    program, *arguments = command
    assert program == "firefly"
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    if arguments[0] == "chat":
        assert re.search(r"Firefly: \w+", printed)
        return
    lines = [json.loads(line) for line in (folder / printed.strip()).read_text("utf-8").splitlines()]
    options = dict(itertools.pairwise(arguments))
    assert [line["index"] for line in lines] == list(range(int(options["--limit"])))
    for line in lines:
        assert len(line["answers"]) == int(options.get("--num_samples", 1))
        for answer in line["answers"]:
            assert ("logprobs" in answer) == ("--logprobs" in arguments)


@pytest.mark.slow
def test_the_real_models_answers_are_those_of_plain_generate_and_its_second_turn_computes_what_is_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, new = embedded_model(), 16
    plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows, output = ROOT / "data/general.jsonl", folder / "real.jsonl"
    options = ("--output_file", output, "--max_new_tokens", new, "--limit", 8, "--dtype", "float32")
    model = ("--model_name_or_path", "smollm2-135m-instruct", "--input_file", rows)
    assert main(["generate", *map(str, (*model, *options))]) == 0
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    for line, row in zip(lines, rows.read_text("utf-8").splitlines(), strict=False):
        record = json.loads(row)
        assert line["reference"] == record["output"]
        asked = "\n".join(filter(None, (record["instruction"], record["input"])))
        turns = [{"role": "user", "content": asked}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ids, expected = line["answers"][0]["token_ids"], continued(plain, prompt, new)
        place_of_difference = next(
            (n for n, pair in enumerate(zip(ids, expected, strict=False)) if len({*pair}) > 1), None
        )
        if place_of_difference is None:
            assert ids == expected
            text = tokenizer.decode([token for token in ids if token != 2], skip_special_tokens=True)
            assert line["answers"][0]["text"] == text
            continue
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *expected[:place_of_difference]]])).logits[0, -1]
        assert logits[expected[place_of_difference]] - logits[ids[place_of_difference]] < 1e-3

    settings = GenerationSettings(max_new_tokens=40, temperature=0)
    with Generator.load(ModelConfig(name_or_path="smollm2-135m-instruct"), dtype="float32") as generator:
        computed: list[int] = []
        embedding = generator.engine._model.get_input_embeddings()  # type: ignore[attr-defined]
        embedding.register_forward_hook(lambda module, inputs, found: computed.append(inputs[0].numel()))
        session = chat.ChatSession(generator, settings)
        session.ask("Name three colours.")
        known = sum(computed)
        computed.clear()
        session.ask("And three animals?")
        prompt = generator.encode(session.turns[:3])
        assert len(prompt) > known
        assert sum(computed) <= len(prompt) - known + generator.engine.limits.page_size + 40  # type: ignore[attr-defined]


def continued(plain: Any, prompt: list[int], new: int) -> list[int]:
    row = torch.tensor([prompt])
    found = plain.generate(
        input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False, eos_token_id=2
    )
    return found[0, len(prompt) :].tolist()
