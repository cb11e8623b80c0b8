"""The page, made with Gradio, and its server. Nothing is loaded from other hosts, and nothing is sent to them."""

import os
import shutil
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from html import escape
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from threading import Event, Lock
from typing import Any
from urllib.parse import quote

from samlove.errors import RequestError, SamloveError
from samlove.overlay import COLOURS
from samlove.predict import Segmenter, load
from samlove.predict.example import SEED, SENTENCES, write_example
from samlove.web.files import Files
from samlove.web.job import MAX_MB, MAX_SECONDS, MAX_SENTENCES, RATES, Result, run_job

EXAMPLES = (SEED, 10)  # seeds of scenes
WAITING = 8  # requests in the queue; one is computed at a time
LOCAL = ("127.0.0.1", "localhost")
GRACE = 2  # seconds that open connections get at the end
MISSING = 'the page needs Gradio, which is not installed; run: pip install "samlove[web]"'
SMALL = (
    "This is the small model that comes with samlove. It knows only the generated shapes and sounds of LAVS-synth, as "
    "in the examples; for real videos, start the page with a model of your own: samlove web --checkpoint FILE."
)
SILENT = "This video has no sound; for the model it is silent."
# Gradio's own page needs inline scripts and styles. Everything comes from this server.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "frame-ancestors 'none'"
)
CSS = """
.gradio-container { width: 100% !important; max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container h1 { margin: 0.2em 0 0; }
#intro p { max-width: 44em; margin: 0.4em 0 0; }
#result { min-height: 9em; }
#result .pending { opacity: 0; }
#result .wrap * { font-family: inherit; }
#result p { margin: 0 0 0.5em; line-height: 1.5; max-width: 44em; overflow-wrap: anywhere; }
#result .note { margin: 0 0 1em; padding: 0.6em 0.9em; border-left: 3px solid var(--border-color-primary); }
#result .bad { border-color: #d55e00; }
#result video, #result img { display: block; width: 100%; margin: 0; border-radius: 6px; background: #1b1f24; }
#result video { max-height: 75vh; }
#result ul { list-style: none; margin: 0.8em 0 1.4em; padding: 0; line-height: 1.6; }
#result li { display: flex; gap: 0.6em; align-items: baseline; }
#result i { flex: none; width: 0.8em; height: 0.8em; border-radius: 2px; }
#result li span { flex: 1; min-width: 0; overflow-wrap: anywhere; }
#result small { flex: none; color: var(--body-text-color-subdued); }
#result nav { display: flex; flex-wrap: wrap; gap: 0.4em 1.6em; margin-top: 1em; }
#preview video { display: block; max-width: 100%; max-height: 240px; margin: 0 auto; border-radius: 6px; }
footer { display: none !important; }
"""
EMPTY = "The result appears here: the video with its masks and sound, loudness and object scores, masks to download."


