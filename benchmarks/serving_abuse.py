"""A minute of bad manners: malformed requests, huge bodies, slow and vanishing clients, and a queue that is full.

    python benchmarks/serving_abuse.py [--model MODEL] [--seconds 60] [--clients 3]

`firefly serve` runs in a process of its own. Meanwhile its health is asked twice a second, and an honest client asks
one question again and again. Exit 3 if the server ends or logs a traceback, if health says that it does not live, if an
honest answer is another one than before (an error 429 is an answer, too), if requests stay behind, or if the resident
set has grown by more than 5 % from the end of a first round of the same abuse to the end of the measured one.
"""

import argparse
import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from processes import environment
from reporting import HERE, new_report, saver

GROWTH = 0.05
QUESTION = {"messages": [{"role": "user", "content": "Name three colours."}], "temperature": 0, "max_tokens": 8}
LONG = QUESTION | {"max_tokens": 256, "stream": True, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}


class Server:
    """`firefly serve` in a process of its own."""

    def __init__(self, model: str, log: Path, options: list[str]) -> None:
        command = [sys.executable, "-c", "from firefly.cli import run; run()"]
        command += ["serve", "--model_name_or_path", model, "--port", "0", *options]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(2))
        end = time.monotonic() + 300
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", log.read_text())):
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        self.port = int(found[1])

    def ask(self, path: str, body: Any = None, timeout: float = 60) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        with suppress(OSError):
            connection.sendall(data)
        return connection

    def rss(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def post(body: bytes, length: int | None = None, path: str = "/v1/chat/completions") -> bytes:
    size = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode() + body


# ---- the guests: each call is one visit; they may fail in any way that a network lets them


def malformed(server: Server, luck: random.Random) -> None:
    """Bytes that are no HTTP, bodies that are no JSON, fields of the wrong kind."""
    values: list[Any] = [
        None,
        -1,
        1e308,
        "x",
        [],
        {},
        True,
        2**70,
        [[[]]],
        "\ud800",
        {"a": 1},
        [float("nan")],
        -(2**63),
    ]
    fields = ["messages", "n", "stop", "temperature", "logit_bias", "tools", "seed", "stream", "max_tokens", "prompt"]
    wrong = json.dumps(QUESTION | {luck.choice(fields): luck.choice(values) for _ in range(3)}).encode()
    data = luck.choice(
        [
            luck.randbytes(luck.randrange(1, 5000)),
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
            post(luck.randbytes(luck.randrange(1, 5000))),
            post(b"[" * 50_000),
            post(wrong),
            post(wrong, path="/v1/completions"),
            post(json.dumps({"prompt": [luck.randrange(2**40)], "max_tokens": 1}).encode(), path="/v1/completions"),
            post(wrong[: luck.randrange(len(wrong))]),
        ]
    )
    with server.raw(data) as connection, suppress(OSError):
        connection.settimeout(2)
        connection.recv(4096)


def huge(server: Server, luck: random.Random) -> None:
    """Bodies beyond the limit, announced or not, and prompts beyond the context."""
    kind = luck.randrange(4)
    if kind == 0:
        with server.raw(post(b"{", length=1 << 45)) as connection, suppress(OSError):
            connection.recv(4096)
    elif kind == 1:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        with server.raw(head) as connection, suppress(OSError):
            for _ in range(64):
                connection.sendall(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")
    elif kind == 2:
        with suppress(OSError, http.client.HTTPException):
            server.ask("/v1/completions", {"prompt": "words " * 500_000, "max_tokens": 1})
    else:
        with suppress(OSError, http.client.HTTPException):
            server.ask("/v1/chat/completions", QUESTION | {"messages": QUESTION["messages"] * 4000})


def slow(server: Server, luck: random.Random) -> None:
    """A request byte by byte, one that never ends, or a stream that nobody reads."""
    kind = luck.randrange(3)
    if kind == 0:
        with server.raw(b"POST /v1/chat/completions HTTP/1.1\r\n") as connection, suppress(OSError):
            for _ in range(30):
                connection.sendall(b"X")
                time.sleep(0.1)
    elif kind == 1:
        with server.raw(post(b"{", length=1000)) as connection, suppress(OSError):
            connection.recv(4096)
    else:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        with connection, suppress(OSError):
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(post(json.dumps(LONG).encode()))
            time.sleep(luck.uniform(1, 8))


def vanishing(server: Server, luck: random.Random) -> None:
    """Clients that hang up in the middle of it, some of them with a reset."""
    body = json.dumps(LONG | {"stream": luck.random() < 0.5, "n": luck.randrange(1, 4)}).encode()
    data = post(body)
    if luck.random() < 0.3:
        data = data[: luck.randrange(len(data))]
    with server.raw(data) as connection:
        time.sleep(luck.uniform(0, 0.5))
        if luck.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def crowd(server: Server, luck: random.Random) -> None:
    """More requests than the queue takes, all at a time."""
    connections = [server.raw(post(json.dumps(LONG | {"n": 8}).encode())) for _ in range(12)]
    time.sleep(luck.uniform(0.5, 2))
    for connection in connections:
        connection.close()
    time.sleep(luck.uniform(1, 4))  # in which the honest client has a chance


GUESTS: list[Callable[[Server, random.Random], None]] = [malformed, huge, slow, vanishing, crowd]


def abuse(server: Server, seconds: float, clients: int, watched: dict[str, Any]) -> None:
    """Let guests come for a while; what health and the honest client saw goes into `watched`."""
    end = time.monotonic() + seconds

    def repeat(guest: Callable[[Server, random.Random], None], seed: int) -> None:
        luck = random.Random(seed)
        while time.monotonic() < end:
            with suppress(OSError):
                guest(server, luck)
            watched["visits"][guest.__name__] += 1
            time.sleep(0.01)

    def ask_health() -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                status = server.ask("/health", timeout=20)[0]
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            watched["health"][str(status)] += 1
            watched["slowest_health"] = max(watched["slowest_health"], time.monotonic() - began)
            time.sleep(0.5)

    def ask_honestly() -> None:
        while time.monotonic() < end:
            try:
                status, text = server.ask("/v1/chat/completions", QUESTION)
                said = json.loads(text)["choices"][0]["message"]["content"] if status == 200 else status
            except (OSError, http.client.HTTPException) as error:
                said = type(error).__name__
            watched["honest"][str(said)] += 1
            time.sleep(0.5)

    threads = [
        threading.Thread(target=repeat, args=(guest, number * 100 + at))
        for at, guest in enumerate(GUESTS)
        for number in range(1 if guest is crowd else clients)
    ]
    threads += [threading.Thread(target=ask_health), threading.Thread(target=ask_honestly)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def settle(server: Server) -> float:
    """Wait until nothing runs; how many requests are left in the end."""
    for _ in range(120):
        text = server.ask("/metrics")[1]
        left = sum(float(value) for value in re.findall(r"^firefly_requests_(?:running|waiting) (\S+)", text, re.M))
        if not left:
            return 0
        time.sleep(0.5)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm_up", type=float, default=30, help="Seconds of the same before memory is compared.")
    parser.add_argument("--clients", type=int, default=3, help="Of each kind.")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving_abuse.json")
    arguments = parser.parse_args()
    report = new_report("serving_abuse", arguments)
    save = saver(arguments.out, report)
    log = Path(tempfile.mkdtemp()) / "serve.log"
    # In float32, where an answer does not depend on the size of its batch.
    limits = [
        "--dtype",
        "float32",
        "--max_requests",
        "8",
        "--max_queue",
        "16",
        "--client_timeout",
        "3",
        "--cache_tokens",
        "8192",
    ]
    server = Server(arguments.model, log, ["--template_name", arguments.template, *limits])
    faults: list[str] = []
    try:
        right = json.loads(server.ask("/v1/chat/completions", QUESTION)[1])["choices"][0]["message"]["content"]
        watched: dict[str, Any] = {}
        memory = []
        for seconds in (arguments.warm_up, arguments.seconds):
            watched = {"visits": Counter(), "health": Counter(), "honest": Counter(), "slowest_health": 0.0}
            abuse(server, seconds, arguments.clients, watched)
            left = settle(server)
            time.sleep(4)  # for the last clients to be broken off
            memory.append(server.rss())
            report |= watched | {"rss_bytes": memory, "left": left}
            save()
        growth = memory[-1] / memory[0] - 1
        report["growth"] = growth
        if growth > GROWTH:
            faults.append(f"the resident set grew by {growth:.1%}")
        if left:
            faults.append(f"{left:g} requests stayed behind")
        if set(watched["health"]) != {"200"}:
            faults.append(f"health said {dict(watched['health'])}")
        if not set(watched["honest"]) <= {right, "429"} or right not in watched["honest"]:
            faults.append(f"the honest client heard {dict(watched['honest'])}, where {right!r} is right")
        if json.loads(server.ask("/v1/chat/completions", QUESTION)[1])["choices"][0]["message"]["content"] != right:
            faults.append("afterwards the answer is another one")
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        faults.append(f"the server could not be asked any more: {error!r}")
    if server.process.poll() is not None:
        faults.append(f"the server ended with {server.process.returncode}")
    else:
        server.process.send_signal(signal.SIGTERM)
        try:
            code = server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()
            code = "a kill"
        if code != 0:
            faults.append(f"after SIGTERM the server ended with {code}")
    text = log.read_text(errors="replace")
    report["statuses"] = dict(Counter(re.findall(r"^\S+ \S+ [A-Z]+ \S* (\d{3}) ", text, re.M)))
    if "Traceback" in text:
        faults.append(f"the log has a traceback:\n{text[text.index('Traceback') :][:3000]}")
    report["faults"] = faults
    save()
    print(
        json.dumps(
            {
                name: report[name]
                for name in ("visits", "health", "slowest_health", "honest", "statuses", "rss_bytes", "growth")
                if name in report
            },
            indent=1,
        ),
        os.linesep.join(faults) or "no faults",
        sep="\n",
    )
    return 3 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
