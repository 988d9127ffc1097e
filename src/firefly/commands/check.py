"""`firefly check`: the ledger of the data a run would train on, before any run."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firefly.commands.options import ANY_KEY, JsonOption, given_configuration
from firefly.console import notice, print_json, stdout_console
from firefly.errors import UsageError, VerificationError
from firefly.translation import translate

if TYPE_CHECKING:
    import numpy as np

    from firefly.config import ModelConfig
    from firefly.data.dataset import Split
    from firefly.data.schema import Tokens

PREVIEWED = 5
"""Examples on the page that --html writes."""

app = typer.Typer(add_completion=False)


@app.command(context_settings=ANY_KEY)
def check_command(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="JSON or YAML file; or give --train_file alone.")] = "",
    as_json: JsonOption = False,
    html: Annotated[str, typer.Option("--html", help="Also write a page with a preview.")] = "",
    rows: Annotated[str, typer.Option("--rows", help="With --json: also the texts of these examples, FROM:TO.")] = "",
) -> None:
    shown = parse_range(rows)
    checked = check_data(*given_configuration(context, config))
    if html:
        write_html(checked, Path(html).expanduser())
    if as_json:
        numbers = [index for index in shown if index < len(checked.data.train)]
        texts = {"examples": [checked.example(index) for index in numbers]} if rows else {}
        print_json(json.dumps(checked.as_dict() | texts, ensure_ascii=False))
    else:
        show_check(checked, stdout_console())
    if checked.problem:
        raise VerificationError("check.failed", "a run would not start: {problem}", problem=checked.problem)


@dataclass(frozen=True)
class DataCheck:
    """What was found of a configuration's data.

    Attributes:
        template: its name; None where the rows are no chats.
        problem: why a run would stop; None if it would start.
    """

    data: Split
    task: str
    tokenizer: Any
    template: str | None
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """The value that `firefly check --json` prints."""
        examples = self.data.train
        return {
            "task": self.task,
            "template": self.template,
            **self.data.report(),
            "lengths": histogram(examples.counts.input_tokens),
            "target_share": target_shares(examples.counts.input_tokens, examples.targets),
            "problem": self.problem,
        }

    def example(self, index: int) -> dict[str, Any]:
        """An example to train, as the model sees it: where its row lies, and of each side (one; of a pair the chosen
        and the rejected answer) the text in parts that are trained or not."""
        from firefly.data.schema import Tokens
        from firefly.runs.overview import text_runs

        example, place = self.data.train[index], self.data.train.place(index)
        sides = (example,) if isinstance(example, Tokens) else example.sides
        return {
            "index": index,
            "file": place.file,
            "line": place.line,
            "tokens": [len(side.input_ids) for side in sides],
            "desirable": getattr(example, "desirable", None),
            "sides": [
                [{"text": text, "trained": trained} for trained, text in text_runs(side, self.tokenizer)]
                for side in sides
            ],
        }


def parse_range(text: str) -> range:
    """The numbers of "FROM:TO", from 0, without TO; none for "".

    Raises:
        UsageError: it is no such range.
    """
    start, colon, end = text.partition(":")
    if text and not (colon and start.isdecimal() and end.isdecimal()):
        raise UsageError("check.bad_rows", "--rows {value!r} is not valid: write FROM:TO, such as 0:20.", value=text)
    return range(int(start), int(end)) if text else range(0)


def check_data(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> DataCheck:
    """Read, encode and judge the data of a configuration (or of overrides alone), as a run would at its start.

    Raises:
        UsageError: the configuration or a file is at fault so that there is nothing to judge.
    """
    from firefly.config import RECORDS_OF_TASK, load_config
    from firefly.data.dataset import find_kind, load_split
    from firefly.models.loading import EMBEDDED, load_tokenizer
    from firefly.models.saved_adapter import tokenizer_source
    from firefly.models.tokens import add_tokens
    from firefly.setup.checks import bind_encoder, check_positions, prove_template

    config = load_config(source or {}, overrides, required=("train_file",), to_train=False)
    # Without a configuration the data tells; with one, `firefly train` would not ask it.
    given = source or config.given.get("task_type")
    task, kind = config.task_type, RECORDS_OF_TASK[config.task_type]
    if not given:
        kind = find_kind(config.data, config.model.hub)
        task = next(task for task, wanted in RECORDS_OF_TASK.items() if wanted == kind)
    model = config.model
    if not model.name_or_path:
        notice(
            "check.embedded_tokenizer",
            "no model_name_or_path given: tokens are counted with the tokenizer and template of {name}.",
            name=EMBEDDED,
        )
        model = replace(model, name_or_path=EMBEDDED)
    tokenizer = load_tokenizer(model, tokenizer_source(model, config.adapter.name_or_path))
    add_tokens(tokenizer, model.add_tokens)
    chats = kind != "document"
    encoder = bind_encoder(config, tokenizer, chats)
    if chats:
        prove_template(encoder)
    data = load_split(config.data, encoder, kind, model.hub)
    problem = None
    try:
        data.check(config.data)
        if has_config(model):
            check_positions(model, data)
    except UsageError as error:
        problem = str(error)
    return DataCheck(data, task, tokenizer, encoder.template.name if chats else None, problem)


def has_config(model: ModelConfig) -> bool:
    """Whether the model's configuration is here: a folder with a tokenizer alone is enough to count tokens."""
    from firefly.models.loading import read_config

    try:
        read_config(model)
    except UsageError:
        return False
    return True


