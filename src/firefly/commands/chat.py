"""`firefly chat`: streams, keeps history, Ctrl-C stops an answer and not the program."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firefly.commands.options import (
    AdapterOption,
    DtypeOption,
    ForceOption,
    FourBitOption,
    HubOption,
    ModelOption,
    RemoteCodeOption,
    TemplateOption,
    imports_without_gc,
)
from firefly.errors import UsageError
from firefly.translation import translate

if TYPE_CHECKING:
    from firefly.data.schema import Message
    from firefly.generation import GenerationSettings, Generator
    from firefly.generation.replies import Piece, ReplyFormat

COMMANDS = ("/reset", "/system", "/save", "/exit")
DIM, NOT_DIM = "\033[2m", "\033[22m"

app = typer.Typer(add_completion=False)


@app.command()
def chat_command(
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: AdapterOption = "",
    template_name: TemplateOption = "auto",
    system: Annotated[str, typer.Option("--system", help="System prompt.")] = "",
    load_in_4bit: FourBitOption = False,
    dtype: DtypeOption = "auto",
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="Longest answer, in tokens.")] = 500,
    top_p: Annotated[
        float, typer.Option("--top_p", help="Draw among the likeliest tokens that have this probability together.")
    ] = 0.9,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of sampling; 0 always takes the likeliest token.")
    ] = 0.35,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition_penalty", help="Above 1, tokens that were there become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same answers; negative: none.")] = -1,
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    with imports_without_gc():
        from firefly.config import ModelConfig
        from firefly.generation import GenerationSettings, Generator
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        top_p=top_p,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        seed=seed if seed >= 0 else None,
    )
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    generator = Generator.load(model, adapter_name_or_path or None, template_name, load_in_4bit, force, dtype=dtype)
    with generator:
        talk(generator, settings, system or None)


def talk(generator: Generator, settings: GenerationSettings, system: str | None = None) -> None:
    """Answer what is typed until /exit or the end of input."""
    session = ChatSession(generator, settings, system)
    with suppress(ImportError):  # arrow keys and history in `input`, where the platform has them
        import readline  # noqa: F401
    print(
        translate(
            "Chatting with {name}. /reset forgets, /system TEXT sets the system prompt, /save FILE keeps the "
            "conversation, /exit leaves; Ctrl-C stops an answer.",
            name=generator.name,
        ),
        file=sys.stderr,
    )
    while True:
        try:
            line = input(translate("User: ")).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the prompt it clears the line
            print()
            continue
        if "\ufffd" in line:
            print(
                translate(
                    "this line has bytes that are not {encoding}; each was replaced. Set PYTHONIOENCODING to the "
                    "encoding that the input has.",
                    encoding=getattr(sys.stdin, "encoding", None),
                ),
                file=sys.stderr,
            )
        if line == "/exit":
            return
        if line.startswith("/") and line.split()[0] in COMMANDS:
            session.command(line)
        elif line.startswith("/") and " " not in line and line[1:].isalpha():
            print(
                translate("unknown command {command}; known: {known}", command=line, known=" ".join(COMMANDS)),
                file=sys.stderr,
            )
        elif line:
            session.ask(line)


class ChatSession:
    """A conversation and what its commands do to it.

    Raises:
        UsageError: the model has no template.
    """

    def __init__(self, generator: Generator, settings: GenerationSettings, system: str | None = None) -> None:
        self.generator, self.encoder = generator, generator.encoder
        self.settings = settings
        self.system = system
        self.history: list[Message] = []
        self.saved: set[Path] = set()
        """Files that this session wrote, and may write again."""

    @property
    def turns(self) -> list[Message]:
        """All messages, the system prompt first."""
        from firefly.data.schema import Message

        return [*([Message.of("system", self.system)] if self.system else []), *self.history]

    def ask(self, question: str) -> None:
        """Print the answer as it comes; what was said before a Ctrl-C stays in the history.

        The engine has kept what it computed for earlier turns, as long as the template writes them the same way.
        """
        from firefly.data.schema import Message
        from firefly.data.templates import TemplateFailure
        from firefly.generation import GenerationFailed
        from firefly.generation.replies import Reply

        self.history.append(Message.of("user", question))
        try:
            ids = self.generator.encode(self.turns)
            request = self.generator.request(ids, self.settings)
        except (TemplateFailure, UsageError) as error:  # refused, or too long
            self._forget_question(translate("this cannot be sent: {problem}", problem=error))
            return
        prompt_end = self.generator.prompt_end(ids)
        reply = self.reply_format.stream(prompt_tail=prompt_end, reply_id=str(len(self.history)))
        printer = ReplyPrinter(self.encoder.special_tokens)
        print(translate("Firefly: "), end="", flush=True)
        try:
            for delta in self.generator.deltas(request):
                printer.print(reply.feed(delta.text))
        except KeyboardInterrupt:
            print(f" {translate('[stopped]')}", end="")
        except GenerationFailed as error:
            print()
            self._forget_question(translate("no answer came: {problem}", problem=error))
            return
        printer.print(reply.finish())
        print()
        said = Reply.of(printer.pieces)
        self.history.append(replace(said, content=said.content.strip()).as_message())

    @cached_property
    def reply_format(self) -> ReplyFormat:
        from firefly.generation.replies import ReplyFormat

        return ReplyFormat.of(self.encoder.template)

    def _forget_question(self, why: str) -> None:
        self.history.pop()
        print(why, file=sys.stderr)

    def command(self, line: str) -> None:
        """Carry out /reset, /system or /save."""
        name, _, rest = line.partition(" ")
        if name == "/save":
            print(self.save(rest.strip()), file=sys.stderr)
            return
        self.history.clear()
        if name == "/reset":
            print(translate("history forgotten."), file=sys.stderr)
            return
        self.system = rest.strip() or None
        message = (
            "system prompt set; history forgotten." if self.system else "system prompt removed; history forgotten."
        )
        print(translate(message), file=sys.stderr)

    def save(self, target: str) -> str:
        """Write the conversation as one record in OpenAI's form, which `train` reads; return what became of it."""
        if not target:
            return translate("usage: /save FILE")
        path = Path(target).expanduser()
        if path.exists() and path.resolve() not in self.saved:
            return translate("{path} exists already and is left as it is: choose another name.", path=path)
        record = {"messages": [as_record(message) for message in self.turns]}
        try:
            path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            return translate("cannot write {path}: {problem}.", path=path, problem=error.strerror or error)
        self.saved.add(path.resolve())
        return translate("saved to {path}.", path=path)


