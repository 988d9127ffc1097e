"""`firefly generate`: a line for each row, in order, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly.cli import main
from firefly.config import ModelConfig
from firefly.data.encoding import Encoder
from firefly.data.formats.prompts import read_prompts
from firefly.data.schema import Source
from firefly.data.templates import bind_template
from firefly.files import hold
from firefly.generation import Answer, GenerationSettings, Generator, loading, progress
from firefly.generation.engine import Token
from firefly.generation.files import Answering, Row, read_rows
from firefly.generation.loading import ServedModel
from firefly.models.precision import Precision
from firefly.translation import Phrase
from tiny import save_tiny_model, tiny_tokenizer, with_plain_lora, write_rows

NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("generate") / "model", "llama")


@pytest.fixture(scope="module")
def generator(model: Path) -> Iterator[Generator]:
    with Generator.load(ModelConfig(name_or_path=str(model)), template_name="default", dtype="float32") as loaded:
        yield loaded


def command(model: Path, rows: Path, output: Path, *options: object) -> list[str]:
    given = ("--model_name_or_path", model, "--input_file", rows, "--output_file", output, "--max_new_tokens", NEW)
    return ["generate", *map(str, given), "--template_name", "default", "--dtype", "float32", *map(str, options)]


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


GOOD = {"prompt": "red", "completion": "green"}
MIXED = (
    GOOD,
    {"nothing": "known"},
    "\n",
    "{broken\n",
    {"messages": [{"role": "user", "content": "blue " * 200}]},
    {"prompt": "two", "note": "unread"},
    {"prompt": "one", "chosen": "blue", "rejected": "red"},
    {"text": "three"},
)


def test_every_row_has_its_line_in_order_and_what_cannot_be_answered_says_why(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", *MIXED)
    assert main(command(model, rows, tmp_path / "answers.jsonl", "--json")) == 3
    lines = lines_of(tmp_path / "answers.jsonl")
    assert [line["index"] for line in lines] == list(range(7))
    assert [line["reference"] for line in lines] == ["green", None, None, None, None, "blue", None]
    assert [len(line["answers"]) for line in lines] == [1, 0, 0, 0, 1, 1, 1]
    errors = [line.get("error", "") for line in lines]
    assert "rows.jsonl:2: no known format" in errors[1]
    assert "rows.jsonl:4: not valid JSON" in errors[2]
    assert "rows.jsonl:5: the prompt has" in errors[3]
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["rows"], summary["failed"], summary["found"]) == (7, 3, 0)
    assert summary["new_tokens"] == sum(len(answer["token_ids"]) for line in lines for answer in line["answers"])
    assert "1 row(s) are plain text" in printed.err
    assert "'note' (1)" in printed.err
    assert "of 7 rows 3 have no answer" in printed.err


def test_greedy_answers_are_those_of_plain_generate(generator: Generator, model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = write_rows(tmp_path / "rows.jsonl", 24, seed=5)
    settings = GenerationSettings(max_new_tokens=NEW, temperature=0, logprobs=0)
    lines = [line.value for line in Answering(generator, settings).lines(read_rows([rows]))]
    stops = set(generator.encoder.template.stop_ids)
    for line, row in zip(lines, rows.read_text("utf-8").splitlines(), strict=True):
        *before, last = json.loads(row)["conversation"]
        assert line["reference"] == last["assistant"]
        text = "".join(f"User: {turn['human']}\nAssistant: {turn['assistant']} <|im_end|>" for turn in before)
        prompt = tiny_tokenizer().encode(f"{text}User: {last['human']}\nAssistant:")
        (answer,) = line["answers"]
        check_greedy(plain, prompt, answer["token_ids"], stops)
        assert answer["finish_reason"] == ("stop" if answer["token_ids"][-1] in stops else "length")
        ids = [token for token in answer["token_ids"] if token not in stops]
        assert answer["text"] == tiny_tokenizer().decode(ids, skip_special_tokens=True)
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *answer["token_ids"]]])).logits[0, len(prompt) - 1 : -1]
        found = logits.log_softmax(-1)[range(len(answer["token_ids"])), answer["token_ids"]]
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), found, rtol=0, atol=1e-4)


def check_greedy(plain: Any, prompt: list[int], ids: list[int], stops: set[int], tie: float = 1e-3) -> None:
    """Equal what `generate` of transformers gives, up to the first place where two tokens are equally likely."""
    row = torch.tensor([prompt])
    expected = plain.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=sorted(stops),
    )[0, len(prompt) :].tolist()
    place = next((n for n, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        assert ids == expected
        return
    with torch.no_grad():
        logits = plain(torch.tensor([[*prompt, *expected[:place]]])).logits[0, -1]
    assert logits[expected[place]] - logits[ids[place]] < tie


def test_an_adapter_answers_as_when_it_is_merged_whether_or_not_its_base_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    adapted = with_plain_lora(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    adapted.save_pretrained(tmp_path / "adapter")
    rows, output = write_rows(tmp_path / "rows.jsonl", 6), tmp_path / "answers.jsonl"
    named = ["--adapter_name_or_path", str(tmp_path / "adapter")]
    assert main([*command(model, rows, output), *named]) == 0
    merged, stops = adapted.merge_and_unload().eval(), {tiny_tokenizer().eos_token_id}
    encoder = Encoder(tiny_tokenizer(), bind_template("default", tiny_tokenizer()))
    for row, line in zip(read_rows([rows]), lines_of(output), strict=True):
        prompt = encoder.encode_prompt(row.prompt.asked.messages)  # type: ignore[union-attr]
        check_greedy(merged, prompt, line["answers"][0]["token_ids"], stops)
    capsys.readouterr()
    assert main(command(tmp_path / "adapter", rows, output, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["found"] == 6
    assert main(command(model, rows, output)) == 2
    assert "other settings: adapter_weights." in capsys.readouterr().err


DRAWN = ("--temperature", 2, "--num_samples", 2, "--json")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(rows, their answers by a run that was not interrupted)."""
    folder = tmp_path_factory.mktemp("whole")
    rows = write(folder / "rows.jsonl", *MIXED, GOOD)
    assert main(command(model, rows, folder / "answers.jsonl", *DRAWN)) == 3
    return rows, folder / "answers.jsonl"


