"""lm-eval as a guest in this process: what it prints and sets here is hushed and put back, and it fetches nothing."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from types import ModuleType

from firefly.errors import UsageError
from firefly.hub import offline

SEEDS = (0, 1234, 1234)
"""Of random, numpy and torch: what lm-eval itself sets before tasks shuffle their choices."""
CHATTY = ("lm_eval", "datasets", "evaluate", "absl", "rouge_score")
DEBUG = "FIREFLY_DEBUG"


def require_harness() -> None:
    """Import lm-eval, which takes two seconds, and undo what that does to the environment.

    Raises:
        UsageError: it is not installed.
    """
    with _environment():
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "eval.no_package",
                "{package} is not installed. Install what evaluation needs: pip install -e '.[eval]'",
                package=error.name or "lm_eval",
            ) from error


def is_debugging() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


@contextmanager
def as_guest() -> Iterator[None]:
    """Let lm-eval work: without a word, with its seeds, and with data that are on this machine alone.

    FIREFLY_DEBUG=1 lets it speak, on stderr. Afterwards seeds, environment, loggers and streams are as before.
    """
    import numpy as np
    import torch
    from datasets import config as datasets_config

    try:
        from evaluate import config as evaluate_config
    except ImportError:  # which a few metrics alone need
        evaluate_config = None

    loggers = {logger: logger.level for logger in map(logging.getLogger, CHATTY)}
    drawn = random.getstate(), np.random.get_state()
    silent = not is_debugging()
    with ExitStack() as stack:
        stack.enter_context(_environment())
        os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork a process that has threads
        stack.enter_context(offline())
        stack.enter_context(_set(datasets_config, "HF_HUB_OFFLINE", True))
        if evaluate_config is not None:
            stack.enter_context(_set(evaluate_config, "HF_EVALUATE_OFFLINE", True))
        stack.enter_context(torch.random.fork_rng())
        if silent:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stderr(nowhere))
            stack.enter_context(redirect_stdout(nowhere))
        else:
            stack.enter_context(redirect_stdout(sys.stderr))
        try:
            random.seed(SEEDS[0])
            np.random.seed(SEEDS[1])
            torch.manual_seed(SEEDS[2])
            for logger in loggers if silent else ():
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])
            for logger, level in loggers.items():
                logger.setLevel(level)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _set(config: ModuleType, name: str, value: object) -> Iterator[None]:
    """A setting of a library that looked at the environment when it was imported (`hub.offline` is for the hub's)."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)
