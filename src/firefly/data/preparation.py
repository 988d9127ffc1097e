"""One data file becomes cached examples: read, parsed, rendered, tokenized, fitted to the length, accounted for.

While one chunk of rows is tokenized (in threads of the tokenizer's own), the next is read and rendered.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from firefly.config import DataConfig, RecordKind
from firefly.console import notice
from firefly.data.encoding import Encoder
from firefly.data.examples import INDEX, ROWS, SCHEMA, index_entry, record_batch
from firefly.data.formats import MalformedRecord, Parsed, ReadRecord, read_record
from firefly.data.ledger import (
    BLANK,
    CUT,
    EMPTY_ANSWER,
    JOINED,
    MALFORMED,
    NO_TARGET,
    OUTSCORED,
    REFUSED,
    REPLACED_IDS,
    SAME_ANSWERS,
    TOO_LONG,
    UNANSWERED_END,
    UNHEEDED_KEY,
    UNREAD_KEY,
    WRAPPED_TEXT,
    Ledger,
)
from firefly.data.pairs import PairEncoder
from firefly.data.readers.text import WrappedLines
from firefly.data.schema import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    PreferencePair,
    RawRecord,
    Rendered,
    Source,
    TokenPair,
    Tokens,
)
from firefly.data.templates import TemplateFailure
from firefly.files import Held, Holder, atomic_folder, hold, make_cache
from firefly.translation import Phrase, translate

CHUNK, CHUNK_CHARACTERS = 1000, 1 << 24
"""Rows, and characters of text, that are tokenized in one call and written as one Arrow batch."""
SIDES = ("chosen", "rejected")


def prepare(
    records: Iterator[RawRecord], file: str, config: DataConfig, encoder: Encoder, kind: RecordKind, folder: Path
) -> None:
    """Write examples.arrow, index.npy, rows.npy and ledger.json into `folder`, which appears whole or not at all."""
    make_cache(folder.parent)
    with atomic_folder(folder) as scratch:
        lines = kind == "document" and config.text_documents == "line" and file.lower().endswith(".txt")
        preparation = Preparation(config, encoder, kind, Ledger(file), WrappedLines() if lines else None)
        # On a terminal the rows are counted, once preparation has taken a while.
        shown = tqdm(records, Path(file).name, unit=f" {translate('rows')}", delay=2, disable=None, leave=False)
        index, rows, count = [], [], 0
        with pa.OSFile(str(scratch / "examples.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for chunk in preparation.run(iter(shown)):
                if chunk:
                    writer.write_batch(record_batch([tokens for row in chunk for tokens in row.examples]))
                    entries = [
                        index_entry(example, row.source.line, number)
                        for number, row in enumerate(chunk, count)
                        for example in row.examples
                    ]
                    index.append(np.array(entries, dtype=INDEX))
                    count += len(chunk)
                    rows.append(np.array([(row.source.line, row.content, row.answer) for row in chunk], dtype=ROWS))
        np.save(scratch / "index.npy", np.concatenate(index) if index else np.zeros(0, INDEX))
        np.save(scratch / "rows.npy", np.concatenate(rows) if rows else np.zeros(0, ROWS))
        stored = json.dumps(preparation.ledger.stored(), ensure_ascii=False)
        (scratch / "ledger.json").write_text(stored, encoding="utf-8", errors="backslashreplace")


def prepare_once(folder: Path, file: str, make: Callable[[], None]) -> None:
    """`make` the cache entry `folder`, unless another process is at it: then wait for it, and use what it made.

    Ranks and runs share preparation by a lock file, not by a collective operation, which would time out. If the other
    process died, this one takes over.
    """
    make_cache(folder.parent)

    announced = False

    def waiting(holder: Holder) -> None:
        nonlocal announced
        if not announced:  # whoever waits may find that another waiter was quicker
            notice(
                "data.waiting",
                "{file} is being prepared by process {pid} on {host}; waiting for it.",
                file=file,
                pid=holder.pid,
                host=holder.host,
            )
        announced = True

    with hold(_lock_of(folder), waiting) as held:
        if (folder / "ledger.json").is_file():
            return
        if held:
            shutil.rmtree(folder, ignore_errors=True)  # without its last file it is incomplete
            remove_scratch(folder)
        make()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def remove_scratch(own: Path) -> None:
    """Remove leftovers of killed preparations beside the entry `own`, whose lock is held, unless they are in use."""
    for scratch in own.parent.glob("*.*"):
        if not scratch.is_dir():
            continue
        entry = own.parent / scratch.name.partition(".")[0]
        with suppress(Held), nullcontext(True) if entry == own else hold(_lock_of(entry)) as held:
            if held:
                shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class KeptRow:
    """The examples of one row, and hashes of its content and last answer."""

    source: Source
    examples: list[Example]
    content: int
    answer: int


@dataclass(frozen=True, slots=True)
class _Row:
    """A parsed row that is not tokenized yet: texts or a document, or an example that comes as tokens.

    Attributes:
        desirable: the verdict on its answer, where that is trained whichever way.
        answer: hash of its last reply.
        condemned: the field that condemns its answer, which is not trained then.
    """

    source: Source
    texts: list[Rendered]
    ready: Example | None = None
    document: str | None = None
    pair: PreferencePair | None = None
    desirable: bool | None = None
    answer: int = 0
    condemned: str | None = None

    @property
    def characters(self) -> int:
        return sum(len(text.text) for text in self.texts) + len(self.document or "")


@dataclass
class _KeyCount:
    """A key that is not used: its first row, how many rows have it, and how much text it holds."""

    source: Source
    rows: int = 0
    characters: int = 0


@dataclass(frozen=True)
class Preparation:
    """Prepares the rows of one file; every one of them is accounted for in `ledger`."""

    config: DataConfig
    encoder: Encoder
    kind: RecordKind
    ledger: Ledger
    lines: WrappedLines | None = None
    unread: dict[str, _KeyCount] = field(default_factory=dict)
    unheeded: dict[str, _KeyCount] = field(default_factory=dict)
    outscored: dict[tuple[str, str], _KeyCount] = field(default_factory=dict)

    def run(self, records: Iterator[RawRecord]) -> Iterator[list[KeptRow]]:
        """Yield the kept rows, chunk by chunk, in file order."""
        with _young_garbage_only(), ThreadPoolExecutor(1, "firefly-tokenize") as executor:
            pending: tuple[list[_Row], Future[_Encoded]] | None = None
            for rows in self._chunks(records):
                future = executor.submit(self._tokenize, rows)
                if pending:
                    yield self._finish(*pending)
                    gc.collect(0)
                pending = rows, future
            if pending:
                yield self._finish(*pending)
        self._note_file()

    def _note_file(self) -> None:
        """Findings that are known only at the end of the file."""
        for key, found in sorted(self.unread.items(), key=lambda item: -item[1].characters):
            shown = key if key.isprintable() else repr(key)[1:-1]  # a key may hold anything
            self.ledger.unread_keys[shown] += found.rows
            if found.characters:
                counts = {"rows": found.rows, "characters": f"{found.characters:,}"}
                message = Phrase(
                    "text under the key {key} is not read: {characters} characters in {rows} row(s), this one the "
                    "first",
                    key=shown,
                    **counts,
                )
            else:
                message = Phrase(
                    "the number, true or false under the key {key} is not read, in {rows} row(s), this one the first",
                    key=shown,
                    rows=found.rows,
                )
            self.ledger.note(found.source, UNREAD_KEY, message)
        for key, found in self.unheeded.items():
            self.ledger.note(
                found.source,
                UNHEEDED_KEY,
                Phrase(
                    "{key} asks for a loss on messages that are no replies, in {rows} row(s), this one the first: "
                    "they stay context",
                    key=key,
                    rows=found.rows,
                ),
            )
        for (chosen, rejected), found in self.outscored.items():
            message = Phrase(
                "{chosen} and {rejected} prefer the rejected answer, in {rows} row(s), this one the first: chosen is "
                "taken for the better one",
                chosen=chosen,
                rejected=rejected,
                rows=found.rows,
            )
            self.ledger.note(found.source, OUTSCORED, message)
        if self.lines is not None and self.lines.first is not None and self.lines.are_wrapped:
            message = Phrase(
                "{count} of {lines} lines are short and end within a sentence, and each line is a document of its "
                "own: where they are parts of longer documents, write each document on one line, or set "
                "text_documents to file",
                count=self.lines.unended,
                lines=self.lines.lines,
            )
            self.ledger.note(self.lines.first, WRAPPED_TEXT, message)

    def _chunks(self, records: Iterator[RawRecord]) -> Iterator[list[_Row]]:
        """Parsed rows, as many at a time as fit the limits of a chunk."""
        rows: list[_Row] = []
        read = characters = 0
        for record in records:
            read += 1
            row = self._read(record)
            if row is not None:
                rows.append(row)
                characters += row.characters
            if read >= CHUNK or characters >= CHUNK_CHARACTERS:
                yield rows
                rows, read, characters = [], 0, 0
        if rows:
            yield rows

    def _tokenize(self, rows: Sequence[_Row]) -> _Encoded:
        texts = [text for row in rows for text in row.texts]
        documents = [row.document for row in rows if row.document is not None]
        return _Encoded(texts, self.encoder.tokenize(texts), self.encoder.encode_documents(documents))

    def _read(self, record: RawRecord) -> _Row | None:
        """Parse and render one record; None for one that is lost."""
        if record.blank:
            self.ledger.note(record.source, BLANK, Phrase("a blank line"))
            return None
        self.ledger.rows += 1
        try:
            if record.problem is not None:
                raise MalformedRecord(record.problem.text, **record.problem.values)
            read = self._parse(record)
            parsed = read.parsed
            if isinstance(parsed, Document) and not parsed.text.strip():  # what a blank line is in a text file
                self.ledger.rows -= 1
                self.ledger.note(record.source, BLANK, Phrase("a document without text"))
                return None
            if self.lines is not None and isinstance(parsed, Document):
                self.lines.see(record.source, parsed.text)
            row = self._render(record.source, parsed)
            return replace(row, condemned=read.condemned) if read.condemned else row
        except RecursionError:
            self.ledger.lose(record.source, MALFORMED, Phrase("nested too deeply"))
        except MalformedRecord as error:
            self.ledger.lose(record.source, MALFORMED, error.phrase)
        except TemplateFailure as error:
            self.ledger.lose(record.source, REFUSED, error.phrase)
        return None

    def _parse(self, record: RawRecord) -> ReadRecord:
        read = read_record(record.value, self.kind, self.config.data_format)
        self.ledger.formats[read.format] += 1
        for key, characters in read.unread.items():
            found = self.unread.setdefault(key, _KeyCount(record.source))
            found.rows += 1
            found.characters += characters
        if read.outscored:
            self.outscored.setdefault(read.outscored, _KeyCount(record.source)).rows += 1
        for key in sorted(read.unheeded):
            self.unheeded.setdefault(key, _KeyCount(record.source)).rows += 1
        return read

    def _render(self, source: Source, parsed: Parsed) -> _Row:
        desirable, train_on = None, self.config.train_on
        if isinstance(parsed, Labelled):
            if self.kind == "labelled":  # its last reply is trained, whichever way
                parsed, desirable, train_on = parsed.conversation, parsed.desirable, "last"
            else:
                parsed = parsed.as_demonstration()
        if isinstance(parsed, Conversation):
            parsed = (parsed,)
        if isinstance(parsed, tuple):
            chosen = [select_targets(conversation, train_on) for conversation in parsed]
            for conversation in chosen:
                self._note_empty_replies(source, conversation)
            texts = [text for conversation in chosen for text in self.encoder.render(conversation)]
            for conversation in chosen:
                self._note_identifiers(source, conversation)
            self._note_unanswered_end(source, chosen)
            answer = 0 if desirable is False else _answer(chosen[-1])
            return _Row(source, texts, desirable=desirable, answer=answer)
        if isinstance(parsed, PreferencePair):
            self._note_empty_replies(source, replace(parsed.chosen, messages=parsed.chosen.messages[:-1]))
            for side in ("chosen", "rejected"):
                last = getattr(parsed, side).messages[-1]
                if _is_empty(last):
                    self.ledger.note(
                        source,
                        EMPTY_ANSWER,
                        Phrase("the {side} answer is empty: only its stop token is trained", side=side),
                    )
            texts = self.pairs.render(parsed)
            self._note_identifiers(source, parsed.chosen)
            return _Row(source, texts, pair=parsed, answer=_answer(parsed.chosen))
        if isinstance(parsed, Document):
            return _Row(source, [], document=self.encoder.protect_document(parsed.text))
        vocabulary = len(self.encoder.tokenizer)
        if parsed.input_ids.max() >= vocabulary:
            raise MalformedRecord(
                "id {id} is not in the vocabulary of {vocabulary}",
                id=int(parsed.input_ids.max()),
                vocabulary=vocabulary,
            )
        return _Row(source, [], ready=parsed)

    @cached_property
    def pairs(self) -> PairEncoder:
        """How preference pairs become tokens."""
        return PairEncoder(self.encoder)

    def _note_identifiers(self, source: Source, conversation: Conversation) -> None:
        if replaced := self.encoder.template.count_replaced_identifiers(conversation):
            name = self.encoder.template.name
            self.ledger.note(
                source,
                REPLACED_IDS,
                Phrase(
                    "identifiers of tool calls that the chat template {name} does not take, replaced in calls and "
                    "results: {count}",
                    count=replaced,
                    name=name,
                ),
            )

    def _note_unanswered_end(self, source: Source, conversations: Sequence[Conversation]) -> None:
        """Note the messages after the last reply, which no template needs to render; once per row."""
        lasts = [(conversation, _last_reply(conversation)) for conversation in conversations]
        behind = [message for each, last in lasts if last is not None for message in each.messages[last + 1 :]]
        if behind:
            roles = ", ".join(dict.fromkeys(message.role for message in behind))
            message = Phrase(
                "after the last reply {count} message(s) ({roles}) have no answer: they are not trained",
                count=len(behind),
                roles=roles,
            )
            self.ledger.note(source, UNANSWERED_END, message)

    def _note_empty_replies(self, source: Source, conversation: Conversation) -> None:
        """Note which replies are empty, and what of them is trained."""
        turns, turn = sum(item.role == "user" for item in conversation.messages), 0
        for item in conversation.messages:
            turn += item.role == "user"
            if _is_empty(item):
                if not item.trained:
                    found = "turn {turn} of {turns}: the reply is empty; it is not trained"
                elif item.reasoning:
                    found = "turn {turn} of {turns}: the reply is empty; only its reasoning and stop token are trained"
                else:
                    found = "turn {turn} of {turns}: the reply is empty; only its stop token is trained"
                self.ledger.note(source, EMPTY_ANSWER, Phrase(found, turn=max(turn, 1), turns=max(turns, 1)))

    def _finish(self, rows: list[_Row], encoded: Future[_Encoded]) -> list[KeptRow]:
        done = encoded.result()
        encoded_texts, documents = iter(self.encoder.label(done.texts, done.encodings)), iter(done.documents)
        kept = []
        for row in rows:
            joined = 0
            if row.ready is not None:
                examples: list[Any] = [row.ready]
            elif row.document is not None:
                examples = [next(documents)]
            else:
                texts = [next(encoded_texts) for _ in row.texts]
                examples = [tokens for text in texts for tokens in text.examples]
                joined = sum(text.joined for text in texts)
            if row.pair is not None or isinstance(row.ready, TokenPair):
                fitted: list[Example] = self._fit_pair(row, examples)
            else:
                fitted = self._fit(row, examples)
            if fitted and joined:
                self.ledger.note(
                    row.source,
                    JOINED,
                    Phrase(
                        "replies encoded behind their prompts, as they are served: {count} (one tokenization would "
                        "join the two, as a rule by the white space between them)",
                        count=joined,
                    ),
                )
            if fitted:
                parts = [text.text.encode() for text in row.texts] or [item.input_ids.tobytes() for item in examples]
                kept.append(KeptRow(row.source, fitted, _hash(parts), row.answer))
        return kept

    def _fit(self, row: _Row, examples: Sequence[Tokens]) -> list[Example]:
        """Fit a row's examples to the length limit, and record the outcome in the ledger."""
        source = row.source
        if row.document is None:
            fitted = [fit(tokens, self.config.max_seq_length, self.config.on_too_long) for tokens in examples]
            kept = [tokens for tokens in fitted if tokens is not None and tokens.num_targets]
        else:  # cut into blocks, not to a length; one token has no target alone, and one within a stream
            fitted: list[Tokens | None] = list(examples)
            kept = [tokens for tokens in examples if len(tokens.input_ids)]
        whole_or_not = self.config.on_too_long in ("drop", "error")
        if not kept or (whole_or_not and any(tokens is None for tokens in fitted)):
            if row.condemned and row.desirable is None:
                self.ledger.lose(
                    source,
                    NO_TARGET,
                    Phrase(
                        "nothing in it is trained: {field} condemns its answer, and SFT trains no condemned one",
                        field=row.condemned,
                    ),
                )
            else:
                self._lose(source, examples)
            return []
        self._account(source, examples, kept, examples=len(kept))
        if row.desirable is None:
            return [*kept]
        return [replace(tokens, desirable=row.desirable) for tokens in kept]

    def _fit_pair(self, row: _Row, sides: Sequence[Any]) -> list[Example]:
        """Fit a pair's prompt and answers to their limits, and record the outcome in the ledger."""
        policy, limit = self.config.on_too_long, self.config.max_seq_length
        margin = row.pair.margin if row.pair else None
        pair = row.ready if isinstance(row.ready, TokenPair) else TokenPair.of(sides[0], sides[1], margin)
        whole, most = pair, self.config.max_prompt_length if self.kind == "pair" else None
        if most is not None and pair.prompt > most:
            cut = None
            if policy not in ("drop", "error"):
                cut = self.pairs.cut_prompt(row.pair, most) if row.pair else self.pairs.cut_tokens(pair, most)
            if cut is None:
                message = Phrase(
                    "the prompt has {tokens} tokens and cannot be cut to max_prompt_length {limit} (null: no limit)",
                    tokens=pair.prompt,
                    limit=most,
                )
                self.ledger.lose(row.source, TOO_LONG, message)
                return []
            pair = cut
        fitted = [fit(side, limit, policy) for side in pair.sides]
        if any(side is None or not side.num_targets for side in fitted):
            left = [name for name, side in zip(SIDES, fitted, strict=True) if side is None or not side.num_targets]
            self._lose(row.source, [side for name, side in zip(SIDES, pair.sides, strict=True) if name in left], left)
            return []
        kept = [side for side in fitted if side is not None]
        if np.array_equal(kept[0].input_ids, kept[1].input_ids):
            self.ledger.note(row.source, SAME_ANSWERS, Phrase("chosen and rejected are the same: nothing to prefer"))
        cuts = [
            Phrase("{side}: {message}", side=name, message=_cut([side], [rest], limit))
            for name, side, rest in zip(SIDES, pair.sides, kept, strict=True)
            if len(rest.input_ids) < len(side.input_ids)
        ]
        if whole.prompt > pair.prompt:
            cuts.insert(
                0,
                Phrase(
                    "{tokens} tokens cut out of the prompt, oldest first (max_prompt_length {limit})",
                    tokens=whole.prompt - pair.prompt,
                    limit=most,
                ),
            )
        examples: list[Example] = [TokenPair.of(kept[0], kept[1], whole.margin)]
        if self.kind == "labelled":
            examples = [replace(side, desirable=good) for side, good in zip(kept, (True, False), strict=True)]
        self._account(row.source, whole.sides, kept, len(examples), cuts)
        return examples

    def _lose(self, source: Source, examples: Sequence[Tokens], sides: Sequence[str] = ()) -> None:
        """Record why nothing of a row is trained; of a pair, on which sides."""
        if any(tokens.num_targets for tokens in examples):
            longest = max(len(tokens.input_ids) for tokens in examples)
            cause, limit = TOO_LONG, self.config.max_seq_length
            if self.config.on_too_long in ("cut_turns", "cut"):
                message = Phrase(
                    "{tokens} tokens; no reply begins within max_seq_length {limit}", tokens=longest, limit=limit
                )
            else:
                message = Phrase("{tokens} tokens, more than max_seq_length {limit}", tokens=longest, limit=limit)
        else:
            cause, message = NO_TARGET, Phrase("nothing in it is trained (no reply, or none that is selected)")
        self.ledger.lose(
            source, cause, Phrase("{side}: {message}", side=", ".join(sides), message=message) if sides else message
        )

    def _account(
        self,
        source: Source,
        given: Sequence[Tokens],
        kept: Sequence[Tokens],
        examples: int,
        cuts: Sequence[Phrase] | None = None,
    ) -> None:
        """Count a kept or cut row and its examples; `cuts` says what was cut of a pair."""
        ledger = self.ledger
        total, left = (sum(len(tokens.input_ids) for tokens in some) for some in (given, kept))
        trained = sum(tokens.num_targets for tokens in kept)
        if left < total:
            ledger.cut += 1
            ledger.cut_tokens += total - left
            ledger.cut_turns += sum(map(count_turns, given)) - sum(map(count_turns, kept))
            message, *more = [_cut(given, kept, self.config.max_seq_length)] if cuts is None else cuts
            for other in more:
                message = Phrase("{first}; {second}", first=message, second=other)
            ledger.note(source, CUT, message)
        else:
            ledger.kept += 1
        ledger.examples += examples
        ledger.tokens += left
        ledger.target_tokens += trained


