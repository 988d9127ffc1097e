"""Which of vLLM's parsers take tool calls and thoughts out of a model's replies.

A template says nowhere what its format is called, so a reply with unmistakable names is rendered, and what it looks
like is looked up. The names are those of vLLM 0.32 (`vllm.tool_parsers`, `vllm.reasoning`); a test compares them with
the vLLM that is installed, and has its parsers read what templates write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from firefly.console import notice
from firefly.data.templates import ChatTemplate
from firefly.generation.replies.markers import (
    Markers,
    Thoughts,
    learn_markers,
    probe_replies,
    shown_reply,
    written_reply,
)


@dataclass(frozen=True)
class ToolParser:
    """A parser of calls.

    Attributes:
        looks: a pattern of what it reads, in a call's outline (`outline`).
        tokens: that the tokenizer must have, or vLLM does not start with it.
        are_text: vLLM leaves special tokens out of the text that it reads, so that its marks must not be special.
        streams: whether it reads streamed replies, too.
    """

    name: str
    looks: str
    tokens: tuple[str, ...] = ()
    are_text: bool = False
    streams: bool = True


@dataclass(frozen=True)
class ReasoningParser:
    """A parser of thoughts.

    Attributes:
        opens, closes: what stands around a thought, without white space.
        follows: parsers of calls that it goes with; empty: all.
        is_eager: takes a reply without a thought for one that is nothing else: its answer would be lost.
        tokens, are_text: as of `ToolParser`.
    """

    name: str
    opens: str
    closes: str
    follows: tuple[str, ...] = ()
    is_eager: bool = True
    tokens: tuple[str, ...] = ()
    are_text: bool = False


def _json_call(name: str = "name", arguments: str = "arguments") -> str:
    """A call as a JSON object, which may have an identifier, too."""
    return rf'\{{[^{{}}]*"{name}":"NAME",[^{{}}]*"{arguments}":ARGS[^{{}}]*\}}'


_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_PYTHON = r'NAME\(KEY="VALUE",KEY=NUMBER\)'

TOOL_PARSERS = (
    ToolParser("hermes", rf"<tool_call>{_json_call()}</tool_call>"),
    ToolParser("qwen3_coder", r"<tool_call><function=NAME><parameter=KEY>VALUE</parameter>"),
    ToolParser("glm45", r"<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>"),
    ToolParser("seed_oss", r"<seed:tool_call><function=NAME><parameter=KEY>VALUE</parameter>"),
    ToolParser("llama3_json", rf"^(<\|python_tag\|>)?{_json_call(arguments='parameters')}$", ("<|python_tag|>",)),
    ToolParser("pythonic", rf"^\[{_PYTHON}\]$"),
    # With an identifier between name and arguments, vLLM takes both for the name.
    ToolParser("mistral", rf"\[TOOL_CALLS\](\[{_json_call()}\]|NAME(\[ARGS\])?ARGS)", ("[TOOL_CALLS]",)),
    ToolParser(
        "deepseek_v3",
        r"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME```jsonARGS```<｜tool▁call▁end｜>",
        _DEEPSEEK,
        are_text=True,
    ),
    ToolParser(
        "deepseek_v31",
        r"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGS<｜tool▁call▁end｜>",
        _DEEPSEEK,
        are_text=True,
    ),
    ToolParser(
        "deepseek_v32",
        r'<｜DSML｜function_calls><｜DSML｜invokename="NAME"><｜DSML｜parametername="KEY"',
        ("｜DSML｜",),
    ),
    ToolParser(
        "deepseek_v4", r'<｜DSML｜tool_calls><｜DSML｜invokename="NAME"><｜DSML｜parametername="KEY"', ("｜DSML｜",)
    ),
    ToolParser("kimi_k2", r"<\|tool_calls_section_begin\|><\|tool_call_begin\|>\S*<\|tool_call_argument_begin\|>ARGS"),
    ToolParser("minimax_m2", r'<minimax:tool_call><invokename="NAME"><parametername="KEY">VALUE</parameter>'),
    ToolParser("minicpm5", r'<functionname="NAME"><paramname="KEY">VALUE</param>'),
    ToolParser("gemma4", r'<\|tool_call>call:NAME\{KEY:<\|"\|>VALUE<\|"\|>,KEY:NUMBER\}<tool_call\|>'),
    ToolParser("granite", rf"(<\|tool_call\|>|<tool_call>)\[{_json_call()}\]"),
    ToolParser("granite-20b-fc", rf"<function_call>{_json_call()}"),
    ToolParser("internlm", rf"<\|action_start\|><\|plugin\|>{_json_call(arguments='parameters')}<\|action_end\|>"),
    ToolParser(
        "jamba", rf"<tool_calls>\[{_json_call()}\]</tool_calls>", ("<tool_calls>", "</tool_calls>"), streams=False
    ),
    ToolParser("hunyuan_a13b", rf"<tool_calls>\[{_json_call()}\]</tool_calls>", streams=False),
    ToolParser(
        "lfm2",
        rf"<\|tool_call_start\|>\[{_PYTHON}\]<\|tool_call_end\|>",
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    ToolParser("olmo3", rf"<function_calls>{_PYTHON}</function_calls>", are_text=True),
    ToolParser("phi4_mini_json", rf"functools\[{_json_call()}\]", streams=False),
    ToolParser("xlam", rf"^\[{_json_call()}\]$"),
    ToolParser("apertus", r'<\|tools_prefix\|>\[\{"NAME":ARGS\}\]<\|tools_suffix\|>'),
    ToolParser("longcat", rf"<longcat_tool_call>{_json_call()}</longcat_tool_call>"),
    ToolParser("openai", r"to=functions\.NAME.*<\|message\|>ARGS"),
)
"""The first that fits is taken. Left out: `functiongemma`, which loses arguments that are no text, and those of Cohere,
with which vLLM starts only beside another package."""

REASONING_PARSERS = (
    ReasoningParser("glm45", "<think>", "</think>", ("glm45",)),
    ReasoningParser("kimi_k2", "<think>", "</think>", ("kimi_k2",)),
    ReasoningParser("minimax_m2", "<think>", "</think>", ("minimax_m2",)),
    ReasoningParser(
        "deepseek_r1",
        "<think>",
        "</think>",
        ("deepseek_v3", "deepseek_v31"),
        tokens=("<think>", "</think>"),
        are_text=True,
    ),
    ReasoningParser("qwen3", "<think>", "</think>"),
    ReasoningParser("seed_oss", "<seed:think>", "</seed:think>"),
    ReasoningParser("mistral", "[THINK]", "[/THINK]", is_eager=False, tokens=("[TOOL_CALLS]", "[THINK]", "[/THINK]")),
    ReasoningParser("gemma4", "<|channel>thought", "<channel|>", is_eager=False),
)
CHANNELS = ("openai", "openai_gptoss")
"""Of gpt-oss, whose replies are messages in channels."""


def find_parsers(template: ChatTemplate, tokenizer: Any, thinks: bool | None = None) -> tuple[str | None, str | None]:
    """vLLM's parsers of a template's calls and thoughts. Where it writes some that no parser reads, a notice says so.

    Args:
        thinks: whether every reply begins with a thought; None: as far as the template tells.
    """
    template = replace(template, thinking="keep")
    markers = learn_markers(template)
    if markers.by_channel:
        return CHANNELS
    known = set(tokenizer.get_vocab())
    special = set(tokenizer.all_special_tokens) | {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    call = written_call(template)
    tools = None if call is None else parser_of_calls(outline(*call), known, special)
    if call is not None and tools is None:
        notice(
            "export.vllm_calls_stay_text",
            "vLLM has no parser for the tool calls that this template writes with this tokenizer ({call}): they come "
            'back as text, and a request with tools has to say "tool_choice": "none".',
            call=re.sub(r"\s+", " ", call[0]).replace("firefly_", "")[:120],
        )
    if tools is not None and not all(parser.streams for parser in TOOL_PARSERS if parser.name == tools):
        notice(
            "export.vllm_calls_whole",
            "vLLM's parser {parser} reads tool calls in whole replies only: in a streamed one they are broken, or stay "
            "text.",
            parser=tools,
        )
    return tools, _find_reasoning(template, markers, tools, known, special, thinks)


def _find_reasoning(
    template: ChatTemplate,
    markers: Markers,
    tools: str | None,
    known: Collection[str],
    special: Collection[str],
    thinks: bool | None,
) -> str | None:
    thoughts = markers.thoughts
    if thoughts is None or markers.prompt_tail.rstrip().endswith(thoughts.close.strip()):
        return None  # the prompt has ended the thought already: a reply is nothing but its answer
    parser = parser_of_thoughts(thoughts, tools, known, special)
    opened = markers.prompt_tail.rstrip().endswith(thoughts.open.strip())
    plain = probe_replies()[0]
    said = written_reply(template, plain) or shown_reply(template, plain)
    shows = opened or (said is not None and thoughts.close.strip() in said.text)
    if parser is not None and (not parser.is_eager or thinks or (shows and thinks is not False)):
        return parser.name
    marks = f"{thoughts.open.strip()} … {thoughts.close.strip()}"
    if parser is None:
        notice(
            "export.vllm_thoughts_stay_text",
            "vLLM has no parser for the thoughts that this template writes ({marks}): they come back in the text.",
            marks=marks,
        )
    else:
        notice(
            "export.vllm_thoughts_are_optional",
            "replies of this template may come without a thought ({marks}), and vLLM's parser {parser} would take such "
            "a reply for a thought without an answer: none is set, so that thoughts come back in the text. If every "
            "reply thinks, add --reasoning-parser {parser}.",
            marks=marks,
            parser=parser.name,
        )
    return None


def parser_of_calls(looks: str, known: Collection[str], special: Collection[str]) -> str | None:
    """The parser for calls of this outline, with a tokenizer that has these tokens."""
    fits = (parser for parser in TOOL_PARSERS if re.search(parser.looks, looks, re.DOTALL))
    usable = (parser for parser in fits if _is_usable(parser, looks, known, special))
    return next((parser.name for parser in usable), None)


def parser_of_thoughts(
    thoughts: Thoughts, tools: str | None, known: Collection[str], special: Collection[str]
) -> ReasoningParser | None:
    marks = thoughts.open.strip(), thoughts.close.strip()
    for parser in REASONING_PARSERS:
        goes_with = not parser.follows or tools in parser.follows
        if (parser.opens, parser.closes) == marks and goes_with and _is_usable(parser, "".join(marks), known, special):
            return parser
    return None


def _is_usable(
    parser: ToolParser | ReasoningParser, looks: str, known: Collection[str], special: Collection[str]
) -> bool:
    hidden = parser.are_text and any(token in looks for token in special)
    return not hidden and all(token in known for token in parser.tokens)


def written_call(template: ChatTemplate) -> tuple[str, tuple[str | None, ...]] | None:
    """The text of a reply that is one call, and the call's identifier; None where the template writes no calls."""
    call = probe_replies()[2]
    written = written_reply(template, call) or shown_reply(template, call)
    return None if written is None else (written.text, written.identifiers)


