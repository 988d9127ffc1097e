"""A model that is asked by the network: whatever speaks OpenAI's chat completions."""

from __future__ import annotations

import http.client
import json
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from firefly.console import notice
from firefly.data.schema import Message
from firefly.data.tool_calls import CallStyle, openai_message
from firefly.errors import UsageError
from firefly.evaluation.measurement import GivenAnswer, Question
from firefly.files import first_line
from firefly.generation.remote import LONGEST, Server, ServerError
from firefly.translation import translate

PAUSES = (1.0, 4.0)
"""Seconds before a question is put again, where the endpoint was busy or the connection broke."""
LONGEST_PAUSE = 30.0
"""Of those that an endpoint asks for itself."""
BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
KEY_REFUSED = {401, 403}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OTHER_LIMIT = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
FAILURES = 3
"""So many questions in a row that no connection took: nobody is there, and the rest are not put."""

CALLS = CallStyle(as_text=True, identify=lambda identifier, function, number: identifier)
"""Endpoints refuse calls and results without an identifier; rows often have none."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked.

    Attributes:
        url: of the server, with or without the closing /v1.
        model: its name there; "": the only one that /v1/models lists.
        concurrency: questions that are put at a time.
    """

    url: str
    model: str = ""
    api_key: str = field(default="", repr=False)
    concurrency: int = 8

    def __post_init__(self) -> None:
        try:
            Server(self.url)
        except UsageError as error:
            raise UsageError(
                "endpoint.bad_url",
                "{url} is no address of an OpenAI endpoint. Write it as http://HOST:PORT/v1.",
                url=self.url.rpartition("@")[2],  # what stands in front may be a password
            ) from error
        if self.concurrency < 1:
            raise UsageError(
                "endpoint.bad_concurrency",
                "concurrency = {value} is not valid: at least one question is put at a time.",
                value=self.concurrency,
            )

    @property
    def server(self) -> Server:
        return Server(self.url, self.api_key.strip())

    @property
    def shown_url(self) -> str:
        """The address as a report may show it: without a user's name and password, and without a query."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

    def named(self) -> Endpoint:
        """The same with the name of its model.

        Raises:
            UsageError: it lists none or several, or nobody is there.
        """
        if self.model:
            return self
        try:
            names = _model_names(self.server)
        except (OSError, http.client.HTTPException, ServerError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "endpoint.no_list",
                "the endpoint {url} does not say which models it has: {problem}. Is it running, and are this its "
                "address and its API key? If it keeps no list, name the model.",
                url=self.shown_url,
                problem=first_line(error),
            ) from error
        if len(names) != 1:
            raise UsageError(
                "endpoint.which_model",
                "the endpoint {url} has {count} models; name the one that is meant: {names}.",
                url=self.shown_url,
                count=len(names),
                names=", ".join(names) or "–",
            )
        return replace(self, model=names[0])

    def answer(
        self, questions: Sequence[Question], max_new_tokens: int, tick: Callable[[], None] = lambda: None
    ) -> tuple[GivenAnswer, ...]:
        """Its answers at temperature 0, in the order of the questions. One that fails has an error in place of a text.

        Args:
            tick: called after each answer.

        Raises:
            UsageError: all fail, and for one reason.
        """
        if not questions:
            return ()
        asking = _Asking(self.named(), max_new_tokens)
        answers = asking.all(questions, tick)
        if any("temperature" not in settings for settings in asking.settings.values()):
            notice(
                "endpoint.no_temperature",
                "{model} at {url} refuses temperature 0: its answers are drawn, and may be others the next time.",
                model=asking.endpoint.model,
                url=self.shown_url,
            )
        problems = {answer.error for answer in answers}
        if len(problems) == 1 and None not in problems:
            raise asking.refusal(problems.pop() or "")
        return answers


def _model_names(server: Server) -> list[str]:
    return [str(card["id"]) for card in server.ask("/v1/models")["data"]]


class _Asking:
    """Questions on their way to an endpoint, and what has been learnt of it meanwhile.

    Attributes:
        settings: of a request to each path, as the endpoint takes them: not every one has the same name for the longest
            answer.
    """

    def __init__(self, endpoint: Endpoint, max_new_tokens: int) -> None:
        self.endpoint = endpoint
        settings = {"max_tokens": max_new_tokens, "temperature": 0}
        self.settings = {CHAT: settings, COMPLETIONS: settings}
        self._server = endpoint.server
        self._failures = 0
        self._given_up: Exception | None = None
        self._stop = threading.Event()

    def all(self, questions: Sequence[Question], tick: Callable[[], None]) -> tuple[GivenAnswer, ...]:
        """On threads that end with the program: an interrupt does not wait for answers that nobody wants any more."""
        todo: queue.SimpleQueue[tuple[int, Question]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, GivenAnswer | BaseException]] = queue.SimpleQueue()
        for placed in enumerate(questions):
            todo.put(placed)

        def work() -> None:
            while not self._stop.is_set():
                try:
                    place, question = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((place, self._one(question)))
                except BaseException as error:  # somebody waits for it
                    done.put((place, error))

        for number in range(min(self.endpoint.concurrency, len(questions))):
            threading.Thread(target=work, name=f"endpoint-{number}", daemon=True).start()
        answers: dict[int, GivenAnswer] = {}
        try:
            while len(answers) < len(questions):
                place, answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                answers[place] = answer
                tick()
        finally:
            self._stop.set()
        return tuple(answers[place] for place in range(len(questions)))

    def refusal(self, problem: str) -> UsageError:
        """Why nothing was answered, as the user can mend it."""
        shown = {"url": self.endpoint.shown_url, "model": self.endpoint.model, "problem": problem}
        names = []
        if self._given_up is None:
            with suppress(OSError, http.client.HTTPException, ServerError, ValueError, KeyError, TypeError):
                names = _model_names(self._server)
        if names and self.endpoint.model not in names:
            return UsageError(
                "endpoint.no_model",
                "the endpoint {url} does not serve {model}; it has {names}. ({problem})",
                **shown,
                names=", ".join(names),
            )
        return UsageError(
            "endpoint.no_answers",
            "the endpoint {url} answers none of the questions: {problem}. Is it running, and are address, model "
            "({model}) and API key right?",
            **shown,
        )

    # ---- on threads of its own

    def _one(self, question: Question) -> GivenAnswer:
        try:
            if self._given_up is not None:
                raise self._given_up
            if question.messages or question.text is None:
                asked: dict[str, Any] = {"messages": chat_messages(question.messages)}
                if question.tools:
                    asked["tools"] = [dict(tool) for tool in question.tools]
                choice, tokens = self._choice(CHAT, asked)
                text = said(choice["message"])
            else:
                choice, tokens = self._choice(COMPLETIONS, {"prompt": question.text})
                text = choice["text"] or ""
        except (OSError, http.client.HTTPException, ServerError, ValueError) as error:
            return GivenAnswer(question.key, "", error=first_line(error))
        except (LookupError, TypeError, AttributeError) as error:
            problem = translate("an answer that is not as OpenAI's API has it: {problem}", problem=first_line(error))
            return GivenAnswer(question.key, "", error=problem)
        reason = choice.get("finish_reason")
        reason = "stop" if reason in ("tool_calls", "function_call") else reason  # the model ended it
        return GivenAnswer(question.key, text, tokens, reason)

    def _choice(self, path: str, asked: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
        """The first choice of an answer, and the tokens that it took.

        A setting that the endpoint refuses is given another name or left out, and so it stays if that helps.
        """
        settings = self.settings[path]
        refused: ServerError | None = None
        while True:
            try:
                found = self._patiently(path, {"model": self.endpoint.model, **asked, **settings})
                break
            except ServerError as error:
                if error.status not in (400, 422):
                    raise
                if "temperature" in str(error) and "temperature" in settings:
                    settings = {name: value for name, value in settings.items() if name != "temperature"}
                elif any(name in str(error) for name in OTHER_LIMIT):
                    # A context that is too short is told in the same words.
                    if refused is not None:
                        raise refused from error
                    refused = error
                    settings = {OTHER_LIMIT.get(name, name): value for name, value in settings.items()}
                else:
                    raise
        self.settings[path] = settings
        used = found.get("usage") or {}
        return found["choices"][0], int(used.get("completion_tokens") or 0)

    def _patiently(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers, asked again after a pause where that may help."""
        for pause in (*PAUSES, None):
            try:
                found = self._server.ask(path, body, LONGEST)
                self._failures = 0
                return found
            except ServerError as error:
                self._failures = 0
                if error.status in KEY_REFUSED:
                    self._given_up = error
                if error.status not in BUSY or pause is None:
                    raise
                pause = min(max(pause, error.retry_after or 0), LONGEST_PAUSE)
            except (OSError, http.client.HTTPException) as error:
                # A time that has run out has run long enough.
                if pause is None or isinstance(error, TimeoutError):
                    self._failures += 1
                    if self._failures >= FAILURES:
                        self._given_up = error
                    raise
            if self._stop.wait(pause):
                break
            if self._given_up is not None:  # by another thread
                raise self._given_up
        raise ConnectionAbortedError  # nobody waits any more


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as every chat endpoint takes them: calls with identifiers, thoughts of earlier turns left out, which
    some refuse."""
    sent = [openai_message(message) for message in CALLS.complete(messages)]
    for message in sent:
        message.pop("reasoning_content", None)
    return sent


def said(message: Mapping[str, Any]) -> str:
    """The text of a reply, without thoughts; a call of a function is one line of JSON."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return "\n".join([text for text in [without_thoughts(content)] if text] + [_written(call) for call in calls])


def without_thoughts(text: str) -> str:
    """A reply without a thought in front of it, whose opening mark the prompt may have had. One that never came to its
    end leaves nothing."""
    thought = re.match(r"\s*<think>", text)
    before, mark, after = text.partition("</think>")
    if thought:
        return after.lstrip() if mark else ""
    return after.lstrip() if mark and "<think>" not in before else text


def _written(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
