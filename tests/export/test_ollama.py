"""Modelfiles for Ollama: they give the trained prompt, say what they cannot express, and a damaged one is caught."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from firefly.console import take_notices
from firefly.data.encoding import Encoder
from firefly.data.families import TEMPLATES, find_family
from firefly.data.schema import Message
from firefly.data.templates import ChatTemplate, TemplateFailure, bind_template, read_template
from firefly.errors import VerificationError
from firefly.export.go_template import GoTemplate
from firefly.export.modelfile import Modelfile, read_modelfile, render
from firefly.export.ollama import battery, compare, express, has_thoughts, verify_modelfile, write_modelfile
from firefly.export.ollama_template import Learner, NotExpressed
from go_renderer import Go, request

SAMPLING = {"temperature": 0.35, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
SMOLLM2_DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
WITHOUT_TOOLS = {
    "gemma4", "glm4.6", "gpt-oss", "kimi-k2", "minicpm3", "minicpm5", "qwen3.5", "seed-oss",
}  # fmt: skip
"""Families that write functions or calls in ways that Ollama's templates have no means for."""


def family(name: str, variables: Mapping[str, Any] | None = None) -> Learner:
    """A family's template without its tokenizer, for an engine that adds BOS where every prompt begins with it."""
    spec = find_family(name)
    assert spec is not None
    bos, eos = spec.bos or "<s>", spec.eos or "</s>"
    values = {"bos_token": bos, "eos_token": eos} | dict(variables or {})
    template = ChatTemplate(name, read_template(spec), spec.stop_tokens or (eos,), (), values, stable=spec.stable)
    user, system = Message.of("user", "?"), Message.of("system", "?")
    texts = [Learner(template, "").prompt(messages) for messages in ([user], [system, user])]
    return Learner(template, bos if bos != "<|im_start|>" and all(text.startswith(bos) for text in texts) else "")


def expressed(learner: Learner) -> Modelfile:
    template, system, _ = express(learner)
    return Modelfile("./model.gguf", template, system)


@pytest.fixture
def smollm2(chatml_tokenizer) -> Encoder:
    return Encoder(chatml_tokenizer, bind_template("smollm2", chatml_tokenizer))


@pytest.fixture
def write(smollm2, tmp_path) -> Callable[..., Path]:
    """A verified Modelfile of SmolLM2's template, damaged."""

    def written(old: str = "", new: str = "") -> Path:
        path = tmp_path / "Modelfile"
        write_modelfile(path, "model.gguf", smollm2, ["<|im_end|>"], SAMPLING, 2048)
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        return path

    return written


# ---- the prompt


@pytest.mark.parametrize(
    "name", ["smollm2", "qwen2.5", "qwen3", "llama2", "llama3.1", "gemma", "mistral-v3-tekken-common", "deepseek-r1"]
)
def test_every_prompt_of_the_battery_is_the_trained_one(name):
    learner = family(name)
    template, system, unexpressed = express(learner)
    assert not unexpressed
    needs = ["plain", "system"] + ["tools"] * (".Tools" in template) + ["thinking"] * ("Think" in template)
    compared, equal, problems = compare(Modelfile("", template, system), learner, needs)
    assert (equal, problems) == (compared, [])
    assert compared >= 11 + 9 * ("tools" in needs)


@pytest.mark.slow
def test_every_family_is_expressed_and_go_renders_it_as_the_interpreter_does(tmp_path):
    go = Go(tmp_path)
    without: set[str] = set()
    requests, texts = [], []
    for name in TEMPLATES:
        learner = family(name)
        template, system, unexpressed = express(learner)
        without |= {name} if "tools" in unexpressed else set()
        assert set(unexpressed) <= {"tools"}, (name, unexpressed)
        parsed, modelfile = GoTemplate.parse(template), Modelfile("", template, system)
        for case in battery():
            if case.needs == "tools" and not parsed.uses("Tools"):
                continue
            messages = case.messages
            if system and messages[0].role != "system":
                messages = (Message.of("system", system), *messages)
            texts.append((name, case.name, render(modelfile, parsed, case.messages, case.tools, case.think)))
            requests.append(request(template, messages, case.tools, case.think))
    for (name, case, text), answer in zip(texts, go.render(requests), strict=True):
        assert (answer["error"], answer["text"]) == ("", text), (name, case)
    assert len(texts) > 80 * 14
    assert without == WITHOUT_TOOLS


