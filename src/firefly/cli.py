"""The command line. Heavy imports wait until a command needs them, so `firefly --help` answers at once."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from firefly import ranks
from firefly.console import hush_libraries, print_error, print_json, stdout_console, tolerate_encodings
from firefly.errors import FireflyError
from firefly.files import first_line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Firefly takes a base model and data to a trained and checked model, ready to be served.",
)

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""

ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}

ModelOption = Annotated[
    str, typer.Option("--model_name_or_path", help="Model folder, hub id, or smollm2-135m-instruct.")
]
AdapterOption = Annotated[str, typer.Option("--adapter_name_or_path", help="Folder of a LoRA or QLoRA adapter.")]
HubOption = Annotated[str, typer.Option("--hub", help="huggingface or modelscope.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Go on although the template is not the one that was trained.")
]
RemoteCodeOption = Annotated[bool, typer.Option("--trust_remote_code", help="Run code that the model brings along.")]


@contextmanager
def lasting_imports() -> Iterator[None]:
    """For the import of torch and transformers: no garbage is looked for in the million objects that it makes and that
    stay, neither while they grow in number (a fifth of the time) nor, from then on, in any later collection."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from firefly import __version__

        print(f"firefly {__version__}")
        raise typer.Exit


@app.command("train", context_settings=ANY_KEY)
def train_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="JSON or YAML file; every key can be given as --key value too.")] = "",
    train_args_file: Annotated[
        str, typer.Option("--train_args_file", help="The same file, as the tutorial names it.")
    ] = "",
) -> None:
    """Train: firefly train CONFIG [--key value …]"""
    from firefly.config import load_config, parse_overrides
    from firefly.errors import UsageError

    extra = list(context.args)
    if config.startswith("--"):  # an override came first: no positional configuration was given
        extra.insert(0, config)
        config = ""
    if config and train_args_file:
        raise UsageError(
            "cli.unexpected_argument",
            "unexpected argument {argument!r}; options are written --key value.",
            argument=config,
        )
    source = config or train_args_file
    if not source:
        raise UsageError("cli.no_config", "no configuration given. Usage: firefly train CONFIG [--key value …]")
    with lasting_imports():
        resolved = load_config(source, parse_overrides(extra))
        from firefly.train import train
    output_dir = train(resolved)
    if ranks.is_first():
        print(output_dir)


@app.command("check", context_settings=ANY_KEY)
def check_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="JSON or YAML file; or give --train_file alone.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON value on standard output.")] = False,
    html: Annotated[str, typer.Option("--html", help="Also write a page with a preview.")] = "",
) -> None:
    """What a run would train on: every row's fate, token statistics, a preview. Exit 3 if a run would stop."""
    from pathlib import Path

    from firefly.config import parse_overrides
    from firefly.errors import VerificationError

    extra = list(context.args)
    if config.startswith("--"):
        extra.insert(0, config)
        config = ""
    from firefly.reports import check

    checked = check.check_data(config, parse_overrides(extra))
    if html:
        check.write_html(checked, Path(html).expanduser())
    if as_json:
        print_json(check.as_json(checked))
    else:
        check.show_check(checked, stdout_console())
    if checked.problem:
        raise VerificationError("check.failed", "a run would not start: {problem}", problem=checked.problem)


@app.command("plan", context_settings=ANY_KEY)
def plan_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="JSON or YAML file; every key can be given as --key value too.")] = "",
    memory: Annotated[str, typer.Option("--memory", help="Plan for a machine with so much, such as 24GB.")] = "",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; with --memory alone a card is meant.")] = "",
    tflops: Annotated[
        float | None, typer.Option("--tflops", help="Rate of matrix products of that machine, for the time.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Train two steps on the longest rows, and compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON value on standard output.")] = False,
) -> None:
    """Memory by part and time of a run, from the model's config.json alone. Exit 3 if it does not fit."""
    from firefly.config import parse_overrides
    from firefly.errors import UsageError, VerificationError

    extra = list(context.args)
    if config.startswith("--"):
        extra.insert(0, config)
        config = ""
    if tflops is not None and not tflops > 0:
        raise UsageError("plan.bad_rate", "--tflops {value} is not valid; it must be above 0.", value=tflops)
    with lasting_imports():
        from firefly.reports import plan_view
        from firefly.reports.advice import advise
        from firefly.reports.plan import make_plan
        from firefly.reports.probe import probe as probe_plan
    plan, data = make_plan(config, parse_overrides(extra), memory, device, tflops)
    probed = probe_plan(plan, data) if probe else None
    advice = [] if plan.fits else advise(plan)
    if as_json:
        print_json(plan_view.as_json(plan, advice, probed))
    else:
        plan_view.show_plan(plan, advice, probed, stdout_console())
    if not plan.fits:
        total, available = plan_view.gib(plan.forecast.total), plan_view.gib(plan.forecast.available)
        raise VerificationError(
            "plan.failed",
            "the run needs {total} GiB and {available} GiB are available.",
            total=total,
            available=available,
        )


