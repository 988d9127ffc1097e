"""What is loaded to answer: a base and adapters by name, each with its own tokenizer, template and certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from firefly.config import ModelConfig
from firefly.data.certificate import FILE_NAME, certify
from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.data.templates import bind_template
from firefly.errors import UsageError
from firefly.generation.loading import base_name, load_for_generation, named_adapters
from firefly.models.adapter_loading import load_adapter, load_adapters, use_adapter
from firefly.models.loading import load_model
from firefly.models.precision import Precision
from firefly.models.saved_adapter import open_adapter
from firefly.models.serving_memory import spread_over
from tiny import save_tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 20, 31, 7, 44, 6, 100, 250]])
HELLO = [Message.of("user", "red")]
TEMPLATES = {
    "formal": "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}Dear user, ",
    "curt": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
}


def save_adapter(folder: Path, base: Path, template: str | None = None, seed: int = 0, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    trained: Any = get_peft_model(model, LoraConfig(**wanted))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(trained.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    trained.save_pretrained(folder)
    if template is not None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a chat template, and two adapters with one each."""
    folder = tmp_path_factory.mktemp("served")
    base = save_tiny_model(folder / "base")
    for seed, (name, template) in enumerate(TEMPLATES.items()):
        save_adapter(folder / name, base, template, seed)
    return folder


@pytest.fixture
def base(place: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(place / "base"))


def test_each_name_has_the_weights_and_the_prompts_of_its_own_folder(place: Path, base: ModelConfig) -> None:
    loaded = load_for_generation(base, {name: place / name for name in TEMPLATES})
    assert list(loaded.served) == ["base", "formal", "curt"]
    precision = Precision(torch.float32)  # what a tiny model computes in
    fresh = [load_model(base, "lora", precision, torch.device("cpu")).eval() for _ in range(3)]
    expected = {name: logits(load_adapter(fresh.pop(), str(place / name))) for name in TEMPLATES}
    expected["base"] = logits(fresh.pop())
    for name in ("formal", "base", "curt", "formal", "curt", "base"):
        loaded.select(name)
        assert torch.equal(logits(loaded.model), expected[name]), name
    tokenizer = tiny_tokenizer()
    for name, template in TEMPLATES.items():
        served = loaded.served[name]
        messages = [{"role": "user", "content": "red"}]
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert served.encoder is not None
        assert served.encoder.encode_prompt(HELLO) == tokenizer.encode(text)
        assert (served.adapter, served.folder) == (str(place / name), place / name)
        assert served.stop_ids == (tokenizer.eos_token_id,)


def test_a_base_without_a_template_continues_texts_and_says_why_it_does_not_chat(base: ModelConfig) -> None:
    served = load_for_generation(base, {}).served["base"]
    assert served.encoder is None
    assert served.no_template is not None
    assert served.no_template.code == "template.tokenizer_has_none"
    assert served.stop_ids == (2,)  # of its generation_config
    assert served.tokenizer.decode(served.tokenizer.encode("red")) == "red"
    assert load_for_generation(base, {}, "default").served["base"].encoder is not None
    with pytest.raises(UsageError, match="nonesuch"):
        load_for_generation(base, {}, "nonesuch")


def test_nothing_of_a_published_generation_config_acts_unseen(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "base")
    plain = load_for_generation(ModelConfig(name_or_path=str(folder)), {})
    expected = plain.model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert plain.defaults == {}
    file = folder / "generation_config.json"
    sampling = {"repetition_penalty": 3.0, "suppress_tokens": [int(expected[0, -1])], "temperature": 0.7, "top_k": 1}
    ends = {"eos_token_id": [2, 7], "do_sample": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | sampling | ends))
    loaded = load_for_generation(ModelConfig(name_or_path=str(folder)), {})
    found = loaded.model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert torch.equal(found, expected)
    assert loaded.defaults == sampling | {"do_sample": True}
    assert loaded.served["base"].stop_ids == (2, 7)


def test_the_prompts_that_an_adapter_learnt_are_kept_to(place: Path, tmp_path: Path, base: ModelConfig) -> None:
    adapter = save_adapter(tmp_path / "tuned", place / "base", TEMPLATES["curt"])
    tokenizer = tiny_tokenizer()
    certificate = certify(Encoder(tokenizer, bind_template("qwen", tokenizer))).as_dict()
    (adapter / FILE_NAME).write_text(json.dumps(certificate), encoding="utf-8")
    both = {"curt": place / "curt", "tuned": adapter}
    with pytest.raises(UsageError, match="--force"):
        load_for_generation(base, both)
    forced = load_for_generation(base, both, force=True).served["tuned"].encoder
    assert forced is not None
    assert forced.template.text == TEMPLATES["curt"]
    named = load_for_generation(base, {"tuned": adapter}, "qwen").served["tuned"].encoder
    assert named is not None
    assert named.template.name == "qwen"


def test_a_base_keeps_no_adapter_from_being_served(tmp_path: Path) -> None:
    """Neither by its certificate nor for want of a tokenizer: it need not even be asked for."""
    folder = save_tiny_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "tuned", folder, TEMPLATES["curt"])
    tokenizer = tiny_tokenizer()
    certificate = certify(Encoder(tokenizer, bind_template("qwen", tokenizer))).as_dict()
    (folder / FILE_NAME).write_text(json.dumps(certificate), encoding="utf-8")
    model = ModelConfig(name_or_path=str(folder))
    served = load_for_generation(model, {"tuned": adapter}, "smollm2").served["base"]
    assert served.encoder is None
    assert served.no_template is not None
    assert served.no_template.code == "certificate.mismatch"
    for file in (*folder.glob("token*"), *folder.glob("special*")):
        file.unlink()
    loaded = load_for_generation(model, {"tuned": adapter})
    assert list(loaded.served) == ["tuned"]
    assert list(loaded.unserved) == ["base"]
    assert list(load_for_generation(model, {"tuned": adapter}, with_base=False).served) == ["tuned"]