@pytest.mark.slow
def test_official_renderings_are_given(shared):
    modelfiles: dict[str, tuple[Modelfile, GoTemplate, str]] = {}
    compared = 0
    for line in (shared / "templates" / "expected.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        name = case["family"]
        # Phi-3 and Orion drop a system prompt, and it is trained merged; these others print a date.
        changed = ("phi3-mini-2024-04", "phi3-medium", "orion", "granite3.1", "granite3.3", "gpt-oss")
        dated = (*changed, "mistral-small-3.2")
        if "error" in case or not case["add_generation_prompt"] or not find_family(name) or name in dated:
            continue
        if name not in modelfiles:
            tokens = {key: case[key] or "" for key in ("bos_token", "eos_token")}
            learner = family(name, tokens | case["extra"])
            modelfile = expressed(learner)
            modelfiles[name] = modelfile, GoTemplate.parse(modelfile.template), learner.bos
        modelfile, template, bos = modelfiles[name]
        messages = [Message.of(item["role"], item["content"]) for item in case["messages"]]
        assert bos + render(modelfile, template, messages) == case["rendered"], (name, case["case"])
        compared += 1
    assert compared > 130


def test_a_default_system_prompt_is_in_system_and_a_given_one_takes_its_place():
    learner = family("smollm2")
    modelfile = expressed(learner)
    template = GoTemplate.parse(modelfile.template)
    assert modelfile.system == SMOLLM2_DEFAULT
    user, pirate = Message.of("user", "Hi"), Message.of("system", "You are a pirate.")
    assert render(modelfile, template, [user]).startswith(f"<|im_start|>system\n{SMOLLM2_DEFAULT}<|im_end|>\n")
    assert render(modelfile, template, [pirate, user]) == learner.prompt([pirate, user])
    assert SMOLLM2_DEFAULT not in render(modelfile, template, [pirate, user])


def test_a_default_that_system_cannot_hold_is_in_the_template():
    # Llama 3.1 names dates in its system turn, given or not; SmolLM3 writes other words behind a given one.
    for name in ("llama3.1", "smollm3"):
        modelfile = expressed(family(name))
        assert modelfile.system == ""
        assert "{{- define" not in modelfile.template or name == "llama3.1"


def test_a_beginning_that_the_engine_adds_is_not_in_the_template():
    learner = family("llama3.1")
    assert learner.bos == "<|begin_of_text|>"
    assert "<|begin_of_text|>" not in expressed(learner).template
    assert expressed(Learner(learner.template, "")).template.count("<|begin_of_text|>") >= 1


def test_an_engine_that_adds_a_beginning_to_prompts_trained_without_is_refused():
    learner = family("zephyr")
    with pytest.raises(NotExpressed, match="in front of every prompt"):
        express(Learner(learner.template, "<s>"))


def test_a_system_prompt_in_the_middle_stands_where_it_was_said():
    learner = family("qwen2.5")
    modelfile = expressed(learner)
    said = [
        Message.of(role, text) for role, text in (("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d"))
    ]
    assert render(modelfile, GoTemplate.parse(modelfile.template), said) == learner.prompt(said)


def test_rounds_are_counted():
    modelfile = expressed(family("chatglm2"))
    turns = [Message.of(role, "x") for _ in range(11) for role in ("user", "assistant")] + [Message.of("user", "y")]
    text = render(modelfile, GoTemplate.parse(modelfile.template), turns)
    assert [f"[Round {number}]" in text for number in (1, 2, 11, 12, 13)] == [True, True, True, True, False]


def test_thinking_that_a_request_switches_off_is_off_as_trained():
    learner = family("qwen3")
    modelfile = expressed(learner)
    template, user = GoTemplate.parse(modelfile.template), [Message.of("user", "Hi")]
    assert render(modelfile, template, user, think=False).endswith("<think>\n\n</think>\n\n")
    for think in (None, True):
        assert render(modelfile, template, user, think=think).endswith("<|im_start|>assistant\n")


def test_neighbours_of_one_role_are_joined_as_ollama_does():
    modelfile = expressed(family("chatml"))
    said = [Message.of("user", "a"), Message.of("user", "b")]
    text = render(modelfile, GoTemplate.parse(modelfile.template), said)
    assert text == "<|im_start|>user\na\n\nb<|im_end|>\n<|im_start|>assistant\n"


def test_what_a_function_has_beyond_the_usual_is_not_dropped():
    modelfile = expressed(family("qwen2.5"))
    nested = {"type": "object", "properties": {"inner": {"type": "string"}}}
    items = {"type": "array", "items": {"type": "string"}, "description": "d"}
    parameters = {"type": "object", "properties": {"a": nested, "b": items}}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}
    text = render(modelfile, GoTemplate.parse(modelfile.template), [Message.of("user", "?")], [tool])
    assert '"a": {"type":"object","properties":{"inner":{"type":"string"}}}' in text
    assert '"b": {"type": "array", "description": "d", "items": {"type": "string"}}' in text


