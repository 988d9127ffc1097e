"""vLLM's parsers of calls and thoughts: the right one for each format, and none where it would lose an answer."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from firefly.data.families import find_family
from firefly.data.schema import Message
from firefly.data.templates import ChatTemplate, read_template
from firefly.export.vllm_parsers import (
    CHANNELS,
    REASONING_PARSERS,
    TOOL_PARSERS,
    begins_with_thought,
    find_parsers,
    outline,
    parser_of_calls,
)
from firefly.generation.replies.markers import probe_replies, shown_reply, written_reply

FAMILIES: dict[str, tuple[str | None, str | None]] = {
    "qwen2.5": ("hermes", None),
    "qwen3": ("hermes", "qwen3"),
    "qwen3-nothink": ("hermes", None),
    "qwen3.5": ("qwen3_coder", "qwen3"),
    "llama3.1": ("llama3_json", None),
    "llama3.2": ("llama3_json", None),
    "llama4": (None, None),
    "mistral-nemo": ("mistral", None),
    "mistral-v7-common": ("mistral", None),
    "mistral-v11-common": (None, None),
    "mistral-v13-common": ("mistral", "mistral"),
    "deepseek-v2.5": ("deepseek_v3", None),
    "deepseek-v3": ("deepseek_v3", None),
    "deepseek-r1": ("deepseek_v3", "deepseek_r1"),
    "deepseek-r1-distill": ("deepseek_v3", None),
    "deepseek-v3.1": ("deepseek_v31", None),
    "glm4.6": ("glm45", "glm45"),
    "seed-oss": ("seed_oss", "seed_oss"),
    "kimi-k2": ("kimi_k2", None),
    "minicpm3": (None, None),
    "minicpm5": ("minicpm5", "qwen3"),
    "granite3.3": (None, "qwen3"),
    "granite4.0": ("hermes", None),
    "smollm3": (None, "qwen3"),
    "gemma4": ("gemma4", None),
    "gpt-oss": CHANNELS,
    "phi3": (None, None),
    "smollm2": (None, None),
}
"""Family → parsers of calls and thoughts, of a model whose replies think where its template lets them."""

THINK_ALWAYS = {"qwen3", "qwen3.5", "glm4.6", "mistral-v13-common", "gpt-oss"}
"""Families whose thoughts are read although nobody says that every reply thinks."""

OBJECT = '{"name": "NAME", "arguments": ARGS}'
PARAMETERS = OBJECT.replace("arguments", "parameters")
PYTHON = 'NAME(KEY="VALUE", KEY2=NUMBER)'
FORMATS = {
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="NAME">\n'
    '<｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="KEY2" string="false">NUMBER</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="NAME">\n<parameter name="KEY">VALUE</parameter>\n'
    '<parameter name="KEY2">NUMBER</parameter>\n</invoke>\n</minimax:tool_call>',
    "granite": f"<|tool_call|>[{OBJECT}]",
    "granite-20b-fc": f"<function_call> {OBJECT}",
    "internlm": f"<|action_start|><|plugin|>\n{PARAMETERS}<|action_end|>",
    "jamba": f"<tool_calls>[\n    {OBJECT}\n]</tool_calls>",
    "hunyuan_a13b": f"<tool_calls>[{OBJECT}]</tool_calls>",
    "lfm2": f"<|tool_call_start|>[{PYTHON}]<|tool_call_end|>",
    "olmo3": f"<function_calls>{PYTHON}</function_calls>",
    "pythonic": f"[{PYTHON}]",
    "phi4_mini_json": f"functools[{OBJECT}]",
    "xlam": f"[{OBJECT}]",
    "apertus": '<|tools_prefix|>[{"NAME": ARGS}]<|tools_suffix|>',
    "longcat": f"<longcat_tool_call>{OBJECT}</longcat_tool_call>",
}
"""Calls of families that we have no template of, by the parser that reads them."""
LEFT_OVER = "<|tool_response>"
"""What Gemma 4 writes behind its calls, and vLLM leaves in a streamed reply."""
NOT_STREAMED = {parser.name for parser in TOOL_PARSERS if not parser.streams}
ABSENT = {"hunyuan_a13b"}
"""Formats that another parser reads where their marks are tokens."""

MARK = re.compile(r"｜DSML｜|<[|｜]?[^<>\s=\"'{}()]+[|｜]?>|\[/?[A-Z_]+\]")
NOT_IN_TEMPLATE = {"<|python_tag|>", "<｜tool▁calls▁end｜>"}


@dataclass(frozen=True)
class Tokenizer:
    """One that has these tokens; whether each is special."""

    tokens: dict[str, bool]

    @property
    def all_special_tokens(self) -> list[str]:
        return [token for token, special in self.tokens.items() if special]

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.get_vocab()[text]]}


@cache
def bind(name: str) -> ChatTemplate:
    spec = find_family(name)
    assert spec is not None
    stops = spec.stop_tokens or ("</s>",)
    variables = {"bos_token": spec.bos or "<s>", "eos_token": spec.eos or "</s>"}
    return ChatTemplate(name, read_template(spec), stops, tuple(range(len(stops))), variables, spec.stable)


def tokenizer_of(name: str, special: bool = False) -> Tokenizer:
    """One that has all marks of a family, as text or as special tokens."""
    found = {*MARK.findall(bind(name).text), *NOT_IN_TEMPLATE, *KNOWN_MARKS}
    return Tokenizer(dict.fromkeys(sorted(found), special))


KNOWN_MARKS = {"<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<think>", "</think>"}


def probe_text(shape: str) -> str:
    """A format with the probe's own call in it."""
    function = probe_replies()[2].tool_calls[0]["function"]
    (key, value), (other, number) = function["arguments"].items()
    parts = {"NAME": function["name"], "ARGS": json.dumps(function["arguments"]), "KEY2": other, "KEY": key}
    for mark, text in (parts | {"VALUE": value, "NUMBER": str(number)}).items():
        shape = shape.replace(mark, text)
    return shape


