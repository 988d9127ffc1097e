"""What is judged of an export: prompts, stop tokens, distributions; each kind of damage is told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from firefly.data.encoding import Encoder
from firefly.data.templates import TemplateFailure, bind_template
from firefly.export.agreement import Agreement, Candidates, Limits, Refused, divergence, expect, listed, read_back
from firefly.export.battery import Battery, BatteryRow, make_battery, text_battery
from tiny import tiny_model, tiny_tokenizer

STRICT = Limits(kl=1e-6, usual=(0, 1e-6), tie=1e-4, agreement=1, gap=1e-3)


def encoder_of(template: str = "qwen2.5") -> Encoder:
    tokenizer = tiny_tokenizer()
    return Encoder(tokenizer, bind_template(template, tokenizer))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = tiny_model("llama").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)  # a model with opinions
    return made


@dataclass
class InProcess:
    """An engine that has read the model back, in this process."""

    model: Any
    encoder: Encoder
    stops: Sequence[int] = ()
    listed: int = 256
    name: str = "in process"
    asked: list[str] = field(default_factory=list)

    def prompt_ids(self, row: BatteryRow) -> list[int]:
        self.asked.append(row.name)
        if row.text is not None:
            return self.encoder.tokenizer.encode(row.text)
        try:
            return self.encoder.encode_prompt(row.messages[:-1], row.tools)
        except TemplateFailure as error:
            raise Refused(str(error)) from error

    def ends_at(self, token: int) -> bool:
        return token in self.stops

    def candidates(self, ids: Sequence[int], positions: Sequence[int]) -> list[Candidates]:
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0, list(positions)]
        top = torch.log_softmax(logits.double(), -1).topk(min(self.listed, logits.shape[-1]))
        return [
            Candidates(dict(zip(tokens.tolist(), values.tolist(), strict=True)))
            for tokens, values in zip(top.indices, top.values, strict=True)
        ]

    def tokens_per_second(self) -> float:
        return 1.0


def judged(model: Any, engine: InProcess, battery: Battery) -> Agreement:
    return read_back(engine, battery, expect(model, battery), STRICT)


def test_the_same_model_behind_the_same_template_has_no_problem(model: Any) -> None:
    encoder = encoder_of()
    battery = make_battery(encoder)
    found = judged(model, InProcess(model, encoder, battery.stop_ids), battery)
    assert found.problems(STRICT) == []
    assert found.agreement == 1
    assert found.kl < 1e-9
    assert found.positions == sum(len(row.positions) for row in battery.rows)
    assert {"system", "turns", "chinese", "tools", "tool result"} <= {row.name for row in battery.rows}


@pytest.mark.parametrize("template", ["chatml", "default"])
def test_prompts_of_another_template_are_named(template: str, model: Any) -> None:
    """Among them chatml: Qwen2.5's format without the default system prompt."""
    encoder = encoder_of()
    battery = make_battery(encoder)
    found = judged(model, InProcess(model, encoder_of(template), battery.stop_ids), battery)
    assert "question" in found.other_prompts
    assert len(found.problems(STRICT)) == 1
    assert found.report()["prompt_ids_equal"] is False


def test_a_dropped_system_prompt_is_found_where_no_message_gives_one(model: Any) -> None:
    encoder = encoder_of()
    battery = make_battery(encoder)
    without = replace(encoder.template, text=encoder.template.text.replace("You are Qwen", "You were Qwen"))
    found = judged(model, InProcess(model, replace(encoder, template=without), battery.stop_ids), battery)
    assert "question" in found.other_prompts
    assert "system" in found.equal_prompts


def test_a_missing_stop_is_found(model: Any) -> None:
    encoder = encoder_of()
    battery = make_battery(encoder)
    found = judged(model, InProcess(model, encoder, battery.stop_ids[1:]), battery)
    assert found.unstopped == battery.stop_ids[:1]
    assert len(found.problems(STRICT)) == 1


def test_one_layer_with_flipped_signs_is_found(model: Any) -> None:
    encoder = encoder_of()
    battery = make_battery(encoder)
    expected = expect(model, battery)
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.neg_()
    try:
        found = read_back(InProcess(model, encoder, battery.stop_ids), battery, expected, STRICT)
    finally:
        with torch.no_grad():
            weight.neg_()
    assert found.kl > STRICT.kl
    assert found.problems(STRICT)


def test_a_text_model_is_judged_on_texts(model: Any) -> None:
    encoder = encoder_of()
    battery = text_battery(encoder.tokenizer.encode, [3])
    found = judged(model, InProcess(model, encoder, [3]), battery)
    assert found.problems(STRICT) == []
    assert found.positions == sum(len(row.ids) - 1 for row in battery.rows)


def test_tokens_that_an_engine_does_not_list_count_against_it() -> None:
    """A model that likes wholly other tokens must not look like the trained one because both are in the same bucket."""
    tokens, log_probs = np.array([1, 2]), np.log([0.6, 0.3])
    other = Candidates({token: float(np.log(0.5)) if token == 9 else float(np.log(1e-3)) for token in range(9, 300)})
    assert divergence(log_probs, listed(tokens, other)) > 1


def test_first_choices_within_the_tie_are_left_out(model: Any) -> None:
    encoder = encoder_of()
    battery = make_battery(encoder)
    expected = expect(model, battery)
    engine = InProcess(model, encoder, battery.stop_ids)
    wide = replace(STRICT, tie=100.0)
    shifted = [replace(item, tokens=np.roll(item.tokens, 1, axis=1)) for item in expected]
    found = read_back(engine, battery, shifted, wide)
    assert found.ties == found.positions
    assert found.agreement == 1
    assert read_back(engine, battery, shifted, STRICT).agreement < 1


def test_conversations_longer_than_the_context_are_left_out() -> None:
    battery = make_battery(encoder_of())
    lengths = sorted(len(row.ids) for row in battery.rows)
    assert len(battery.within(lengths[2]).rows) == 3
    assert battery.within(lengths[0] - 1).rows == ()
