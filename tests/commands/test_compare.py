"""`firefly compare`: two models side by side, whatever they are; its losses are plain transformers'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fake_openai import FakeOpenAI, Refusal
from firefly.cli import main
from firefly.data.encoding import Encoder
from firefly.data.schema import Conversation, Message
from firefly.data.templates import bind_template
from firefly.errors import UsageError
from firefly.evaluation.comparison import ComparisonRequest, compare_models
from firefly.evaluation.endpoints import Endpoint
from firefly.evaluation.subjects import LoadingOptions
from tiny import save_tiny_model, tiny_model, tiny_tokenizer, with_plain_lora, write_rows

OPTIONS = LoadingOptions(template_name="default", dtype="float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter over it, another model, and rows."""
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_model(folder / "base", "llama")
    save_tiny_model(folder / "other", "qwen2", seed=3)
    adapted = with_plain_lora(tiny_model("llama"))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    write_rows(folder / "rows.jsonl", 14)
    return folder


def request(place: Path, base: str, tuned: str, **changes: Any) -> ComparisonRequest:
    own: dict[str, Any] = {"eval_files": (str(place / "rows.jsonl"),), "questions": 3, "max_new_tokens": 4}
    own |= {"probes": False, "loading": OPTIONS} | changes
    return ComparisonRequest(str(place / base), str(place / tuned), **own)


def plain_loss(model: Any, row: dict[str, Any]) -> tuple[float, int]:
    """Σ NLL of a row's replies by transformers alone, and how many tokens they have."""
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, bind_template("default", tokenizer))
    turns = [Message.of(role, turn[key]) for turn in row["conversation"] for role, key in ROLES]
    (example,) = encoder.encode_rendered(encoder.render(Conversation(tuple(turns))))
    ids, labels = torch.tensor(example.input_ids[None]).long(), torch.tensor(example.labels[None]).long()
    count = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * count, count


ROLES: tuple[tuple[Any, str], ...] = (("user", "human"), ("assistant", "assistant"))


def test_the_losses_of_all_rows_are_those_of_plain_transformers(place: Path) -> None:
    from peft import PeftModel

    report = compare_models(request(place, "base", "adapter"))
    base = AutoModelForCausalLM.from_pretrained(place / "base").float().eval()
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text("utf-8").splitlines()]
    expected = [plain_loss(base, row) for row in rows]
    tuned = PeftModel.from_pretrained(base, place / "adapter").eval()
    afterwards = [plain_loss(tuned, row) for row in rows]
    targets = sum(count for _, count in expected)
    assert report.losses[0].base == pytest.approx(sum(loss for loss, _ in expected) / targets, abs=1e-4)
    assert report.losses[0].tuned == pytest.approx(sum(loss for loss, _ in afterwards) / targets, abs=1e-4)
    for change in (*report.worst, *report.best):
        number = int(change.key.rpartition(":")[2]) - 1
        assert change.base == pytest.approx(expected[number][0] / expected[number][1], abs=1e-4)
        assert change.tuned == pytest.approx(afterwards[number][0] / afterwards[number][1], abs=1e-4)


def test_a_model_beside_itself_is_no_different(place: Path) -> None:
    report = compare_models(request(place, "base", "base"))
    assert report.learnt == "no_difference"
    assert report.tied == 14
    assert all(row.answers[0] == row.answers[1] for row in report.side_by_side)


def test_two_models_of_unlike_weights_are_loaded_one_after_another(place: Path) -> None:
    report = compare_models(request(place, "base", "other"))
    assert report.losses[0].rows == 14
    assert report.base.name != report.tuned.name
    assert len(report.side_by_side) == 3


def test_an_adapter_is_compared_with_the_base_that_is_named_for_it(place: Path) -> None:
    together = compare_models(request(place, "base", "adapter"))
    turned = compare_models(request(place, "adapter", "base"))
    assert together.losses[0].difference.value == pytest.approx(-turned.losses[0].difference.value, abs=1e-6)
    assert [row.answers for row in turned.side_by_side] == [row.answers[::-1] for row in together.side_by_side]


