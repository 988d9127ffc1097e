"""llama.cpp reads a GGUF file back: what prompts it makes of conversations, where it stops, what it predicts.

It is the real one, its server and its chat endpoint included, through xllamacpp, in a process of its own
(`llamacpp_worker.py`): llama.cpp ends its process when a file is damaged in a way that it does not look for, and what
it holds in memory is given back with the process.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from firefly.console import notice
from firefly.data.tool_calls import openai_message
from firefly.errors import UsageError, VerificationError
from firefly.export.agreement import Candidates, Refused
from firefly.export.battery import BatteryRow
from firefly.export.llamacpp_worker import UNUSABLE
from firefly.translation import translate

PACKAGE = "xllamacpp"
WORKER = Path(__file__).with_name("llamacpp_worker.py")
STARTS_WITHIN = 1200.0
"""Seconds. The file is mapped, but its tokenizer is read; and a disk may be slow."""
LONGEST = 3600.0
"""Seconds for one answer: a large model reads a prompt on a CPU."""
LIKELIEST = 1024
"""How many tokens of a distribution are asked for: what the trained model thinks likely has to be among them."""
FORCED = 1e6
"""A bias that no logit comes near, so that a token is chosen for certain."""
ANSWER = 32
"""Tokens that speed is measured on; the context has room for them."""
REASONING: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...] = (
    ({}, ()),
    ({"enable_thinking": False}, ("--reasoning", "off")),
    ({"enable_thinking": True}, ("--reasoning", "on")),
)
"""What llama.cpp may tell a template of thinking, and the option of its command line that makes it do so. By itself it
says true where it finds thinking in the template, which is not every template's own default."""


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


