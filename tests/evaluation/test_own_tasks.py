"""Files of the user's as tasks: what they are read as, how questions are put, and what makes an answer right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from firefly.errors import UsageError
from firefly.evaluation.guest import as_guest
from firefly.evaluation.own_tasks import OwnTask, contains, open_task, read_questions

CEVAL = (
    "id,question,A,B,C,D,answer,explanation\n"
    "0,中国的首都是____。,上海,北京,广州,深圳,B,北京是首都\n"
    "1,下列数字中最大的是____。,1,2,3,4,D,\n"
    '2,"水，也叫做____。",CO2,H2O,O2,NaCl,B,\n'
)

SAID = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def rows_file(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def opened(path: Path, **options: Any) -> OwnTask:
    with as_guest():
        return open_task("mine", path, **options)


def requests(task: OwnTask, template: Any = None) -> list[Any]:
    with as_guest():
        task.task.set_fewshot_seed(1234)
        task.task.build_all_requests(
            apply_chat_template=template is not None, fewshot_as_multiturn=True, chat_template=template
        )
    return task.task.instances


def as_json(history: Sequence[Any], add_generation_prompt: bool = True, **more: Any) -> str:
    return json.dumps([history, more] if more else history, ensure_ascii=False)


def test_a_file_of_c_eval_is_multiple_choice_in_chinese(tmp_path: Path) -> None:
    path = tmp_path / "ceval.csv"
    path.write_text(CEVAL, "utf-8")
    task = opened(path)
    assert (task.kind, task.rows) == ("letters", 3)
    asked = requests(task)
    assert len(asked) == 12
    context, choice = asked[1].args
    assert context == "中国的首都是____。\n\nA. 上海\nB. 北京\nC. 广州\nD. 深圳\n\n请只回答正确选项的字母。\n答案："
    assert choice == "B"
    assert task.task.process_results(asked[0].doc, [(-3, False), (-1, True), (-2, False), (-4, False)]) == {"acc": 1.0}
    assert task.task.process_results(asked[0].doc, [(-1, True), (-3, False), (-2, False), (-4, False)]) == {"acc": 0.0}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Which?", "choices": ["red", "blue"], "answer": 1},
        {"question": "Which?", "choices": ["red", "blue"], "answer": "B"},
        {"question": "Which?", "choices": ["red", "blue"], "answer": "blue"},
        {"question": "Which?", "choices": ["red", "blue"], "answer": "1"},
        {"question": "Which?", "options": ["B", "A"], "answer": "A"},
        {"question": "Which?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"},
        {"Question": "Which?", "A": "red", "B": "blue", "Answer": "(b)"},
        {"question": "Which?", "A": "B", "B": "A", "answer": "B"},
        {"question": "Which?", "options": {"A": "red", "B": "blue"}, "answer": "B"},
        {"question": "Which?", "A": 1, "B": 2, "answer": "B"},
    ],
)
def test_the_right_choice_is_found_by_number_letter_text_or_label(tmp_path: Path, row: dict[str, Any]) -> None:
    _, (asked,) = read_questions(rows_file(tmp_path / "rows.jsonl", row))
    assert (len(asked.choices), asked.gold) == (2, 1)


def test_choices_that_are_texts_follow_the_question_and_count_by_length_too(tmp_path: Path) -> None:
    row = {"question": "What barks?", "choices": ["a dog", "a very small cat"], "answer": 0}
    task = opened(rows_file(tmp_path / "rows.jsonl", row, row))
    first, second, *_ = requests(task)
    assert first.args == ("Question: What barks?\nAnswer:", " a dog")
    assert second.args == ("Question: What barks?\nAnswer:", " a very small cat")
    assert task.task.process_results(first.doc, [(-6.0, False), (-5.0, False)]) == {"acc": 0.0, "acc_norm": 0.0}
    assert task.task.process_results(first.doc, [(-2.0, False), (-9.0, False)]) == {"acc": 1.0, "acc_norm": 1.0}


def test_any_training_file_is_questions_with_answers(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    path = rows_file(
        tmp_path / "rows.jsonl",
        {"conversation": [{"human": "one", "assistant": "two"}, {"human": "three", "assistant": "four"}]},
        {"instruction": "say", "input": "", "output": "said"},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"messages": SAID, "tools": [tool]},
    )
    task = opened(path, metrics=("contains",))
    asked = requests(task, as_json)
    histories = [json.loads(each.args[0]) for each in asked]
    assert [turn["content"] for turn in histories[0]] == ["one", "two", "three"]
    assert [turn["role"] for turn in histories[2]] == ["system", "user"]
    assert histories[3][1]["tools"][0]["function"]["name"] == "f"
    assert [each.doc["reference"] for each in asked] == ["four", "said", "a", "a"]
    assert asked[0].args[1]["until"] == []
    assert task.task.process_results(asked[0].doc, [" It is FOUR. "]) == {"contains": 1.0}
    plain = requests(task)
    assert plain[0].args[0] == "Question: one\nAnswer: two\n\nQuestion: three\nAnswer:"
    assert "\nQuestion:" in plain[0].args[1]["until"]


def test_examples_are_other_rows_or_the_first_of_their_own_file(tmp_path: Path) -> None:
    rows = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(4)]
    path = rows_file(tmp_path / "rows.jsonl", *rows)
    for each in requests(opened(path, num_fewshot=2), as_json):
        *examples, question = json.loads(each.args[0])
        shown = [turn["content"] for turn in examples]
        assert question["content"] not in shown
        assert [answer.replace("a", "q") for answer in shown[1::2]] == shown[::2]
        assert len(shown) == 4
    other = rows_file(tmp_path / "other.jsonl", *({"question": f"x{number}", "answer": "y"} for number in range(3)))
    for each in requests(opened(path, examples=other, num_fewshot=2), as_json):
        assert [turn["content"] for turn in json.loads(each.args[0])][:4] == ["x0", "y", "x1", "y"]
    letters = tmp_path / "ceval.csv"
    letters.write_text(CEVAL, "utf-8")
    context = requests(opened(letters, num_fewshot=1))[0].args[0]
    assert context.count("答案：") == 2
    with pytest.raises(UsageError, match=r"--num_fewshot = 4 .* \(3\)"):
        opened(path, num_fewshot=4)
    with pytest.raises(UsageError, match="same kind"):
        opened(path, examples=letters, num_fewshot=1)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"question": "q", "A": "1", "B": "2"}], "no answer to compare with"),
        ([{"question": "q", "A": "1", "B": "2", "answer": "C"}], "'C' is none of the 2 choices"),
        ([{"question": "q", "choices": ["1", "2"], "answer": 2}], "2 is none of the 2 choices"),
        ([{"question": "q", "choices": ["1", "2"], "answer": True}], "True is none of the 2 choices"),
        ([{"question": "q", "choices": ["1", ""], "answer": 0}], "each choice must be a text"),
        ([{"question": "q", "choices": "1", "answer": 0}], "choices must be a list"),
        ([{"question": "q", "choices": ["1"], "answer": 0}], "choices must be a list"),
        ([{"question": " ", "choices": ["1", "2"], "answer": 0}], "question must be a text"),
        ([{"question": "q", "answer": "a"}, {"question": "q", "A": "1", "B": "2", "answer": "A"}], "something else"),
        ([{"text": "only a text"}], "plain text or token ids"),
        ([{"prompt": "unanswered"}], "no answer to compare with"),
        ([{"nothing": "known"}], "no known format"),
    ],
)
def test_rows_that_cannot_be_judged_are_named_with_their_place(tmp_path: Path, rows: list[Any], problem: str) -> None:
    path = rows_file(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UsageError) as caught:
        read_questions(path)
    assert problem in str(caught.value)
    assert f"rows.jsonl:{len(rows)}" in str(caught.value)
    assert f"1 of {len(rows)} row(s)" in str(caught.value)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no rows"):
        read_questions(rows_file(tmp_path / "rows.jsonl"))


def test_what_contains_means_ignores_case_width_and_white_space() -> None:
    assert contains("The capital is  PARIS.", "paris")
    assert contains("答案是ＡＢＣ", "abc")
    assert not contains("London", "Paris")
