"""`firefly studio`: the whole path in a web page."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from firefly.commands.options import imports_without_gc
from firefly.commands.serve import KEYS
from firefly.errors import UsageError
from firefly.translation import translate

PASSWORD = "FIREFLY_STUDIO_PASSWORD"
"""Environment variable that holds the password: other users of the machine see a command line."""

app = typer.Typer(add_completion=False)


@app.command()
def studio_command(
    root: Annotated[
        list[str] | None, typer.Option("--root", help="Folder that the page may see; several; by default this one.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond this machine only with a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 7860,
    password: Annotated[
        str, typer.Option("--password", help="What the page asks for; or FIREFLY_STUDIO_PASSWORD.")
    ] = "",
    max_upload: Annotated[str, typer.Option("--max_upload", help="Largest file that can be uploaded.")] = "2GB",
) -> None:
    password = password or os.environ.get(PASSWORD, "")
    need_packages()
    from firefly.server.running import LOCAL_NAMES, bind, is_loopback
    from firefly.studio.roots import Roots

    if not password and not is_loopback(host):
        raise UsageError(
            "studio.no_password",
            "--host {host} lets other machines in, and that takes a password: give --password, or {variable} in the "
            "environment.",
            host=host,
            variable=PASSWORD,
        )
    roots = Roots.of(root or ["."])
    sock = bind(host, port)
    os.environ["GRADIO_TEMP_DIR"] = str(roots.received)  # read when gradio is imported
    with imports_without_gc():
        import uvicorn

        from firefly.server.access import stored_token
        from firefly.setup.plan import parse_memory
        from firefly.studio.app import make_app
    token = stored_token(roots.own)
    os.environ[KEYS] = token  # of what the page starts: a server lets in who has the page's token
    hosts = frozenset({*LOCAL_NAMES, host.lower()}) if is_loopback(host) else None
    studio = make_app(roots, token, password=password or None, hosts=hosts, max_upload_bytes=parse_memory(max_upload))
    sock.listen()  # whoever is quick with the address waits, and is not refused
    name, number = sock.getsockname()[:2]
    address = f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"
    print(
        translate(
            "Firefly Studio at {address} (Ctrl-C ends the page; what it has started goes on)",
            address=address if password else f"{address}/?token={token}",
        ),
        file=sys.stderr,
        flush=True,
    )
    config = uvicorn.Config(studio, log_level="warning", server_header=False, proxy_headers=False)
    uvicorn.Server(config).run(sockets=[sock])


def need_packages() -> None:
    """Say what to install, where the page's packages are not there."""
    if find_spec("gradio") is None:  # not imported yet: its settings have to stand first
        raise UsageError(
            "studio.no_packages",
            "firefly studio needs the package {package}: pip install 'firefly-llm[studio]'",
            package="gradio",
        )
