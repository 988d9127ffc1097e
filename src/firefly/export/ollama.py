"""An Ollama Modelfile that gives the trained prompt, and the proof: the file, read back from disk, renders a battery of
conversations as the trained template does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from gguf import Keys

from firefly.console import notice
from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.data.templates import TemplateFailure
from firefly.errors import VerificationError
from firefly.export.gguf_file import read_head
from firefly.export.go_template import GoTemplate, GoTemplateError
from firefly.export.modelfile import Modelfile, Tools, read_modelfile, render
from firefly.export.ollama_template import Feature, Learner, NotExpressed, learn
from firefly.export.ollama_writing import write_template
from firefly.export.proof import failed_name
from firefly.files import atomic_file

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_new_tokens": "num_predict",
    "seed": "seed",
}
"""How an answer is drawn: our name → Ollama's."""


# ---- the battery


@dataclass(frozen=True)
class Case:
    """A conversation of the battery, and the part of a Modelfile that it tests."""

    name: str
    needs: str
    messages: tuple[Message, ...]
    tools: Tools = ()
    think: bool | None = None


def battery() -> list[Case]:
    """Conversations that end where the model is to speak.

    Keys of functions and arguments stand in the alphabet's order, the only one in which Ollama gives them.
    """

    def said(role: Any, text: str, **fields: Any) -> Message:
        return Message.of(role, text, **fields)

    user, reply, system = (lambda text, r=role: said(r, text) for role in ("user", "assistant", "system"))
    code = (
        'Braces {{ .Content }}, {% if %}, "quotes", \'more\', a \\ backslash\n\n\tand `lines`: """three""" <b>&amp;</b>'
    )
    many = [user("One?"), reply("1."), user("Two?"), reply("2."), user("Three?"), reply("3."), user("Four?")]
    plain = {
        "single": [user("What is the capital of France?")],
        "multi-turn": [user("Hello!"), reply("Hi. How can I help?"), user("Tell me a joke.")],
        "many turns": many,
        "chinese": [
            user("你好，请介绍一下杭州。"),
            reply("杭州是浙江省省会。\u3000西湖很有名。"),
            user("谢谢！再说说西湖？"),
        ],
        "special characters": [user(code), reply(code), user(code)],
    }
    prompts = {
        "system": "You are a pirate. Answer in one sentence.",
        "system, chinese": "你是一名乐于助人的助手。",
        "system, special characters": code,
    }
    cases = [Case(name, "plain", tuple(messages)) for name, messages in plain.items()]
    for name, prompt in prompts.items():
        cases.append(Case(name, "system", (system(prompt), user("Who are you?"))))
        cases.append(Case(f"{name}, multi-turn", "system", (system(prompt), *many)))
    return cases + _tool_cases() + _thinking_cases()


def _tool_cases() -> list[Case]:
    def describe(name: str, description: str, **properties: Any) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
        return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}

    weather = describe(
        "get_weather",
        "Weather of a city & its <surroundings>, 天气",
        city={"type": "string", "description": 'City, such as "Paris"'},
        unit={"type": "string", "description": "Unit", "enum": ["celsius", "fahrenheit"]},
    )
    search = describe("search", "Search\nthe web", query={"type": "string", "description": "What for"})

    def call(number: int, name: str, **arguments: Any) -> dict[str, Any]:
        return {"type": "function", "id": f"call0000{number}", "function": {"name": name, "arguments": arguments}}

    user = Message.of("user", "What is the weather in Paris?")
    system = Message.of("system", "Use functions where they help.")
    one = Message.of("assistant", "", tool_calls=(call(1, "get_weather", city="Paris", unit="celsius"),))
    odd = {"html": 'a <b> & "c"\nd', "list": [1, 2.5, True, None, {"k": "v"}], "n": -3, "text": "杭州\u3000西湖"}
    other = Message.of("assistant", "", tool_calls=(call(2, "search", **dict(sorted(odd.items()))),))
    both = Message.of("assistant", "", tool_calls=(*one.tool_calls, *other.tool_calls))
    beside = Message.of("assistant", "Let me look.", tool_calls=one.tool_calls)
    found = Message.of("tool", '{"temperature": 21}', name="get_weather", tool_call_id="call00001")
    result = Message.of("tool", 'It says: "sunny"', name="search", tool_call_id="call00002")
    later = (Message.of("assistant", "It is 21 °C."), Message.of("user", "Thanks! And London?"))
    conversations = {
        "tools": (user,),
        "tools, system": (system, user),
        "tools, multi-turn": (user, *later),
        "call": (user, one, found),
        "call, text result": (user, other, result),
        "call, system": (system, user, one, found),
        "call, multi-turn": (user, one, found, *later),
        "two calls": (user, both, found, result),
        "calls in turn": (user, one, found, other, result),
        "text beside a call": (user, beside, found),
        "calls in turn, multi-turn": (system, user, one, found, other, result, *later),
    }
    cases = [Case(name, "tools", messages, (weather, search)) for name, messages in conversations.items()]
    return [*cases, Case("one tool", "tools", (user,), (search,))]


