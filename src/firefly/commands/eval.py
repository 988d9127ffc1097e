"""`firefly eval`: lm-eval on a model, or on a base and what was tuned of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from firefly.commands.options import (
    AdapterOption,
    DtypeOption,
    ForceOption,
    FourBitOption,
    HubOption,
    JsonOption,
    ModelOption,
    RemoteCodeOption,
    TemplateOption,
    imports_without_gc,
    refuse_below,
)
from firefly.console import print_json, stdout_console
from firefly.errors import UsageError

app = typer.Typer(add_completion=False)


@app.command()
def eval_command(
    tasks: Annotated[
        str, typer.Option("--tasks", help="Names of lm-eval's tasks and files of questions, with commas between.")
    ],
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: AdapterOption = "",
    base: Annotated[str, typer.Option("--base", help="A model to compare with; of an adapter, its own base.")] = "",
    no_base: Annotated[bool, typer.Option("--no_base", help="Measure the adapter alone, not its base too.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="The first so many questions of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num_fewshot", help="Examples in front of each question.")
    ] = None,
    fewshot_file: Annotated[
        str, typer.Option("--fewshot_file", help="Examples for files of questions; else other rows of the file.")
    ] = "",
    metric: Annotated[
        str, typer.Option("--metric", help="Of written answers: exact_match, contains, chrf, bleu, rouge_l.")
    ] = "exact_match",
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", help="Longest answer to a question of a file.")
    ] = 256,
    include_path: Annotated[
        str, typer.Option("--include_path", help="Folder with task descriptions of your own (.yaml).")
    ] = "",
    no_chat_template: Annotated[
        bool, typer.Option("--no_chat_template", help="Ask in plain text, as of a base model.")
    ] = False,
    template_name: TemplateOption = "auto",
    save_path: Annotated[
        str, typer.Option("--save_path", help="Folder for the results; else evaluations/ in the run's folder.")
    ] = "",
    load_in_4bit: FourBitOption = False,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    refuse_below(("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("max_new_tokens", max_new_tokens, 1))
    with imports_without_gc():
        from firefly.config import ModelConfig
        from firefly.evaluation.guest import require_harness

        require_harness()
        from firefly.evaluation.benchmarks import OwnSettings, find_tasks
        from firefly.evaluation.evaluations import Subject, describe, evaluate_models, make_folder, show, write
        from firefly.evaluation.own_tasks import METRICS
    metrics = tuple(dict.fromkeys(name.strip() for name in metric.split(",")))
    for name in metrics:
        if name not in METRICS:
            raise UsageError(
                "config.bad_choice",
                "{key} = {value} is not valid; choose one of: {choices}.",
                key="--metric",
                value=json.dumps(name, ensure_ascii=False),
                choices=", ".join(METRICS),
            )
    subject = Subject(
        ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code),
        adapter_name_or_path,
        base=base,
        with_base=not no_base,
        template_name=template_name,
        with_template=not no_chat_template,
        load_in_4bit=load_in_4bit,
        dtype=dtype,
        force=force,
    )
    own = OwnSettings(Path(fewshot_file).expanduser() if fewshot_file else None, metrics, max_new_tokens)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    included = Path(include_path).expanduser() if include_path else None
    folder = make_folder(subject, Path(save_path).expanduser() if save_path else None)
    found = find_tasks(names, own, num_fewshot, included)
    evaluation = evaluate_models(subject, found, limit)
    written: list[str] = []
    try:  # neither a full disk nor a closed pipe takes the other's copy of what was measured
        if not as_json:
            show(evaluation, stdout_console())
    finally:
        try:
            for path in write(evaluation, found, folder) if folder else ():
                written.append(str(path))
        finally:
            if as_json:
                print_json(json.dumps(describe(evaluation, found) | {"files": written}, ensure_ascii=False))
            for name in () if as_json else written:
                print(name, file=sys.stderr)