# ---- which


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gets_the_parsers_of_its_formats(name: str) -> None:
    assert find_parsers(bind(name), tokenizer_of(name), thinks=True) == FAMILIES[name]
    tools, thoughts = FAMILIES[name]
    assert find_parsers(bind(name), tokenizer_of(name)) == (tools, thoughts if name in THINK_ALWAYS else None)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_of_another_family_is_known_by_its_look(name: str) -> None:
    text = probe_text(FORMATS[name])
    known = {*MARK.findall(text)} - (set(MARK.findall(text)) if name in ABSENT else set())
    assert parser_of_calls(outline(text), known, ()) == name


def test_without_a_parser_a_notice_says_that_calls_or_thoughts_stay_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert find_parsers(bind("minicpm3"), tokenizer_of("minicpm3")) == (None, None)
    said = capsys.readouterr().err
    assert "no parser for the tool calls" in said
    assert '"tool_choice": "none"' in said
    assert "<|thought_start|> … <|thought_end|>" in said
    assert find_parsers(bind("smollm3"), tokenizer_of("smollm3"), thinks=False) == (None, None)
    assert "--reasoning-parser qwen3" in capsys.readouterr().err
    assert find_parsers(bind("smollm2"), tokenizer_of("smollm2")) == (None, None)
    assert capsys.readouterr().err == ""  # it writes neither


