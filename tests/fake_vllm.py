"""A server with vLLM's protocol and no model: in a thread of a test, or as a program that is started like vLLM.

It says what `script` makes of a request, a token an event. Nothing heavy is imported: it is up at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeVllm(ThreadingHTTPServer):
    """
    Attributes:
        script: a request → the ids to answer with. An entry may also be a piece of JSON to send as an event, bytes to
            send as they are, seconds to wait, or None, which cuts the connection.
        bodies: the requests so far.
        hung_up: requests (by place in `bodies`) whose client went away before their end.
        healthy: what /health says.
        raw: whether log-probabilities are the model's, as they should be, or those after biases.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, encode: Callable[[str], list[int]], names: Sequence[str] = ("base",), port: int = 0, key: str = ""
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.encode, self.names, self.key = encode, list(names), key
        self.script: Callable[[dict[str, Any]], Iterable[Any]] = lambda body: body["prompt"]
        self.bodies: list[dict[str, Any]] = []
        self.hung_up: set[int] = set()
        self.healthy = True
        self.raw = True
        self.gives_ids = True
        self.knows_bias = True
        self.tokenizes = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> FakeVllm:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients go away on purpose


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, *values: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        text = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(None, 200 if self.server.healthy else 503)
        elif self.path == "/v1/models":
            cards = [{"id": self.server.names[0], "root": "/model", "parent": None, "max_model_len": 128}]
            cards += [{"id": name, "root": "/a", "parent": cards[0]["id"]} for name in self.server.names[1:]]
            self.answer({"object": "list", "data": cards})
        else:
            self.answer({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.answer({"error": "Unauthorized"}, 401)
        elif self.path == "/tokenize" and self.server.tokenizes:
            self.answer({"tokens": self.server.encode(body["prompt"])})
        elif self.path != "/v1/completions":
            self.answer({"detail": "Not Found"}, 404)
        elif body["model"] not in self.server.names:
            self.answer({"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}, 404)
        elif body.get("stream"):
            self.stream(body)
        else:
            places = [
                None,
                *({str(t): {"logprob": -1.0, "rank": 7}, "9": {"logprob": -0.5}} for t in body["prompt"][1:]),
            ]
            self.answer({"choices": [{"prompt_logprobs": places}]})

    def stream(self, body: dict[str, Any]) -> None:
        number = len(self.server.bodies)
        self.server.bodies.append(body)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.say(": a comment, as some servers send to keep a connection")
            likely = [int(token) for token, bias in body["logit_bias"].items() if bias == 100]
            said = [likely[0], 5] if likely and self.server.knows_bias else self.server.script(body)
            count = 0
            for entry in said:
                if entry is None:
                    self.close_connection = True
                    return
                if isinstance(entry, float):
                    time.sleep(entry)
                elif isinstance(entry, bytes):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(entry), entry))
                elif isinstance(entry, dict):
                    self.say("data: " + json.dumps(entry))
                else:
                    count += 1
                    ended = entry in body["stop_token_ids"] or count == body["max_tokens"]
                    self.say("data: " + json.dumps({"choices": [self.choice(entry, body, ended)]}))
                    if ended:
                        break
            self.say("data: [DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.hung_up.add(number)

    def choice(self, token: int, body: dict[str, Any], ended: bool) -> dict[str, Any]:
        chosen: dict[str, Any] = {"index": 0, "text": "ignored", "finish_reason": None}
        if ended:
            chosen["finish_reason"] = "stop" if token in body["stop_token_ids"] else "length"
        if self.server.gives_ids:
            chosen["token_ids"] = [token]
        if body["logprobs"] is not None:
            own = -2.0 if self.server.raw else 0.0
            near = {f"token_id:{token}": own, "token_id:7": -0.25, "token_id:8": -1.5}
            chosen["logprobs"] = {"token_logprobs": [own], "top_logprobs": [near]}
        return chosen

    def say(self, line: str) -> None:
        text = line.encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        self.wfile.flush()


def main() -> None:
    """As vLLM: `python -m vllm.… --port P --model FOLDER --served-model-name NAME --lora-modules NAME=PATH …`."""
    from tokenizers import Tokenizer

    def given(option: str) -> list[str]:
        places = [place for place, text in enumerate(sys.argv) if text == option]
        after = sys.argv[places[-1] + 1 :] if places else []  # the last one counts
        return after[: next((place for place, text in enumerate(after) if text.startswith("--")), len(after))]

    tokenizer = Tokenizer.from_file(os.path.join(given("--model")[0], "tokenizer.json"))
    names = [*given("--served-model-name"), *(item.partition("=")[0] for item in given("--lora-modules"))]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    FakeVllm(encode, names, int(given("--port")[0]), os.environ["VLLM_API_KEY"]).serve_forever()


if __name__ == "__main__":
    main()
