"""Hubs, asked once and within a deadline. The libraries that download would try an unreachable one for a minute, and
again for every file.

Nothing is downloaded here: a hub that answers leaves the rest to its library. Of one that does not, what an earlier
run left in the library's cache is used, and a notice says so.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from firefly.console import notice
from firefly.errors import UsageError
from firefly.files import first_line, make_cache
from firefly.translation import Phrase

T = TypeVar("T")

DEADLINE, TRIES = 6.0, 3
"""Seconds for an answer, all tries together; HF_HUB_ETAG_TIMEOUT in the environment sets others."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""What a server answers that may be well again in a moment."""


class NoAnswer(Exception):
    """The hub could not be reached, or nothing there answers as a hub does."""


def find_model(name: str, revision: str | None) -> bool:
    """Whether the Hugging Face Hub gives out a model now; False: it cannot be asked, and a copy is in the cache.

    Raises:
        UsageError: the hub has no such model or keeps it from this user, or it cannot be asked and there is no copy.
    """
    from huggingface_hub import constants

    return _find_model(name, revision, constants.ENDPOINT, constants.HF_HUB_OFFLINE)


@cache  # a command asks for one model many times; a refusal ends it
def _find_model(name: str, revision: str | None, endpoint: str, offline: bool) -> bool:
    key = "model_name_or_path"
    copy = _copy_or_place(key, name, revision, "model", offline)
    if offline:
        return False
    try:
        _ask(lambda seconds: _model_answers(name, revision, seconds), key, name, revision, copy)
    except NoAnswer:
        return False
    return True


def list_dataset(key: str, name: str, revision: str | None) -> list[str] | None:
    """Names of the files of a dataset of the Hugging Face Hub; None: it cannot be asked, and a copy is in the cache.

    Raises:
        UsageError: as `find_model`.
    """
    from huggingface_hub import constants

    return _list_dataset(key, name, revision, constants.ENDPOINT, constants.HF_HUB_OFFLINE)


@cache
def _list_dataset(key: str, name: str, revision: str | None, endpoint: str, offline: bool) -> list[str] | None:
    from huggingface_hub import HfApi

    copy = _copy_or_place(key, name, revision, "dataset", offline)
    if offline:
        return None

    def question(seconds: float) -> Any:
        return HfApi(endpoint).dataset_info(name, revision=revision, timeout=seconds)

    try:
        info = _ask(question, key, name, revision, copy)
    except NoAnswer:
        return None
    return sorted(file.rfilename for file in info.siblings or ())


def ask_modelscope() -> None:
    """Find out that ModelScope can be reached.

    Raises:
        NoAnswer: it cannot.
    """
    _patiently(_modelscope_answers)


def modelscope_package() -> Any:
    """ModelScope's own library, by name: an optional package is not there for the type checker either.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("modelscope")
    except ImportError:
        raise UsageError("model.no_modelscope", "hub = modelscope needs a package: pip install modelscope.") from None


def modelscope() -> str:
    """The address of ModelScope, as its library finds it."""
    found = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return found if "://" in found else f"https://{found}"


def incomplete(name: str, problem: str) -> UsageError:
    """What to say of a copy that lacks something."""
    from huggingface_hub import constants

    return UsageError(
        "hub.incomplete",
        "model_name_or_path = {name}: the copy in the cache is not whole ({problem}), and the hub {hub} could not be "
        "asked for the rest.\n"
        'Set HF_ENDPOINT to a mirror that can be reached (such as https://hf-mirror.com), use ModelScope ("hub": '
        '"modelscope"), or give a local folder.',
        name=name,
        hub=constants.ENDPOINT,
        problem=problem,
    )


@contextmanager
def offline() -> Iterator[None]:
    """As under HF_HUB_OFFLINE=1: libraries take what is in the cache. Not all of them regard `local_files_only` in each
    of their questions (transformers 5.23 looks for an adapter beside the weights), and each would be asked six times.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def unreachable(key: str, name: str, hub: str, problem: object) -> NoReturn:
    raise UsageError(
        "hub.unreachable",
        "{key} = {name} is not a local path, and the hub {hub} could not be reached: {problem}\n"
        'Set HF_ENDPOINT to a mirror that can be reached (such as https://hf-mirror.com), use ModelScope ("hub": '
        '"modelscope", pip install modelscope), or give a local folder or file that was downloaded elsewhere.',
        key=key,
        name=name,
        hub=hub,
        problem=problem,
    ) from None


