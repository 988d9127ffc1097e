"""lm-eval on our loading, template and engines gives the numbers of its own `hf` on the merged model."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firefly.config import ModelConfig
from firefly.data.schema import Message
from firefly.errors import UsageError
from firefly.evaluation.guest import as_guest, require_harness
from firefly.generation.loading import Loaded, load_for_generation
from tiny import save_tiny_model, tiny_model, with_plain_lora

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = (
    ("What is red?", " A colour"),
    ("What is red? ", "A colour"),
    ("", "Nothing stands before"),
    ("blue " * 150, " is long"),
    ("你好", "，请介绍一下"),
    ("Answer:", " A"),
    ("Answer:", " B"),
)


def saved(folder: Path, tokenizer: Any, name: str = "llama", **changes: Any) -> Path:
    changes = {"vocab_size": len(tokenizer), "bos_token_id": 1, **changes}
    tiny_model(name, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["chatml", "sentencepiece"])
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    chatml_tokenizer: Any,
    sentencepiece_tokenizer: Any,
) -> Any:
    """(a loaded base with an adapter, lm-eval's `hf` on the base, and on the merged model)"""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require_harness()
    tokenizer = {"chatml": chatml_tokenizer, "sentencepiece": sentencepiece_tokenizer}[request.param]
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp(request.param)
    base = saved(folder / "base", tokenizer, max_position_embeddings=128)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = with_plain_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder / "adapter")
    with_adapter = load_for_generation(
        ModelConfig(name_or_path=str(base)), {"tuned": str(folder / "adapter")}, dtype="float32"
    )
    given = AutoTokenizer.from_pretrained(base)
    with as_guest():
        guests = [HFLM(pretrained=each, tokenizer=given, batch_size=4) for each in (plain, wrapped.merge_and_unload())]
    return with_adapter, {"base": guests[0], "tuned": guests[1]}


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def ours(loaded: Loaded, name: str, **options: Any) -> Any:
    from firefly.evaluation.harness import HarnessModel

    return HarnessModel(loaded, name, **options)


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_likelihoods_are_those_of_hf_on_the_merged_model(
    trained: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, theirs = trained
    asked = instances("loglikelihood", *PAIRS)
    found, expected = ours(loaded, name).loglikelihood(asked), theirs[name].loglikelihood(asked)
    assert found == [(pytest.approx(logp, abs=1e-3), greedy) for logp, greedy in expected]
    assert "1 of 7 prompts are longer than the 128 tokens" in capsys.readouterr().err
    texts = [("red green blue " * 40,), ("short",), ("天地玄黄",)]
    found = ours(loaded, name).loglikelihood_rolling(instances("loglikelihood_rolling", *texts))
    assert found == pytest.approx(
        theirs[name].loglikelihood_rolling(instances("loglikelihood_rolling", *texts)), abs=1e-3
    )


def test_prompts_of_the_template_give_the_likelihoods_of_hf(trained: Any) -> None:
    loaded, theirs = trained
    if theirs["base"].tokenizer.bos_token:
        pytest.skip("hf adds a token in front that the template does not write")
    histories = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "red?"}],
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "3"}],
    ]
    begun = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "It is"}]
    for name in ("base", "tuned"):
        model = ours(loaded, name)
        for lm in (model, theirs[name]):
            contexts = [lm.apply_chat_template(history) for history in histories]
            contexts.append(lm.apply_chat_template(begun, add_generation_prompt=False))
            asked = instances(
                "loglikelihood", *((context, text) for context in contexts for text in ("A", "B", " C d"))
            )
            if lm is model:
                found = lm.loglikelihood(asked)
            else:
                assert found == [(pytest.approx(logp, abs=1e-3), greedy) for logp, greedy in lm.loglikelihood(asked)]


@pytest.mark.parametrize("with_template", [True, False])
def test_answers_are_those_of_hf(trained: Any, with_template: bool) -> None:
    loaded, theirs = trained
    if with_template and theirs["base"].tokenizer.bos_token:
        pytest.skip("hf adds a token in front that the template does not write")
    settings = {"until": ["\n\n", "e"], "max_gen_toks": 12, "do_sample": False}
    questions = ["red", "two words", "天地玄黄 " * 30, "red"]
    for name in ("tuned", "base"):
        answers = []
        for lm in (ours(loaded, name, with_template=with_template), theirs[name]):
            contexts = questions
            if with_template:
                contexts = [lm.apply_chat_template([{"role": "user", "content": each}]) for each in questions]
            answers.append(lm.generate_until(instances("generate_until", *((each, settings) for each in contexts))))
        assert answers[0] == answers[1]
        # Likelihoods after answers are still those of this model.
        asked = instances("loglikelihood", *PAIRS)
        expected = theirs[name].loglikelihood(asked)
        found = ours(loaded, name).loglikelihood(asked)
        assert found == [(pytest.approx(logp, abs=1e-3), greedy) for logp, greedy in expected]


