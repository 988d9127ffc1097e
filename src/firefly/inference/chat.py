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
from firefly.messages import render

COMMANDS = ("/reset", "/system", "/save", "/exit")


def chat(engine: Engine, settings: GenerationSettings, system: str | None = None) -> None:
    """Talk until /exit or the end of input."""
    enable_line_editing()
    print(render("chat.welcome", name=engine.name), file=sys.stderr)
    conversation = ChatSession(engine, settings, system)
    while True:
        try:
            line = input(render("chat.user")).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the prompt it clears the line
            print()
            continue
        if "\ufffd" in line:
            print(render("chat.undecodable", encoding=getattr(sys.stdin, "encoding", None)), file=sys.stderr)
        if line == "/exit":
            return
        if line.startswith("/") and line.split()[0] in COMMANDS:
            conversation.command(line)
        elif line.startswith("/") and " " not in line and line[1:].isalpha():
            print(render("chat.unknown", command=line, known=" ".join(COMMANDS)), file=sys.stderr)
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
        start = [Message("system", self.system)] if self.system else []
        return start + self.history

    def ask(self, question: str) -> None:
        """Print the answer as it comes; what was said before a Ctrl-C stays in the history."""
        self.history.append(Message("user", question))
        stop, pieces = threading.Event(), []
        print(render("chat.assistant"), end="", flush=True)
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
            print(f" {render('chat.stopped')}", end="")
        except TemplateFailure as error:
            self.history.pop()
            print(f"\n{render('chat.refused', problem=error)}", file=sys.stderr)
            return
        print()
        self.history.append(Message("assistant", "".join(pieces).strip()))

    def command(self, line: str) -> None:
        """Carry out /reset, /system or /save."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/save":
            self._save(rest)
            return
        self.history.clear()
        if name == "/reset":
            print(render("chat.reset"), file=sys.stderr)
        else:
            self.system = rest or None
            print(render("chat.system" if rest else "chat.system_off"), file=sys.stderr)

    def _save(self, target: str) -> None:
        """Write the conversation as one record in OpenAI's form, which `train` reads."""
        if not target:
            print(render("chat.save_usage"), file=sys.stderr)
            return
        path = Path(target).expanduser()
        if path.exists() and path.resolve() not in self.saved:
            print(render("chat.save_exists", path=path), file=sys.stderr)
            return
        record = {"messages": [{"role": item.role, "content": item.content} for item in self.messages]}
        try:
            path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            print(render("chat.save_failed", path=path, problem=error.strerror or error), file=sys.stderr)
            return
        self.saved.add(path.resolve())
        print(render("chat.saved", path=path), file=sys.stderr)