class ReplyPrinter:
    """Prints a reply as it comes: thoughts in a dim colour, each call on a line of its own.

    Special tokens that are no markup of the template are left out, as `decode` leaves them out.
    """

    def __init__(self, special_tokens: Sequence[str]) -> None:
        self.pieces: list[Piece] = []
        self._special = re.compile("|".join(map(re.escape, special_tokens)) or r"(?!)")
        self._printed: type[Piece] | None = None

    def print(self, pieces: Sequence[Piece]) -> None:
        from firefly.generation.replies import CallDelta, CallDropped, ContentDelta, ReasoningDelta

        for piece in pieces:
            if isinstance(piece, ContentDelta):
                piece = ContentDelta(self._special.sub("", piece.text))
            self.pieces.append(piece)
            if isinstance(piece, CallDropped):
                continue
            if isinstance(piece, CallDelta):
                text = f"\n→ {piece.name} {piece.arguments}" if piece.name else piece.arguments
            else:
                begins = self._printed is not type(piece)
                text = piece.text.lstrip() if begins else piece.text
                if not text:
                    continue
                if begins and self._printed:
                    text = f"\n\n{text}"
                if isinstance(piece, ReasoningDelta) and sys.stdout.isatty():
                    text = f"{DIM}{text}{NOT_DIM}"
            self._printed = type(piece)
            print(text, end="", flush=True)


def as_record(message: Message) -> dict[str, Any]:
    """A message in OpenAI's form."""
    record: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.reasoning is not None:
        record["reasoning_content"] = message.reasoning
    if message.tool_calls:
        record["tool_calls"] = [dict(call) for call in message.tool_calls]
    return record
