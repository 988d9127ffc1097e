"""The one set of token ids and labels that every framework of a benchmark trains on.

Made once and written to disk, so a difference in tokenisation, templates or truncation cannot pass for a
difference in speed or in loss.
"""

import json
from pathlib import Path
from typing import Any

from measuring import IGNORE_INDEX
from transformers import AutoTokenizer


def write_dump(*, model: str, data: Path, num_rows: int, max_seq_length: int, path: Path) -> dict[str, Any]:
    """Encode the first `num_rows` usable alpaca rows and write one JSON object per line.

    Returns what was left out and cut. A row whose answer lies wholly beyond `max_seq_length` has nothing to
    train and is skipped, the next one taking its place.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    kept, cut, skipped = [], 0, 0
    for record in json.loads(data.read_text(encoding="utf-8")):
        if len(kept) == num_rows:
            break
        row = encode(tokenizer, record)
        cut += len(row["input_ids"]) > max_seq_length
        row = {name: values[:max_seq_length] for name, values in row.items()}
        if all(label == IGNORE_INDEX for label in row["labels"]):
            skipped += 1
            continue
        kept.append(row)
    if len(kept) < num_rows:
        raise SystemExit(f"--rows {num_rows}: {data} has only {len(kept)} rows to train on")
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return {"rows": len(kept), "cut_to_max_seq_length": cut, "skipped_without_target": skipped}


def encode(tokenizer: Any, record: dict[str, str]) -> dict[str, list[int]]:
    """Render one alpaca record with the model's template and label the answer and its stop token."""
    question = record["instruction"] + ("\n" + record["input"] if record.get("input") else "")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    return encode_messages(tokenizer, messages)


def encode_messages(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """Render a conversation and label its last message, the answer, and the stop token.

    The whole text is tokenised once, so ids are those of the official rendering; labels come from character
    positions. What the template writes after the stop token (often a newline) stays, untrained.
    """
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    stop = text.rfind(tokenizer.eos_token)
    if not text.startswith(prompt) or stop < len(prompt):
        raise SystemExit(
            f"the chat template of {tokenizer.name_or_path} does not continue its prompt with the answer and "
            f"{tokenizer.eos_token!r}; labels cannot be placed by text, so benchmark another model"
        )
    answer_end = stop + len(tokenizer.eos_token)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if len(prompt) <= start < answer_end else IGNORE_INDEX
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}