def test_ollama_finds_the_mark_of_calls_and_of_thoughts():
    """It takes the first text below `if .ToolCalls`, and what stands around `.Thinking` in its own branch."""
    for name, mark in (
        ("qwen2.5", "<tool_call>"),
        ("mistral-v3-tekken-common", "[TOOL_CALLS][{"),
        ("qwen3", "<tool_call>"),
    ):
        _, _, behind = expressed(family(name)).template.partition("{{- if .ToolCalls }}")
        text = behind.replace("\n{{- range $j, $_ := .ToolCalls }}\n{{- if eq $j 0 }}", "")
        assert text.startswith(mark), name
    for name in ("qwen3", "deepseek-r1"):
        template = expressed(family(name)).template
        assert "}}<think>\n{{ .Thinking }}\n</think>" in template, name
        assert 'eq .Role "tool"' in template or name == "deepseek-r1"


# ---- what cannot be expressed


def test_what_is_not_expressed_is_said_and_stands_in_the_file(tmp_path, chatml_tokenizer):
    path = tmp_path / "qwen3.5.jinja"
    spec = find_family("qwen3.5")
    assert spec is not None
    path.write_text(read_template(spec), encoding="utf-8")
    encoder = Encoder(chatml_tokenizer, bind_template(str(path), chatml_tokenizer))
    take_notices()
    report = write_modelfile(tmp_path / "Modelfile", "m.gguf", encoder, ["<|im_end|>"], SAMPLING)
    codes = [item["code"] for item in take_notices()]
    assert report.verified
    assert report.equal == report.conversations
    assert "tools" in report.not_expressed
    assert "tools" not in report.expressed
    assert "ollama.no_tools" in codes
    assert "ollama.no_trim" in codes
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8").startswith("# not expressed: tools: ")
    assert report.as_json()["not_expressed"]["tools"] == report.not_expressed["tools"]


def test_a_template_without_functions_has_none_to_miss(smollm2, tmp_path):
    take_notices()
    report = write_modelfile(tmp_path / "Modelfile", "m.gguf", smollm2, ["<|im_end|>"], SAMPLING)
    assert (report.expressed, report.not_expressed, take_notices()) == (("plain", "system"), {}, [])
    assert not has_thoughts(Learner(smollm2.template, ""))


def test_a_template_that_cannot_be_expressed_fails(tmp_path, chatml_tokenizer):
    text = "{% for m in messages %}<|im_start|>{{ m.role }} {{ messages | length - loop.index }}\n{{ m.content }}"
    path = tmp_path / "counting.jinja"
    path.write_text(text + "<|im_end|>\n{% endfor %}<|im_start|>assistant\n", encoding="utf-8")
    encoder = Encoder(chatml_tokenizer, bind_template(str(path), chatml_tokenizer))
    with pytest.raises(VerificationError, match="how many came before"):
        write_modelfile(tmp_path / "Modelfile", "m.gguf", encoder, ["<|im_end|>"], SAMPLING)
    assert [item.name for item in tmp_path.glob("Modelfile*")] == ["Modelfile.failed"]


# ---- damage


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (f'SYSTEM """{SMOLLM2_DEFAULT}"""\n', "", "single: the prompt has"),
        ("named SmolLM", "named Smol", "single: the prompt has"),
        ('PARAMETER stop "<|im_end|>"\n', "", "PARAMETER stop lacks"),
        ('stop "<|im_end|>"', 'stop "<|im_end|>"\nPARAMETER stop "."', "ends no reply as trained"),
        ("<|im_start|>user", "<|user|>", "single: the prompt has"),
        ("<|im_start|>assistant\n", "<|im_start|>assistant", "the prompt has"),
        ('else if eq .Role "assistant"', 'else if eq .Role "bot"', "multi-turn: the prompt has"),
        ("{{ .Content }}", "{{ .Contents }}", "can't evaluate field Contents"),
        ("\n{{- end }}", "", "range without end"),
        ("temperature", "temperatur", "PARAMETER temperatur is 0.35"),
        ('num_ctx "2048"', 'num_ctx "512"', "PARAMETER num_ctx is 512, not 2048"),
        ("FROM", "FRM", "unknown command"),
    ],
)
def test_a_damaged_file_is_caught(write, smollm2, old, new, problem):
    path = write(old, new)
    with pytest.raises(VerificationError, match=problem.replace("|", r"\|")) as caught:
        verify_modelfile(path, smollm2, ["<|im_end|>"], SAMPLING, 2048)
    assert caught.value.exit_code == 3
    assert not path.exists()
    assert path.with_name("Modelfile.failed").is_file()