@pytest.mark.parametrize("cut", [1, -1, 0.5])
def test_an_interrupted_output_goes_on_to_the_bytes_of_an_uninterrupted_one(
    cut: float, model: Path, whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = whole
    settings, written = output.with_name(output.name + ".settings.json"), output.read_bytes()
    left = int(len(written) * cut) if isinstance(cut, float) else cut % len(written)
    part = tmp_path / "part.jsonl"
    part.write_bytes(written[:left])
    part.with_name("part.jsonl.settings.json").write_bytes(settings.read_bytes())
    assert main(command(model, rows, part, *DRAWN)) == 3
    assert part.read_bytes() == written
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["failed"], summary["found"]) == (8, 3, written[:left].count(b"\n"))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bytes_of_an_uninterrupted_one(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 300)
    assert main(command(model, rows, tmp_path / "whole.jsonl", *DRAWN)) == 0
    part = tmp_path / "part.jsonl"
    for least in (20, 120):
        process = subprocess.Popen(
            [sys.executable, "-c", "from firefly.cli import run; run()", *command(model, rows, part, *DRAWN)]
        )
        deadline = time.monotonic() + 120
        while not (part.exists() and part.read_bytes().count(b"\n") >= least):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert part.read_bytes().count(b"\n") < 300
    assert main(command(model, rows, part, *DRAWN)) == 0
    assert part.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_output_of_other_settings_or_of_something_else_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "answers.jsonl"
    assert main(command(model, rows, output)) == 0
    before = output.read_bytes()
    capsys.readouterr()
    assert main(command(model, rows, output, "--temperature", 1, "--system", "Be brief.")) == 2
    said = capsys.readouterr().err
    assert "other settings: system, temperature." in said
    assert "--overwrite" in said
    assert output.read_bytes() == before
    assert main(command(model, rows, output, "--temperature", 1, "--overwrite")) == 0
    assert main(command(model, rows, output)) == 2
    assert main(command(model, rows, rows)) == 2
    output.with_name("answers.jsonl.settings.json").unlink()
    assert main(command(model, rows, output)) == 2
    assert "no answers.jsonl.settings.json beside it" in capsys.readouterr().err


