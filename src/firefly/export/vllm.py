"""A folder that vLLM serves as the model was trained, the command that serves it, and vLLM as the engine that reads it
back.

vLLM renders prompts itself, so whatever decides about them stands in the folder or in the command: the template and how
it takes contents, the tokens that end an answer, the type of the weights, and which of vLLM's parsers take tool calls
and thoughts out of a reply.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firefly.console import notice
from firefly.data.encoding import Encoder
from firefly.data.schema import Message
from firefly.data.templates import ChatTemplate
from firefly.data.tool_calls import openai_message
from firefly.errors import VerificationError
from firefly.export.agreement import Candidates
from firefly.export.battery import BatteryRow
from firefly.export.vllm_parsers import find_parsers
from firefly.files import atomic_file, first_line
from firefly.generation.remote import LONGEST, Server, ServerError
from firefly.generation.vllm import (
    KEY_VARIABLE,
    PYTHON_VARIABLE,
    EngineChoice,
    check_adapters,
    free_port,
    lora_room,
    start_vllm,
    vllm_environment,
)
from firefly.models.saved_adapter import SETTINGS, SavedAdapter
from firefly.runs.manifest import write_json
from firefly.runs.records import read_object

SCRIPT, TEMPLATE, GENERATION, ADAPTERS = "serve.sh", "chat_template.jinja", "generation_config.json", "adapters"
TYPES = ("float32", "bfloat16", "float16")
HERE = "\ue000"
"""Stands for the folder in a word of its command: serve.sh finds out where it lies."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING += ("max_new_tokens",)
"""What vLLM takes from a generation_config.json for requests that say nothing of it."""
MERGED_SYSTEM = """\
{%- if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' -%}
    {%- set both = messages[0]['content'] ~ '\\n\\n' ~ messages[1]['content'] -%}
    {%- set messages = [{'role': 'user', 'content': both}] + messages[2:] -%}
{%- endif -%}
"""
"""Puts a system prompt in front of the first user turn, as training does for a template that has no place for one."""
LISTED = 256
"""Likeliest tokens that are asked for at each position."""
SHORT_ANSWER = 32
LONGEST_READ = 4096
"""Tokens that vLLM makes room for when it only reads back."""


@dataclass(frozen=True)
class VllmExport:
    """What was written.

    Attributes:
        name: that the model is served under; `adapters`: those over it.
        command: that serve.sh runs, with the folder's own place in it.
        has_template: whether it takes chats; else it only continues texts.
        tool_parser, reasoning_parser: vLLM's names of what reads calls and thoughts; None: they stay text.
        context_length: the most tokens of prompt and answer, where config.json says or it was given.
        vocabulary_size: rows of the model's table of tokens, where config.json says.
    """

    folder: Path
    name: str
    adapters: tuple[str, ...]
    command: list[str]
    has_template: bool
    tool_parser: str | None
    reasoning_parser: str | None
    context_length: int | None
    vocabulary_size: int | None

    @property
    def script(self) -> Path:
        return self.folder / SCRIPT


def write_vllm(
    folder: Path,
    name: str,
    tokenizer: Any,
    encoder: Encoder | None,
    *,
    base: Base | None = None,
    adapters: Mapping[str, SavedAdapter] | None = None,
    context_length: int | None = None,
    thinks: bool | None = None,
    trust_remote_code: bool = False,
) -> VllmExport:
    """Make a folder one that vLLM serves as the model was trained.

    Args:
        folder: holds the model's weights, config.json and generation_config.json; or, with `base`, is made here.
        name: that the model is served under.
        encoder: how it was prompted in training; None: it has no chat template, and only continues texts.
        base: stays where it is; `adapters` are served unmerged over it.
        adapters: by the names that they are served under; their files are copied into the folder.
        context_length: the most tokens of prompt and answer; None: as many as the model has positions for.
        thinks: whether every reply begins with a thought; None: as far as the template tells.

    Raises:
        UsageError: vLLM does not serve an adapter as it was trained.
    """
    adapters = adapters or {}
    check_adapters(adapters.values())
    folder.mkdir(parents=True, exist_ok=True)
    config = read_object(folder / "config.json") if base is None else base.config
    inner = config.get("text_config") or config
    if base is not None:
        write_json(folder / GENERATION, base.generation)
    settle_generation(folder / GENERATION, encoder)
    save_prompting(folder, tokenizer, encoder)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or inner.get("dtype")).removeprefix("torch.")
    length = context_length or inner.get("max_position_embeddings") or inner.get("n_positions")

    words = ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "8000"]
    words += ["--model", HERE if base is None else base.name, "--tokenizer", HERE, "--served-model-name", name]
    # "auto" would serve weights of 32 bits in 16.
    words += ["--dtype", dtype if dtype in TYPES else "auto", "--generation-config", HERE]
    if length:
        words += ["--max-model-len", str(length)]
    tool_parser, reasoning_parser = find_parsers(encoder.template, tokenizer, thinks) if encoder else (None, None)
    if encoder is not None:
        words += chat_options(encoder.template, tool_parser, reasoning_parser)
    if base is not None and base.revision is not None:
        words += ["--revision", base.revision]
    if trust_remote_code:
        words += ["--trust-remote-code"]
    if adapters:
        modules = copy_adapters(folder / ADAPTERS, adapters)
        words += [*lora_room(list(adapters.values())), "--lora-modules", *modules]
    write_script(folder / SCRIPT, words)
    command = ["python3", *(word.replace(HERE, str(folder.resolve())) for word in words)]
    notice(
        "export.vllm", "vLLM serves it with {script}: {command}", script=folder / SCRIPT, command=shlex.join(command)
    )
    return VllmExport(
        folder=folder,
        name=name,
        adapters=tuple(adapters),
        command=command,
        has_template=encoder is not None,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        context_length=length,
        vocabulary_size=inner.get("vocab_size"),
    )


