"""Files of the user's as tasks of lm-eval: questions with answers, and multiple choice.

Imports lm-eval: `guest.require_harness` comes first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from firefly.data.formats import MalformedRecord
from firefly.data.formats.prompts import Prompt, read_prompts
from firefly.data.readers import read_records
from firefly.data.schema import Conversation, Message, Source
from firefly.errors import UsageError
from firefly.translation import Phrase

Kind = Literal["answers", "letters", "choices"]

KINDS: dict[Kind, Phrase] = {
    "answers": Phrase("questions with answers, which are written and compared"),
    "letters": Phrase("multiple choice by letters, by log-likelihood"),
    "choices": Phrase("multiple choice among texts, by log-likelihood"),
}
QUESTION, CHOICES = ("question", "prompt", "query", "input", "instruction"), ("choices", "options")
RIGHT = ("answer", "answerkey", "answer_index", "answer_idx", "label", "target", "gold")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER = re.compile(r"\(?([A-Za-z])[).．、]?")
HAN, KANA = re.compile(r"[\u3400-\u9fff]"), re.compile(r"[\u3040-\u30ff]")


# ---- how questions are put, by language


@dataclass(frozen=True)
class Wording:
    """What stands around questions and answers that no chat template renders, and around choices.

    Attributes:
        gap: between `answer` and the answer itself.
    """

    question: str
    answer: str
    by_letter: str
    gap: str

    def of_letters(self, question: str, choices: Sequence[str]) -> str:
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        return f"{question}\n\n{listed}\n\n{self.by_letter}\n{self.answer}"

    def of_choices(self, question: str) -> str:
        return f"{self.question}{question}\n{self.answer}"

    def of_messages(self, messages: Sequence[Message]) -> str:
        """A conversation as plain text, up to where its answer begins."""
        heads = {"user": self.question, "assistant": self.answer + self.gap}
        turns = [heads.get(message.role, "") + message.text for message in messages]
        ends = ["\n\n" if message.role == "assistant" else "\n" for message in messages]
        return "".join(turn + end for turn, end in zip(turns, ends, strict=True)) + self.answer

    @property
    def ends(self) -> list[str]:
        """Texts that end an answer which goes on with a question of its own."""
        return ["\n\n", "\n" + self.question.strip()]


ENGLISH = Wording("Question: ", "Answer:", "Answer with the letter of the right choice alone.", " ")
CHINESE = Wording("问题：", "答案：", "请只回答正确选项的字母。", "")


def wording_of(texts: Sequence[str]) -> Wording:
    """Chinese where most texts are: those with Chinese characters and without kana."""
    chinese = sum(bool(HAN.search(text)) and not KANA.search(text) for text in texts)
    return CHINESE if 2 * chinese > len(texts) else ENGLISH


# ---- metrics of written answers


def contains(answer: str, reference: str) -> bool:
    """Whether the reference stands in the answer, whatever its case, width and white space."""
    plain_answer, plain_reference = (
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in (answer, reference)
    )
    return plain_reference in plain_answer


def _metrics() -> dict[str, Callable[[str, str], float]]:
    from firefly.evaluation import text_metrics

    return {
        "exact_match": text_metrics.exact_match,
        "contains": contains,
        "chrf": text_metrics.chrf,
        "bleu": text_metrics.bleu,
        "rouge_l": text_metrics.rouge_l,
    }


METRICS = ("exact_match", "contains", "chrf", "bleu", "rouge_l")
"""Of an answer and its reference: 0 or 1, or points of 100."""


# ---- rows


@dataclass(frozen=True)
class Asked:
    """A row of a file.

    Attributes:
        place: where it stands.
        prompt: what is answered in writing; None of multiple choice.
        question, choices, gold: of multiple choice, with the number of the right one.
    """

    place: Source
    prompt: Prompt | None = None
    question: str = ""
    choices: tuple[str, ...] = ()
    gold: int = 0

    @property
    def shown(self) -> str:
        if self.prompt is None:
            return self.question
        assert isinstance(self.prompt.asked, Conversation)
        return self.prompt.asked.messages[-1].text


def read_questions(path: Path) -> tuple[Kind, list[Asked]]:
    """The rows of a file, and what its first one shows them to be.

    Raises:
        UsageError: it cannot be read, has no rows, or has some that are no questions with answers.
    """
    kind: Kind | None = None
    asked: list[Asked] = []
    problems: list[tuple[Source, Phrase]] = []
    rows = 0
    for record in read_records(path, "tasks"):
        if record.blank:
            continue
        rows += 1
        try:
            if record.problem is not None:
                raise MalformedRecord(record.problem.text, **record.problem.values)
            value = record.value
            kind = kind or _kind_of(value)
            asked += _read(value, kind, record.source)
        except MalformedRecord as error:
            problems.append((record.source, error.phrase))
        except RecursionError:
            problems.append((record.source, Phrase("nested too deeply")))
    if problems:
        place, problem = problems[0]
        raise UsageError(
            "eval.malformed",
            "{place}: {problem}. {count} of {rows} row(s) of {path} cannot be asked and judged. Correct or remove "
            "them; docs/eval.md shows what a row may hold.",
            place=place,
            problem=problem,
            count=len(problems),
            rows=rows,
            path=path,
        )
    if kind is None:
        raise UsageError("eval.no_rows", "{path} has no rows. Give a file of questions with answers.", path=path)
    return kind, asked


def _kind_of(value: Any) -> Kind:
    if isinstance(value, Mapping):
        names = {str(key).lower() for key in value}
        if names.intersection(CHOICES) and names.intersection(QUESTION):
            return "letters" if isinstance(_value(value, CHOICES), Mapping) and not _labelled(value) else "choices"
        if {"A", "B"} <= value.keys() and names.intersection(QUESTION):
            return "letters"
    return "answers"


def _read(value: Any, kind: Kind, place: Source) -> Iterator[Asked]:
    if _kind_of(value) != kind:
        raise MalformedRecord("the file begins with {kind}, and this row is something else", kind=KINDS[kind])
    if kind == "answers":
        yield from _read_answers(value, place)
        return
    question = _value(value, QUESTION)
    if not isinstance(question, str) or not question.strip():
        raise MalformedRecord("{field} must be a text", field=QUESTION[0])
    listed = _value(value, CHOICES)
    labels: Sequence[str] = ()
    if kind == "choices" and isinstance(listed, Mapping):
        listed, labels = listed["text"], [str(label) for label in listed["label"]]
    elif kind == "letters":
        columns = listed if isinstance(listed, Mapping) else value
        count = next((place for place, letter in enumerate(LETTERS) if columns.get(letter) in (None, "")), len(LETTERS))
        listed = [columns[letter] for letter in LETTERS[:count]]
    if not isinstance(listed, list | tuple) or len(listed) < 2:
        raise MalformedRecord("{field} must be a list of two texts or more", field=CHOICES[0])
    choices = tuple(_choice(each) for each in listed)
    gold = _gold(_value(value, RIGHT), choices, labels, by_letter=kind == "letters")
    yield Asked(place, None, question.strip(), choices, gold)


def _read_answers(value: Any, place: Source) -> Iterator[Asked]:
    for prompt in read_prompts(value).prompts:
        if not isinstance(prompt.asked, Conversation):
            raise MalformedRecord("plain text or token ids, where a question with an answer is needed")
        reference = prompt.reference
        if not isinstance(reference, Message) or not reference.text.strip():
            raise MalformedRecord("there is no answer to compare with")
        yield Asked(place, prompt)


def _value(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What stands under the first of some names, in any case."""
    lower = {str(key).lower(): item for key, item in value.items() if item is not None}
    return next((lower[name] for name in names if name in lower), None)