def serve(checkpoint: Path | None, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    checkpoint: as samlove.load takes it. port: 0 for a free one. ready: is called with the address when the page can be
    opened.
    Raises RequestError if Gradio is missing, the address cannot be used or the checkpoint is not there.
    """
    listening = _listen(host, port)
    with listening, TemporaryDirectory(prefix="samlove-web-") as scratch:
        os.environ |= {  # Gradio reads these when it is imported
            "GRADIO_TEMP_DIR": str(Path(scratch).resolve()),
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
        try:
            import uvicorn
            from fastapi import FastAPI
            from gradio import mount_gradio_app
            from starlette.middleware.trustedhost import TrustedHostMiddleware
        except ImportError:
            raise RequestError(MISSING) from None
        files, jobs = Files(Path(scratch)), _Jobs()
        theme, blocks = _page(load(checkpoint), files, jobs, _write_examples(files), checkpoint is None)
        app = FastAPI(openapi_url=None)
        app.add_middleware(_Policy)
        if host in LOCAL:  # other names that lead to this machine may belong to somebody else's page (DNS rebinding)
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL))
        mount_gradio_app(
            app, blocks, path="/", max_file_size=MAX_MB * 2**20, ssr_mode=False, show_error=False, footer_links=[],
            theme=theme, css=CSS,
        )  # fmt: skip
        # At the end, uvicorn reports each connection that is still open as an error, with a traceback.
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=GRACE))
        ready(_url(host, listening))
        try:
            server.run(sockets=[listening])
        finally:
            jobs.stop()
            files.close()


class _Jobs:
    """Says when the request that is computed should stop, and waits for it. One is computed at a time."""

    def __init__(self) -> None:
        self.running = Lock()
        self._stopping, self._ended = Event(), set[str]()

    def stop(self) -> None:
        self._stopping.set()
        with self.running:
            return

    def end(self, session: str) -> None:
        self._ended.add(session)

    def stopped(self, session: str) -> bool:
        return self._stopping.is_set() or session in self._ended


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0])
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"{host}, port {port}: cannot be used: {reason}; choose another with --port (0: any that is free) or --host"
        ) from None


def _url(host: str, listening: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


class _Policy:
    """ASGI middleware that adds POLICY to every answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy, (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _write_examples(files: Files) -> list[Path]:
    paths = []
    for number, seed in enumerate(EXAMPLES, start=1):
        paths.append(files.root / f"example-{number}" / f"example-{number}.mp4")
        paths[-1].parent.mkdir()
        files.keep(paths[-1])
        write_example(paths[-1], seed)
    return paths


def _page(segmenter: Segmenter, files: Files, jobs: _Jobs, examples: list[Path], small: bool) -> tuple[Any, Any]:
    """The theme and the page."""
    import gradio as gr

    tracked = gr.Progress()

    def segment(video: str | None, text: str, fps: int, request: gr.Request, progress: Any = tracked) -> str:
        if not video:
            return _note("Choose a video first: drop one, or take an example.", bad=True)
        session, path, out = str(request.session_hash), Path(video), files.root / f"result-{token_hex(16)}"
        files.use(session, path)
        files.use(session, out)

        def report(part: float, step: str) -> None:
            progress(part, desc=step)

        with jobs.running:
            try:
                return _shown(run_job(segmenter, path, text, fps, out, report, lambda: jobs.stopped(session)))
            except Exception as error:
                shutil.rmtree(out, ignore_errors=True)
                return "" if jobs.stopped(session) else _note(_told(error, path), bad=True)
            finally:
                if jobs.stopped(session):
                    shutil.rmtree(out, ignore_errors=True)

    def chosen(video: str | None, request: gr.Request) -> str:
        """A preview, which removes itself if the browser does not know the format."""
        if not video:
            return ""
        files.use(str(request.session_hash), Path(video))
        return f'<video controls playsinline src="{_address_of(Path(video))}" onerror="this.remove()"></video>'

    def end(request: gr.Request) -> None:
        jobs.end(str(request.session_hash))
        files.end(str(request.session_hash))

    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"])
    theme = theme.set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        input_placeholder_color="*neutral_500",
    )
    with gr.Blocks(title="samlove", analytics_enabled=False) as blocks:
        gr.HTML(
            "<h1>samlove</h1><p>Segments what a sentence refers to in a video, by what is seen and what is heard.</p>",
            elem_id="intro",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                video = gr.File(
                    label=f"Video: up to {MAX_SECONDS:g} s, {MAX_MB} MB", type="filepath", height=150, elem_id="video"
                )
                preview = gr.HTML(elem_id="preview")
                with gr.Row():
                    takes = [gr.Button(f"Example {n + 1}", size="sm", min_width=90) for n in range(len(examples))]
                text = gr.Textbox(
                    label=f"Sentences: one per line, up to {MAX_SENTENCES}",
                    lines=3,
                    max_lines=6,
                    placeholder="the object making the loudest sound",
                    elem_id="sentences",
                )
                fps = gr.Radio(
                    list(RATES),
                    value=RATES[1],
                    label="Masks per second",
                    info="More look smoother and take longer.",
                )
                go = gr.Button("Segment", variant="primary", elem_id="go")
            with gr.Column(scale=3, min_width=300):
                result = gr.HTML(_note(EMPTY) + (_note(SMALL) if small else ""), elem_id="result")
        private = {"api_visibility": "private"}
        for take, path in zip(takes, examples, strict=True):
            take.click(lambda path=path: (str(path), "\n".join(SENTENCES)), None, [video, text], queue=False, **private)
        video.change(chosen, video, preview, show_progress="hidden", queue=False, **private)
        go.click(segment, [video, text, fps], result, concurrency_limit=1, **private)
        blocks.unload(end)
    blocks.queue(max_size=WAITING, api_open=False)
    return theme, blocks


def _note(text: str, bad: bool = False) -> str:
    return f'<p class="note{" bad" if bad else ""}"{" role=alert" if bad else ""}>{escape(text)}</p>'


def _address_of(path: Path) -> str:
    """The URL of a file in Gradio's temporary folder, relative to the page."""
    return "gradio_api/file=" + quote(str(path))


def _shown(result: Result) -> str:
    """The video, where each sentence was found, the plot, and links to the files."""
    overlay, plot, archive = (_address_of(path) for path in (result.overlay, result.plot, result.archive))
    rows = (
        f'<li><i style="background:rgb{COLOURS[n % len(COLOURS)]}"></i><span>{escape(sentence)}</span>'
        f"<small>{escape(found)}</small></li>"
        for n, (sentence, found) in enumerate(zip(result.sentences, result.found, strict=True))
    )
    return (
        ("" if result.has_sound else _note(SILENT))
        + f'<video controls playsinline src="{overlay}"></video><ul>{"".join(rows)}</ul>'
        + "<p>Loudness and object scores; above 0, the object is in sight</p>"
        + f'<img src="{plot}" alt="Loudness and object scores over time">'
        + f'<nav><a href="{overlay}" download="overlay.mp4">Download the video</a>'
        + f'<a href="{archive}" download="masks.zip">Download the masks (zip)</a></nav>'
    )


def _told(error: Exception, video: Path) -> str:
    """What the page says about an error, without paths of the server. The terminal says more about unexpected ones."""
    if isinstance(error, SamloveError):
        if not video.exists():
            return "The video was deleted, as all are after an hour. Choose it again."
        return str(error).replace(str(video), video.name)
    if isinstance(error, OSError) and error.strerror:
        return f"The server cannot read or write a file: {error.strerror}."
    with suppress(OSError):
        traceback.print_exception(error, file=sys.stderr)
    return "Something went wrong on the server; its terminal says what."
