"""The one set of token ids and labels that every side of a case trains on.

Made once and written to disk, so a difference in tokenization, templates or truncation cannot pass for a difference in
speed or in loss.
"""

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from measuring import IGNORE_INDEX
from transformers import AutoTokenizer

Messages = list[dict[str, str]]


def read_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read files of a JSON list or JSON lines; of several, one record from each by turns while they last."""
    texts = [path.read_text(encoding="utf-8") for path in paths]
    files = [
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        for text in texts
    ]
    return [record for turn in zip_longest(*files) for record in turn if record is not None]


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_rows(*, model: str, data: Sequence[Path], num_rows: int, max_tokens: int, path: Path) -> dict[str, Any]:
    """Encode the first `num_rows` usable chats, one JSON object a line; return what was left out and cut.

    A row whose answers lie wholly beyond `max_tokens` has nothing to train and is skipped, the next one taking its
    place. A file with fewer is gone through again, in the same order, as in further epochs.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    kept, cut, skipped = [], 0, 0
    for record in read_records(data):
        if len(kept) == num_rows:
            break
        row = encode_messages(tokenizer, messages_of(record))
        cut += len(row["input_ids"]) > max_tokens
        row = {name: values[:max_tokens] for name, values in row.items()}
        if all(label == IGNORE_INDEX for label in row["labels"]):
            skipped += 1
            continue
        kept.append(row)
    if not kept:
        raise SystemExit(f"{_names(data)} has no rows to train on")
    again = num_rows - len(kept)
    kept = [kept[number % len(kept)] for number in range(num_rows)]
    write_lines(path, kept)
    return {
        "rows": len(kept),
        "taken_again": again,
        "tokens": sum(len(row["input_ids"]) for row in kept),
        "cut_to_max_tokens": cut,
        "skipped_without_target": skipped,
    }


def messages_of(record: dict[str, Any]) -> Messages:
    """Read an alpaca record or a conversation of Firefly's own shape."""
    if "conversation" in record:
        turns = [(("user", turn["human"]), ("assistant", turn["assistant"])) for turn in record["conversation"]]
        return [{"role": role, "content": content} for turn in turns for role, content in turn]
    question = record["instruction"] + ("\n" + record["input"] if record.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def encode_messages(tokenizer: Any, messages: Messages) -> dict[str, list[int]]:
    """Render a conversation and label every answer with its stop token.

    The whole text is tokenized once, so ids are those of the official rendering; labels come from character
    positions. What the template writes after a stop token (often a newline) stays, untrained.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = [
        answer_span(tokenizer, messages[: number + 1], text)
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(first <= start < end for first, end in answers) else IGNORE_INDEX
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def answer_span(tokenizer: Any, messages: Messages, text: str) -> tuple[int, int]:
    """Where the last of `messages` and its stop token stand in the rendering of the whole conversation."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    so_far = tokenizer.apply_chat_template(messages, tokenize=False)
    stop = so_far.rfind(tokenizer.eos_token)
    if not (text.startswith(so_far[: stop + len(tokenizer.eos_token)]) and so_far.startswith(prompt)) or stop < len(
        prompt
    ):
        raise SystemExit(
            f"the chat template of {tokenizer.name_or_path} does not continue its prompt with the answer and "
            f"{tokenizer.eos_token!r}; labels cannot be placed by text, so benchmark another model"
        )
    return len(prompt), stop + len(tokenizer.eos_token)


def write_blocks(
    *, model: str, data: Sequence[Path], num_blocks: int, max_tokens: int, isolated: bool, path: Path, documents: Path
) -> dict[str, Any]:
    """Cut blocks of `max_tokens` out of the stream document, EOS, document, EOS, …, and keep the texts they came from.

    A block's `starts` are the places where a document, or what is left of one from the block before, begins. Every
    token is trained but the first of a segment, which nothing predicts; joined blocks are one segment each.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    stream: list[int] = []
    borders: list[int] = []
    texts: list[dict[str, str]] = []
    for record in read_records(data):
        if len(stream) >= num_blocks * max_tokens:
            break
        borders.append(len(stream))
        texts.append({"text": record["text"]})
        ids = tokenizer(record["text"])["input_ids"]
        stream += ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    if len(stream) < num_blocks * max_tokens:
        raise SystemExit(
            f"--rows {num_blocks}: {_names(data)} has only {len(stream) // max_tokens} blocks of {max_tokens}"
        )
    blocks = cut_blocks(stream, borders, num_blocks, max_tokens, isolated)
    write_lines(path, blocks)
    write_lines(documents, texts)
    return {
        "rows": num_blocks,
        "tokens": num_blocks * max_tokens,
        "documents": len(texts),
        "segments": sum(len(block["starts"]) for block in blocks),
    }


def cut_blocks(
    stream: Sequence[int], borders: Sequence[int], num_blocks: int, size: int, isolated: bool
) -> list[dict[str, list[int]]]:
    """Blocks of `size` ids each, labelled; `borders` are the places in the stream where documents begin."""
    blocks = []
    for first in range(0, num_blocks * size, size):
        ids = list(stream[first : first + size])
        inside = [border - first for border in borders if first < border < first + size] if isolated else []
        starts = [0, *inside]
        labels = [IGNORE_INDEX if place in starts else token for place, token in enumerate(ids)]
        blocks.append({"input_ids": ids, "labels": labels, "starts": starts})
    return blocks