def histogram(values: np.ndarray, bins: int = 12) -> list[dict[str, int]]:
    """Counts of token lengths in steps of equal width: `[{"from", "to", "count"}, …]`, `to` included."""
    import numpy as np

    if not len(values):
        return []
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // bins))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(values, edges)
    return [
        {"from": int(start), "to": int(min(start + width - 1, high)), "count": int(count)}
        for start, count in zip(edges[:-1], counts, strict=True)
    ]


def target_shares(lengths: np.ndarray, targets: np.ndarray) -> list[dict[str, float]]:
    """Counts of examples by the share of their tokens that is trained, in tenths."""
    import numpy as np

    if not len(lengths):
        return []
    counts, _ = np.histogram(targets / lengths, np.linspace(0, 1, 11))
    return [{"from": tenth / 10, "to": (tenth + 1) / 10, "count": int(count)} for tenth, count in enumerate(counts)]


def show_check(check: DataCheck, console: Any) -> None:
    """Print the ledger, the histograms and a coloured preview."""
    from firefly.runs.overview import show_example

    data = check.data
    ledgers = [examples.ledger for examples in (data.train, data.held_out) if examples is not None]
    for ledger in {id(ledger): ledger for ledger in ledgers}.values():  # eval_ratio holds out rows of the same files
        console.print(ledger.summary(), soft_wrap=True)
    if data.held_out is not None:
        console.print(
            translate(
                "{trained:,} examples to train, {held_out:,} held out",
                held_out=len(data.held_out),
                trained=len(data.train),
            )
        )
    formats = ", ".join(f"{name} {count}" for name, count in data.train.ledger.formats.items()) or "–"
    console.print(
        translate(
            "format: {formats}; task {task}; template {template}",
            formats=formats,
            task=check.task,
            template=check.template or "–",
        )
    )
    tokens = data.train.counts.input_tokens  # as the ledger counts them: the prompt of a pair once for each answer
    for title, bars in (
        (translate("tokens per example"), [(f"{b['from']}–{b['to']}", b["count"]) for b in histogram(tokens)]),
        (
            translate("share of trained tokens per example"),
            [(f"{b['from']:.0%}–{b['to']:.0%}", int(b["count"])) for b in target_shares(tokens, data.train.targets)],
        ),
    ):
        show_bars(console, title, bars)
    if len(data.train):
        show_example(console, data.train[0], check.tokenizer)


def show_bars(console: Any, title: str, bars: list[tuple[str, int]], width: int = 40) -> None:
    most = max((count for _, count in bars), default=0)
    if not most:
        return
    console.print(title, style="bold")
    for label, count in bars:
        console.print(f"  {label:>13} {'█' * round(width * count / most):<{width}} {count}", highlight=False)


def write_html(check: DataCheck, path: Path) -> None:
    """Write a page with the ledger and the first examples, trained tokens marked.

    Raises:
        UsageError: the file cannot be written.
    """
    from firefly.data.schema import Tokens

    parts = []
    for index in range(min(PREVIEWED, len(check.data.train))):
        example = check.data.train[index]
        sides = (example,) if isinstance(example, Tokens) else example.sides
        shown = "\n\n".join(marked(side, check.tokenizer) for side in sides)
        place = html.escape(str(check.data.train.place(index)))
        parts.append(f"<h2>{place}</h2><pre>{shown}</pre>")
    findings = check.data.train.ledger.findings
    rows = "".join(
        f"<tr><td>{html.escape(f.file)}:{f.line}</td><td>{html.escape(f.cause)}</td><td>{html.escape(f.message)}</td></tr>"
        for f in findings
    )
    summary = html.escape(check.data.train.ledger.summary().splitlines()[0])
    page = PAGE.format(
        title=translate("Data check"),
        summary=summary,
        problem=html.escape(check.problem or ""),
        previews="".join(parts),
        rows=rows,
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            "check.html_failed",
            "--html {path} cannot be written: {problem}.",
            path=path,
            problem=error.strerror or error,
        ) from None


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: 1rem; color: #666; }}
mark {{ background: #cdeccd; color: #063; }}
td {{ padding: .1rem .8rem .1rem 0; vertical-align: top; }}
.problem {{ color: #a00; white-space: pre-wrap; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #181818; color: #ddd; }} pre {{ background: #222; color: #999; }}
  mark {{ background: #143d14; color: #bfb; }} .problem {{ color: #f88; }}
}}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<p class="problem">{problem}</p>
{previews}
<table>{rows}</table>
"""


def marked(tokens: Tokens, tokenizer: Any) -> str:
    """An example's text as HTML, what is trained of it marked."""
    from firefly.runs.overview import text_runs

    return "".join(
        f"<{tag}>{html.escape(text)}</{tag}>"
        for trained, text in text_runs(tokens, tokenizer)
        for tag in ["mark" if trained else "span"]
    )