templates_app = typer.Typer(no_args_is_help=True, help="Chat templates: list, show, render, verify.")
app.add_typer(templates_app, name="templates")

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON value on standard output.")]


@templates_app.command("list")
def templates_list(as_json: JsonOption = False) -> None:
    """The named templates and their aliases."""
    import json

    from firefly.reports.template_tools import describe_templates

    described = describe_templates()
    if as_json:
        print_json(json.dumps(described, ensure_ascii=False))
        return
    for item in described:
        print(
            "  ".join([f"{item['name']:26}", f"{' '.join(item['stop_tokens']):40}", " ".join(item["aliases"])]).rstrip()
        )


@templates_app.command("show")
def templates_show(name: str) -> None:
    """The Jinja text of a template."""
    from firefly.data.templates import read_template
    from firefly.reports.template_tools import find_spec

    print(read_template(find_spec(name)))


@templates_app.command("render")
def templates_render(
    name: str,
    messages: Annotated[str, typer.Option("--messages", help='JSON file {"messages": […], …}, or - for stdin.')],
    add_generation_prompt: Annotated[bool, typer.Option("--add_generation_prompt")] = False,
    on_system: Annotated[str, typer.Option("--on_system", help="merge or error, where it is refused.")] = "merge",
    as_json: JsonOption = False,
) -> None:
    """The official text of some messages, and the character spans that carry loss."""
    import json

    from firefly.errors import UsageError
    from firefly.reports.template_tools import read_request, render_request

    if on_system not in ("merge", "error"):
        raise UsageError(
            "merge.bad_choice",
            "--{option} = {value!r}; choose one of: {choices}.",
            option="on_system",
            value=on_system,
            choices="merge, error",
        )
    rendered = render_request(name, read_request(messages), add_generation_prompt, on_system)
    if as_json:
        print_json(json.dumps(rendered, ensure_ascii=False))
    else:
        print(rendered["text"])


