"""`firefly compare`: two models on the same rows and questions, in one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from firefly.commands.options import (
    DtypeOption,
    ForceOption,
    FourBitOption,
    HubOption,
    JsonOption,
    RemoteCodeOption,
    TemplateOption,
    imports_without_gc,
    refuse_below,
)
from firefly.console import print_json, stderr_console
from firefly.errors import UsageError
from firefly.translation import translate

app = typer.Typer(add_completion=False)


@app.command()
def compare_command(
    base: Annotated[
        str, typer.Option("--base", help="What is compared with: a model, an adapter, or a server's http address.")
    ],
    tuned: Annotated[str, typer.Option("--tuned", help="What is judged: a model, an adapter, or a server's address.")],
    save_path: Annotated[str, typer.Option("--save_path", help="Folder for report.html and report.json.")],
    eval_file: Annotated[
        list[str] | None, typer.Option("--eval_file", help="Held-out rows, in any format that train reads; repeatable.")
    ] = None,
    train_file: Annotated[
        list[str] | None,
        typer.Option("--train_file", help="Rows that were trained on: those that look wrong are named; repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Losses of only so many rows of a file.")] = None,
    questions: Annotated[int, typer.Option("--questions", help="Held-out prompts that both answer.")] = 32,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="Longest answer, in tokens.")] = 128,
    max_seq_length: Annotated[int, typer.Option("--max_seq_length", help="Longest row, in tokens.")] = 2048,
    data_format: Annotated[
        str, typer.Option("--data_format", help="Format of the rows, where several fit (docs/data.md).")
    ] = "auto",
    no_probes: Annotated[bool, typer.Option("--no_probes", help="Leave out what shows forgetting.")] = False,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Share of loss on general texts that counts as forgetting.")
    ] = 0.05,
    judge_url: Annotated[str, typer.Option("--judge_url", help="Server of a model that judges the answers.")] = "",
    judge_model: Annotated[str, typer.Option("--judge_model", help="Its name there, if there are several.")] = "",
    judge_api_key: Annotated[str, typer.Option("--judge_api_key", help="API key of the judge's server.")] = "",
    judge_tokens: Annotated[int, typer.Option("--judge_tokens", help="Longest judgement, in tokens.")] = 512,
    base_name: Annotated[str, typer.Option("--base_name", help="Model at the base's server.")] = "",
    tuned_name: Annotated[str, typer.Option("--tuned_name", help="Model at the tuned model's server.")] = "",
    base_api_key: Annotated[str, typer.Option("--base_api_key", help="API key of the base's server.")] = "",
    tuned_api_key: Annotated[str, typer.Option("--tuned_api_key", help="API key of the tuned model's server.")] = "",
    template_name: TemplateOption = "auto",
    load_in_4bit: FourBitOption = False,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    refuse_below(
        ("questions", questions, 0),
        ("limit", limit, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("max_seq_length", max_seq_length, 2),
        ("judge_tokens", judge_tokens, 1),
        ("threshold", threshold, 0),
    )
    refuse_without_effect("judge_url", bool(judge_url), judge_model=judge_model, judge_api_key=judge_api_key)
    for role, given, name, key in (
        ("base", base, base_name, base_api_key),
        ("tuned", tuned, tuned_name, tuned_api_key),
    ):
        at_server = given.startswith(("http://", "https://"))
        refuse_without_effect(f"{role} http://…", at_server, **{f"{role}_name": name, f"{role}_api_key": key})
    with imports_without_gc():
        from firefly.evaluation.comparison import ComparisonRequest, compare_models, write_report
        from firefly.evaluation.endpoints import Endpoint
        from firefly.evaluation.subjects import LoadingOptions
        from firefly.evaluation.terminal import show_report
    request = ComparisonRequest(
        base=base,
        tuned=tuned,
        eval_files=tuple(eval_file or ()),
        train_files=tuple(train_file or ()),
        names=(base_name, tuned_name),
        api_keys=(base_api_key, tuned_api_key),
        questions=questions,
        max_new_tokens=max_new_tokens,
        max_seq_length=max_seq_length,
        data_format=data_format,
        limit=limit,
        probes=not no_probes,
        judge=Endpoint(judge_url, judge_model, judge_api_key) if judge_url else None,
        judge_tokens=judge_tokens,
        threshold=threshold,
        loading=LoadingOptions(hub, trust_remote_code, template_name, load_in_4bit, dtype, force),
    )
    folder = Path(save_path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)  # better refused now than after minutes
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            "compare.no_folder",
            "--save_path {path} is no folder, and cannot be made one: {problem}.",
            path=folder,
            problem=error.strerror or error,
        ) from error
    report = compare_models(request)
    page = write_report(report, folder)
    show_report(report, stderr_console())
    if as_json:
        print_json(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        print(translate("report: {path}", path=page))


def refuse_without_effect(needed: str, is_given: bool, **options: str) -> None:
    """
    Raises:
        UsageError: one of the options is given, and the one that it needs is not.
    """
    for option, value in options.items():
        if value and not is_given:
            raise UsageError(
                "compare.without_effect", "--{option} has no effect without --{needed}.", option=option, needed=needed
            )
