"""`graft ui`: the pages in one application of our own, guarded, on the loopback interface unless told otherwise."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

# Before gradio is imported: it reads these once.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_SHARE"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(tempfile.gettempdir()) / f"graft-ui-{os.getuid()}"))

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from graft.app import files
from graft.app.guard import Guard
from graft.app.models import Models
from graft.app.pages import compare, library, preview, runs, teach
from graft.app.place import Place
from graft.app.uploads import MAX_MEGAPIXELS
from graft.studio.errors import InputError

LOOPBACK = "127.0.0.1"
FONTS = ("system-ui", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "DejaVu Sans Mono", "monospace")
PAGES = {"Teach": teach, "Preview": preview, "Compare": compare, "Library": library}
"""Pages beside the first one, by name; each is found at its name."""


def build(place: Place) -> gr.Blocks:
    """All pages."""
    with gr.Blocks(title="Graft Studio", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Navbar(main_page_name="Runs")
        runs.build(place)
    for name, module in PAGES.items():
        with blocks.route(name, f"/{name.lower()}"):
            gr.Navbar(main_page_name="Runs")
            module.build(place)
    return blocks


def make_app(place: Place, names: Sequence[str] = (), token: str = "") -> Any:
    """The whole application, behind its guard."""
    api = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    api.include_router(files.routes(place))
    theme = gr.themes.Base(
        primary_hue="emerald", secondary_hue="emerald", neutral_hue="zinc", font=FONTS, font_mono=MONO, radius_size="lg"
    ).set(
        body_text_color_subdued="*neutral_600",  # the default is too pale on white
        block_title_text_color="*neutral_700",
        block_label_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )
    css = (Path(__file__).parent / "ui.css").read_text(encoding="utf-8")
    warnings.filterwarnings("ignore", "SSR mode is not supported")  # nobody asked for it
    gr.mount_gradio_app(
        api, build(place).queue(max_size=32), "/", footer_links=[], run_history=False, max_file_size="64mb",
        show_error=True, theme=theme, css=css, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
    )  # fmt: skip
    return Guard(api, names, token)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    root: Path, port: int = 7860, host: str = LOOPBACK, names: Sequence[str] = (), data: Path | None = None
) -> None:
    """Serve until interrupted.

    Args:
        root: the runs.
        port: to listen at.
        host: address to listen on; any but a loopback address needs the token, which is printed.
        names: by which the studio may be reached beside addresses and localhost.
        data: where uploaded pictures go; None is `data` beside the runs.

    Raises:
        InputError: the port is taken.
    """
    import uvicorn

    token = "" if is_loopback(host) else os.environ.get("GRAFT_TOKEN") or secrets.token_urlsafe(32)
    root = Path(root).absolute()
    root.mkdir(parents=True, exist_ok=True)
    place = Place(root, Path(data or root.parent / "data").absolute(), Models(root))
    app = make_app(place, names, token)
    Image.MAX_IMAGE_PIXELS = int(MAX_MEGAPIXELS * 1e6 / 2)  # PIL refuses twice as much, whoever opens it
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False))
    shown = f"http://{host}:{port}/" + (f"login?token={token}" if token else "")
    print(f"{shown}  (stop with Ctrl-C)", file=sys.stderr, flush=True)
    try:
        server.run()
    except SystemExit as error:
        raise InputError(f"port {port}", "it cannot be listened at", "Give another --port") from error
    finally:
        place.models.close()