def _thinking_cases() -> list[Case]:
    user, again = Message.of("user", "What is 2 + 2?"), Message.of("user", "And 3 + 3?")
    thought = Message.of("assistant", "4.", reasoning="Two and two\nmake four.")
    return [
        Case("thought of an earlier reply", "thinking", (user, thought, again)),
        Case("thinking asked for", "thinking", (user,), think=True),
        Case("thinking switched off", "thinking", (user,), think=False),
    ]


# ---- the proof


@dataclass(frozen=True)
class OllamaReport:
    """What was proved of a Modelfile.

    Attributes:
        equal, conversations: prompts that equal the trained ones, and how many were compared.
        expressed: "plain", "system", and of "tools" and "thinking" what the trained template has and TEMPLATE gives.
        not_expressed: what the trained template has and TEMPLATE lacks → why.
        trims: the trained template takes white space off around a message, which no TEMPLATE can.
        problems: what in the file is not as trained; none: it is verified.
    """

    file: Path
    conversations: int
    equal: int
    expressed: tuple[str, ...]
    not_expressed: Mapping[str, str]
    trims: bool
    problems: tuple[str, ...]

    @property
    def verified(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "engine": "ollama: TEMPLATE rendered, model not run",
            "verified": self.verified,
            "conversations": self.conversations,
            "prompts_equal": self.equal,
            "expressed": list(self.expressed),
            "not_expressed": dict(self.not_expressed),
            "trims": self.trims,
            "problems": list(self.problems),
        }


def write_modelfile(
    target: Path,
    gguf_name: str,
    encoder: Encoder,
    stops: Sequence[str],
    sampling: Mapping[str, float | None],
    context: int | None = None,
    *,
    adapter_name: str = "",
    adds_bos: bool | None = None,
) -> OllamaReport:
    """Write the Modelfile `target` beside the GGUF file `gguf_name`, read it back and prove it.

    What TEMPLATE cannot express of the trained template (functions, thoughts) is said in a notice and reported.

    Args:
        stops: texts of the tokens that end a reply as trained.
        sampling: how answers are drawn, by names of GenerationSettings; of those that are no option of Ollama's nothing
            is written.
        context: the most tokens of prompt and answer together.
        adapter_name: an adapter as GGUF, beside it; `gguf_name` is then its base.
        adds_bos: whether the engine puts BOS in front of every prompt (tokenizer.ggml.add_bos_token of the GGUF file);
            None: as that file says, else as the tokenizer does.

    Raises:
        VerificationError: it does not give the trained prompt of plain conversations, or is not what it should be. It
            is then named *.failed.
    """
    learner = Learner(encoder.template, engine_bos(encoder, target.with_name(gguf_name), adds_bos))
    unexpressed: dict[str, str] = {}
    template, system, reason = "", "", None
    try:
        template, system, unexpressed = express(learner)
    except (NotExpressed, TemplateFailure, GoTemplateError) as error:
        reason = str(error)
    modelfile = Modelfile(
        source=f"./{gguf_name}",
        template=template,
        system=system,
        adapter=f"./{adapter_name}" if adapter_name else "",
        stops=tuple(dict.fromkeys(stops)),
        parameters=_parameters(sampling, context),
        comments=tuple(f"not expressed: {feature}: {why}" for feature, why in unexpressed.items()),
    )
    with atomic_file(target) as partial:
        partial.write_text(str(modelfile), encoding="utf-8", newline="\n")
    if reason is not None:
        _fail(target, reason)
    report = verify_modelfile(target, encoder, stops, sampling, context, adds_bos=adds_bos, unexpressed=unexpressed)
    if "tools" in report.not_expressed:
        notice(
            "ollama.no_tools",
            "{file}: functions (tools) are not expressed in this Modelfile: {why}. A version of Ollama that takes the "
            "template inside the GGUF file for them gives the trained prompt; others do not.",
            file=target.name,
            why=report.not_expressed["tools"],
        )
    if "thinking" in report.not_expressed:
        notice(
            "ollama.no_thinking",
            "{file}: thoughts are not expressed in this Modelfile: {why}. Send earlier replies without them.",
            file=target.name,
            why=report.not_expressed["thinking"],
        )
    if report.trims:
        notice(
            "ollama.no_trim",
            "{file}: the trained template takes white space off around a message, which no template of Ollama's can. "
            "Send messages without it.",
            file=target.name,
        )
    return report