def test_an_output_does_not_go_on_in_another_type_that_auto_comes_to(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, output = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "answers.jsonl"
    for dtype, code in ((torch.float32, 0), (torch.float32, 0), (torch.bfloat16, 2)):
        monkeypatch.setattr(loading, "answering_precision", lambda *_, dtype=dtype: Precision(dtype))
        assert main([*command(model, rows, output), "--dtype", "auto"]) == code
    assert "other settings: dtype." in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command(model, rows, output)) == 0  # float32 by its name


def test_one_process_at_a_time_writes_an_output(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", GOOD)
    with hold(tmp_path / ".answers.jsonl.lock"):
        assert main(command(model, rows, tmp_path / "answers.jsonl")) == 2
    assert f"another process ({os.getpid()}" in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


def test_more_rows_are_added_to_an_output_and_fewer_leave_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = write(tmp_path / "rows.jsonl", *[GOOD] * 5), tmp_path / "answers.jsonl"
    assert main(command(model, rows, output, "--limit", 2)) == 0
    assert [line["index"] for line in lines_of(output)] == [0, 1]
    assert main(command(model, rows, output, "--limit", 4)) == 0
    assert main(command(model, rows, output, "--limit", 3)) == 0
    assert [line["index"] for line in lines_of(output)] == [0, 1, 2, 3]
    assert "4 rows already, and 3 were asked for" in capsys.readouterr().err
    assert main(command(model, rows, output, "--limit", 0)) == 2


def answers(generator: Generator, rows: Path, settings: GenerationSettings, samples: int) -> list[list[list[int]]]:
    lines = Answering(generator, settings, samples).lines(read_rows([rows]))
    return [[answer["token_ids"] for answer in line.value["answers"]] for line in lines]


def test_several_answers_with_a_seed_are_the_same_alone_and_in_a_batch(generator: Generator, tmp_path: Path) -> None:
    settings = GenerationSettings(max_new_tokens=NEW, temperature=3.0, top_p=1.0, seed=7)
    prompts = [{"prompt": text} for text in ("red", "blue and green", "two three one two", "天")]
    together = answers(generator, write(tmp_path / "all.jsonl", *prompts), settings, 3)
    for prompt, found in zip(prompts, together, strict=True):
        assert answers(generator, write(tmp_path / "one.jsonl", prompt), settings, 3) == [found]
        assert len({tuple(ids) for ids in found}) == 3


def test_several_greedy_answers_are_one_and_are_said_to_be(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", GOOD)
    assert main(command(model, rows, tmp_path / "answers.jsonl", "--num_samples", 3)) == 0
    first, *others = lines_of(tmp_path / "answers.jsonl")[0]["answers"]
    assert others == [first, first]
    assert "the same answer 3 times" in capsys.readouterr().err


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(generator: Generator, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", GOOD)
    settings = GenerationSettings(max_new_tokens=NEW, temperature=5.0, top_p=1.0, seed=3)
    (line,) = Answering(generator, settings).lines(read_rows([rows]))
    text = line.value["answers"][0]["text"]
    middle = next(character for character in text[2:] if character.isascii() and text.find(character) >= 2)
    stopping = GenerationSettings(max_new_tokens=NEW, temperature=5.0, top_p=1.0, seed=3, stop=(middle,))
    (line,) = Answering(generator, stopping).lines(read_rows([rows]))
    answer = line.value["answers"][0]
    assert (answer["text"], answer["finish_reason"]) == (text[: text.find(middle)], "stop")


class Prompted:
    """Takes down what it is asked, and answers what it was told to."""

    name = "prompted"

    def __init__(self, answer: str = "", template: str = "qwen2.5") -> None:
        tokenizer = tiny_tokenizer()
        self.encoder = Encoder(tokenizer, bind_template(template, tokenizer))
        stops = self.encoder.template.stop_ids
        self.served = {"prompted": ServedModel("prompted", tokenizer, self.encoder, stops, None, Path())}
        ids = [*tokenizer.encode(answer), stops[0]]
        self.answer = Answer(answer, tuple(map(Token, ids)), "stop")
        self.asked: list[tuple[list[str], tuple[Any, ...]]] = []

    def text_encoder(self) -> Encoder:
        return self.encoder

    def prompt_end(self, ids: Sequence[int]) -> str:
        return "<|im_start|>assistant\n"

    def encode(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> tuple[int, ...]:
        self.asked.append(([f"{message.role}: {message.text}" for message in messages], tuple(tools)))
        return (5,)

    def request(self, ids: Sequence[int], settings: GenerationSettings) -> None: ...

    def generate(self, prompts: Any, settings: Any, samples: int) -> Iterator[list[Any]]:
        return ([self.answer] for _ in prompts)


def test_a_prompt_has_the_tools_of_its_row_and_the_system_prompt_that_it_lacks(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    own = {"messages": [{"role": "system", "content": "own"}, *talk]}
    prompted = Prompted()
    rows = write(tmp_path / "rows.jsonl", {"messages": talk, "tools": [tool]}, own)
    list(Answering(prompted, GenerationSettings(), system="given").lines(read_rows([rows])))  # type: ignore[arg-type]
    assert prompted.asked == [(["system: given", "user: q"], (tool,)), (["system: own", "user: q"], ())]


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def test_thoughts_and_calls_of_an_answer_are_told_apart_from_its_text(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    asked = {"messages": [{"role": "user", "content": "q"}]}
    rows = write(tmp_path / "rows.jsonl", asked | {"tools": [tool]}, asked)
    prompted = Prompted(f"<think>\nwhy\n</think>\n\nI call.\n{CALL}", "qwen3")
    with_tools, without = Answering(prompted, GenerationSettings()).lines(read_rows([rows]))  # type: ignore[arg-type]
    answer = with_tools.value["answers"][0]
    assert (answer["text"], answer["reasoning"]) == ("I call.", "why")
    assert [call["function"] for call in answer["tool_calls"]] == [{"name": "f", "arguments": {"x": 1}}]
    answer = without.value["answers"][0]  # where nothing can be called, nothing is
    assert (answer["text"], answer["reasoning"]) == (f"I call.\n{CALL}", "why")
    assert "tool_calls" not in answer


def test_a_plain_answer_is_what_decode_gives(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", GOOD, {"text": "<think>\n"})
    for written in (" spaced \n", "a<|endoftext|>b"):
        lines = Answering(Prompted(written), GenerationSettings()).lines(read_rows([rows]))  # type: ignore[arg-type]
        expected = written.replace("<|endoftext|>", "")
        assert [line.value["answers"][0]["text"] for line in lines] == [expected, expected]


def test_rows_are_read_as_they_are_needed_those_that_cannot_be_answered_too(generator: Generator) -> None:
    read = 0

    def many(row: Row) -> Iterator[Row]:
        nonlocal read
        while read < 5_000:
            read += 1
            yield row

    good = Row(0, Source("rows", 1), read_prompts({"prompt": "red"}).prompts[0])
    bad = Row(0, Source("rows", 1), problem=Phrase("blank"))
    for row in (good, bad):
        read = 0
        lines = Answering(generator, GenerationSettings(max_new_tokens=1, temperature=0)).lines(many(row))
        assert list(itertools.islice(lines, 5))
        lines.close()  # type: ignore[attr-defined]
        assert read < 200


def test_a_model_without_a_template_goes_on_with_texts_and_is_asked_nothing_else(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, questions = write(tmp_path / "texts.jsonl", {"text": "red"}), write(tmp_path / "questions.jsonl", GOOD)
    assert main([*command(model, texts, tmp_path / "answers.jsonl"), "--template_name", "auto"]) == 0
    assert lines_of(tmp_path / "answers.jsonl")[0]["answers"][0]["token_ids"]
    assert main([*command(model, questions, tmp_path / "others.jsonl"), "--template_name", "auto"]) == 2
    assert "template_name" in capsys.readouterr().err.splitlines()[-1]


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    assert main(command(model, write(tmp_path / "rows.jsonl", GOOD, GOOD), tmp_path / "answers.jsonl")) == 0
    said = capsys.readouterr()
    assert re.search(r"rows 1/2  \d+ tokens/s  [\d:]+ left", said.err)
    assert said.out == f"{tmp_path / 'answers.jsonl'}\n"