class LlamaCpp:
    """llama.cpp with a GGUF file open; a `ReadBack`. Made by `open`.

    Attributes:
        name: with llama.cpp's build number.
        options: what has to stand on the command line of llama-server for the prompts that `prompt_ids` gives.
    """

    def __init__(self, child: _Child, address: str, key: str, template_values: Mapping[str, Any]) -> None:
        self.name = f"llama.cpp b{importlib.metadata.version(PACKAGE).rpartition('.')[2]}"
        self._child, self._address, self._key = child, urlsplit(address), key
        self._values = dict(template_values)
        self._reasoning = 0
        self._seen: list[BatteryRow] = []
        # The raw numbers of a position are given with the token that was chosen there, and left out where that one is a
        # part of a character. So the same plain one is chosen everywhere: they are taken before the bias.
        self._plain = self._ask("/tokenize", {"content": "a"})["tokens"][-1]
        self._vocabulary = int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])

    @classmethod
    @contextmanager
    def open(
        cls,
        file: Path,
        lora: Path | None,
        context: int,
        threads: int,
        exact: bool = True,
        template_values: Mapping[str, Any] | None = None,
    ) -> Iterator[LlamaCpp]:
        """
        Args:
            lora: an adapter as GGUF, applied in full.
            context: the most tokens of a row.
            exact: keep keys and values in fp32 and compute attention from them. By default llama.cpp rounds both to
                fp16, which moves log-probabilities by as much as weights in fp16 do; that is not the file's.
            template_values: what the chat template is given beside the conversation (`--chat-template-kwargs`).

        Raises:
            UsageError: xllamacpp is missing, or does not run on this machine.
            VerificationError: llama.cpp does not read the file.
        """
        if not is_installed():
            raise UsageError(
                "export.missing",
                "{package} is not installed, which runs llama.cpp to read the export back: pip install -e '.[export]'",
                package=PACKAGE,
            )
        key = secrets.token_urlsafe(24)
        settings = {
            "file": str(file),
            "lora": str(lora) if lora else "",
            "context": context + ANSWER + 2,
            "threads": threads,
            "exact": exact,
            "key": key,
        }
        with tempfile.TemporaryDirectory(prefix="firefly.llamacpp.") as folder:
            child = _Child(file, settings, Path(folder) / "log")
            try:
                yield cls(child, child.address(), key, template_values or {})
            finally:
                child.stop()

    @property
    def options(self) -> tuple[str, ...]:
        kwargs = ("--chat-template-kwargs", json.dumps(self._values, ensure_ascii=False)) if self._values else ()
        return REASONING[self._reasoning][1] + kwargs

    def prompt_ids(self, row: BatteryRow) -> list[int]:
        """As a `ReadBack`.

        Where the default for thinking does not give the trained prompts and another does, the latter is taken for
        all rows, with a notice: that option has to be given when the file is served.
        """
        if row.text is not None:
            return self._tokenize(row.text)
        ids = self._rendered_ids(row, self._reasoning)
        self._seen.append(row)
        if ids != list(row.prompt):
            for number, (_, options) in enumerate(REASONING):
                if all(self._rendered_ids(seen, number) == list(seen.prompt) for seen in self._seen):
                    self._reasoning, ids = number, list(row.prompt)
                    notice(
                        "llamacpp.reasoning",
                        "llama.cpp's own default for thinking does not give the trained prompt; it has to be started "
                        "with {options}.",
                        options=" ".join(options),
                    )
                    break
        self._check_chat(row, len(ids))
        return ids

    def _chat_body(self, row: BatteryRow, reasoning: int) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": [openai_message(message) for message in row.messages[:-1]]}
        if row.tools:
            body["tools"] = list(row.tools)
        values = self._values | dict(REASONING[reasoning][0])
        return body | {"chat_template_kwargs": values} if values else body

    def _rendered_ids(self, row: BatteryRow, reasoning: int) -> list[int]:
        """
        Raises:
            Refused: llama.cpp's Jinja does not render the template for this conversation.
        """
        try:
            rendered = self._ask("/apply-template", self._chat_body(row, reasoning))["prompt"]
        except VerificationError as error:
            if error.code != "llamacpp.refused":
                raise
            raise Refused(str(error)) from error
        return self._tokenize(rendered)

    def _check_chat(self, row: BatteryRow, count: int) -> None:
        """
        Raises:
            VerificationError: the chat endpoint itself makes another number of tokens of the conversation.
        """
        body = self._chat_body(row, self._reasoning)
        try:
            used = self._ask("/v1/chat/completions", body | {"max_tokens": 1})["usage"]["prompt_tokens"]
        except VerificationError as error:
            if error.code != "llamacpp.refused":
                raise
            # What a model says may be no reply in its format, which is an error there.
            used = self._ask("/v1/chat/completions/input_tokens", body)["input_tokens"]
        if used != count:
            raise VerificationError(
                "llamacpp.two_prompts",
                "llama.cpp's chat endpoint makes {used} tokens of the conversation {name}, but {count} by way of "
                "/apply-template and /tokenize.",
                used=used,
                name=row.name,
                count=count,
            )

    def _tokenize(self, text: str) -> list[int]:
        # As /v1/completions and /v1/chat/completions do it.
        return self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def ends_at(self, token: int) -> bool:
        answer = self._complete([self._plain], 1, logit_bias=[[token, FORCED]], response_fields=["stop_type", "tokens"])
        return answer["stop_type"] == "eos" and answer["tokens"] == [token]

    def candidates(self, ids: Sequence[int], positions: Sequence[int]) -> list[Candidates]:
        """As a `ReadBack`. Positions are read in order, so that each costs the tokens since the one before."""
        found = {position: self._candidates(list(ids[: position + 1])) for position in sorted(set(positions))}
        return [found[position] for position in positions]

    def _candidates(self, prompt: list[int]) -> Candidates:
        answer = self._complete(
            prompt,
            1,
            n_probs=min(LIKELIEST, self._vocabulary),
            logit_bias=[[self._plain, FORCED]],
            response_fields=["completion_probabilities"],
        )
        (place,) = answer["completion_probabilities"]
        log_probs = {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}
        if None in log_probs.values():
            raise VerificationError(
                "llamacpp.no_numbers",
                "llama.cpp computes no numbers from {file}: after {count} tokens its logits are NaN.",
                file=self._child.file,
                count=len(prompt),
            )
        # A probability that underflows is given as the least number of its type.
        return Candidates({token: value for token, value in log_probs.items() if value > -1e30})

    def tokens_per_second(self) -> float:
        """As a `ReadBack`: with llama.cpp's own defaults for keys, values and attention, which are faster."""
        settings = self._child.settings
        if settings["exact"]:
            lora = Path(settings["lora"]) if settings["lora"] else None
            with LlamaCpp.open(self._child.file, lora, ANSWER, settings["threads"], exact=False) as faster:
                return faster.tokens_per_second()
        answer = self._complete([self._plain] * 8, ANSWER, ignore_eos=True, response_fields=["timings"])
        return float(answer["timings"]["predicted_per_second"])

    def _complete(self, prompt: list[int], tokens: int, **options: Any) -> Any:
        # The likeliest token, with nothing applied before but a bias.
        body = {"prompt": prompt, "n_predict": tokens, "samplers": ["top_k"], "top_k": 1, "cache_prompt": True}
        return self._ask("/completion", body | {"return_tokens": True} | options)

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """
        Raises:
            VerificationError: it refuses (code llamacpp.refused), or has ended.
        """
        connection = http.client.HTTPConnection(self._address.hostname or "", self._address.port, timeout=LONGEST)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        try:
            with closing(connection):
                connection.request(
                    "GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers
                )
                response = connection.getresponse()
                answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._child.failure() from error
        if response.status != http.client.OK:
            raise VerificationError(
                "llamacpp.refused",
                "llama.cpp, which has {file} open, refuses {path}: {problem}",
                file=self._child.file,
                path=path,
                problem=answer.decode(errors="replace")[:1000],
            )
        return json.loads(answer)