@templates_app.command("verify")
def templates_verify(
    model_name_or_path: ModelOption,
    template_name: Annotated[str, typer.Option("--template_name", help="auto, a name, or a .jinja file.")] = "auto",
    template_date: Annotated[str, typer.Option("--template_date", help="YYYY-MM-DD, for templates with a date.")] = "",
    as_json: JsonOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Prove a template on a model's tokenizer: ids, prefixes, stop tokens. Exit 3 if a check fails."""
    import json

    from firefly.config import ModelConfig
    from firefly.errors import VerificationError
    from firefly.reports.verify import verify_template

    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    certificate = verify_template(model, template_name, template_date or None)
    if as_json:
        print_json(json.dumps(certificate.as_dict(), ensure_ascii=False))
    else:
        for check in certificate.checks:
            print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
        print(f"hash {certificate.hash}")
    failed = [check.name for check in certificate.checks if not check.passed]
    if failed:
        raise VerificationError(
            "certificate.exit",
            "the template {name} fails {count} check(s) on this tokenizer: {checks}.",
            name=certificate.template,
            count=len(failed),
            checks=", ".join(failed),
        )


@app.command("merge")
def merge_command(
    adapter_name_or_path: AdapterOption,
    save_path: Annotated[str, typer.Option("--save_path", help="Folder for the merged model.")],
    model_name_or_path: ModelOption = "",
    onto: Annotated[
        str, typer.Option("--onto", help="original, or dequantized (QLoRA: the weights as trained).")
    ] = "original",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (the base model's), float32, bfloat16 or float16.")
    ] = "auto",
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Merge an adapter into its base model, reload the result and compare it with the trained model."""
    from firefly.config import ModelConfig

    with lasting_imports():
        from firefly.export.merge import merge
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    print(merge(model, adapter_name_or_path, save_path, onto=onto, dtype=dtype, force=force))


@app.command("chat")
def chat_command(
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: AdapterOption = "",
    template_name: Annotated[
        str, typer.Option("--template_name", help="auto (saved with the model), a name, or a .jinja file.")
    ] = "auto",
    system: Annotated[str, typer.Option("--system", help="System prompt.")] = "",
    load_in_4bit: Annotated[bool, typer.Option("--load_in_4bit", help="Hold the weights in NF4.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens")] = 500,
    top_p: Annotated[float, typer.Option("--top_p")] = 0.9,
    temperature: Annotated[float, typer.Option("--temperature", help="0 always takes the likeliest token.")] = 0.35,
    repetition_penalty: Annotated[float, typer.Option("--repetition_penalty")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Repeatable answers; negative: none.")] = -1,
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Talk with a model in the terminal."""
    from firefly.config import ModelConfig

    with lasting_imports():
        from firefly.inference.chat import chat
        from firefly.inference.engine import Engine, GenerationSettings
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        top_p=top_p,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        seed=seed if seed >= 0 else None,
    )
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    engine = Engine.load(model, adapter_name_or_path or None, template_name, load_in_4bit, force)
    chat(engine, settings, system or None)


@app.command("schema")
def schema_command() -> None:
    """The JSON schema of a configuration, by which editors complete and check its keys."""
    with lasting_imports():
        from firefly.commands.schema import print_schema

        print_schema()


runs_app = typer.Typer(no_args_is_help=True, help="Runs and what they left: list, show, diff.")
app.add_typer(runs_app, name="runs")


@runs_app.command("list")
def runs_list(
    folders: Annotated[
        list[str] | None, typer.Argument(help="Folders to search: output, if there is one, or here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The runs in some folders, newest first: state, steps, losses, duration."""
    from firefly.reports import runs
    from firefly.runs.records import find_runs

    places = folders or runs.default_folders()
    records = find_runs(places)
    if as_json:
        print_json(runs.list_as_json(records))
    else:
        runs.show_list(records, places, stdout_console())


@runs_app.command("show")
def runs_show(
    run: Annotated[str, typer.Argument(help="The output_dir of a run.")], as_json: JsonOption = False
) -> None:
    """Everything of one run: configuration, choices, data, loss, results, checkpoints, notes, versions."""
    from firefly.reports import runs
    from firefly.runs.records import open_run

    record = open_run(run)
    if as_json:
        print_json(runs.show_as_json(record))
    else:
        runs.show_run(record, stdout_console())


@runs_app.command("diff")
def runs_diff(
    first: Annotated[str, typer.Argument(metavar="A", help="The output_dir of a run.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The output_dir of another.")],
    as_json: JsonOption = False,
) -> None:
    """Why two runs differ, what explains most first, and how far their losses agree."""
    from firefly.reports import run_diff
    from firefly.runs.records import open_run

    found = run_diff.compare_runs(open_run(first), open_run(second))
    if as_json:
        print_json(run_diff.as_json(found))
    else:
        run_diff.show_diff(found, stdout_console())


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from firefly.translation import translate

    tolerate_encodings()
    hush_libraries()
    try:
        result = app(args=sys.argv[1:] if arguments is None else arguments, prog_name="firefly", standalone_mode=False)
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
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print_error(
                translate(
                    "no space is left on the disk, or the quota is used up: {path}. Free some space and start again.",
                    path=error.filename or error,
                )
            )
            return 2
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            print_error(
                translate(
                    "{path}: {problem}. Give this user the right to write there, or choose another folder (the cache "
                    "moves with FIREFLY_CACHE).",
                    path=error.filename or "–",
                    problem=error.strerror or error,
                )
            )
            return 2
        if isinstance(error, UnicodeEncodeError):  # text that is printed or written never raises it, names of files do
            print_error(
                translate(
                    "{name}: the encoding {encoding} has no such file name. Use a UTF-8 locale, set PYTHONUTF8=1, or "
                    "give the file or folder another name.",
                    name=error.object,
                    encoding=error.encoding,
                )
            )
            return 2
        if _is_out_of_memory(error):
            print_error(
                translate(
                    "out of memory: {problem}. Lower tokens_per_microbatch or max_seq_length, set "
                    "gradient_checkpointing to true, or use train_mode qlora.",
                    problem=first_line(error),
                )
            )
        raise
    if code == INTERRUPTED:
        print_error(translate("interrupted."))
    ranks.leave(failed=code != 0)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)


def run(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and end the process: the `firefly` console script and the tutorial's doors."""
    ranks.end(main(arguments))
