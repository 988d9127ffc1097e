"""Terminal chat: streams, keeps history, Ctrl-C stops an answer and not the program."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from pathlib import Path

from firefly.data.schema import Message
from firefly.data.templates import TemplateFailure
from firefly.inference.engine import Engine, GenerationSettings
from firefly.translation import translate

COMMANDS = ("/reset", "/system", "/save", "/exit")


def chat(engine: Engine, settings: GenerationSettings, system: str | None = None) -> None:
    """Talk until /exit or the end of input."""
    enable_line_editing()
    print(
        translate(
            "Chatting with {name}. /reset forgets, /system TEXT sets the system prompt, /save FILE keeps the "
            "conversation, /exit leaves; Ctrl-C stops an answer.",
            name=engine.name,
        ),
        file=sys.stderr,
    )
    conversation = ChatSession(engine, settings, system)
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
            conversation.command(line)
        elif line.startswith("/") and " " not in line and line[1:].isalpha():
            print(
                translate("unknown command {command}; known: {known}", command=line, known=" ".join(COMMANDS)),
                file=sys.stderr,
            )
        elif line:
            conversation.ask(line)


def enable_line_editing() -> None:
    """Arrow keys and history in `input`, where the platform has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401


class ChatSession:
    """A conversation and what its commands do to it."""

    def __init__(self, engine: Engine, settings: GenerationSettings, system: str | None = None) -> None:
        self.engine = engine
        self.settings = settings
        self.system = system
        self.history: list[Message] = []
        self.saved: set[Path] = set()
        """Files that this session wrote, and may write again."""

    @property
    def messages(self) -> list[Message]:
        start = [Message.of("system", self.system)] if self.system else []
        return start + self.history

    def ask(self, question: str) -> None:
        """Print the answer as it comes; what was said before a Ctrl-C stays in the history."""
        self.history.append(Message.of("user", question))
        stop, pieces = threading.Event(), []
        print(translate("Firefly: "), end="", flush=True)
        answer = self.engine.stream(self.messages, self.settings, stop)
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
        self.history.append(Message.of("assistant", "".join(pieces).strip()))

    def command(self, line: str) -> None:
        """Carry out /reset, /system or /save."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/save":
            self._save(rest)
            return
        self.history.clear()
        if name == "/reset":
            print(translate("history forgotten."), file=sys.stderr)
        else:
            self.system = rest or None
            print(
                translate(
                    "system prompt set; history forgotten." if rest else "system prompt removed; history forgotten."
                ),
                file=sys.stderr,
            )

    def _save(self, target: str) -> None:
        """Write the conversation as one record in OpenAI's form, which `train` reads."""
        if not target:
            print(translate("usage: /save FILE"), file=sys.stderr)
            return
        path = Path(target).expanduser()
        if path.exists() and path.resolve() not in self.saved:
            print(
                translate("{path} exists already and is left as it is: choose another name.", path=path),
                file=sys.stderr,
            )
            return
        record = {"messages": [{"role": item.role, "content": item.text} for item in self.messages]}
        try:
            path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            print(
                translate("cannot write {path}: {problem}.", path=path, problem=error.strerror or error),
                file=sys.stderr,
            )
            return
        self.saved.add(path.resolve())
        print(translate("saved to {path}.", path=path), file=sys.stderr)
