"""Preference rows to pairs: one prompt, limits kept, and a cut prompt that is still what would be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firefly.config import DataConfig
from firefly.data.dataset import load_split
from firefly.data.encoding import Encoder
from firefly.data.schema import IGNORE, Message, TokenPair
from firefly.data.templates import bind_template
from firefly.errors import UsageError
from tiny import tiny_tokenizer

SYSTEM = "Be brief."


def encoder() -> Encoder:
    tokenizer = tiny_tokenizer()
    return Encoder(tokenizer, bind_template("qwen2.5", tokenizer))


def loaded(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> Any:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_split(DataConfig(train_file=str(path), **options), encoder(), "pair")


def row(*prompt: tuple[str, str], chosen: str = "yes", rejected: str = "no") -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in prompt]
    return {
        "chosen": [*messages, {"role": "assistant", "content": chosen}],
        "rejected": [*messages, {"role": "assistant", "content": rejected}],
    }


def text(ids: np.ndarray) -> str:
    return tiny_tokenizer().decode(ids.tolist(), skip_special_tokens=False)


def test_a_pair_is_the_served_prompt_and_two_answers_with_their_stop_tokens(tmp_path: Path) -> None:
    split = loaded(tmp_path, row(("system", SYSTEM), ("user", "Is it?"), chosen="yes, it is"))
    (pair,) = [split.train[0]]
    assert isinstance(pair, TokenPair)
    prompt = encoder().encode_prompt([Message.of("system", SYSTEM), Message.of("user", "Is it?")])
    assert pair.input_ids[: pair.prompt].tolist() == prompt
    chosen, rejected = np.split(pair.input_ids[pair.prompt :], [pair.chosen])
    assert (text(chosen).strip(), text(rejected).strip()) == ("yes, it is<|im_end|>", "no<|im_end|>")
    assert set(pair.labels[: pair.prompt].tolist()) == {IGNORE}
    ledger = split.train.ledger
    assert (ledger.rows, ledger.kept, ledger.examples) == (1, 1, 1)
    assert ledger.tokens == 2 * pair.prompt + len(chosen) + len(rejected)
    assert ledger.target_tokens == pair.num_targets == split.train.targets[0]
    assert split.train.counts.input_tokens[0] == ledger.tokens
    assert split.train.counts.chosen_targets[0] == pair.chosen_targets == len("yes, it is") + 1


def test_the_longest_text_of_a_pair_counts_answers_whole_though_not_all_of_them_is_trained(tmp_path: Path) -> None:
    """qwen2.5 writes a newline behind the stop token, which nobody trains."""
    split = loaded(tmp_path, row(("user", "Is it?"), chosen="no", rejected="certainly not, or so it seems"))
    pair = split.train[0]
    assert pair.chosen > pair.chosen_targets
    longest = max(len(side.input_ids) for side in pair.sides)
    assert split.train.longest_text() == (longest, 0)
    assert split.train.counts.sides.tolist() == [longest]


def test_a_prompt_over_its_limit_loses_its_oldest_turns_first_and_keeps_the_system_prompt(tmp_path: Path) -> None:
    turns = [("user", "first question"), ("assistant", "first answer"), ("user", "second one?")]
    whole = loaded(tmp_path, row(("system", SYSTEM), *turns)).train[0]
    split = loaded(tmp_path, row(("system", SYSTEM), *turns), max_prompt_length=whole.prompt - 1)
    pair = split.train[0]
    expected = encoder().encode_prompt([Message.of("system", SYSTEM), Message.of("user", "second one?")])
    assert pair.input_ids[: pair.prompt].tolist() == expected
    assert (split.train.ledger.cut, split.train.ledger.kept) == (1, 0)
    assert f"{whole.prompt - pair.prompt} tokens cut out of the prompt" in split.train.ledger.findings[0].message


@pytest.mark.parametrize("left", [1, 4, 11])
def test_a_single_long_question_loses_its_beginning(tmp_path: Path, left: int) -> None:
    question = "the very long question that is asked here"
    empty = len(encoder().encode_prompt([Message.of("system", SYSTEM), Message.of("user", "")]))
    limit = empty + left
    pair = loaded(tmp_path, row(("system", SYSTEM), ("user", question)), max_prompt_length=limit).train[0]
    kept = question[-left:]
    assert pair.prompt <= limit
    expected = encoder().encode_prompt([Message.of("system", SYSTEM), Message.of("user", kept)])
    assert pair.input_ids[: pair.prompt].tolist() == expected
    assert text(pair.input_ids[pair.prompt :]).count("<|im_end|>") == 2


def test_a_prompt_that_cannot_be_cut_is_lost_with_its_numbers(tmp_path: Path) -> None:
    rows = [row(("user", "short")), row(("system", "x" * 200), ("user", "short"))]
    split = loaded(tmp_path, *rows, max_prompt_length=120)
    assert len(split.train) == 1
    (finding,) = [item for item in split.train.ledger.findings if item.cause == "too_long"]
    assert finding.line == 2
    assert "max_prompt_length 120" in finding.message


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_policies_that_cut_nothing_cut_no_prompt(tmp_path: Path, policy: str) -> None:
    rows = [row(("user", "short")), row(("user", "long " * 60))]
    split = loaded(tmp_path, *rows, max_prompt_length=120, on_too_long=policy)
    assert dict(split.train.ledger.lost) == {"too_long": 1}
    if policy == "error":
        with pytest.raises(UsageError):
            split.check(DataConfig(on_too_long="error"))


def test_an_answer_over_the_limit_is_cut_and_accounted_for(tmp_path: Path) -> None:
    whole = loaded(tmp_path, row(("user", "q"), chosen="long " * 30)).train[0]
    limit = whole.prompt + 20
    split = loaded(tmp_path, row(("user", "q"), chosen="long " * 30), max_seq_length=limit)
    pair = split.train[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == (whole.prompt, 20, whole.rejected)
    assert split.train.ledger.cut_tokens == whole.chosen - 20


def test_what_was_cut_of_a_pair_names_its_side(tmp_path: Path) -> None:
    def said(limit: int, most: int | None = None, **answers: str) -> str:
        ledger = loaded(
            tmp_path, row(("user", "first"), ("assistant", "x"), ("user", "q"), **answers), max_seq_length=limit,
            max_prompt_length=most,
        ).train.ledger  # fmt: skip
        (finding,) = [item for item in ledger.findings if item.cause in ("cut", "too_long")]
        return finding.message

    whole = loaded(tmp_path, row(("user", "first"), ("assistant", "x"), ("user", "q"))).train[0]
    start = whole.prompt
    cut = "trained tokens and 0 whole replies lost; max_seq_length"
    assert (
        said(start + 10, chosen="long " * 9)
        == f"chosen: cut from {start + 47} to {start + 10} tokens (36 {cut} {start + 10})"
    )
    assert (
        said(start + 9, rejected="no " * 9)
        == f"rejected: cut from {start + 29} to {start + 9} tokens (19 {cut} {start + 9})"
    )
    both = said(start + 4, start - 1, chosen="x" * start, rejected="y" * start)
    assert both.startswith(
        f"{start - len(encoder().encode_prompt([Message.of('user', 'q')]))} tokens cut out of the prompt"
    )
    assert "; chosen: cut from " in both
    assert "; rejected: cut from " in both
    assert said(start - 5) == f"chosen, rejected: {start + 5} tokens; no reply begins within max_seq_length {start - 5}"


def test_an_empty_answer_names_its_side(tmp_path: Path) -> None:
    ledger = loaded(
        tmp_path,
        row(("user", "q"), rejected=" "),
        row(("user", "q"), chosen=""),
        row(("user", "q"), ("assistant", ""), ("user", "r")),
    ).train.ledger
    found = [(item.line, item.message) for item in ledger.findings if item.cause == "empty_answer"]
    assert found == [
        (1, "the rejected answer is empty: only its stop token is trained"),
        (2, "the chosen answer is empty: only its stop token is trained"),
        (3, "turn 1 of 2: the reply is empty; it is not trained"),
    ]
    assert ledger.kept == 3


def test_answers_that_one_tokenization_would_join_to_their_prompt_share_it_as_served(
    tmp_path: Path, qwen_tokenizer: Any
) -> None:
    encoder = Encoder(qwen_tokenizer, bind_template("qwen2.5", qwen_tokenizer))
    path = tmp_path / "joined.jsonl"
    record = row(("user", "q"), ("assistant", "\n\nsaid before"), ("user", "r"), chosen="\n\nyes", rejected=" \nno")
    plain = row(("user", "q"), chosen="yes", rejected="\nno")
    path.write_text("".join(json.dumps(item) + "\n" for item in (record, plain)), encoding="utf-8")
    train = load_split(DataConfig(train_file=str(path)), encoder, "pair").train
    assert (len(train), train.ledger.counts["joined_to_prompt"]) == (2, 2)
    for pair, item, answers in zip(train, (record, plain), (("\n\nyes", " \nno"), ("yes", "\nno")), strict=True):
        prompt = encoder.encode_prompt([Message.of(turn["role"], turn["content"]) for turn in item["chosen"][:-1]])
        assert pair.input_ids[: pair.prompt].tolist() == prompt
        sides = np.split(pair.input_ids[pair.prompt :], [pair.chosen])
        for ids, answer in zip(sides, answers, strict=True):
            assert ids.tolist() == qwen_tokenizer.encode(answer + "<|im_end|>\n")


def test_no_limit_at_all_keeps_long_prompts(tmp_path: Path) -> None:
    pair = loaded(tmp_path, row(("user", "long " * 150)), max_prompt_length=None, max_seq_length=4096).train[0]
    assert pair.prompt > 700


def test_answers_that_are_the_same_are_a_finding(tmp_path: Path) -> None:
    ledger = loaded(tmp_path, row(("user", "q"), chosen="same", rejected="same")).train.ledger
    assert ledger.counts["same_answers"] == 1
    assert ledger.kept == 1


def test_pairs_of_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    record = {"prompt_ids": [1, 40, 41, 42], "chosen_ids": [50, 2], "rejected_ids": [60, 61, 2]}
    pair = loaded(tmp_path, record).train[0]
    assert pair.input_ids.tolist() == [1, 40, 41, 42, 50, 2, 60, 61, 2]
    assert (pair.prompt, pair.chosen, pair.num_targets) == (4, 2, 5)
    cut = loaded(tmp_path, record, max_prompt_length=3).train[0]
    assert cut.input_ids.tolist() == [1, 41, 42, 50, 2, 60, 61, 2]  # the first, maybe BOS, and the last ones
    assert cut.prompt == 3


def test_every_real_pair_is_shared_and_counted(tmp_path: Path, shared: Path) -> None:
    for name in ("dpo_en_demo.json", "firefly_dpo.jsonl"):
        place = {"path": str(shared / "data" / name), "max_rows": 40}
        config = DataConfig(train_file=(place,), max_prompt_length=300, max_seq_length=1024)
        train = load_split(config, encoder(), "pair").train
        assert len(train) == train.ledger.examples > 10
        counted = 0
        for index in range(len(train)):
            pair = train[index]
            assert 0 < pair.prompt <= 300
            for side in pair.sides:
                assert len(side.input_ids) <= 1024
                assert text(side.input_ids).startswith("<|im_start|>system\n")
                counted += len(side.input_ids)
        assert counted == train.ledger.tokens == train.counts.input_tokens.sum()


def test_an_empty_microbatch_takes_as_many_passes_as_one_with_a_pair():
    """Ranks that hold parts of the weights have to call the model equally often."""
    from firefly.data.pair_batching import pack_pairs

    pair = TokenPair(np.arange(6, dtype=np.int32), np.arange(6, dtype=np.int32), prompt=2, chosen=2)
    for shared in (True, False):
        assert len(pack_pairs([], shared).rows) == len(pack_pairs([pair], shared).rows)