def test_pairs_are_compared_by_their_better_answers(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    pair = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": f"no {n} never"} for n in range(9)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair))
    report = compare_models(
        ComparisonRequest(
            str(place / "base"), str(place / "adapter"), (str(rows),), questions=0, probes=False, loading=OPTIONS
        )
    )
    assert report.losses[0].rows == 9
    (prefers,) = [measure for measure in report.answers if measure.name == "prefers"]
    assert prefers.count == 9
    assert report.learnt == prefers.verdict  # and not the loss of the better answers
    assert "held-out pairs" in str(report.verdicts[0])
    assert any("better answer" in str(note) for note in report.notes)


def test_documents_are_compared_by_all_their_tokens(place: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a text of number {n} that goes on " * 3}) + "\n" for n in range(9)))
    options = LoadingOptions(dtype="float32")
    report = compare_models(
        ComparisonRequest(
            str(place / "base"),
            str(place / "adapter"),
            (str(texts),),
            questions=2,
            max_new_tokens=4,
            max_seq_length=64,
            probes=False,
            loading=options,
        )
    )
    assert report.losses[0].rows >= 4
    assert [row.question.startswith("a text of number") for row in report.side_by_side] == [True, True]


def test_rows_that_were_trained_on_are_looked_at(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "trained.jsonl"
    turns = [{"human": f"ask {n}", "assistant": f"say {n}"} for n in range(12)]
    turns.append({"human": "ask 0", "assistant": "something else"})
    rows.write_text("".join(json.dumps({"conversation": [turn]}) + "\n" for turn in turns))
    report = compare_models(request(place, "base", "adapter", eval_files=(), train_files=(str(rows),)))
    assert {int(each.key.rpartition(":")[2]) for each in report.suspects} >= {1, 13}
    assert report.losses == ()


def test_each_file_has_a_line_of_its_own(place: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", 9, seed=ord(name))
    report = compare_models(request(place, "base", "adapter", eval_files=(str(tmp_path),), questions=0))
    assert [each.source for each in report.losses] == ["", "a.jsonl", "b.jsonl"]


def test_every_row_that_is_listed_has_its_texts(place: Path) -> None:
    report = compare_models(request(place, "base", "other", questions=0))
    listed = [*report.worst, *report.best]
    assert listed
    assert all(change.question and change.reference for change in listed)


def test_a_malformed_row_is_named_and_nothing_is_compared(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((place / "rows.jsonl").read_text("utf-8") + '{"conversation": [', "utf-8")
    with pytest.raises(UsageError, match=r"rows.jsonl:15"):
        compare_models(request(place, "base", "adapter", eval_files=(str(rows),)))


@pytest.mark.parametrize("longest", [2048, 60])
def test_rows_that_one_tokenizer_cuts_do_not_count(
    place: Path, tmp_path: Path, longest: int, qwen_tokenizer: Any
) -> None:
    """A byte for a token on one side, and words on the other: only rows that both read whole are compared."""
    tiny_model("llama", vocab_size=len(qwen_tokenizer)).save_pretrained(tmp_path / "words")
    qwen_tokenizer.save_pretrained(tmp_path / "words")
    asked = request(place, "base", "base", questions=0, max_seq_length=longest)
    report = compare_models(replace(asked, tuned=str(tmp_path / "words")))
    assert report.unit == "byte"
    counted = report.losses[0].rows if report.losses else 0
    assert counted == 14 if longest == 2048 else counted < 14
    assert any("reads less" in str(note) for note in report.notes) == (longest == 60)


def test_a_base_without_a_template_is_asked_by_that_of_the_model_made_of_it(place: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tuned", "llama", seed=2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = bind_template("default", tokenizer).text
    tokenizer.save_pretrained(tmp_path / "tuned")
    asked = request(place, "base", "base", loading=LoadingOptions(dtype="float32"))
    report = compare_models(replace(asked, tuned=str(tmp_path / "tuned")))
    assert report.losses[0].rows == 14
    assert all(row.errors == (None, None) for row in report.side_by_side)


# ---- servers


def echo(body: dict[str, Any]) -> str:
    return "VERDICT: A" if "VERDICT" in str(body) else "red blue"


def test_a_model_here_is_compared_with_one_at_a_server_by_its_answers(place: Path) -> None:
    with FakeOpenAI(echo, ("there",)) as server:
        report = compare_models(replace(request(place, "base", "base"), tuned=server.url))
    assert report.losses == ()
    assert report.tuned.name == "there"
    assert {row.answers[1] for row in report.side_by_side} == {"red blue"}
    assert report.tuned.described["endpoint"] == server.url


def test_a_judge_that_goes_by_the_order_decides_nothing(place: Path) -> None:
    with FakeOpenAI(echo, ("a judge",)) as server:
        asked = request(place, "base", "other", judge=Endpoint(server.url))
        report = compare_models(asked)
    assert report.judge is not None
    assert len(report.judge.votes) == 3
    assert {vote.winner for vote in report.judge.votes} <= {"order", "tie"}


def test_training_rows_of_a_model_at_a_server_are_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="--train_file"):
        compare_models(replace(request(place, "base", "base", train_files=("rows",)), tuned="http://127.0.0.1:9/v1"))


def test_a_judge_that_is_down_is_found_before_anything_is_computed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firefly.evaluation.comparison.measure_local", lambda *_: pytest.fail("it was computed"))
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:9"):
        compare_models(request(place, "base", "base", judge=Endpoint("http://127.0.0.1:9/v1")))


def test_a_judge_that_fails_leaves_a_report_without_it(place: Path) -> None:
    def refuse(body: dict[str, Any]) -> str:
        raise Refusal(400, "not today")

    with FakeOpenAI(refuse, ("a judge",)) as server:
        report = compare_models(request(place, "base", "other", judge=Endpoint(server.url)))
    assert report.judge is None
    assert any("not today" in str(note) for note in report.notes)


def test_a_key_goes_to_the_server_that_it_is_for(place: Path) -> None:
    with FakeOpenAI(echo, ("m",)) as one, FakeOpenAI(echo, ("m",)) as other:
        asked = request(place, "base", "base", api_keys=("", "secret"))
        report = compare_models(replace(asked, base=one.url, tuned=other.url))
    assert set(one.keys) == {None}
    assert set(other.keys) == {"Bearer secret"}
    assert "secret" not in str(report.as_dict())


# ---- the command


def command(place: Path, folder: Path, *options: object) -> list[str]:
    given = ("--base", place / "base", "--tuned", place / "adapter", "--save_path", folder)
    asked = ("--questions", 2, "--max_new_tokens", 4, "--template_name", "default", "--dtype", "float32")
    return ["compare", *map(str, (*given, *asked, *options))]


def test_the_command_writes_a_page_and_facts_and_prints_one_json_value(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, tmp_path / "out", "--eval_file", place / "rows.jsonl", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert printed == stored
    assert printed["losses"][0]["rows"] == 14
    assert printed["forgetting"]["correct"]["count"] >= 20
    assert "<html" in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--no_probes"], "nothing to compare"),
        (["--eval_file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--questions", "-1"], "--questions"),
        (["--threshold", "-1"], "--threshold"),
        (["--hub", "modelscop"], "hub"),
        (["--data_format", "foo"], "data_format"),
        (["--judge_model", "m"], "--judge_url"),
        (["--tuned_name", "m"], "--tuned"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    assert main(command(place, tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:")
    assert problem in error
