"""The three ways a command can end other than well (DESIGN.md, "Errors").

Every error carries a message code of the catalogue (`messages.py`) and the values it names, so that the same
fault reads well in every language and can be told apart by programs.
"""

from firefly.messages import render


class FireflyError(Exception):
    """An error that the user can act on: printed as one message, without a traceback."""

    exit_code = 2

    def __init__(self, code: str, **values: object) -> None:
        super().__init__(render(code, **values))
        self.code = code
        self.values = values


class UsageError(FireflyError):
    """The input (configuration, data, paths) is at fault. Exit code 2."""

    exit_code = 2


class VerificationError(FireflyError):
    """A check, a verification or an export found problems. Exit code 3."""

    exit_code = 3
