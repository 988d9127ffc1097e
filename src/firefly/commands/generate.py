"""`firefly generate`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from firefly.commands.options import (
    AdapterOption,
    DtypeOption,
    EngineArgumentsOption,
    EngineKeyOption,
    EngineOption,
    EnginePythonOption,
    EngineUrlOption,
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
from firefly.console import notice, print_json
from firefly.errors import VerificationError
from firefly.translation import translate

app = typer.Typer(add_completion=False)


@app.command()
def generate_command(
    input_file: Annotated[
        str, typer.Option("--input_file", help="Prompts, in any format that train reads: file, folder, glob, dataset.")
    ],
    output_file: Annotated[str, typer.Option("--output_file", help="Answers as JSON lines, in the order of the rows.")],
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: AdapterOption = "",
    template_name: TemplateOption = "auto",
    system: Annotated[str, typer.Option("--system", help="System prompt of conversations that have none.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="Longest answer, in tokens.")] = 500,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of sampling; 0 always takes the likeliest token.")
    ] = 0.0,
    num_samples: Annotated[int, typer.Option("--num_samples", help="Answers to each prompt.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same answers; negative: none.")] = 42,
    top_p: Annotated[
        float, typer.Option("--top_p", help="Draw among the likeliest tokens that have this probability together.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top_k", help="Draw among so many of the likeliest tokens; 0: among all.")
    ] = 0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition_penalty", help="Above 1, tokens that were there become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends an answer; may be given several times.")
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Log-probability of each token of an answer.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Answer only so many rows, from the beginning.")] = None,
    data_format: Annotated[
        str, typer.Option("--data_format", help="Format of the rows, where several fit (docs/data.md).")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    load_in_4bit: FourBitOption = False,
    dtype: DtypeOption = "auto",
    engine: EngineOption = "transformers",
    engine_python: EnginePythonOption = "",
    engine_url: EngineUrlOption = "",
    engine_api_key: EngineKeyOption = "",
    engine_arguments: EngineArgumentsOption = "",
    as_json: JsonOption = False,
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    refuse_below(("num_samples", num_samples, 1), ("limit", limit, 1))
    with imports_without_gc():
        from firefly.config import ModelConfig
        from firefly.data.sources import find_sources
        from firefly.generation import GenerationSettings, Generator
        from firefly.generation.answer_file import AnswerFile
        from firefly.generation.files import Answering, answer_files, identify_model
        from firefly.generation.vllm import EngineChoice
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed if seed >= 0 else None,
        logprobs=0 if logprobs else None,
    )
    if settings.is_greedy and num_samples > 1:
        notice(
            "generate.same_answers",
            "num_samples = {count} at temperature 0 gives the same answer {count} times; --temperature above 0 draws.",
            count=num_samples,
        )
    (source,) = find_sources(input_file, "input_file", hub)
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    choice = EngineChoice(engine, engine_python, engine_url, engine_api_key, engine_arguments)
    adapters = adapter_name_or_path or None
    generator = Generator.load(model, adapters, template_name, load_in_4bit, force, dtype=dtype, engine=choice)
    with generator:
        adapter = generator.served[generator.name].adapter
        summary = answer_files(
            Answering(generator, settings, num_samples, system or None),
            source.files,
            AnswerFile(Path(output_file).expanduser()),
            identify_model(model, adapter, generator.computes_in or dtype, load_in_4bit) | {"engine": engine},
            data_format,
            limit,
            overwrite,
        )
    found = summary.as_dict()
    print(
        translate(
            "{rows} rows, {failed} of them without an answer; {new_tokens:,} tokens in {seconds:,.1f} s "
            "({new_tokens_per_second:,.0f} tokens/s).",
            **found,
        ),
        file=sys.stderr,
    )
    if as_json:
        print_json(json.dumps(found, ensure_ascii=False))
    else:
        print(summary.output_file)
    if summary.failed:
        raise VerificationError(
            "generate.failed_rows",
            'of {rows} rows {failed} have no answer; "error" in their lines of {output} says why.',
            rows=summary.rows,
            failed=summary.failed,
            output=summary.output_file,
        )