class _Child:
    """The process of llama.cpp."""

    def __init__(self, file: Path, settings: Mapping[str, Any], log: Path) -> None:
        self.file, self.settings, self._log = file, settings, log
        # ggml would start a debugger to show where it ended.
        environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
        with log.open("wb") as errors:
            # A session of its own: Ctrl-C is for us. No path of ours: `gguf` is a package, and a file here.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )

    def address(self, seconds: float = STARTS_WITHIN) -> str:
        """Where it listens, once it does.

        Raises:
            UsageError: xllamacpp does not run on this machine.
            VerificationError: it ended before that.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(self.settings).encode() + b"\n")
            stdin.flush()
        if not select.select([stdout], [], [], seconds)[0]:
            raise VerificationError(
                "llamacpp.silent",
                "llama.cpp did not open {file} within {seconds:.0f} seconds.",
                file=self.file,
                seconds=seconds,
            )
        address = stdout.readline().decode().strip()
        if not address:
            raise self.failure()
        if address.startswith(UNUSABLE):
            raise UsageError(
                "export.unusable",
                "{package} is installed, but cannot be loaded: {problem}",
                package=PACKAGE,
                problem=address.removeprefix(UNUSABLE),
            )
        return address

    def failure(self) -> VerificationError:
        """Why it ended, or does not answer."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        return VerificationError(
            "llamacpp.ended",
            "llama.cpp does not run {file} ({ending}):\n{words}",
            file=self.file,
            ending=translate("no answer") if code is None else translate("it ended with code {code}", code=code),
            words=self.last_words(),
        )

    def last_words(self) -> str:
        """Its log from the first error on, without its clock; where it names none, its last lines."""
        log = self._log.read_text(encoding="utf-8", errors="replace").partition("Traceback (most recent call last)")
        found = re.search(r"^[\d.]+ E ", log[0], re.MULTILINE)
        lines = log[0][found.start() :].splitlines()[:12] if found else "".join(log).splitlines()[-6:]
        return "\n".join(re.sub(r"^[\d.]+ [EW] ", "", line) for line in lines)[:2000]

    def stop(self) -> None:
        """End it, which has nothing to save."""
        self._process.kill()
        self._process.communicate()
