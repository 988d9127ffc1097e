"""`firefly templates`: list, show, render, verify. The first three need no tokenizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firefly.commands.options import HubOption, JsonOption, ModelOption, RemoteCodeOption
from firefly.console import notice, print_json
from firefly.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from firefly.data.families import TemplateSpec

NameArgument = Annotated[str, typer.Argument(help="A template or one of its aliases.")]

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """The named templates and their aliases."""
    described = describe_templates()
    if as_json:
        print_json(json.dumps(described, ensure_ascii=False))
        return
    for item in described:
        print(f"{item['name']:26}  {' '.join(item['stop_tokens']):40}  {' '.join(item['aliases'])}".rstrip())


def describe_templates() -> list[dict[str, Any]]:
    """Every named template: `[{"name", "aliases", "stop_tokens", "prefix_stable"}, …]`."""
    from firefly.data.families import TEMPLATES

    return [
        {
            "name": name,
            "aliases": list(spec.aliases),
            "stop_tokens": list(spec.stop_tokens),
            "prefix_stable": spec.stable,
        }
        for name, spec in TEMPLATES.items()
    ]


@app.command("show")
def show_command(name: NameArgument) -> None:
    """The Jinja text of a template."""
    from firefly.data.templates import read_template

    print(read_template(find_spec(name)))


def find_spec(name: str) -> TemplateSpec:
    """A template by name or alias.

    Raises:
        UsageError: there is none; the nearest is named.
    """
    from firefly.data.families import find_family
    from firefly.data.templates import unknown_template

    spec = find_family(name)
    if spec is None:
        raise unknown_template(name)
    return spec


@app.command("render")
def render_command(
    name: NameArgument,
    messages: Annotated[str, typer.Option("--messages", help='JSON file {"messages": […], …}, or - for stdin.')],
    add_generation_prompt: Annotated[
        bool, typer.Option("--add_generation_prompt", help="End with the beginning of a reply.")
    ] = False,
    on_system: Annotated[str, typer.Option("--on_system", help="merge or error, where it is refused.")] = "merge",
    as_json: JsonOption = False,
) -> None:
    """The official text of some messages, and the character spans that carry loss."""
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


def read_request(source: str) -> dict[str, Any]:
    """`{"messages": […], …variables}` from a file, or from standard input for `-`.

    Raises:
        UsageError: no such file, no JSON, or no list of messages in it.
    """
    request: Any = None
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
        request = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", None) or error
    else:
        messages = request.get("messages") if isinstance(request, dict) else None
        if not isinstance(messages, list) or not messages:
            problem = "messages"
        elif any(not isinstance(item, dict) or not isinstance(item.get("role"), str) for item in messages):
            problem = "role"
        else:
            problem = None
    if problem is not None:
        raise UsageError(
            "templates.not_messages",
            '{path} must hold {{"messages": [{{"role", "content"}}, …], …}} as JSON: {problem}.',
            path=source,
            problem=problem,
        )
    return request


def render_request(
    name: str, request: Mapping[str, Any], add_generation_prompt: bool, on_system: str = "merge"
) -> dict[str, Any]:
    """The official text of some messages: `{"text", "spans": [[start, end], …]}`, spans being what carries loss.

    Args:
        request: `messages`, and any variable the template reads; `bos_token` and `eos_token` are the family's own
            unless given, `template_date` (YYYY-MM-DD) fixes the day that a template prints.
        on_system: `merge` puts a system prompt that the template refuses into the first user turn.

    Raises:
        UsageError: unknown template, a date that is none, or the template refuses the messages.
    """
    from firefly.data.templates import ChatTemplate, TemplateFailure, parse_date, read_template

    spec = find_spec(name)
    given = {key: value for key, value in request.items() if key not in ("messages", "template_date")}
    tokens = {"bos_token": spec.bos or "", "eos_token": spec.eos or (spec.stop_tokens or ("</s>",))[0]}
    template = ChatTemplate(
        name=name,
        text=read_template(spec),
        stop_tokens=spec.stop_tokens or (tokens["eos_token"],),
        stop_ids=(),
        variables=tokens | {key: value for key, value in given.items() if value is not None},
        stable=spec.stable,
        date=parse_date(str(request["template_date"])) if request.get("template_date") else None,
    )
    messages = request["messages"]
    mergeable = [item["role"] for item in messages[:2]] == ["system", "user"]
    if on_system == "merge" and mergeable and template.system_role == "refused":
        notice(
            "template.merges_system",
            "the chat template {name} has no system role; a system prompt is put in front of the first user turn "
            "(on_system: error refuses instead).",
            name=name,
        )
        system, question, *rest = messages
        merged = f"{system.get('content')}\n\n{question.get('content')}"
        messages = [{**question, "content": merged}, *rest]
    try:
        text, spans = template.render_messages(messages, prompt=add_generation_prompt)
    except TemplateFailure as error:
        raise UsageError(
            "template.unusable",
            "template_name = {name} cannot be used: {problem}. Correct the template, or name another.",
            name=name,
            problem=error,
        ) from None
    return {"text": text, "spans": [list(span) for span in spans]}


@app.command("verify")
def verify_command(
    model_name_or_path: ModelOption,
    template_name: Annotated[str, typer.Option("--template_name", help="auto, a name, or a .jinja file.")] = "auto",
    template_date: Annotated[str, typer.Option("--template_date", help="YYYY-MM-DD, for templates with a date.")] = "",
    as_json: JsonOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Prove a template on a model's tokenizer: ids, prefixes, stop tokens. Exit 3 if a check fails."""
    from firefly.config import ModelConfig
    from firefly.data.certificate import certify
    from firefly.data.encoding import Encoder
    from firefly.data.templates import bind_template
    from firefly.models.loading import load_tokenizer, stop_ids_of

    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer, bind_template(template_name, tokenizer, date=template_date or None))
    certificate = certify(encoder, stop_ids_of(model))  # of its generation_config: the weights are not needed
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
