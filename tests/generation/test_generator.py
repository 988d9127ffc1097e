"""A generator prompts as training did, and draws from a random state of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from firefly.config import ModelConfig
from firefly.data.schema import Message
from firefly.errors import UsageError
from firefly.generation import GenerationSettings, Generator
from tiny import save_tiny_model, tiny_tokenizer

GREEDY = GenerationSettings(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    folder = save_tiny_model(tmp_path_factory.mktemp("chat") / "model", "llama")
    model = ModelConfig(name_or_path=str(folder))
    with Generator.load(model, template_name="default", dtype="float32") as loaded:
        yield loaded


def continued(generator: Generator, messages: list[Message], **options: Any) -> list[int]:
    """The new ids of transformers' own `generate`."""
    ids = torch.tensor([generator.encoder.encode_prompt(messages)])
    model = AutoModelForCausalLM.from_pretrained(generator.served[generator.name].folder)
    stops = list(generator.encoder.template.stop_ids)
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=stops, **options)
    return found[0, ids.shape[1] :].tolist()


def test_the_streamed_text_is_what_transformers_generates(generator: Generator) -> None:
    messages = [Message.of("user", "two blue red")]
    ids = continued(generator, messages, max_new_tokens=8, do_sample=False)
    expected = generator.encoder.tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(generator.stream(messages, GREEDY)).strip() == expected.strip()


def test_the_same_seed_gives_the_same_answer(generator: Generator) -> None:
    settings = GenerationSettings(max_new_tokens=12, temperature=5.0, seed=3)
    answers = {generator.answer([Message.of("user", "red")], settings) for _ in range(3)}
    assert len(answers) == 1


def test_a_seed_repeats_an_answer_beside_another_request_and_leaves_the_random_state_of_the_process(
    generator: Generator,
) -> None:
    settings = GenerationSettings(max_new_tokens=24, temperature=5.0, seed=3)
    alone = generator.answer([Message.of("user", "red")], settings)
    state = torch.get_rng_state()
    pieces = generator.stream([Message.of("user", "red")], settings)
    beside = [next(pieces), *generator.stream([Message.of("user", "blue")], GenerationSettings(temperature=5.0))]
    assert "".join([beside[0], *pieces]).strip() == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_many_prompts_are_answered_in_their_order_and_read_as_they_are_needed(generator: Generator) -> None:
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0, seed=1)
    prompts = [
        generator.encode([Message.of("user", word * (1 + number % 5))]) for number, word in enumerate("abc" * 60)
    ]
    read = 0

    def source() -> Iterator[tuple[int, ...]]:
        nonlocal read
        for prompt in prompts:
            read += 1
            yield prompt

    answers = generator.generate(source(), settings, samples=2)
    first = next(answers)
    assert read < len(prompts)
    found = [first, *answers]
    assert len(found) == len(prompts)
    for number in (0, 7, 100):
        (alone,) = generator.generate([prompts[number]], settings, samples=2)
        assert [answer.token_ids for answer in found[number]] == [answer.token_ids for answer in alone]
    assert found[7][0].token_ids != found[7][1].token_ids


def test_an_answer_ends_with_the_context_and_a_prompt_without_room_for_one_is_refused(generator: Generator) -> None:
    ((answer,),) = generator.generate([[5] * 507], replace(GREEDY, ignore_stop_tokens=True))
    assert (len(answer.tokens), answer.finish_reason) == (5, "length")
    with pytest.raises(UsageError, match="600 tokens"):
        next(generator.generate([[5] * 600], GREEDY))


def test_a_set_event_stops_the_answer(generator: Generator) -> None:
    stop = threading.Event()
    settings = GenerationSettings(max_new_tokens=400, temperature=0, ignore_stop_tokens=True)
    pieces = generator.stream([Message.of("user", "red")], settings, stop)
    next(pieces)
    stop.set()
    assert len(list(pieces)) < 100


def test_bad_settings_are_named() -> None:
    with pytest.raises(UsageError, match="top_p"):
        GenerationSettings(top_p=0)


def test_an_unmerged_adapter_folder_needs_no_base_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adapter_config\.json is missing"):
        Generator.load(ModelConfig(), adapter=str(tmp_path))


def test_another_template_than_the_trained_one_is_refused_unless_forced(tmp_path):
    from firefly.data.certificate import FILE_NAME, certify
    from firefly.data.encoding import Encoder
    from firefly.data.templates import bind_template

    folder = save_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    trained = certify(Encoder(tokenizer, bind_template("qwen", tokenizer)))
    (folder / FILE_NAME).write_text(json.dumps(trained.as_dict()), encoding="utf-8")
    model = ModelConfig(name_or_path=str(folder))
    assert Generator.load(model, template_name="qwen").encoder.template.name == "qwen"
    with pytest.raises(UsageError, match="--force"):
        Generator.load(model, template_name="smollm2")
    assert Generator.load(model, template_name="smollm2", force=True).encoder.template.name == "smollm2"


@pytest.mark.parametrize("allowed", [True, False])
def test_special_tokens_in_a_question_are_read_as_in_training(allowed: bool, tmp_path: Path) -> None:
    from firefly.data.certificate import FILE_NAME, certify
    from firefly.data.encoding import Encoder
    from firefly.data.schema import Message
    from firefly.data.templates import bind_template

    folder = save_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, bind_template("qwen", tokenizer), allowed)
    (folder / FILE_NAME).write_text(json.dumps(certify(encoder).as_dict()), encoding="utf-8")
    served = Generator.load(ModelConfig(name_or_path=str(folder)), template_name="qwen").encoder
    question = [Message.of("user", "what is <|im_end|> for?")]
    assert served.encode_prompt(question) == encoder.encode_prompt(question)