def _labelled(value: Mapping[str, Any]) -> bool:
    """Whether the choices are texts beside labels, as ARC has them."""
    listed = _value(value, CHOICES)
    return (
        isinstance(listed, Mapping) and isinstance(listed.get("text"), list) and isinstance(listed.get("label"), list)
    )


def _choice(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise MalformedRecord("each choice must be a text that is not empty")
    return str(value).strip()


def _gold(value: Any, choices: Sequence[str], labels: Sequence[str], by_letter: bool) -> int:
    """The number of the right choice, given as its label, letter or text, or as a number from 0."""
    if value is None or value == "":
        raise MalformedRecord("there is no answer to compare with")
    text = str(value).strip()
    found = LETTER.fullmatch(text)
    letter = LETTERS.index(found[1].upper()) if found else None
    by_text = choices.index(text) if text in choices else None
    by_number = int(text) if not isinstance(value, bool) and re.fullmatch(r"\d+", text) else None
    ways = [letter, by_text, by_number] if by_letter else [by_text, letter, by_number]
    if isinstance(value, int):
        ways = [by_number]
    number = labels.index(text) if text in labels else next((way for way in ways if way is not None), None)
    if number is None or number >= len(choices):
        raise MalformedRecord(
            "the answer {answer!r} is none of the {count} choices: write its letter, its text, or its number from 0",
            answer=value,
            count=len(choices),
        )
    return number


# ---- tasks


@dataclass(frozen=True)
class OwnTask:
    """A file as a task.

    Attributes:
        task: lm-eval's.
    """

    name: str
    path: Path
    kind: Kind
    rows: int
    task: ConfigurableTask


def open_task(
    name: str,
    path: Path,
    examples: Path | None = None,
    metrics: Sequence[str] = ("exact_match",),
    max_new_tokens: int = 256,
    num_fewshot: int = 0,
) -> OwnTask:
    """A file as a task.

    Args:
        examples: a file whose first rows are shown as examples; None: drawn from the other rows of the file.
        metrics: of written answers.

    Raises:
        UsageError: see `read_questions`; too few rows for the examples.
    """
    kind, asked = read_questions(path)
    shown = list(asked)
    if examples is not None:
        other, shown = read_questions(examples)
        if other != kind:
            raise UsageError(
                "eval.other_examples",
                "{path} holds {kind}, and its examples in {examples} are {other}. Give examples of the same kind.",
                path=path,
                kind=KINDS[kind],
                examples=examples,
                other=KINDS[other],
            )
    if num_fewshot > len(shown) - (examples is None):
        raise UsageError(
            "eval.too_few_examples",
            "--num_fewshot = {shots} is more than the rows that {path} can give as examples ({rows}).",
            shots=num_fewshot,
            path=examples or path,
            rows=len(shown) - (examples is None),
        )
    wording = wording_of([row.shown for row in asked])
    if kind == "answers":
        task: ConfigurableTask = WrittenAnswers(
            name, asked, shown, examples is not None, wording, metrics, max_new_tokens
        )
    else:
        docs = [[_doc(number, row, kind, wording) for number, row in enumerate(rows)] for rows in (asked, shown)]
        task = ConfigurableTask(
            config=_config(name, *docs, own_examples=examples is not None)
            | {
                "output_type": "multiple_choice",
                "doc_to_text": "prompt",
                "doc_to_choice": "choices",
                "doc_to_target": "gold",
                "target_delimiter": wording.gap,
                "metric_list": [_mean(metric) for metric in (("acc",) if kind == "letters" else ("acc", "acc_norm"))],
            }
        )
    task.set_config("num_fewshot", num_fewshot)
    return OwnTask(name, path, kind, len(asked), task)


def _doc(number: int, row: Asked, kind: Kind, wording: Wording) -> dict[str, Any]:
    by_letter = kind == "letters"
    prompt = wording.of_letters(row.question, row.choices) if by_letter else wording.of_choices(row.question)
    choices = list(LETTERS[: len(row.choices)]) if by_letter else list(row.choices)
    return {"number": number, "place": str(row.place), "prompt": prompt, "choices": choices, "gold": row.gold}


def _config(name: str, docs: list[Any], shown: list[Any], own_examples: bool) -> dict[str, Any]:
    def rows(**given: Any) -> dict[str, Dataset]:
        found = {"test": Dataset.from_list(docs)}
        return found | {"examples": Dataset.from_list(shown)} if own_examples else found

    return {
        "task": name,
        "custom_dataset": rows,
        "test_split": "test",
        "fewshot_split": "examples" if own_examples else "test",
        "fewshot_config": {"sampler": "first_n" if own_examples else "default"},
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


class WrittenAnswers(ConfigurableTask):
    """Conversations whose next reply is written and compared with the one that the row holds."""

    def __init__(
        self,
        name: str,
        asked: Sequence[Asked],
        shown: Sequence[Asked],
        own_examples: bool,
        wording: Wording,
        metrics: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self.wording = wording
        self.rows = {"test": [row.prompt for row in asked], "examples": [row.prompt for row in shown]}
        self.own_examples = own_examples
        functions = _metrics()

        def judge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
            answer = results[0].strip()
            return {metric: float(functions[metric](answer, doc["reference"])) for metric in metrics}

        docs = [
            [
                {"number": number, "place": str(row.place), "question": row.shown, "reference": _reference(row.prompt)}
                for number, row in enumerate(rows)
            ]
            for rows in (asked, shown)
        ]
        super().__init__(
            config=_config(name, *docs, own_examples=own_examples)
            | {
                "output_type": "generate_until",
                "doc_to_text": "question",
                "doc_to_target": "reference",
                "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False},
                "process_results": judge,
                "metric_list": [_mean(metric) for metric in metrics],
            }
        )

    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> str:
        asked = self._conversation(self.rows["test"][doc["number"]])
        examples: list[Message] = []
        if num_fewshot:
            for example in self.sampler.sample(n=num_fewshot, eval_doc=None if self.own_examples else doc):
                prompt = self.rows["examples"][example["number"]]
                turns = self._conversation(prompt).messages
                reply = Message.of("assistant", _reference(prompt))
                examples += [*(message for message in turns if message.role != "system"), reply]
        border = 1 if asked.messages[0].role == "system" else 0
        messages = (*asked.messages[:border], *examples, *asked.messages[border:])
        if not apply_chat_template or chat_template is None:
            return self.wording.of_messages(messages)
        conversation = replace(asked, messages=messages)
        tools = {"tools": asked.tools} if asked.tools else {}
        return chat_template(conversation.as_dicts(), add_generation_prompt=True, **tools)

    def construct_requests(self, doc: Any, ctx: Any, **given: Any) -> Instance:
        templated = given.pop("apply_chat_template", False)
        given.pop("chat_template", None)
        settings = dict(self.config.generation_kwargs or {})
        if not templated:
            settings["until"] = self.wording.ends
        return Instance("generate_until", doc, (ctx, settings), 0, **given)

    @staticmethod
    def _conversation(prompt: Prompt | None) -> Conversation:
        assert prompt is not None
        assert isinstance(prompt.asked, Conversation)
        return prompt.asked


def _reference(prompt: Prompt | None) -> str:
    assert prompt is not None
    assert isinstance(prompt.reference, Message)
    return prompt.reference.text.strip()
