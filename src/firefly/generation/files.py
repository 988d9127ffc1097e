"""Files of prompts → a file of answers, a line for each row in the order of the rows: what `firefly generate` does.

Lines are written as their answers come, so a run that was killed goes on behind its last whole line. What the answers
depend on stands in a file beside them: with other settings nothing goes on.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.data.encoding import Encoder
from firefly.data.formats import FORMATS, MalformedRecord
from firefly.data.formats.prompts import Prompt, read_prompts
from firefly.data.readers import read_records
from firefly.data.schema import Conversation, Document, Message, Source
from firefly.data.sources import hash_file
from firefly.data.templates import TemplateFailure
from firefly.errors import UsageError
from firefly.generation.answer_file import AnswerFile
from firefly.generation.generator import Answer, Generator
from firefly.generation.progress import RowProgress
from firefly.generation.replies import Reply, ReplyFormat
from firefly.generation.settings import GenerationSettings
from firefly.models.base_weights import identify_weights
from firefly.models.loading import resolve_model
from firefly.models.saved_adapter import adapter_folder, base_of_adapter
from firefly.runs.manifest import adapter_hash
from firefly.translation import Phrase

# ---- rows


@dataclass(frozen=True)
class Row:
    """A prompt, and where it stands; or why there is none.

    Attributes:
        index: of the row in the input, from 0; blank lines are no rows.
        instance: of a row that holds several prompts, which of them this is.
        unread: characters under keys of the row that are part of no prompt; of its first prompt.
    """

    index: int
    source: Source
    prompt: Prompt | None = None
    problem: Phrase | None = None
    instance: int | None = None
    unread: Mapping[str, int] = field(default_factory=dict)


def read_rows(files: Sequence[Path], data_format: str = "auto", limit: int | None = None) -> Iterator[Row]:
    """The prompts of files in their order, of the first `limit` rows.

    Raises:
        UsageError: see `read_records`.
    """
    records = (record for file in files for record in read_records(file, "input_file") if not record.blank)
    for index, record in enumerate(itertools.islice(records, limit)):
        try:
            if record.problem is not None:
                raise MalformedRecord(record.problem.text, **record.problem.values)
            asked = read_prompts(record.value, data_format)
        except MalformedRecord as error:
            yield Row(index, record.source, problem=error.phrase)
        except RecursionError:
            yield Row(index, record.source, problem=Phrase("nested too deeply"))
        else:
            for number, prompt in enumerate(asked.prompts):
                instance = number if len(asked.prompts) > 1 else None
                yield Row(index, record.source, prompt, None, instance, {} if number else asked.unread)


def survey(rows: Iterable[Row]) -> int:
    """Count rows, and say what of them is read otherwise than a reader may expect.

    Raises:
        UsageError: a file that cannot be read to its end; better known before hours of answers.
    """
    count = documents = 0
    unread: Counter[str] = Counter()
    for row in rows:
        count += 1
        documents += row.prompt is not None and isinstance(row.prompt.asked, Document)
        unread.update(key for key, characters in row.unread.items() if characters)
    if documents:
        notice(
            "generate.documents",
            "{count} row(s) are plain text: it goes on as it is, without the chat template. To ask a question, give "
            'rows such as {{"prompt": "…"}}.',
            count=documents,
        )
    if unread:
        notice(
            "generate.unread_keys",
            "text under these keys is part of no prompt (rows): {keys}.",
            keys=", ".join(f"{key!r} ({rows})" for key, rows in unread.most_common(8)),
        )
    return count


# ---- answers


@dataclass(frozen=True)
class Answering:
    """How rows are answered.

    Attributes:
        samples: answers to each prompt.
        system: the system prompt of conversations that have none.
    """

    generator: Generator
    settings: GenerationSettings
    samples: int = 1
    system: str | None = None

    def lines(self, rows: Iterable[Row]) -> Iterator[Line]:
        """A line for each row, in order; rows are read as they are needed."""
        waiting: deque[tuple[Row, tuple[int, ...] | None, Phrase | None]] = deque()

        def prompts() -> Iterator[tuple[int, ...] | None]:
            for row in rows:
                ids, problem = self._encode(row)
                waiting.append((row, ids, problem))
                yield ids

        # The likeliest answer is the same each time.
        drawn = 1 if self.settings.is_greedy else self.samples
        for answers in self.generator.generate(prompts(), self.settings, drawn):
            row, ids, problem = waiting.popleft()
            if ids is None:
                yield Line(self._head(row) | {"error": f"{row.source}: {problem}", "answers": []})
                continue
            described = [self._describe(answer, row, ids) for answer in answers]
            tokens = sum(len(answer.tokens) for answer in answers)
            repeated = self.samples // drawn
            yield Line(self._head(row) | {"answers": described * repeated}, len(ids), tokens)

    def _encode(self, row: Row) -> tuple[tuple[int, ...] | None, Phrase | None]:
        """The ids of a row's prompt, or why it is not answered."""
        if row.prompt is None:
            return None, row.problem
        asked = row.prompt.asked
        try:
            if isinstance(asked, Conversation):
                messages = asked.messages
                if self.system and messages[0].role != "system":
                    messages = (Message.of("system", self.system), *messages)
                ids = self.generator.encode(messages, asked.tools)
            elif isinstance(asked, Document):
                ids = tuple(self.encoder.encode_text(asked.text))
            else:
                ids = asked
            if not ids:
                return None, Phrase("there is no text that could go on")
            vocabulary = len(self.encoder.tokenizer)
            if max(ids) >= vocabulary:
                problem = "id {id} is not in the vocabulary of {vocabulary}"
                return None, Phrase(problem, id=max(ids), vocabulary=vocabulary)
            self.generator.request(ids, self.settings)
        except TemplateFailure as error:
            return None, error.phrase
        except UsageError as error:
            if error.code != "generation.too_long":  # a model without a template has no answer to any row
                raise
            return None, error.phrase
        return ids, None

    @cached_property
    def encoder(self) -> Encoder:
        return self.generator.text_encoder()

    def _head(self, row: Row) -> dict[str, Any]:
        head: dict[str, Any] = {"index": row.index}
        if row.instance is not None:
            head["instance"] = row.instance
        reference = None if row.prompt is None else row.prompt.reference
        if reference is None or isinstance(reference, tuple):
            return head | {"reference": None if reference is None else self._text(reference)}
        head["reference"] = reference.text
        if reference.reasoning:
            head["reference_reasoning"] = reference.reasoning
        if reference.tool_calls:
            head["reference_tool_calls"] = list(reference.tool_calls)
        return head

    def _text(self, ids: Sequence[int]) -> str:
        """The text of a reply, less the token that ended it."""
        stops = self._stop_ids
        return self.encoder.tokenizer.decode(ids[:-1] if ids and ids[-1] in stops else ids, skip_special_tokens=True)

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        return frozenset(self.generator.served[self.generator.name].stop_ids)

    def _describe(self, answer: Answer, row: Row, prompt: tuple[int, ...]) -> dict[str, Any]:
        ids = answer.token_ids
        ended_by_text = answer.finish_reason == "stop" and ids[-1] not in self._stop_ids
        text = answer.text if ended_by_text else self._text(ids)
        described: dict[str, Any] = {"text": text, "token_ids": ids, "finish_reason": answer.finish_reason}
        reply = self._parse(answer, row, prompt)
        if reply is not None and reply.content.strip() != answer.text.strip():
            described["text"] = reply.content
            if reply.reasoning is not None:
                described["reasoning"] = reply.reasoning
            if reply.tool_calls:
                described["tool_calls"] = list(reply.tool_calls)
        if self.settings.logprobs is not None:
            described["logprobs"] = [token.logprob for token in answer.tokens]
        return described

    def _parse(self, answer: Answer, row: Row, prompt: tuple[int, ...]) -> Reply | None:
        """The answer in the template's format; None where it is no reply but text that went on."""
        asked = row.prompt.asked if row.prompt else None
        if asked is None or isinstance(asked, Document) or self.generator.served[self.generator.name].encoder is None:
            return None
        tools: Sequence[Mapping[str, Any]] | None = None
        if isinstance(asked, Conversation) and (asked.tools or any(message.tool_calls for message in asked.messages)):
            tools = asked.tools
        return self._reply_format.parse(answer.text, tools, self.generator.prompt_end(prompt))

    @cached_property
    def _reply_format(self) -> ReplyFormat:
        return ReplyFormat.of(self.encoder.template)