def test_an_undamaged_file_is_verified_and_stays(write, smollm2):
    path = write()
    report = verify_modelfile(path, smollm2, ["<|im_end|>"], SAMPLING, 2048)
    assert report.verified
    assert path.is_file()
    assert report.as_json()["conversations"] == report.as_json()["prompts_equal"] == 11


def test_another_template_than_the_trained_one_is_caught(write, chatml_tokenizer):
    other = Encoder(chatml_tokenizer, bind_template("qwen", chatml_tokenizer))
    with pytest.raises(VerificationError):
        verify_modelfile(write(), other, ["<|im_end|>"], SAMPLING, 2048)


# ---- the file


def test_a_modelfile_is_read_as_it_was_written():
    texts = ["x", ' {"a"}\n\n b ', 'ends with a quote"', "", "line\n\tтекст 中文\n"]
    for text in texts:
        for stop in ("<|im_end|>", 'a"b', "\n\nUser:", " spaced "):
            given = Modelfile("./a b.gguf", text or "t", text, "./lora.gguf", (stop,), {"temperature": "0.35"})
            assert read_modelfile(str(given)) == given


def test_a_modelfile_is_read_as_ollama_reads_it():
    text = (
        '# comment\nfrom ./m.gguf\n\nTEMPLATE """a """b\u200b\u3000c\n"""\nparameter stop <end>\nSystem  plain words\n'
    )
    read = read_modelfile(text)
    # What Go does not call printable is lost; three quotes close a value only at the end of a line.
    assert (read.source, read.template, read.stops, read.system) == ("./m.gguf", 'a """bc\n', ("<end>",), "plain words")
    for broken in ('FROM m\nTEMPLATE """a\n', "TEMPLATE a\n", "FROM m\nFROM n\n", "FROM m\nLEMPLATE b\n"):
        with pytest.raises(ValueError, match=r"closed|FROM|unknown"):
            read_modelfile(broken)


def test_what_the_parser_would_lose_or_close_stands_in_a_go_string(tmp_path, chatml_tokenizer):
    text = (
        '{% for m in messages %}<|im_start|>{{ m.role }}\u3000{{ "{{" }} """\n{{ m.content }}<|im_end|>\n{% endfor %}'
    )
    path = tmp_path / "odd.jinja"
    path.write_text(text + "<|im_start|>assistant\u200b{", encoding="utf-8")
    encoder = Encoder(chatml_tokenizer, bind_template(str(path), chatml_tokenizer))
    report = write_modelfile(tmp_path / "Modelfile", "m.gguf", encoder, ["<|im_end|>"], SAMPLING)
    assert report.equal == report.conversations == 11
    assert "\u3000" not in (tmp_path / "Modelfile").read_text(encoding="utf-8")


def test_the_penalty_that_ollama_adds_by_itself_is_switched_off(smollm2, tmp_path):
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 64, "seed": None, "logit_bias": {}}
    write_modelfile(tmp_path / "Modelfile", "m.gguf", smollm2, ["<|im_end|>"], sampling, adapter_name="lora.gguf")
    read = read_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert read.parameters == {"temperature": "0", "top_p": "1", "repeat_penalty": "1", "num_predict": "64"}
    assert (read.source, read.adapter, read.stops) == ("./m.gguf", "./lora.gguf", ("<|im_end|>",))


def test_the_gguf_file_says_whether_the_engine_adds_a_beginning(tmp_path, sentencepiece_tokenizer):
    gguf = pytest.importorskip("gguf")
    encoder = Encoder(sentencepiece_tokenizer, bind_template("llama2", sentencepiece_tokenizer))
    for says, adds in ((True, True), (False, False), (None, True)):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_tokenizer_model("llama")
        if says is not None:
            writer.add_add_bos_token(says)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_modelfile(tmp_path / "Modelfile", "m.gguf", encoder, ["</s>"], SAMPLING)
        template = read_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8")).template
        assert ("<s>[INST]" in template.split("</s>")[0]) is not adds, says


def test_a_template_that_refuses_everything_fails(tmp_path):
    spec = find_family("chatml")
    assert spec is not None
    refusing = ChatTemplate("x", "{{ raise_exception('no') }}", ("</s>",), ())
    with pytest.raises(TemplateFailure):
        express(Learner(refusing, ""))