def test_answers_that_are_drawn_several_times_differ_and_the_likeliest_is_computed_once(trained: Any) -> None:
    loaded, _ = trained
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = instances("generate_until", *[("red", drawn)] * 4)
    first, second = (ours(loaded, "tuned").generate_until(asked) for _ in range(2))
    assert first == second
    assert len(set(first)) > 1
    greedy = ours(loaded, "tuned").generate_until(instances("generate_until", *[("red", {"max_gen_toks": 8})] * 4))
    assert len(set(greedy)) == 1


def test_a_setting_that_no_engine_honours_is_refused_by_name(trained: Any) -> None:
    loaded, _ = trained
    with pytest.raises(UsageError, match="num_beams = 4"):
        ours(loaded, "tuned").generate_until(instances("generate_until", ("red", {"num_beams": 4})))


def test_a_typed_special_token_stays_text_in_a_templates_prompt(trained: Any) -> None:
    loaded, _ = trained
    model = ours(loaded, "tuned")
    if model.tokenizer.bos_token:
        pytest.skip("this tokenizer joins the line break before a reply to what stands before it")
    (special,) = model.encoder.special_tokens[:1]
    context = model.apply_chat_template([{"role": "user", "content": f"say {special}"}])
    expected = model.encoder.encode_prompt([Message.of("user", f"say {special}")])
    assert model.tok_encode(context) == expected
    before, after = model._encode_pair(context, "A")
    assert before == expected[: len(before)]
    assert model.tokenizer.decode(after) == "\nA"


def test_what_the_template_writes_before_a_reply_stands_before_a_choice(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    loaded = load_for_generation(ModelConfig(name_or_path=str(model)), {}, template_name="default", dtype="float32")
    lm = ours(loaded, "model")
    context = lm.apply_chat_template([{"role": "user", "content": "red"}])
    _, choice = lm._encode_pair(context, "A")
    assert lm.tokenizer.decode(choice) == " A"


def test_lm_eval_leaves_the_process_as_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setenv("DISABLE_MULTIPROC", "0")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    flags = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    require_harness()
    with as_guest():
        print("a task speaks")
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
        first = random.random(), np.random.random(), torch.rand(1).item()
    with as_guest():
        assert first == (random.random(), np.random.random(), torch.rand(1).item())
    assert capsys.readouterr() == ("", "")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state[:3]
    assert dict(os.environ) == state[3]
    assert flags == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


@pytest.mark.slow
@pytest.mark.parametrize("with_template", [True, False])
def test_a_real_adapter_scores_as_hf_scores_the_merged_model(tmp_path: Path, with_template: bool) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from firefly.evaluation.benchmarks import OwnSettings, find_tasks, measure
    from firefly.export.merge import merge
    from firefly.models.loading import embedded_model

    base = ModelConfig(name_or_path="smollm2-135m-instruct")
    wrapped = with_plain_lora(AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32))
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            parameter.data *= 0.1
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")

    letters = tmp_path / "letters.csv"
    lines = [f"{a} + {b} = ?,{a + b},{a + b + 1},{a * b + 7},A" for a in range(2, 8) for b in range(3, 6)]
    letters.write_text("\n".join(["question,A,B,C,answer", *lines, "中国的首都是哪里？,上海,北京,广州,B", ""]), "utf-8")
    texts = tmp_path / "texts.jsonl"
    capitals = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "中国": "北京", "Spain": "Madrid"}
    rows = [
        {"question": f"The capital of {land}?", "choices": list(capitals.values()), "answer": city}
        for land, city in capitals.items()
    ]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    written = tmp_path / "written.jsonl"
    rows = [{"question": f"What is the capital of {land}?", "answer": city} for land, city in capitals.items()]
    written.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    settings = OwnSettings(metrics=("contains", "chrf"), max_new_tokens=24)
    found = find_tasks([str(letters), str(texts), str(written)], settings, num_fewshot=2)

    loaded = load_for_generation(base, {"tuned": str(tmp_path / "adapter")}, dtype="float32")
    own = measure(ours(loaded, "tuned", with_template=with_template), found)
    with as_guest():
        for task in found.tasks.values():
            task.set_fewshot_seed(1234)
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        theirs: Any = evaluate(
            lm=HFLM(pretrained=plain, tokenizer=AutoTokenizer.from_pretrained(merged), batch_size=4),
            task_dict={"tasks": found.tasks, "groups": {}, "group_map": {}},
            bootstrap_iters=100,
            apply_chat_template=with_template,
            fewshot_as_multiturn=True,
        )
    for task in ("letters", "texts"):
        for one, other in zip(own["samples"][task], theirs["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            found_logps, expected = ([logp for logp, _ in each["filtered_resps"]] for each in (one, other))
            assert found_logps == pytest.approx(expected, abs=1e-3)
        assert own["results"][task]["acc,none"] == theirs["results"][task]["acc,none"]
    answers = [[sample["filtered_resps"] for sample in each["samples"]["written"]] for each in (own, theirs)]
    assert sum(one == other for one, other in zip(*answers, strict=True)) >= 4