@dataclass(frozen=True)
class Line:
    """A line of the output, and the tokens that were read and written for it."""

    value: dict[str, Any]
    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def has_failed(self) -> bool:
        return "error" in self.value

    def encoded(self) -> bytes:
        # What a damaged file name or text holds of halves of characters is written as an escape, which JSON reads.
        return json.dumps(self.value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


# ---- files


@dataclass(frozen=True)
class Summary:
    """What became of a file.

    Attributes:
        rows: lines of the output.
        failed: those with an error.
        found: lines that were there already.
        prompt_tokens, new_tokens, seconds: of this process.
    """

    output_file: str
    rows: int
    failed: int
    found: int
    prompt_tokens: int
    new_tokens: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        rate = self.new_tokens / self.seconds if self.seconds else 0.0
        return asdict(self) | {"seconds": round(self.seconds, 3), "new_tokens_per_second": round(rate, 1)}


def answer_files(
    answering: Answering,
    files: Sequence[Path],
    output: AnswerFile,
    model: Mapping[str, Any],
    data_format: str = "auto",
    limit: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Answer the rows of files, or those of them that an earlier run has left.

    Args:
        model: what identifies the model that answers (`identify_model`).

    Raises:
        UsageError: a file cannot be read; the output is one of them, or cannot go on (see `AnswerFile.find`).
    """
    if data_format not in ("auto", *FORMATS):
        raise UsageError(
            "config.bad_choice",
            "{key} = {value} is not valid; choose one of: {choices}.",
            key="data_format",
            value=json.dumps(data_format),
            choices=", ".join(("auto", *FORMATS)),
        )
    if output.path.exists() and any(output.path.samefile(file) for file in files):
        raise UsageError(
            "generate.output_is_input",
            "--output_file {path} is what is read. Name another file.",
            path=output.path,
        )
    settings = {
        **model,
        "template": answering.encoder.template.hash,
        "tokenizer": answering.encoder.tokenizer_hash,
        "input": [hash_file(file) for file in files],
        "data_format": data_format,
        "system": answering.system,
        "num_samples": answering.samples,
        **asdict(answering.settings),
    }
    with output.held():
        found = output.find(settings, overwrite)
        count = survey(read_rows(files, data_format, limit))
        if found.lines > count:
            notice(
                "generate.more_rows",
                "{output} has {found} rows already, and {count} were asked for: it stays as it is.",
                output=output.path,
                found=found.lines,
                count=count,
            )
        began = time.monotonic()
        failed, prompt_tokens, new_tokens = found.failed, 0, 0
        with output.open(settings, found) as file, RowProgress(count, found.lines) as progress:
            rows = itertools.islice(read_rows(files, data_format, limit), found.lines, None)
            for line in answering.lines(rows):
                file.write(line.encoded())
                file.flush()
                failed += line.has_failed
                prompt_tokens, new_tokens = prompt_tokens + line.prompt_tokens, new_tokens + line.new_tokens
                progress.add(line.new_tokens)
    seconds = time.monotonic() - began
    rows_there = max(found.lines, count)
    return Summary(str(output.path), rows_there, failed, found.lines, prompt_tokens, new_tokens, seconds)


def identify_model(model: ModelConfig, adapter: str | None, dtype: str, load_in_4bit: bool) -> dict[str, Any]:
    """What tells one model from another: the values of its weights, and the type that they are computed in.

    Args:
        adapter: as `ServedModel` has it.
        dtype: what "auto" came to: another day it may come to something else.
    """
    if adapter == model.name_or_path:  # an adapter alone names its base
        model = replace(model, name_or_path="")
    base = base_of_adapter(adapter, model) if adapter else model
    weights = identify_weights(resolve_model(base), base.revision)
    return {
        "base_weights": weights.get("sha256", weights.get("name")),
        "adapter_weights": adapter_hash(str(adapter_folder(adapter))) if adapter else None,
        "dtype": dtype,
        "load_in_4bit": load_in_4bit,
    }