def outline(text: str, identifiers: Collection[str | None] = ()) -> str:
    """A call of the probe, with NAME, ARGS or KEY, VALUE and NUMBER in place of what is its own, and no white space."""
    function = probe_replies()[2].tool_calls[0]["function"]
    arguments = function["arguments"]
    for brace in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, end = json.JSONDecoder().raw_decode(text, brace)
        except ValueError:
            continue
        if value == arguments:
            text = f"{text[:brace]}ARGS{text[end:]}"
            break
    for identifier in filter(None, identifiers):
        if function["name"] not in identifier:
            text = text.replace(identifier, "ID")
    text = text.replace(function["name"], "NAME")
    for key, value in arguments.items():
        text = text.replace(key, "KEY").replace(str(value), "VALUE" if isinstance(value, str) else "NUMBER")
    return re.sub(r"\s+", "", text)


def begins_with_thought(template: ChatTemplate, tokenizer: Any, first_tokens: Collection[int]) -> bool:
    """Whether replies whose first tokens these are all begin with a thought."""
    thoughts = learn_markers(replace(template, thinking="keep")).thoughts
    if thoughts is None or not first_tokens:
        return False
    opening = tokenizer(thoughts.open.strip(), add_special_tokens=False)["input_ids"][:1]
    return all([token] == opening for token in first_tokens)
