"""vLLM as the engine: started in an environment of its own, or pointed at by URL.

vLLM pins torch and transformers to other versions than ours, so it runs on another interpreter. How it is started is
printed, and what it could not serve as it was trained is refused before.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.errors import UsageError
from firefly.files import cache_folder, make_cache
from firefly.generation.answering_type import answering_precision
from firefly.generation.connecting import connect
from firefly.generation.remote import RemoteEngine, RemoteLimits, Server, ServerError
from firefly.models.loading import resolve_model
from firefly.models.saved_adapter import SavedAdapter, is_exact_start, open_adapter, trained_in_4_bits
from firefly.models.scores import ADAPTER_TASK
from firefly.translation import translate

ENGINES = ("transformers", "vllm")
PYTHON_VARIABLE = "FIREFLY_VLLM_PYTHON"
KEY_VARIABLE = "VLLM_API_KEY"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
MAX_LOGPROBS = 20
STARTS_WITHIN = 1200.0
"""Seconds. Weights of a hundred gigabytes are read, and kernels compiled."""
STOPS_WITHIN = 20.0
GUARD = 'read -r _; kill -s TERM -- "-$1"; sleep "$2"; kill -s KILL -- "-$1"'
"""A shell that reads from a pipe of ours. The pipe ends with us, however we end, and then so does vLLM."""


@dataclass(frozen=True)
class EngineChoice:
    """Which engine answers, as the command line has it.

    Attributes:
        engine: one of `ENGINES`.
        python: the interpreter that has vLLM, if it is to be started; FIREFLY_VLLM_PYTHON in the environment, else.
        url: of a server that runs already.
        api_key: of that server; VLLM_API_KEY in the environment, else.
        arguments: more of vLLM's own, as a shell would read them.
    """

    engine: str = "transformers"
    python: str = ""
    url: str = ""
    api_key: str = ""
    arguments: str = ""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(
                "engine.unknown",
                "--engine = {engine} is unknown; known: {known}.",
                engine=self.engine,
                known=", ".join(ENGINES),
            )
        given = [
            f"--engine_{name}"
            for name, value in (
                ("python", self.python),
                ("url", self.url),
                ("api_key", self.api_key),
                ("arguments", self.arguments),
            )
            if value
        ]
        if given and not self.is_vllm:
            raise UsageError(
                "engine.not_vllm",
                "{options} has no effect on the engine {engine}. Add --engine vllm, or leave it out.",
                options=", ".join(given),
                engine=self.engine,
            )
        if self.url and (self.python or self.arguments):
            raise UsageError(
                "engine.two_places",
                "--engine_url names a server that runs already; --engine_python and --engine_arguments start one. "
                "Give one or the other.",
            )
        if self.api_key and not self.url:
            raise UsageError(
                "engine.key_without_url",
                "--engine_api_key is that of the server at --engine_url, which is not given.",
            )
        try:
            shlex.split(self.arguments)
        except ValueError as error:
            raise UsageError(
                "engine.bad_arguments",
                "--engine_arguments = {arguments} cannot be read: {problem}.",
                arguments=self.arguments,
                problem=error,
            ) from error

    @property
    def is_vllm(self) -> bool:
        return self.engine == "vllm"

    def find_python(self) -> str:
        """The interpreter that vLLM is started on.

        Raises:
            UsageError: none was named, or none is there.
        """
        named = self.python or os.environ.get(PYTHON_VARIABLE, "")
        if not named:
            raise UsageError(
                "engine.no_python",
                "--engine vllm runs in a Python environment of its own, since it needs other versions of torch and "
                "transformers. Name its interpreter with --engine_python (script/vllm_env.sh makes an environment), or "
                "a server that runs already with --engine_url.",
            )
        found = shutil.which(os.path.expanduser(named))
        if found is None:
            raise UsageError(
                "engine.bad_python",
                "--engine_python = {python} is no program that can be run. Give the interpreter of an environment "
                "that has vLLM: ENVIRONMENT/bin/python.",
                python=named,
            )
        return found


def open_vllm(
    choice: EngineChoice,
    model: ModelConfig,
    adapters: Mapping[str, str],
    tokenizers: Mapping[str, Any],
    load_in_4bit: bool = False,
    context_length: int | None = None,
    limits: RemoteLimits = RemoteLimits(),  # noqa: B008  (frozen)
    dtype: str = "auto",
) -> RemoteEngine:
    """The engine that `choice` names: over a vLLM that is started here and ends with it, or over one that runs.

    Args:
        adapters: their folders by the names that they are served under.
        tokenizers: by the names of all models that are served: the base's first, if it is one of them.
        context_length: the most tokens of prompt and answer; None: as many as the model takes.
        dtype: what a server that is started computes in.

    Raises:
        UsageError: it cannot serve these as they were trained, does not start, or does not answer as vLLM does.
    """
    if load_in_4bit:
        raise UsageError(
            "vllm.in_4_bits",
            "--load_in_4bit does not go with --engine vllm, which has other 4-bit weights than those that QLoRA "
            "trains on. Leave it out, or take --engine transformers.",
        )
    saved = {name: open_adapter(path) for name, path in adapters.items()}
    check_adapters(saved.values())
    if choice.url:
        return connect(
            Server(choice.url, choice.api_key or os.environ.get(KEY_VARIABLE, "")), tokenizers, adapters, None, limits
        )
    place = resolve_model(model)
    base = next((name for name in tokenizers if name not in adapters), place)
    key, port = secrets.token_urlsafe(24), free_port()
    command = vllm_command(
        choice.find_python(),
        place,
        base,
        {name: adapter.folder for name, adapter in saved.items()},
        port=port,
        dtype=answering_precision(dtype, model, adapters.values()).name,
        room=lora_room(list(saved.values())),
        context_length=context_length,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        more=shlex.split(choice.arguments),
    )
    process = start_vllm(command, vllm_environment(os.environ, key, Path(place).is_dir()))
    try:
        server = Server(f"http://127.0.0.1:{port}", key)
        process.wait_until_healthy(server)
        return connect(server, tokenizers, adapters, process, limits)
    except BaseException:
        process.stop()
        raise


def check_adapters(adapters: Iterable[SavedAdapter]) -> None:
    """See that vLLM serves adapters as they were trained, and say where that is on other weights.

    Raises:
        UsageError: one that it does not.
    """
    for adapter in adapters:
        refuse_unserved(adapter)
        if trained_in_4_bits(str(adapter.given)):
            notice(
                "vllm.trained_in_4_bits",
                "the adapter {path} was trained on 4-bit weights; vLLM serves it on the base's own weights, as "
                "`firefly merge` joins it with them.",
                path=adapter.given,
            )


def refuse_unserved(adapter: SavedAdapter) -> None:
    """
    Raises:
        UsageError: vLLM would refuse this adapter with a stack of its own, or leave out a part of it in silence.
    """
    settings = adapter.settings
    # LoRA on experts is named by the layout of one version of one model, and matrices saved whole are skipped unsaid.
    whole = [name for name in adapter.tensors if not re.search(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$", name)]
    reasons = {
        "use_dora": settings.use_dora,
        "modules_to_save": settings.modules_to_save,
        "trainable_token_indices": settings.trainable_token_indices,
        "target_parameters": settings.target_parameters,
        "bias": settings.bias != "none",
        "lora_bias": settings.lora_bias,
        "init_lora_weights": is_exact_start(settings.init_lora_weights),
        "rank_pattern": settings.rank_pattern,  # which versions before 0.32 take no notice of
        "alpha_pattern": settings.alpha_pattern,
        "r": settings.r > RANKS[-1],
        "task_type": settings.task_type == ADAPTER_TASK,
        whole[0] if whole else "": whole,
    }
    found = [name for name, applies in reasons.items() if applies]
    if found:
        raise UsageError(
            "vllm.adapter_not_served",
            "vLLM does not serve the adapter {path} as it was trained, because of its {reasons}. Merge it (firefly "
            "merge) and serve the merged model, or take --engine transformers.",
            path=adapter.given,
            reasons=", ".join(found),
        )


def layer_of(tensor: str) -> str:
    """The name of the layer that a tensor of an adapter belongs to, by itself: q_proj."""
    return re.sub(r"\.lora_.*", "", tensor).rpartition(".")[2]


def vllm_command(
    python: str,
    model: str,
    name: str,
    adapters: Mapping[str, Path],
    *,
    port: int,
    dtype: str,
    room: Sequence[str] = (),
    context_length: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """How vLLM is started.

    Args:
        model: its folder, or its id on the hub.
        name: that it is served under.
        room: the options that make room for the adapters (`lora_room`).
        more: arguments that win over those before them.
    """
    # `vllm serve` looks for a distribution named vllm, which builds for other hardware are not.
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", model, "--served-model-name", name, "--dtype", dtype]
    # A generation_config.json that was published with a model must not act unseen, nor settings on log-probabilities.
    command += ["--generation-config", "vllm", "--logprobs-mode", "raw_logprobs", "--max-logprobs", str(MAX_LOGPROBS)]
    command += ["--disable-uvicorn-access-log"]
    if context_length is not None:
        command += ["--max-model-len", str(context_length)]
    if revision is not None:
        command += ["--revision", revision]
    if trust_remote_code:
        command += ["--trust-remote-code"]
    if adapters:
        command += [*room, "--lora-modules", *(_lora_module(name, str(path)) for name, path in adapters.items())]
    return [*command, *more]


def lora_room(adapters: Sequence[SavedAdapter]) -> list[str]:
    """The options by which vLLM makes room for adapters."""
    largest = max(adapter.settings.r for adapter in adapters) if adapters else 0
    targets = sorted({layer_of(name) for adapter in adapters for name in adapter.tensors})
    return [
        *("--enable-lora", "--max-lora-rank", str(next(rank for rank in RANKS if rank >= largest))),
        # One place stays empty: in a batch with an adapter, the CPU build (0.32) takes the base for place
        # -1, so the adapter in the last one would answer for the base.
        *("--max-loras", str(len(adapters) + 1)),
        # Other layers need no room for an adapter; and with room for one on the head, the CPU build ends where it is
        # asked for log-probabilities of a prompt.
        *("--lora-target-modules", *targets),
    ]


def _lora_module(name: str, path: str) -> str:
    """vLLM reads name=path, and JSON where it sees a comma; it takes the first = for the one between them."""
    if "," in name + path or "=" in name:
        return json.dumps({"name": name, "path": path})
    return f"{name}={path}"


def vllm_environment(environment: Mapping[str, str], api_key: str, offline: bool) -> dict[str, str]:
    """The environment that vLLM is started in.

    Args:
        api_key: not on the command line, where every user of the machine could read it.
        offline: the model is a folder: no hub has to be asked.
    """
    ours = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")  # another interpreter's packages
    kept = {name: value for name, value in environment.items() if name not in ours}
    kept |= {KEY_VARIABLE: api_key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return kept | ({"HF_HUB_OFFLINE": "1"} if offline else {})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class VllmProcess:
    """A vLLM that was started here."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._stopped = False
        with log.open("wb") as file:
            # A session of its own: Ctrl-C is for us, who then end it with all processes that it has started.
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "sh", str(self._process.pid), str(int(STOPS_WITHIN))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def failure(self) -> str | None:
        """Why it has ended, in the user's language; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return translate(
            "vLLM has ended with code {code}: {problem} Its log: {log}",
            code=code,
            problem=self._last_words(),
            log=self.log,
        )

    def _last_words(self) -> str:
        """The first error in its log (those that follow only pass it on), else the last line."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        found = (re.search(r"\b\w*(?:Error|Exception|error): .*", line) for line in lines)
        return next((error[0] for error in found if error), lines[-1] if lines else "")[:500]

    def wait_until_healthy(self, server: Server, seconds: float = STARTS_WITHIN) -> None:
        """
        Raises:
            UsageError: it has ended, or does not answer in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            failure = self.failure()
            if failure is None and time.monotonic() > deadline:
                failure = translate(
                    "vLLM did not answer within {seconds:.0f} seconds. Its log: {log}", seconds=seconds, log=self.log
                )
            if failure is not None:
                raise UsageError("vllm.did_not_start", "vLLM could not be started. {problem}", problem=failure)
            with suppress(OSError, http.client.HTTPException, ServerError, ValueError):
                server.ask("/health", seconds=5)
                return
            time.sleep(0.2)

    def stop(self) -> None:
        """End it and all processes that it has started. Nothing, once that is done."""
        if self._stopped:
            return
        self._stopped = True
        for number, seconds in ((signal.SIGTERM, STOPS_WITHIN), (signal.SIGKILL, STOPS_WITHIN)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self._guard.kill()
        self._guard.communicate()


def start_vllm(command: Sequence[str], environment: Mapping[str, str]) -> VllmProcess:
    """Start it, and say how. Its output goes to a file, which what goes wrong with it names."""
    folder = make_cache(cache_folder() / "vllm")
    descriptor, log = tempfile.mkstemp(".log", time.strftime("%Y%m%d-%H%M%S-"), folder)
    os.close(descriptor)
    notice("vllm.started", "vLLM is started: {command}  Its log: {log}", command=shlex.join(command), log=log)
    return VllmProcess(command, environment, Path(log))