def test_an_adapter_names_its_base_and_may_be_given_as_the_model(place: Path) -> None:
    for given in (
        load_for_generation(ModelConfig(), {"curt": place / "curt"}),
        load_for_generation(ModelConfig(name_or_path=str(place / "curt")), {}),
        load_for_generation(ModelConfig(), {name: place / name for name in TEMPLATES}),
    ):
        assert next(iter(given.served)) == "base"
        assert "curt" in given.served
        assert given.served["base"].folder == place / "base"


def test_adapters_of_two_bases_are_refused_by_name(place: Path, tmp_path: Path, base: ModelConfig) -> None:
    save_tiny_model(tmp_path / "other", seed=5)
    stranger = save_adapter(tmp_path / "stranger", tmp_path / "other", TEMPLATES["curt"])
    with pytest.raises(UsageError, match=r"stranger.*other"):
        load_for_generation(ModelConfig(), {"curt": place / "curt", "stranger": stranger})
    assert "stranger" in load_for_generation(base, {"curt": place / "curt", "stranger": stranger}).served


def test_an_adapter_that_changes_the_base_is_served_without_it(place: Path, tmp_path: Path, base: ModelConfig) -> None:
    adapter = save_adapter(tmp_path / "start", place / "base", TEMPLATES["curt"], init_lora_weights="pissa")
    loaded = load_for_generation(base, {"start": adapter})
    assert list(loaded.served) == ["start"]
    assert str(adapter) in str(loaded.unserved["base"])
    loaded.select("start")


def test_a_base_of_an_adapters_name_is_served_by_its_whole_path(place: Path, base: ModelConfig) -> None:
    loaded = load_for_generation(base, {"base": place / "curt"})
    assert list(loaded.served) == [str(place / "base"), "base"]


def test_an_adapter_that_scores_is_refused(place: Path, tmp_path: Path, base: ModelConfig) -> None:
    save_adapter(tmp_path / "reward", place / "base", TEMPLATES["curt"])
    settings = tmp_path / "reward" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(UsageError, match="reward is a classifier"):
        load_for_generation(base, {"curt": place / "curt", "reward": tmp_path / "reward"})


def test_adapters_over_a_base_in_4_bits_take_turns(place: Path, base: ModelConfig) -> None:
    loaded = load_for_generation(base, {name: place / name for name in TEMPLATES}, load_in_4bit=True)
    found = {}
    for name in loaded.served:
        loaded.select(name)
        found[name] = logits(loaded.model)
    assert type(loaded.model.model.layers[0].mlp.gate_proj).__name__ == "Linear4bit"
    assert not torch.equal(found["formal"], found["curt"])
    loaded.select("base")
    assert torch.equal(logits(loaded.model), found["base"])


def test_names_are_the_last_parts_of_paths_or_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr=1").mkdir()
    assert named_adapters(["a/b", "c/d/", "x=a/b", f"{tmp_path}/lr=1"]) == {
        "b": "a/b",
        "d": "c/d/",
        "x": "a/b",
        "lr=1": f"{tmp_path}/lr=1",
    }
    monkeypatch.chdir(tmp_path / "lr=1")
    assert named_adapters(["."]) == {"lr=1": "."}
    with pytest.raises(UsageError, match=r"served as b: a/b and c/b\..*NAME=c/b"):
        named_adapters(["a/b", "c/b"])
    with pytest.raises(UsageError, match="=a/b is not valid"):
        named_adapters(["=a/b"])
    names = {"Qwen/Qwen3-8B": "Qwen3-8B", "SmolLM2-135M-Instruct": "smollm2-135m-instruct", "/models/base/": "base"}
    assert {path: base_name(ModelConfig(name_or_path=path)) for path in names} == names


def test_weights_are_laid_over_several_gpus_where_they_do_not_fit_one() -> None:
    assert not spread_over(8 << 30, [])
    assert not spread_over(30 << 30, [24 << 30])  # one alone: it is tried, and says so when memory runs out
    assert not spread_over(16 << 30, [24 << 30, 24 << 30])
    assert spread_over(23 << 30, [24 << 30, 24 << 30])  # no room for a cache
    assert spread_over(40 << 30, [24 << 30, 24 << 30])


def test_adapters_take_turns_over_layers_that_accelerate_placed(place: Path, base: ModelConfig) -> None:
    """As on several GPUs: hooks on every layer move its inputs to where its weights lie."""
    from accelerate import dispatch_model

    precision, cpu = Precision(torch.float32), torch.device("cpu")
    alone = logits(load_adapter(load_model(base, "lora", precision, cpu).eval(), str(place / "curt")))
    model = load_model(base, "lora", precision, cpu, spread=True).eval()
    bare = logits(model)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{number}": "cpu" for number in range(3)}
    model = dispatch_model(model, parts, force_hooks=True)
    assert hasattr(model.model.layers[0].self_attn.q_proj, "_hf_hook")
    load_adapters(model, {name: open_adapter(str(place / name)) for name in TEMPLATES})
    for name, expected in (("curt", alone), (None, bare), ("formal", None), ("curt", alone)):
        use_adapter(model, name)
        assert expected is None or torch.equal(logits(model), expected)