def note_copy(name: str, hub: str, problem: object) -> None:
    notice(
        "hub.copy",
        "the hub {hub} could not be reached ({problem}); of {name} the copy in the cache is used.",
        name=name,
        hub=hub,
        problem=problem,
    )


def _ask(question: Callable[[float], T], key: str, name: str, revision: str | None, copy: Path | None) -> T:
    """What the Hugging Face Hub answers.

    Args:
        question: asks, waiting so many seconds at most.
        key, name, revision: what is asked for, and by which key of the configuration, for messages.
        copy: in the library's cache.

    Raises:
        NoAnswer: the hub does not answer in time, not as a hub, or with a refusal; `copy` is there, and a notice said
            that it is used.
        UsageError: the same without a copy, or the hub has no such revision.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked: dict[str, Any] = {"key": key, "name": name, "hub": constants.ENDPOINT}
    try:
        return _patiently(question)
    except NoAnswer as error:
        problem, refusal = error, None
    except RevisionNotFoundError:
        raise UsageError(
            "hub.no_revision",
            "{key} = {name}: the hub {hub} has no revision {revision} of it.",
            revision=revision,
            **asked,
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        problem, refusal = f"HTTP {status}", None
        if isinstance(error, GatedRepoError) or status == 403:
            refusal = UsageError(
                "hub.refused",
                "{key} = {name}: the hub {hub} does not give it to you (HTTP {status}).\n"
                "Accept its conditions at {hub}/{name}, and log in: hf auth login, or set HF_TOKEN.",
                status=status,
                **asked,
            )
        elif isinstance(error, RepositoryNotFoundError) or status in (401, 404):
            refusal = UsageError(
                "hub.missing",
                "{key} = {name} is not a local path, and the hub {hub} does not know it, or keeps it private (HTTP "
                "{status}).\n"
                "Check the path or the name (org/name; the built-in model is smollm2-135m-instruct). For a private "
                "one log in: hf auth login, or set HF_TOKEN.",
                status=status,
                **asked,
            )
    if copy is None:
        if refusal is not None:
            raise refusal
        unreachable(problem=problem, **asked)
    note_copy(name, constants.ENDPOINT, problem)
    raise NoAnswer(problem)


def _model_answers(name: str, revision: str | None, seconds: float) -> None:
    """Ask for config.json as transformers does, with the library's own client: its proxies, its token."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        found = get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=seconds)
    except EntryNotFoundError:
        return  # a model in another form, or a tokenizer
    except HfHubHTTPError as error:
        if error.response.status_code != 404 or error.response.headers.get("X-Error-Code"):
            raise
        # A mirror that does not say what is missing, the model or this file of it.
        HfApi().model_info(name, revision=revision, timeout=seconds)
        return
    if found.commit_hash is None:
        raise NoAnswer(Phrase("what answers there is no hub (a proxy's or a login page, or a wrong HF_ENDPOINT)"))


def _modelscope_answers(seconds: float) -> None:
    try:
        urllib.request.urlopen(modelscope(), timeout=seconds).close()
    except urllib.error.HTTPError as error:  # an answer, too
        if error.code in PASSING:
            raise NoAnswer(f"HTTP {error.code}") from None