def test_a_parser_that_reads_no_streams_is_named_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser_of_calls(outline(probe_text(FORMATS["phi4_mini_json"])), (), ()) in NOT_STREAMED
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}functools[{{ "
    text += "c.function | tojson }}]{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    template = ChatTemplate("functools", text, ("</s>",), (0,))
    assert find_parsers(template, Tokenizer({})) == ("phi4_mini_json", None)
    assert "in whole replies only" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama3.1", "mistral-nemo", "deepseek-v3", "deepseek-v3.1"])
def test_a_parser_that_vllm_would_not_start_with_is_not_named(name: str) -> None:
    assert find_parsers(bind(name), Tokenizer({})) == (None, None)


def test_a_parser_whose_marks_vllm_would_leave_out_of_the_text_is_not_named() -> None:
    assert find_parsers(bind("deepseek-v3"), tokenizer_of("deepseek-v3", special=True)) == (None, None)
    assert find_parsers(bind("qwen3"), tokenizer_of("qwen3", special=True)) == ("hermes", "qwen3")


def test_whether_replies_think_is_told_by_their_first_tokens() -> None:
    tokenizer = tokenizer_of("smollm3")
    opening = tokenizer.get_vocab()["<think>"]
    assert begins_with_thought(bind("smollm3"), tokenizer, [opening, opening])
    assert not begins_with_thought(bind("smollm3"), tokenizer, [opening, opening + 1])
    assert not begins_with_thought(bind("smollm3"), tokenizer, [])
    assert not begins_with_thought(bind("smollm2"), tokenizer, [opening])


# ---- the real ones


def cases() -> list[tuple[str, dict[str, Any], Message]]:
    """What families' models write, with the parsers that they get, and what it says."""
    found = []
    for name, (tools, thoughts) in FAMILIES.items():
        if name == "gpt-oss" or (tools, thoughts) == (None, None):  # vLLM takes its replies apart by their token ids
            continue
        template = bind(name)
        for special in (False, True):
            tokenizer = tokenizer_of(name, special)
            parsers = find_parsers(template, tokenizer, thinks=thoughts is not None)
            if parsers == (None, None):
                continue
            for number, reply in enumerate(probe_replies()):
                written = written_reply(template, reply) or shown_reply(template, reply)
                shows = written is not None and (not reply.reasoning or reply.reasoning in written.text)
                thinks = name not in THINK_ALWAYS and parsers[1] in {
                    parser.name for parser in REASONING_PARSERS if parser.is_eager
                }
                if not shows or (reply.tool_calls and not parsers[0]) or (reply.reasoning and not parsers[1]):
                    continue
                if (thinks and not reply.reasoning) or (reply.text and reply.tool_calls):
                    continue  # vLLM loses a text beside a call with some parsers
                if parsers[0] == "minicpm5" and reply.tool_calls and reply.reasoning:
                    continue  # vLLM streams the call behind a thought twice: as a call and as text
                offered = [
                    {
                        "type": "function",
                        "function": {"name": call["function"]["name"], "parameters": {"type": "object"}},
                    }
                    for call in reply.tool_calls
                ]
                for tool, call in zip(offered, reply.tool_calls, strict=True):
                    types = {
                        key: "string" if isinstance(value, str) else "integer"
                        for key, value in call["function"]["arguments"].items()
                    }
                    properties = {key: {"type": kind} for key, kind in types.items()}
                    tool["function"]["parameters"] |= {"properties": properties}
                assert written is not None
                case = {"tokens": tokenizer.tokens, "tools": offered, "prompt": written.prompt, "text": written.text}
                case |= {"tool_parser": parsers[0], "reasoning_parser": parsers[1]}
                found.append((f"{name}, {'special' if special else 'plain'}, reply {number}", case, reply))
    call = probe_replies()[2]
    function = call.tool_calls[0]["function"]
    types = {
        key: {"type": "string" if isinstance(value, str) else "integer"} for key, value in function["arguments"].items()
    }
    tool = {"name": function["name"], "parameters": {"type": "object", "properties": types}}
    for name, shape in FORMATS.items():
        text = probe_text(shape)
        tokens = {} if name in ABSENT else dict.fromkeys(sorted(set(MARK.findall(text))), False)
        case = {"tokens": tokens, "tools": [{"type": "function", "function": tool}], "prompt": "?", "text": text}
        found.append((name, case | {"tool_parser": name, "reasoning_parser": None}, call))
    return found


@pytest.mark.slow
def test_the_parsers_of_the_installed_vllm_read_what_the_templates_write() -> None:
    python = os.environ.get("FIREFLY_VLLM_PYTHON")
    if not python:
        pytest.skip("FIREFLY_VLLM_PYTHON names no interpreter that has vLLM (script/vllm_env.sh makes one)")
    asked = cases()
    reader = Path(__file__).with_name("vllm_reader.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(reader)],
        input=json.dumps([case for _, case, _ in asked]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert {parser.name for parser in TOOL_PARSERS} - set(told["names"]["tools"]) == set()
    thoughts = {parser.name for parser in REASONING_PARSERS} | {CHANNELS[1]}
    assert thoughts - set(told["names"]["thoughts"]) == set()
    wrong = {}
    for (name, case, reply), answer in zip(asked, told["answers"], strict=True):
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in reply.tool_calls]
        streams = case["tool_parser"] not in NOT_STREAMED
        for way, heard in answer.items() if streams else [("whole", answer["whole"])]:
            if isinstance(heard, list):
                heard = [heard[0].strip(), heard[1].strip().removesuffix(LEFT_OVER), heard[2]]
            if heard != [reply.reasoning or "", reply.text, calls]:
                wrong[f"{name}, {way}"] = (case["tool_parser"], case["reasoning_parser"], heard)
    assert wrong == {}
    assert len(asked) > 60
