"""What a person sees: one-line notices and rich output, always on stderr (stdout is for results).

Of many ranks the first one speaks.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
import warnings
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from firefly import ranks
from firefly.translation import Phrase, translate

if TYPE_CHECKING:
    from rich.console import Console

_notices: ContextVar[tuple[tuple[str, Phrase], ...]] = ContextVar("notices", default=())
"""Of this thread: a plan or a server beside a run leaves nothing in its run.json."""


def tolerate_encodings() -> None:
    """Let no character that the encoding of a console, a pipe or a file lacks end a command: it is replaced.

    Handlers of errors that do not fail, stderr's own or one named in PYTHONIOENCODING, stay.
    """
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            with suppress(io.UnsupportedOperation):  # of an input that somebody has begun to read
                stream.reconfigure(errors="replace")


def print_json(text: str) -> None:
    """Print a JSON text on stdout, where its encoding lacks a character with escapes, which mean the same."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    print(text)


def notice(code: str, text: str, /, **values: object) -> None:
    """Print one line that says what Firefly did differently from what was asked, and remember it for run.json."""
    phrase = Phrase(text, **values)
    _notices.set((*_notices.get(), (code, phrase)))
    if not ranks.is_first():
        return
    with suppress(OSError):  # a log file on a full disk must not end a run
        print(f"{translate('note:')} {phrase}", file=sys.stderr, flush=True)


def take_notices() -> list[dict[str, Any]]:
    """Return this thread's notices so far, as run.json keeps them, and forget them, so that each run records its own.

    `message` is for people who open the file; `text` and `values` let it be shown in another language.
    """
    taken = [{"code": code, "message": str(phrase), **phrase.as_json()} for code, phrase in _notices.get()]
    _notices.set(())
    return taken


def stderr_console() -> Console:
    """A rich console on stderr; colours only where the terminal has them, and brackets, which paths have, as text."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, quiet=not ranks.is_first())


def stdout_console() -> Console:
    """A rich console on stdout, for a command whose result is meant to be read."""
    from rich.console import Console

    return Console(highlight=False, markup=False)


class Note(logging.Filter):
    """Keeps back what a logger says with one of these beginnings."""

    def __init__(self, *beginnings: str) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


LIBRARIES_NOTES = {
    "DeepSpeed": Note("Setting accelerator to", "Setting ds_accelerator to"),
    "bitsandbytes.backends.cpu.ops": Note("Failed to load CPU gemm_4bit_forward"),
    "transformers.integrations.hub_kernels": Note(""),
    "transformers.quantizers.quantizer_gguf": Note(""),
    "matplotlib.font_manager": Note(""),
}
"""What libraries log and no user of ours has to act on, by their loggers: a machine without a GPU has none, a missing
kernel is for inference in 4 bit, which we dequantize for; kernels of a hub, which we load none of; the built-in model's
GGUF file, which is converted once; fonts."""

LIBRARIES_WARNINGS = (
    "This DataLoader will create",
    "Model has `tie_word_embeddings=True`",
    "fan_in_fan_out is set to False",
    "Detected call of `lr_scheduler.step()` before",
)
"""How warnings begin that are no user's concern: what peft says of tied weights our saving and merging see to, it sets
GPT-2's layout right by itself, and a step that was skipped is a notice of ours."""


def hush_libraries() -> None:
    """Silence libraries' notes to their own developers; our notices say what concerns the user.

    FIREFLY_DEBUG=1 in the environment leaves all as it is, and Python's own PYTHONWARNINGS its warnings.
    """
    if os.environ.get("FIREFLY_DEBUG", "") not in ("", "0"):
        return
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        for beginning in LIBRARIES_WARNINGS:
            warnings.filterwarnings("ignore", message=re.escape(beginning))
    for name, note in LIBRARIES_NOTES.items():
        logging.getLogger(name).addFilter(note)  # one and the same, however often


OTHERS_WAIT = 3.0
"""Seconds that a rank waits before it speaks up: where all ranks fail alike, the launcher ends it before."""


def print_error(message: str) -> None:
    """Print the one message of a failed command: once, by the first rank, unless the fault is another rank's alone."""
    if not ranks.is_first():
        time.sleep(OTHERS_WAIT)
        message = f"[rank {ranks.rank()}] {message}"
    print(f"{translate('error:')} {message}", file=sys.stderr, flush=True)