def verify_modelfile(
    path: Path,
    encoder: Encoder,
    stops: Sequence[str],
    sampling: Mapping[str, float | None],
    context: int | None = None,
    *,
    adds_bos: bool | None = None,
    unexpressed: Mapping[str, str] | None = None,
) -> OllamaReport:
    """Read a Modelfile from disk and compare what it gives with what was trained; the arguments are those of
    `write_modelfile`. `unexpressed`: features that were left out → why.

    Raises:
        VerificationError: something differs; the file is then named *.failed.
    """
    try:
        modelfile = read_modelfile(path.read_text(encoding="utf-8"))
        template = GoTemplate.parse(modelfile.template)
    except (ValueError, OSError) as error:
        _fail(path, str(error))
    learner = Learner(encoder.template, engine_bos(encoder, path.parent / modelfile.source, adds_bos))
    features = [
        feature
        for feature, variable in (("tools", "Tools"), ("thinking", "Thinking"), ("thinking", "IsThinkSet"))
        if template.uses(variable)
    ]
    expressed = ("plain", "system", *dict.fromkeys(features))
    conversations, equal, problems = compare(modelfile, learner, expressed)
    if not conversations:
        problems.append("the trained template has no prompt for any conversation")
    if lost := [stop for stop in stops if stop not in modelfile.stops]:
        problems.append(f"PARAMETER stop lacks {lost!r}")
    if added := [stop for stop in modelfile.stops if stop not in stops]:
        problems.append(f"PARAMETER stop has {added!r}, which ends no reply as trained")
    written, wanted = dict(modelfile.parameters), _parameters(sampling, context)
    problems += [
        f"PARAMETER {name} is {written.get(name)}, not {wanted.get(name)}"
        for name in sorted({*written, *wanted})
        if written.get(name) != wanted.get(name)
    ]
    if problems:
        _fail(path, "; ".join(problems[:3]))
    lacking = {
        feature: (unexpressed or {}).get(feature, "TEMPLATE has no place for it")
        for feature, has in (("tools", _has_tools(learner)), ("thinking", has_thoughts(learner)))
        if has and feature not in expressed
    }
    padded, bare = (learner.prompt([Message.of("user", text)]) for text in ("\n firefly \n", "firefly"))
    return OllamaReport(path, conversations, equal, expressed, lacking, padded == bare, ())


def _fail(path: Path, problem: str) -> NoReturn:
    failed = failed_name(path)
    path.replace(failed)
    raise VerificationError(
        "ollama.differs",
        "{file} does not give what was trained: {problem}. It is kept as {failed}.",
        file=path.name,
        problem=problem,
        failed=failed,
    )


