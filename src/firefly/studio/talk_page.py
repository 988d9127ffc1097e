"""Talk: a base and what was tuned of it answer the same prompts, side by side; blind votes become pairs for DPO.

The models answer in a process of `firefly serve`, which the page starts and talks to as any client does.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import gradio as gr

from firefly.errors import UsageError
from firefly.generation.conversing import answers_as_they_grow
from firefly.generation.remote import Server, ServerError
from firefly.models.saved_adapter import is_adapter
from firefly.runs import jobs
from firefly.runs.jobs import Job
from firefly.runs.records import FINISHED, RUNNING, find_runs
from firefly.studio.page import QUIET, Studio, job_text
from firefly.translation import translate

Message = dict[str, Any]

VOTES = "votes.jsonl"
"""Below the first root: pairs for DPO, one a vote."""
LOADING_SECONDS = 300


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, data: Sequence[gr.Dropdown]) -> None:
    """The part "Talk"; `data` are the fields of the part that shows rows: file and task."""
    with gr.Row():
        adapter = gr.Dropdown(
            tuned_models(studio), label=translate("Tuned: a run's folder, an adapter, or a merged model"),
            allow_custom_value=True, elem_id="talk-tuned", scale=3,
        )  # fmt: skip
        base = gr.Textbox("", label=translate("Base; empty: the adapter's own"), elem_id="talk-base", scale=3)
        load = gr.Button(translate("Load"), variant="primary", elem_id="talk-load", scale=1)
        unload = gr.Button(translate("Unload"), elem_id="talk-unload", scale=1)
    status = gr.Markdown(elem_id="talk-status")
    with gr.Accordion(translate("How answers are drawn"), open=False):
        system = gr.Textbox("", label=translate("System prompt"), lines=2, elem_id="talk-system")
        with gr.Row():
            temperature = gr.Slider(0, 2, 0.35, step=0.05, label="temperature", min_width=240)
            top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="top_p", min_width=240)
            most = gr.Slider(16, 2048, 256, step=16, label="max_tokens", min_width=240)
            seed = gr.Number(None, label="seed", precision=0, min_width=120)
    with gr.Row():
        left = gr.Chatbot(
            label=translate("Base"), height=420, editable="user", elem_id="chat-base", buttons=["copy_all"]
        )
        right = gr.Chatbot(label=translate("Tuned"), height=420, elem_id="chat-tuned", buttons=["copy_all"])
    message = gr.Textbox(
        label=translate("Message"), placeholder=translate("Enter sends, Shift+Enter begins a line"), lines=1,
        max_lines=8, elem_id="talk-message",
    )  # fmt: skip
    with gr.Row():
        send = gr.Button(translate("Send"), variant="primary", elem_id="talk-send")
        halt = gr.Button(translate("Stop"), elem_id="talk-stop")
        again = gr.Button(translate("Answer again"), elem_id="talk-again")
        clear = gr.Button(translate("New conversation"), elem_id="talk-clear")
    with gr.Accordion(translate("The prompt as the template wrote it"), open=False):
        prompt = gr.Textbox(lines=10, max_lines=20, interactive=False, show_label=False, elem_id="talk-prompt")
    with gr.Accordion(translate("Blind votes: which answer is better?"), open=False, elem_id="votes"):
        gr.Markdown(translate("Two answers to one question, in random order. A vote becomes a pair for DPO."))
        question = gr.Textbox(label=translate("Question"), elem_id="vote-question")
        ask = gr.Button(translate("Ask both"), elem_id="vote-ask")
        with gr.Row():
            first = gr.Textbox(label="A", lines=8, interactive=False, elem_id="vote-a")
            second = gr.Textbox(label="B", lines=8, interactive=False, elem_id="vote-b")
        with gr.Row():
            better_a = gr.Button(translate("A is better"), elem_id="vote-for-a")
            neither = gr.Button(translate("Neither"))
            better_b = gr.Button(translate("B is better"), elem_id="vote-for-b")
        revealed = gr.Markdown(elem_id="vote-result")
        open_votes = gr.Button(translate("Show the votes under Data"), elem_id="votes-open")
    asked = gr.State(None)
    settings = [system, temperature, top_p, most, seed]

    def start(tuned: str, of: str) -> Iterator[str]:
        arguments, output = serving(studio, tuned, of)
        for job in serving_jobs(studio):
            with suppress(Exception):
                jobs.stop(job)
        job = studio.begin(arguments, output=output)
        yield from until_ready(studio, job)

    def end() -> str:
        for job in serving_jobs(studio):
            jobs.stop(job)
        return translate("Nothing is loaded.")

    def answer(text: str, base_chat: list[Message], tuned_chat: list[Message], *drawn: Any) -> Iterator[list[Any]]:
        if not text.strip():
            yield [gr.skip(), gr.skip(), gr.skip(), gr.skip()]
            return
        asked = {"role": "user", "content": text}
        yield from reply([*base_chat, asked], [*tuned_chat, asked], *drawn)

    def reply(base_chat: list[Message], tuned_chat: list[Message], *drawn: Any) -> Iterator[list[Any]]:
        server, names = connection(studio)
        body = request_of(*drawn)
        chats = [plain(base_chat), plain(tuned_chat)]
        yield ["", *shown(chats, ["", ""]), prompt_text(server, names[-1], body, chats[1])]
        for texts in both(server, names, body, chats):
            yield ["", *shown(chats, texts), gr.skip()]

    def repeat(base_chat: list[Message], tuned_chat: list[Message], *drawn: Any) -> Iterator[list[Any]]:
        kept = [until_question(plain(chat)) for chat in (base_chat, tuned_chat)]
        if kept[0]:
            yield from reply(*kept, *drawn)

    def change(event: gr.EditData, base_chat: list[Message], tuned_chat: list[Message], *drawn: Any) -> Any:
        at = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        edited = {"role": "user", "content": str(event.value)}
        yield from reply([*plain(base_chat)[:at], edited], [*plain(tuned_chat)[:at], edited], *drawn)

    def ask_both(text: str, *drawn: Any) -> Iterator[list[Any]]:
        server, names = connection(studio)
        body = request_of(*drawn)
        chats: list[list[Message]] = [[{"role": "user", "content": text}]] * 2
        order = random.sample(range(2), 2)
        texts = ["", ""]
        for texts in both(server, names, body, chats):
            yield [*(texts[side] for side in order), None, ""]
        votable = {"question": text, "system": drawn[0], "order": order, "texts": texts, "names": names}
        yield [*(texts[side] for side in order), votable, ""]

    def vote(better: int | None, about: Mapping[str, Any] | None) -> tuple[str, None]:
        if about is None:
            raise gr.Error(translate("Ask a question first."))
        names = [about["names"][side] for side in about["order"]]
        said = f"A: {names[0]}, B: {names[1]}"
        if better is not None:
            path = studio.roots.inside(VOTES)
            count = record_vote(path, about, better)
            said += " · " + translate("{count} votes in {path}", count=count, path=studio.roots.shown(path))
        return said, None

    load.click(studio.handler(start), [adapter, base], status, **QUIET)
    unload.click(studio.handler(end), None, status, **QUIET)
    page.load(studio.handler(lambda: loaded(studio)), None, status, **QUIET)
    outputs = [message, left, right, prompt]
    running: Any = [
        gr.on(
            [send.click, message.submit], studio.handler(answer), [message, left, right, *settings], outputs, **QUIET
        ),
        again.click(studio.handler(repeat), [left, right, *settings], outputs, **QUIET),
        left.edit(studio.handler(change), [left, right, *settings], outputs, **QUIET),
        ask.click(studio.handler(ask_both), [question, *settings], [first, second, asked, revealed], **QUIET),
    ]
    halt.click(None, cancels=running, api_visibility="private")
    clear.click(lambda: ([], [], ""), None, [left, right, prompt], **QUIET)
    for button, better in ((better_a, 0), (neither, None), (better_b, 1)):
        button.click(studio.handler(lambda now, side=better: vote(side, now)), asked, [revealed, asked], **QUIET)
    open_votes.click(lambda: (VOTES, "dpo"), None, data, **QUIET)
    tab.select(studio.handler(lambda: gr.Dropdown(tuned_models(studio))), None, adapter, **QUIET)
    studio.remember(page, "talk", [adapter, base, *settings, message])


# ---- the server ----


def tuned_models(studio: Studio) -> list[str]:
    """Folders of runs that ended with a result, the newest first."""
    done = [record for record in find_runs(studio.roots.folders) if record.state == FINISHED]
    return [studio.roots.shown(record.folder) for record in done]


def serving(studio: Studio, tuned: str, base: str) -> tuple[list[str], str]:
    """The arguments of a server for a base and what was tuned of it, and the folder of the latter."""
    arguments = ["serve", "--port", str(free_port())]
    if not tuned:
        studio.roots.check({"base": base})
        return [*arguments, f"--model_name_or_path={base}"], base
    folder = studio.roots.inside(tuned)
    if not folder.is_dir():
        raise UsageError("studio.no_folder", "{path} is no folder.", path=tuned)
    if not is_adapter(str(folder)):
        return [*arguments, "--model_name_or_path", str(folder)], tuned
    studio.base_of(folder, base)  # which has to lie where the page may read
    arguments += [f"--model_name_or_path={base}"] if base else []
    return [*arguments, "--adapter_name_or_path", f"{folder.name}={folder}"], tuned


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def serving_jobs(studio: Studio) -> list[Job]:
    return [job for job in jobs.list_jobs(studio.roots.jobs) if job.kind == "serve" and job.state == RUNNING]


def server_of(studio: Studio, job: Job) -> Server:
    port = job.arguments[job.arguments.index("--port") + 1]
    return Server(f"http://127.0.0.1:{port}", studio.secret)


def until_ready(studio: Studio, job: Job) -> Iterator[str]:
    """What is said while a server loads its models, until it answers or has failed."""
    end = time.monotonic() + LOADING_SECONDS
    while time.monotonic() < end:
        with suppress(OSError, http.client.HTTPException, ServerError):
            yield ready(server_of(studio, job))
            return
        found = jobs.read_job(job.folder)
        if found is None or found.ended:
            yield f"```\n{job_text(found)}\n```"
            return
        yield translate("loading …")
        time.sleep(1)


def ready(server: Server) -> str:
    names = ", ".join(f"`{name}`" for name in models_of(server))
    return translate("ready: {models} at {address}", models=names, address=f"`{server.url}/v1`")


def models_of(server: Server) -> list[str]:
    return [model["id"] for model in server.ask("/v1/models")["data"]]


def loaded(studio: Studio) -> str:
    """What is said of the server when the page is opened."""
    for job in serving_jobs(studio):
        with suppress(OSError, http.client.HTTPException, ServerError):
            return ready(server_of(studio, job))
    return translate("Nothing is loaded.")


def connection(studio: Studio) -> tuple[Server, list[str]]:
    """The server that runs, and the names of the base and the tuned model on it; of one model, twice its name."""
    for job in reversed(serving_jobs(studio)):
        server = server_of(studio, job)
        try:
            names = models_of(server)
        except (OSError, http.client.HTTPException, ServerError):
            break
        return server, [names[0], names[-1]]
    raise gr.Error(translate("Load a model first, and wait until it is ready."))


# ---- answers ----


def request_of(system: str, temperature: float, top_p: float, most: float, seed: float | None) -> dict[str, Any]:
    body = {"temperature": temperature, "top_p": top_p, "max_tokens": int(most), "system": system}
    return body if seed is None else body | {"seed": int(seed)}


def plain(chat: Sequence[Any]) -> list[Message]:
    """A conversation as a request has it, whatever the page keeps beside it."""
    return [{"role": item["role"], "content": text_of(item["content"])} for item in chat]


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def until_question(chat: list[Message]) -> list[Message]:
    """A conversation up to its last question."""
    asked = [number for number, item in enumerate(chat) if item["role"] == "user"]
    return chat[: asked[-1] + 1] if asked else []


def shown(chats: Sequence[list[Message]], texts: Sequence[str]) -> list[list[Message]]:
    return [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, texts, strict=True)]


def messages_of(body: Mapping[str, Any], chat: list[Message]) -> list[Message]:
    return [{"role": "system", "content": body["system"]}, *chat] if body["system"] else chat


def prompt_text(server: Server, name: str, body: Mapping[str, Any], chat: list[Message]) -> str:
    return server.ask("/tokenize", {"model": name, "messages": messages_of(body, chat)})["prompt"]


def both(
    server: Server, names: Sequence[str], body: Mapping[str, Any], chats: Sequence[list[Message]]
) -> Iterator[list[str]]:
    """The two answers as they grow; of one model alone, one."""
    settings = {key: value for key, value in body.items() if key != "system"}
    sides = [
        {**settings, "model": name, "messages": messages_of(body, chat)}
        for name, chat in zip(names, chats, strict=True)
    ]
    for texts in answers_as_they_grow(server, sides if names[0] != names[1] else sides[:1]):
        yield [*texts, ""][:2]


# ---- votes ----


def record_vote(path: Path, about: Mapping[str, Any], better: int) -> int:
    """Append a pair for DPO; returns how many the file holds."""
    chosen, rejected = (about["texts"][about["order"][side]] for side in (better, 1 - better))
    system = [{"role": "system", "content": about["system"]}] if about["system"] else []
    row = {
        "messages": [*system, {"role": "user", "content": about["question"]}],
        "chosen": {"role": "assistant", "content": chosen},
        "rejected": {"role": "assistant", "content": rejected},
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with path.open(encoding="utf-8") as file:
        return sum(1 for _ in file)
