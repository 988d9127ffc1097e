"""The one set of preference pairs, as token ids, and the one untrained adapter that every framework starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from measuring import IGNORE_INDEX
from token_dump import encode_messages, read_records, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def write_pairs(
    *,
    model: str,
    data: Sequence[Path],
    num_pairs: int,
    max_tokens: int,
    pairs_per_step: int,
    path: Path,
    max_prompt_tokens: int | None = None,
    min_answer_tokens: int = 1,
) -> dict[str, Any]:
    """Encode the first `num_pairs` pairs that are of a case's kind, one JSON object a line; say what was left out.

    Nothing is truncated: a pair with a sequence longer than `max_tokens` is dropped, as are those with a longer prompt
    or a shorter answer than asked for. The last pairs that do not fill an optimizer step are dropped too, since
    frameworks scale a shorter step differently.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs, too_long, of_another_kind, unshared = [], 0, 0, 0
    for record in read_records(data):
        if len(pairs) == num_pairs:
            break
        pair = encode_pair(tokenizer, record)
        if pair is None:
            unshared += 1
            continue
        prompt, *answers = (len(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        if prompt + max(answers) > max_tokens:
            too_long += 1
        elif min(answers) < min_answer_tokens or (max_prompt_tokens is not None and prompt > max_prompt_tokens):
            of_another_kind += 1
        else:
            pairs.append(pair)
    found = len(pairs)
    pairs = pairs[: found // pairs_per_step * pairs_per_step]
    if not pairs:
        raise SystemExit(f"{data}: {found} pairs fit, fewer than the {pairs_per_step} of an optimizer step")
    write_lines(path, pairs)
    prompts = sum(len(pair["prompt_ids"]) for pair in pairs)
    answers_in_all = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    return {
        "rows": len(pairs),
        "dropped_as_too_long": too_long,
        "dropped_as_of_another_kind": of_another_kind,
        "dropped_for_an_unshared_prompt": unshared,
        "dropped_from_an_incomplete_step": found - len(pairs),
        "tokens": 2 * prompts + answers_in_all,
        "tokens_with_prompts_counted_once": prompts + answers_in_all,
    }


def encode_pair(tokenizer: Any, record: dict[str, Any]) -> dict[str, list[int]] | None:
    """Split both renderings of a ShareGPT pair where the answer starts; None if their prompts' tokens differ.

    They differ where the tokenizer joins the prompt's end to an answer. What a template writes after the stop
    token predicts nothing that is scored, so it is left out.
    """
    prompt = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    prompts, answers = [], []
    for name in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": record[name]["value"]}
        row = encode_messages(tokenizer, [*prompt, answer])
        answered = [position for position, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
        prompts.append(row["input_ids"][: answered[0]])
        answers.append(row["input_ids"][answered[0] : answered[-1] + 1])
    if prompts[0] != prompts[1]:
        return None
    return {"prompt_ids": prompts[0], "chosen_ids": answers[0], "rejected_ids": answers[1]}


def write_adapter(*, model: str, rank: int, alpha: int, seed: int, folder: Path) -> None:
    """Save a new LoRA adapter: it adds nothing yet, but its random halves decide the first gradients."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft.get_peft_model(base, config).save_pretrained(folder)