def engine_bos(encoder: Encoder, gguf: Path, adds_bos: bool | None = None) -> str:
    """The BOS that the engine puts in front of every prompt, so that TEMPLATE must not; "" if it puts none.

    As `adds_bos` says, else the GGUF file, else (there is none, or it does not say) the tokenizer.
    """
    tokenizer = encoder.tokenizer
    bos = getattr(tokenizer, "bos_token", None)
    if not bos:
        return ""
    if adds_bos is None and gguf.is_file():
        head = read_head(gguf)
        # SentencePiece: llama.cpp adds it unless told not to.
        adds_bos = head.get(Keys.Tokenizer.ADD_BOS, True if head.get(Keys.Tokenizer.MODEL) == "llama" else None)
    if adds_bos is None:
        ids = list(tokenizer.encode("a"))
        adds_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
    return str(bos) if adds_bos else ""


def _parameters(sampling: Mapping[str, float | None], context: int | None) -> dict[str, str]:
    """PARAMETER lines. A penalty on repetition that nobody asked for would change every answer: Ollama's own is 1.1."""
    asked = {"repetition_penalty": 1, **sampling}
    options: dict[str, float | None] = {new: asked.get(name) for name, new in PARAMETERS.items()}
    options["num_ctx"] = context
    return {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in options.items()
        if value is not None
    }


def _has_tools(learner: Learner) -> bool:
    try:
        return bool(learner.prompt(*next((case.messages, case.tools) for case in battery() if case.name == "tools")))
    except TemplateFailure:
        return False


def has_thoughts(learner: Learner) -> bool:
    """Whether the trained template knows thoughts: it writes one, leaves one out, or can switch thinking off."""
    messages = next(case.messages for case in battery() if case.name == "thought of an earlier reply")
    try:
        if learner.quiet().prompt(messages[:1]) != learner.prompt(messages[:1]):
            return True
        without = [replace(item, reasoning=None) for item in messages]
        return learner.prompt(messages) != learner.prompt(without) or learner.template.folds_reasoning
    except TemplateFailure:
        return False


def express(learner: Learner) -> tuple[str, str, dict[str, str]]:
    """TEMPLATE and SYSTEM with all the features that pass the battery, and why others do not.

    Raises:
        NotExpressed, TemplateFailure: not even plain conversations do.
    """
    has: dict[Feature, bool] = {"tools": _has_tools(learner), "thinking": has_thoughts(learner)}
    wanted: list[Feature] = [feature for feature, there in has.items() if there]
    unexpressed: dict[str, str] = {}
    tries: list[tuple[Feature, ...]] = [tuple(wanted), *((feature,) for feature in wanted), ()]
    for features in dict.fromkeys(tries):
        try:
            learned = learn(learner, frozenset(features))
            written = Modelfile("", write_template(learned), learned.default_system or "")
            differences = compare(written, learner, ("plain", "system", *features))[2]
            if differences:
                raise NotExpressed(differences[0])
        except (NotExpressed, TemplateFailure, GoTemplateError) as error:
            if not features:
                raise
            unexpressed |= dict.fromkeys(features, str(error))
            continue
        return written.template, written.system, {f: why for f, why in unexpressed.items() if f not in features}
    raise AssertionError("the last try has no features: it returns or raises")


def compare(modelfile: Modelfile, learner: Learner, needs: Sequence[str]) -> tuple[int, int, list[str]]:
    """How many conversations were compared, how many of their prompts are equal, and what is wrong with the others."""
    template = GoTemplate.parse(modelfile.template)
    compared = 0
    problems: list[str] = []
    for case in battery():
        if case.needs not in needs:
            continue
        try:
            trained = (learner.quiet() if case.think is False else learner).prompt(case.messages, case.tools)
        except TemplateFailure:
            continue  # the trained template has no prompt for it
        except NotExpressed as error:
            compared += 1
            problems.append(f"{case.name}: {error}")
            continue
        compared += 1
        try:
            written = render(modelfile, template, case.messages, case.tools, case.think)
        except GoTemplateError as error:
            problems.append(f"{case.name}: {error}")
            continue
        if written != trained:
            place = len(os.path.commonprefix([written, trained]))  # noqa: RUF071  (of characters)
            here, there = (repr(text[place : place + 40]) for text in (written, trained))
            problems.append(f"{case.name}: the prompt has {here} in place of {there}")
    return compared, compared - len(problems), problems