def _cut(given: Sequence[Tokens], kept: Sequence[Tokens], limit: int) -> Phrase:
    """What was cut of a row's examples."""
    tokens, left = (sum(len(item.input_ids) for item in some) for some in (given, kept))
    targets, targets_left = (sum(item.num_targets for item in some) for some in (given, kept))
    turns, turns_left = (sum(map(count_turns, some)) for some in (given, kept))
    lost = {"targets": targets - targets_left, "turns": turns - turns_left}
    return Phrase(
        "cut from {tokens} to {kept} tokens ({targets} trained tokens and {turns} whole replies lost; max_seq_length "
        "{limit})",
        tokens=tokens,
        kept=left,
        limit=limit,
        **lost,
    )


@dataclass(frozen=True)
class _Encoded:
    """A chunk's texts with their encodings, and the tokens of its documents."""

    texts: list[Rendered]
    encodings: list[Any]
    documents: list[Tokens]


@contextmanager
def _young_garbage_only() -> Iterator[None]:
    """Switch off full garbage collections, which walk all loaded libraries: rows make objects but no old garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _hash(parts: Sequence[bytes]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def _is_empty(message: Message) -> bool:
    """Whether a reply neither says nor calls anything."""
    return message.role == "assistant" and not message.tool_calls and not message.text.strip()


def _last_reply(conversation: Conversation) -> int | None:
    """Which message is the last reply; None where there is none."""
    return max((i for i, item in enumerate(conversation.messages) if item.role == "assistant"), default=None)


def _answer(conversation: Conversation) -> int:
    """Hash of the last reply; 0 where it is empty or a call."""
    place = _last_reply(conversation)
    last = None if place is None else conversation.messages[place]
    return 0 if last is None or last.tool_calls or _is_empty(last) else _hash([last.text.strip().encode()])


def select_targets(conversation: Conversation, train_on: str) -> Conversation:
    """`train_on: last` trains the last reply alone."""
    if train_on == "all":
        return conversation
    last = _last_reply(conversation)
    narrowed = (item if i == last else replace(item, trained=False) for i, item in enumerate(conversation.messages))
    return replace(conversation, messages=tuple(narrowed))


def count_turns(tokens: Tokens) -> int:
    """Trained runs: replies with their stop tokens."""
    return len(tokens.runs)


def fit(tokens: Tokens, max_length: int, policy: str = "cut_turns") -> Tokens | None:
    """Cut an example to `max_length` tokens; None if no target would be left, or the policy has no cut one.

    Args:
        policy: `cut_turns` cuts after the last trained run (reply and stop token) that fits whole or, where not even
            the first one does, within it; `cut` at the limit; `drop` and `error` not at all.
    """
    if len(tokens.input_ids) <= max_length:
        return tokens
    if policy in ("drop", "error"):
        return None
    length = max_length
    if policy == "cut_turns":
        ends = tokens.runs[:, 1]
        fitting = ends[ends <= max_length]
        length = int(fitting[-1]) if len(fitting) else max_length
    cut = Tokens(tokens.input_ids[:length], tokens.labels[:length])
    return cut if cut.num_targets else None
