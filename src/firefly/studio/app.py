"""The page in both languages, behind its guard, on one address."""

import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; nothing leaves this machine

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from gradio.themes import Default
from starlette.types import ASGIApp

from firefly.errors import UsageError
from firefly.server.access import Guard
from firefly.studio import data_page, export_page, history_page, talk_page, train_page, watch_page
from firefly.studio.page import Studio
from firefly.studio.roots import Roots
from firefly.translation import speaking, translate

LANGUAGES = {"en": "English", "zh": "中文"}
HERE = Path(__file__).parent

REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; sandbox allow-scripts"
)
"""A report holds texts of models and data: its page may do nothing but draw itself."""

OPENED = "<script>window.fireflyPart = sessionStorage.getItem('firefly-part') ?? 'data';</script>"
"""Which part was open, read before the page draws itself, which selects its first one."""
REOPEN = "() => ({__type__: 'update', selected: window.fireflyPart})"


def make_app(
    roots: Roots, token: str, *, password: str | None, hosts: frozenset[str] | None, max_upload_bytes: int
) -> ASGIApp:
    """The studio as an ASGI application: /en/ and /zh/, and reports.

    Args:
        hosts: names that requests may call it by; None: any.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def front(request: Request) -> Response:
        asked = request.headers.get("accept-language", "").lower()
        return RedirectResponse("/zh/" if asked.startswith("zh") else "/en/")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return FileResponse(HERE / "icon.svg")

    @app.get("/report")
    def report(path: str) -> Response:
        try:
            found = roots.inside(roots.inside(path) / export_page.REPORT)
        except UsageError:
            return HTMLResponse("", 403)
        if not found.is_file():
            return HTMLResponse("", 404)
        return HTMLResponse(found.read_text("utf-8"), headers={"Content-Security-Policy": REPORT_POLICY})

    for spoken in LANGUAGES:
        studio = Studio(roots, spoken, token)
        with speaking(spoken):
            page = build(studio)
        page.has_launched = True  # or Gradio, which is mounted here, copies whatever file a request names
        gr.mount_gradio_app(
            app,
            page,
            f"/{spoken}",
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            max_file_size=max_upload_bytes,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            favicon_path=str(HERE / "icon.svg"),
            theme=theme(),
            css_paths=[HERE / "studio.css"],
            head=OPENED,
        )
    return Guard(app, token, password, hosts)


def theme() -> Any:
    """Gradio's own, with fonts that every machine has: none is fetched."""
    sans = ("ui-sans-serif", "system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
    return Default(font=sans, font_mono=("ui-monospace", "Consolas", "Noto Sans Mono CJK SC", "monospace"))


def build(studio: Studio) -> gr.Blocks:
    """The page in one language, which has to be the one that is spoken."""
    with gr.Blocks(title="Firefly Studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(header(studio))
        watched = watch_page.run_field()
        with gr.Tabs(elem_id="parts") as tabs:
            parts: dict[str, gr.Tab] = {}
            with gr.Tab(translate("Data"), id="data") as parts["data"]:
                data = data_page.build(studio, page)
            with gr.Tab(translate("Train"), id="train") as parts["train"]:
                train_page.build(studio, page, watched)
            with gr.Tab(translate("Watch"), id="watch") as parts["watch"]:
                watch_page.build(studio, page, parts["watch"], watched)
            with gr.Tab(translate("Talk"), id="talk") as parts["talk"]:
                talk_page.build(studio, page, parts["talk"], data)
            with gr.Tab(translate("Compare and export"), id="export") as parts["export"]:
                export_page.build(studio, page, parts["export"])
            with gr.Tab(translate("History"), id="history") as parts["history"]:
                history_page.build(studio, parts["history"])
        # A refresh comes back to the part that was open. In the browser: from here it would come late, and turn away
        # from a part that was opened in the meantime.
        for name, part in parts.items():
            part.select(
                None, js=f"() => {{ sessionStorage.setItem('firefly-part', '{name}'); }}", show_progress="hidden"
            )
        page.load(None, None, tabs, js=REOPEN, show_progress="hidden")
    return page


def header(studio: Studio) -> str:
    links = " · ".join(
        f"<b>{name}</b>" if spoken == studio.spoken else f"<a href='/{spoken}/' lang='{spoken}'>{name}</a>"
        for spoken, name in LANGUAGES.items()
    )
    return f"<header class='studio'><h1>Firefly Studio</h1><nav>{links}</nav></header>"
