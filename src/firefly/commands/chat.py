"""`firefly chat`: streams, keeps history, Ctrl-C stops an answer and not the program."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firefly.commands.options import (
    AdapterOption,
    ForceOption,
    HubOption,
    ModelOption,
    RemoteCodeOption,
    imports_without_gc,
)
from firefly.translation import translate

if TYPE_CHECKING:
    from firefly.data.schema import Role
    from firefly.generation import GenerationSettings, Generator

COMMANDS = ("/reset", "/system", "/save", "/exit")

app = typer.Typer(add_completion=False)


@app.command()
def chat_command(
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: AdapterOption = "",
    template_name: Annotated[
        str, typer.Option("--template_name", help="auto (saved with the model), a name, or a .jinja file.")
    ] = "auto",
    system: Annotated[str, typer.Option("--system", help="System prompt.")] = "",
    load_in_4bit: Annotated[bool, typer.Option("--load_in_4bit", help="Hold the weights in NF4.")] = False,
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
    generator = Generator.load(model, adapter_name_or_path or None, template_name, load_in_4bit, force)
    talk(generator, settings, system or None)


def talk(generator: Generator, settings: GenerationSettings, system: str | None = None) -> None:
    """Answer what is typed until /exit or the end of input."""
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
    session = ChatSession(generator, settings, system)
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
    """A conversation and what its commands do to it."""

    def __init__(self, generator: Generator, settings: GenerationSettings, system: str | None = None) -> None:
        self.generator = generator
        self.settings = settings
        self.system = system
        self.history: list[tuple[Role, str]] = []
        self.saved: set[Path] = set()
        """Files that this session wrote, and may write again."""

    @property
    def turns(self) -> list[tuple[Role, str]]:
        """(role, text) of each message, the system prompt first."""
        return [*([("system", self.system)] if self.system else []), *self.history]

    def ask(self, question: str) -> None:
        """Print the answer as it comes; what was said before a Ctrl-C stays in the history."""
        from firefly.data.schema import Message
        from firefly.data.templates import TemplateFailure

        self.history.append(("user", question))
        stop, pieces = threading.Event(), []
        print(translate("Firefly: "), end="", flush=True)
        answer = self.generator.stream([Message.of(role, text) for role, text in self.turns], self.settings, stop)
        try:
            for piece in answer:
                piece = piece if pieces else piece.lstrip()
                if piece:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stop.set()
            answer.close()
            print(f" {translate('[stopped]')}", end="")
        except TemplateFailure as error:
            self.history.pop()
            print(f"\n{translate('this cannot be sent: {problem}', problem=error)}", file=sys.stderr)
            return
        print()
        self.history.append(("assistant", "".join(pieces).strip()))

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
        record = {"messages": [{"role": role, "content": text} for role, text in self.turns]}
        try:
            path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            return translate("cannot write {path}: {problem}.", path=path, problem=error.strerror or error)
        self.saved.add(path.resolve())
        return translate("saved to {path}.", path=path)