@dataclass(frozen=True)
class Base:
    """A model whose weights stay where they are.

    Attributes:
        name: its folder, absolute, or its id on a hub.
        config, generation: its config.json and generation_config.json.
    """

    name: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    revision: str | None = None


def save_prompting(folder: Path, tokenizer: Any, encoder: Encoder | None) -> None:
    """Write the tokenizer, if the folder has none, and the template. Files take the place of others and are not written
    into them, which may be links to a model's own."""
    if not (folder / "tokenizer_config.json").is_file():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            tokenizer.save_pretrained(scratch)
            for file in Path(scratch).iterdir():
                file.replace(folder / file.name)
    if encoder is not None:
        with atomic_file(folder / TEMPLATE) as scratch:
            scratch.write_text(served_template(encoder.template), encoding="utf-8")


def chat_options(template: ChatTemplate, tool_parser: str | None, reasoning_parser: str | None) -> list[str]:
    """How vLLM renders chats and takes replies apart."""
    # A content was one text in training; vLLM may guess that the template takes a list of parts.
    words = ["--chat-template", f"{HERE}/{TEMPLATE}", "--chat-template-content-format", "string"]
    if template.date is not None:
        variables = {"date_string": template.date.strftime("%d %b %Y")}
        words += ["--default-chat-template-kwargs", json.dumps(variables)]
    if tool_parser is not None:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", tool_parser]
    if reasoning_parser is not None:
        words += ["--reasoning-parser", reasoning_parser]
    return words


def served_template(template: ChatTemplate) -> str:
    """The template's text as vLLM has to render it: a system prompt that it has no place for stands where it stood in
    training."""
    if template.system_role == "rendered" or template.on_system != "merge":
        return template.text
    return MERGED_SYSTEM + template.text


def settle_generation(path: Path, encoder: Encoder | None) -> None:
    """Let a generation_config.json end answers at every token that did in training, and say what else it does."""
    found = read_object(path)
    given = found.get("eos_token_id")
    ends = given if isinstance(given, list) else [] if given is None else [given]
    stops = list(encoder.template.stop_ids) if encoder is not None else []
    if not set(stops) <= set(ends):
        write_json(path, found | {"eos_token_id": [*stops, *(token for token in ends if token not in stops)]})
    sampling = {name: found[name] for name in SAMPLING if found.get(name) is not None}
    if sampling:
        notice(
            "export.vllm_sampling",
            "the model's generation_config.json has vLLM draw answers with {values} where a request does not say "
            "otherwise (--generation-config vllm leaves that out, and the stop tokens stay).",
            values=", ".join(f"{name} {value}" for name, value in sampling.items()),
        )


def copy_adapters(folder: Path, adapters: Mapping[str, SavedAdapter]) -> list[str]:
    """Copy adapters below a folder; what --lora-modules takes for them."""
    modules = []
    for number, (name, saved) in enumerate(adapters.items()):
        place = folder / (re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).strip(".") or str(number))
        if place.name in modules:
            place = place.with_name(f"{place.name}-{number}")
        place.mkdir(parents=True, exist_ok=True)
        for file in (saved.folder / SETTINGS, saved.weights):
            if not (place / file.name).exists() or not os.path.samefile(file, place / file.name):
                shutil.copyfile(file, place / file.name)
        # As JSON: vLLM takes name=path for none where a comma stands in it.
        module = {"name": name, "path": f"{HERE}/{ADAPTERS}/{place.name}"}
        modules.append(json.dumps(module, ensure_ascii=False))
    return modules


def write_script(path: Path, words: Sequence[str]) -> None:
    """A shell script that runs vLLM from wherever the folder lies; its own arguments come last, and win."""
    quoted = ['"$here"'.join(shlex.quote(part) if part else "" for part in word.split(HERE)) for word in words]
    lines: list[str] = []
    for word in quoted:  # an option and its values on a line
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += " " + word
    options = "".join(f" \\\n    {line}" for line in lines[1:])
    text = f"""\
#!/bin/sh
# Serve this folder with vLLM as the model was trained. More of vLLM's options may follow, and win: serve.sh --port 9000
# {PYTHON_VARIABLE} names the Python that has vLLM.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
exec "${{{PYTHON_VARIABLE}:-python3}}" {lines[0]}{options} \\
    "$@"
"""
    with atomic_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
        scratch.chmod(0o755)


