"""From the address of a server to an engine over it, once the server has shown that it is what we take it for."""

from __future__ import annotations

import http.client
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from firefly.console import notice
from firefly.errors import UsageError
from firefly.files import first_line
from firefly.generation.engine import Delta, Request
from firefly.generation.remote import LONGEST, Process, RemoteEngine, RemoteLimits, Server, ServerError
from firefly.generation.settings import GenerationSettings
from firefly.translation import translate

SAMPLE = "The quick brown fox has 1234 legs. 敏捷的狐狸。"
"""A text by whose ids two vocabularies are told apart."""


def connect(
    server: Server,
    tokenizers: Mapping[str, Any],
    adapters: Collection[str] = (),
    process: Process | None = None,
    limits: RemoteLimits = RemoteLimits(),  # noqa: B008  (frozen)
) -> RemoteEngine:
    """The engine over a server that runs already.

    Args:
        tokenizers: by our names of the models that are to be served: the base's first, if it is one of them.
        adapters: which of these names are adapters'. They have the same names at the server; the base may have another.

    Raises:
        UsageError: no server is there, it lacks one of the models, has another vocabulary, or answers otherwise than
            vLLM does.
    """
    first = next(iter(tokenizers))
    base = next((name for name in tokenizers if name not in adapters), None)
    try:
        listed = [card for card in server.ask("/v1/models")["data"] if isinstance(card.get("id"), str)]
        names, context_length = match_names(server, listed, list(tokenizers), base)
        if process is None:  # of another's we only have the word
            _compare_vocabulary(server, names[first], tokenizers[first])
    except (OSError, http.client.HTTPException, ServerError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "remote.no_server",
            "the server at {url} does not answer as vLLM does: {problem}. Is it running, and is this its address and "
            "its API key (--engine_api_key)?",
            url=server.url,
            problem=first_line(error),
        ) from error
    engine = RemoteEngine(server, names, tokenizers, context_length, process, limits)
    try:
        _try_out(engine, server, tokenizers[first])
    except BaseException:
        engine._process = None  # whoever started it ends it
        engine.close()
        raise
    return engine


def match_names(
    server: Server, listed: Sequence[Mapping[str, Any]], wanted: Sequence[str], base: str | None
) -> tuple[dict[str, str], int]:
    """Our name of each model → the server's, and the most tokens that it takes.

    Args:
        listed: the entries of its /v1/models. vLLM gives an adapter's its base as `parent`.
        base: which of those wanted is the base.

    Raises:
        UsageError: it lacks one, or does not say how many tokens it takes.
    """
    names = {name: name for name in wanted if any(card["id"] == name for card in listed)}
    bases = [card for card in listed if not card.get("parent")]
    if base is not None and base not in names and len({card.get("root") for card in bases}) == 1:
        names = {base: bases[0]["id"], **names}  # several names of one model are as good as each other
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UsageError(
            "remote.no_model",
            "the server at {url} does not serve {missing}; it has {names}. Start it with --lora-modules NAME=PATH, or "
            "give an adapter the name it has there: --adapter_name_or_path NAME=PATH.",
            url=server.url,
            missing=", ".join(missing),
            names=", ".join(card["id"] for card in listed) or "–",
        )
    served = next(card for card in listed if card["id"] == names[wanted[0]])
    lengths = [card["max_model_len"] for card in (served, *bases) if card.get("max_model_len")]
    if not lengths:
        raise ServerError(translate("/v1/models does not say how long a text may be (max_model_len)"))
    return names, int(lengths[0])


def _compare_vocabulary(server: Server, name: str, tokenizer: Any) -> None:
    """
    Raises:
        UsageError: the server's tokenizer makes other ids of a text than ours, so ids mean other things to it.
    """
    ours = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    try:
        theirs = server.ask("/tokenize", {"model": name, "prompt": SAMPLE, "add_special_tokens": False})["tokens"]
    except ServerError as error:
        notice(
            "remote.vocabulary_unchecked",
            "whether the server at {url} has the vocabulary of {name} could not be checked: {problem}.",
            url=server.url,
            name=name,
            problem=error,
        )
        return
    if list(theirs) != list(ours):
        raise UsageError(
            "remote.other_vocabulary",
            "the server at {url} has another vocabulary than the model named here: token ids would mean other texts. "
            "Serve the same model there, or name the one that it serves.",
            url=server.url,
        )


def _try_out(engine: RemoteEngine, server: Server, tokenizer: Any) -> None:
    """Ask for one token that nothing but its bias makes likely: ids, biases and log-probabilities are as we take them.

    Raises:
        UsageError: they are not.
    """
    ids = tuple(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    settings = GenerationSettings(max_new_tokens=2, temperature=0, top_p=1, logit_bias={ids[0]: 100.0}, logprobs=0)
    deltas: list[Delta] = []
    done = threading.Event()

    def deliver(delta: Delta) -> None:
        deltas.append(delta)
        if delta.is_last:
            done.set()

    engine.submit(Request(ids, settings, ids[:1], engine.models[0]), deliver)
    answered = done.wait(LONGEST)
    tokens = [token for delta in deltas for token in delta.tokens]
    if not answered:
        problem = translate("it gave no token in {seconds:.0f} seconds", seconds=LONGEST)
    elif deltas[-1].error:
        problem = deltas[-1].error
    elif [token.id for token in tokens] != [ids[0]]:
        problem = translate("it does not honour logit_bias")
    elif not -math.inf < (tokens[0].logprob or 0) < -1e-3:
        problem = translate(
            "its log-probabilities are not those of the model (start it with --logprobs-mode raw_logprobs)"
        )
    else:
        return
    raise UsageError(
        "remote.other_answers",
        "the server at {url} cannot be used: {problem}.",
        url=server.url,
        problem=problem,
    )
