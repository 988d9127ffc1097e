"""What every side trains on: labels of chats, blocks of documents."""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_every_answer_and_its_stop_token_are_labelled(chatml_tokenizer: Any) -> None:
    import copy

    from token_dump import encode_messages, messages_of

    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    turns = [{"human": "What?", "assistant": "That."}, {"human": "Who?", "assistant": "I am."}]
    row = encode_messages(tokenizer, messages_of({"conversation": turns}))
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(trained) == "That.<|im_end|>I am.<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(
        messages_of({"conversation": turns}), tokenize=False
    )


def test_a_small_file_is_gone_through_again(chatml_tokenizer: Any, tmp_path: Any) -> None:
    import copy
    import json

    from token_dump import write_rows

    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "model")
    records = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    found = write_rows(
        model=str(tmp_path / "model"),
        data=[tmp_path / "data.json"],
        num_rows=7,
        max_tokens=64,
        path=tmp_path / "dump.jsonl",
    )
    lines = (tmp_path / "dump.jsonl").read_text().splitlines()
    assert (found["rows"], found["taken_again"]) == (7, 4)
    assert [*lines[3:6], lines[6]] == [*lines[:3], lines[0]]
    assert len(set(lines)) == 3


def test_pairs_of_a_kind_are_taken_from_several_files_by_turns(chatml_tokenizer: Any, tmp_path: Any) -> None:
    import copy
    import json

    from pair_dump import write_pairs

    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "model")

    def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        answers = {"chosen": {"from": "gpt", "value": chosen}, "rejected": {"from": "gpt", "value": rejected}}
        return {"conversations": [{"from": "human", "value": prompt}], **answers}

    long = "that is what you are and who I am " * 4
    first = [pair("a", long, long + "x"), pair("b" + long * 3, long, long), pair("c", long, long + "y")]
    second = [pair("d", long, long + "z"), pair("e", long, "no"), pair("f", long * 40, long)]
    (tmp_path / "first.json").write_text(json.dumps(first))
    (tmp_path / "second.json").write_text(json.dumps(second))
    found = write_pairs(
        model=str(tmp_path / "model"),
        data=[tmp_path / "first.json", tmp_path / "second.json"],
        num_pairs=3,
        max_tokens=512,
        pairs_per_step=1,
        path=tmp_path / "dump.jsonl",
        max_prompt_tokens=64,
        min_answer_tokens=16,
    )
    pairs = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    prompts = [tokenizer.decode(found["prompt_ids"]) for found in pairs]
    assert ["".join(letter for letter in "abcdef" if f"user\n{letter}<" in prompt) for prompt in prompts] == [
        "a",
        "d",
        "c",
    ]
    assert (found["rows"], found["dropped_as_of_another_kind"]) == (3, 2)


def test_blocks_restart_where_a_document_begins_or_goes_on() -> None:
    from row_batches import segment_lengths
    from token_dump import cut_blocks

    stream = list(range(10, 19))  # documents of 2, 4 and 3 tokens
    blocks = cut_blocks(stream, [0, 2, 6], num_blocks=2, size=4, isolated=True)
    assert [block["starts"] for block in blocks] == [[0, 2], [0, 2]]
    assert blocks[0]["labels"] == [-100, 11, -100, 13]
    assert blocks[1]["input_ids"] == [14, 15, 16, 17]
    assert segment_lengths(blocks[1]) == [2, 2]


def test_joined_blocks_are_one_segment_each() -> None:
    from token_dump import cut_blocks

    (block,) = cut_blocks(list(range(4)), [0, 2], num_blocks=1, size=4, isolated=False)
    assert block["starts"] == [0]
    assert block["labels"] == [-100, 1, 2, 3]


def test_our_own_blocks_are_the_dump_s(chatml_tokenizer: Any, tmp_path: Any) -> None:
    """Firefly cuts its own blocks from the texts; they must be those that the peers are given."""
    import json

    from token_dump import write_blocks

    from firefly.config import DataConfig
    from firefly.data.dataset import load_split
    from firefly.data.encoding import Encoder
    from firefly.data.templates import plain_template

    chatml_tokenizer.save_pretrained(tmp_path / "model")
    data, dump, documents = (tmp_path / name for name in ("data.jsonl", "dump.jsonl", "documents.jsonl"))
    data.write_text(
        "".join(json.dumps({"text": f"{number} is who you are. " * number}) + "\n" for number in range(1, 9))
    )
    common = {"model": str(tmp_path / "model"), "data": [data], "path": dump, "documents": documents}
    write_blocks(**common, num_blocks=3, max_tokens=32, isolated=True)
    config = DataConfig(train_file=str(documents), max_seq_length=32, max_lost_share=1.0)
    blocks = load_split(config, Encoder(chatml_tokenizer, plain_template()), "document").train
    for number, line in enumerate(dump.read_text().splitlines()):
        wanted = json.loads(line)
        assert blocks[number].input_ids.tolist() == wanted["input_ids"]
        assert list(blocks[number].starts) == wanted["starts"]