# ---- reading back


@contextmanager
def open_read_back(export: VllmExport, choice: EngineChoice) -> Iterator[VllmReadBack]:
    """vLLM over what was exported: started by its own serve.sh and ended with the block, or one that runs already.

    Raises:
        UsageError: no vLLM is there, or it does not start.
    """
    if choice.url:
        server = Server(choice.url, choice.api_key or os.environ.get(KEY_VARIABLE, ""))
        yield VllmReadBack(server, export)
        return
    key, port = secrets.token_urlsafe(24), free_port()
    # The CPU build would take half of the memory for its cache.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | vllm_environment(os.environ, key, offline=True)
    length = min(export.context_length or LONGEST_READ, LONGEST_READ)
    command = ["sh", str(export.script), "--port", str(port), "--max-model-len", str(length)]
    command += ["--max-logprobs", str(LISTED), "--disable-uvicorn-access-log", *shlex.split(choice.arguments)]
    process = start_vllm(command, environment | {PYTHON_VARIABLE: choice.find_python()})
    try:
        server = Server(f"http://127.0.0.1:{port}", key)
        process.wait_until_healthy(server)
        yield VllmReadBack(server, export)
    finally:
        process.stop()


@dataclass(frozen=True)
class VllmReadBack:
    """A vLLM that serves an export.

    Attributes:
        model: which of its models is asked: the adapter, where there is one alone.
    """

    server: Server
    export: VllmExport

    @property
    def model(self) -> str:
        return self.export.adapters[0] if len(self.export.adapters) == 1 else self.export.name

    @property
    def name(self) -> str:
        return f"vLLM {self._ask('/version')['version']}"

    def prompt_ids(self, row: BatteryRow) -> list[int]:
        """The ids of the prompt that its endpoint answered.

        Raises:
            VerificationError: it refuses this conversation.
        """
        if row.text is not None:
            return self._ask("/v1/completions", {"prompt": row.text, **ONE_TOKEN})["choices"][0]["prompt_token_ids"]
        body: dict[str, Any] = {"messages": [api_message(item) for item in row.messages[:-1]], **ONE_TOKEN}
        if row.tools:
            # Without a parser of calls vLLM refuses tools, unless it need not choose.
            body |= {"tools": list(row.tools), "tool_choice": "auto" if self.export.tool_parser else "none"}
        return self._ask("/v1/chat/completions", body)["prompt_token_ids"]

    def ends_at(self, token: int) -> bool:
        body = {"max_tokens": 2, "temperature": 0, "allowed_token_ids": [token]}
        if self.export.has_template:
            messages = [{"role": "user", "content": "?"}]
            answer = self._ask("/v1/chat/completions", {"messages": messages, **body})
        else:
            answer = self._ask("/v1/completions", {"prompt": "?", **body})
        return answer["choices"][0]["finish_reason"] == "stop"

    def candidates(self, ids: Sequence[int], positions: Sequence[int]) -> list[Candidates]:
        listed = min(LISTED, self.export.vocabulary_size or LISTED)
        body: dict[str, Any] = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": listed}
        body |= {"logprobs": listed, "return_tokens_as_token_ids": True}
        (choice,) = self._ask("/v1/completions", body)["choices"]
        (last,) = choice["logprobs"]["top_logprobs"]
        behind = [
            *(
                {int(token): each["logprob"] for token, each in place.items()}
                for place in choice["prompt_logprobs"][1:]
            ),
            {int(token.removeprefix("token_id:")): value for token, value in last.items()},
        ]
        return [Candidates(behind[position]) for position in positions]

    def tokens_per_second(self) -> float:
        """Of a short answer, without the time to its first token."""
        body: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}
        seconds = []
        for count in (1, 1, 1 + SHORT_ANSWER):  # the first request pays for what is compiled
            start = time.perf_counter()
            self._ask("/v1/completions", body | {"max_tokens": count})
            seconds.append(time.perf_counter() - start)
        return SHORT_ANSWER / max(seconds[2] - seconds[1], 1e-6)

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            return self.server.ask(path, None if body is None else {"model": self.model, **body}, LONGEST)
        except (OSError, http.client.HTTPException, ServerError, ValueError) as error:
            raise VerificationError(
                "export.vllm_refuses",
                "vLLM does not answer as it should with the exported folder {path}: {problem}",
                path=self.export.folder,
                problem=first_line(error),
            ) from error


ONE_TOKEN = {"max_tokens": 1, "temperature": 0, "return_token_ids": True}


def api_message(message: Message) -> dict[str, Any]:
    """A message as OpenAI's clients send it, its thought under vLLM's name, too."""
    thought = {} if message.reasoning is None else {"reasoning": message.reasoning}
    return openai_message(message) | thought