def _patiently(question: Callable[[float], T]) -> T:
    """The answer to `question`, asked again where a failure may pass, as long as there is time.

    Raises:
        NoAnswer: none in time, or no connection.
        Exception: what the client makes of an answer that says no.
    """
    limit = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or DEADLINE)
    end = time.monotonic() + limit
    tries = 0
    while True:
        answer = _within(end - time.monotonic(), question)
        if answer is None:
            raise NoAnswer(Phrase("no answer within {seconds} s", seconds=f"{limit:g}"))
        found, error = answer
        if error is None:
            return found  # type: ignore[return-value]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, NoAnswer) or status not in (None, *PASSING):
            raise error
        tries += 1
        if tries == TRIES or time.monotonic() + tries >= end:
            raise NoAnswer(f"HTTP {status}" if status else first_line(error)) from None
        time.sleep(tries)


def _within(seconds: float, question: Callable[[float], T]) -> tuple[T | None, Exception | None] | None:
    """What `question` returns and raises; None where it takes longer.

    In a thread: no timeout of a client covers the look-up of a name, several addresses one after another, and an answer
    that comes in drops.
    """
    answers: list[tuple[T | None, Exception | None]] = []

    def asked() -> None:
        try:
            answers.append((question(seconds), None))
        except Exception as error:
            answers.append((None, error))

    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


# ---- what its library keeps ----


def _copy_or_place(key: str, name: str, revision: str | None, kind: str, offline: bool) -> Path | None:
    """The copy in the library's cache; where there is none, one can be put there.

    Raises:
        UsageError: no hub has such a name, nothing can be asked for it, or the cache cannot take it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UsageError(
            "hub.bad_id",
            "{key} = {name} is not a local path, and no name that a hub could know. Check the path, or give an id "
            "(org/name).",
            key=key,
            name=name,
        ) from None
    kept = Path(constants.HF_HUB_CACHE)
    copy = _named_snapshot(kept / repo_folder_name(repo_id=name, repo_type=kind), revision or "main")
    if copy is None and offline:
        raise UsageError(
            "hub.offline",
            "{key} = {name} is not a local path and not in the cache {path}, and HF_HUB_OFFLINE forbids to ask a hub. "
            "Unset it, or give a local folder or file.",
            key=key,
            name=name,
            path=kept,
        )
    if copy is None:
        make_cache(kept, "HF_HOME")
    return copy


def _named_snapshot(root: Path, revision: str) -> Path | None:
    """The snapshot of a branch, a tag or a commit."""
    reference = root / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    folder = root / "snapshots" / commit
    return folder if folder.is_dir() and any(folder.iterdir()) else None


@cache  # a command asks for one folder many times; the notice is for the first
def snapshot_of(folder: Path, revision: str | None = None) -> Path:
    """The snapshot that a folder of the library's cache (models--org--name, datasets--org--name, or what it has its
    snapshots in) stands for; any other folder stands for itself.

    Raises:
        UsageError: there is none, or not the revision that was asked for, or it has links to nothing.
    """
    root = folder.parent if folder.name == "snapshots" else folder
    in_cache = (root / "snapshots").is_dir() and any((root / name).is_dir() for name in ("refs", "blobs"))
    if not in_cache and not root.name.startswith(("models--", "datasets--")):
        return folder
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "tokenizer_config.json")):
        return folder
    there = sorted((root / "snapshots").glob("*/"), key=lambda path: path.stat().st_mtime)
    there = [path for path in there if any(path.iterdir())]
    found = _named_snapshot(root, revision or "main")
    if found is None and not revision and there:
        found = there[-1]
    if found is None:
        missing = [f"refs/{revision}" if revision else "snapshots/*"]
    else:
        missing = [str(path.relative_to(found)) for path in found.rglob("*") if not path.exists()]
    if found is None or missing:
        raise UsageError(
            "hub.no_snapshot",
            "{path} is a folder of a hub's cache, and what is needed is not in it: {missing} (snapshots there: "
            "{there}). Download it again, or copy it whole (cp -rL follows its links).",
            path=folder,
            missing=", ".join(sorted(missing)[:5]),
            there=", ".join(path.name for path in there) or "–",
        )
    notice(
        "hub.followed",
        "{path} is a folder of a hub's cache with {count} snapshot(s); {snapshot} is read.",
        path=folder,
        snapshot=found,
        count=len(there),
    )
    return found
