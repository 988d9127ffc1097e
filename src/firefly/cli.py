"""The command line. A verb is a module of `firefly.commands`, imported when it is called: help answers at once."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from firefly import ranks
from firefly.console import hush_libraries, print_error, tolerate_encodings
from firefly.errors import FireflyError
from firefly.files import first_line
from firefly.threads import settle_threads, wait_by_load
from firefly.translation import Phrase, chinese, language, translate

VERBS = {
    "train": Phrase("Train: firefly train CONFIG [--key value …]"),
    "check": Phrase(
        "What a run would train on: every row's fate, token statistics, a preview. Exit 3 if a run would stop."
    ),
    "plan": Phrase("Memory by part and time of a run, from the model's config.json alone. Exit 3 if it does not fit."),
    "merge": Phrase("Merge an adapter into its base model, reload the result and compare it with the trained model."),
    "export": Phrase("Files for other engines, read back and compared: gguf, ollama, vllm. Exit 3 if they differ."),
    "chat": Phrase("Talk with a model in the terminal."),
    "generate": Phrase("Answer a file of prompts: JSON lines in its order. Exit 3 if rows have no answer."),
    "eval": Phrase("Benchmarks by lm-eval, and files of questions: a base against what was tuned of it."),
    "serve": Phrase("An OpenAI-compatible server for a model and adapters over it."),
    "compare": Phrase("Did it help, and what was forgotten: two models side by side, in one report."),
    "templates": Phrase("Chat templates: list, show, render, verify."),
    "runs": Phrase("Runs and what they left: list, show, diff, stop, remove."),
    "queue": Phrase("Configurations that are trained one after the other: add, run, list, stop, remove."),
    "studio": Phrase("The whole path in a web page: data, training, talking, comparing, exporting."),
    "schema": Phrase("The JSON schema of a configuration, by which editors complete and check its keys."),
}
"""The modules of `firefly.commands`, and what `firefly --help` says of each."""

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


class Verbs(TyperGroup):
    """Knows the verbs by name, and imports the one that is called."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = {name: TyperCommand(name, help=str(text)) for name, text in VERBS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, *rest = args
        if name not in VERBS:
            return super().resolve_command(ctx, args)
        command = translated(typer.main.get_command(importlib.import_module(f"firefly.commands.{name}").app))
        command.help = str(VERBS[name])
        return name, command, rest


def translated(command: Any) -> Any:
    """The same command with its help, and that of its options, in the user's language."""
    known = chinese() if language() == "zh" else {}
    for item in (command, *command.params):
        item.help = known.get(item.help, item.help)
    for below in getattr(command, "commands", {}).values():
        translated(below)
    return command


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    no_args_is_help=True,
    help="Firefly takes a base model and data to a trained and checked model, ready to be served.",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from firefly import __version__

        print(f"firefly {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    settle_threads()
    tolerate_encodings()
    hush_libraries()
    command = translated(typer.main.get_command(app))
    try:
        with wait_by_load():
            result = command.main(sys.argv[1:] if arguments is None else arguments, "firefly", standalone_mode=False)
        code = result if isinstance(result, int) else 0  # of an Exit: typer turns Ctrl-C into one, too
    except FireflyError as error:
        print_error(str(error))
        ranks.leave(failed=True)
        return error.exit_code
    except typer.Abort:
        code = INTERRUPTED
    except Exception as error:
        if show := getattr(error, "show", None):  # click's own complaints about options
            show(file=sys.stderr)
            return 2
        if remedy := remedy_of(error):
            print_error(remedy)
            if not is_out_of_memory(error):
                return 2
        raise
    if code == INTERRUPTED:
        print_error(translate("interrupted."))
    ranks.leave(failed=code != 0)
    return code


def is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)


def remedy_of(error: Exception) -> str | None:
    """What to do about a fault of the machine; None where it is none."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return translate(
            "no space is left on the disk, or the quota is used up: {path}. Free some space and start again.",
            path=error.filename or error,
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return translate(
            "{path}: {problem}. Give this user the right to write there, or choose another folder (the cache "
            "moves with FIREFLY_CACHE).",
            path=error.filename or "–",
            problem=error.strerror or error,
        )
    if isinstance(error, UnicodeEncodeError):  # text that is printed or written never raises it, names of files do
        return translate(
            "{name}: the encoding {encoding} has no such file name. Use a UTF-8 locale, set PYTHONUTF8=1, or "
            "give the file or folder another name.",
            name=error.object,
            encoding=error.encoding,
        )
    if is_out_of_memory(error):
        return translate(
            "out of memory: {problem}. Lower tokens_per_microbatch or max_seq_length, set "
            "gradient_checkpointing to true, or use train_mode qlora.",
            problem=first_line(error),
        )
    return None


def run(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and end the process: the `firefly` console script and the tutorial's doors."""
    ranks.end(main(arguments))
