"""`samlove web`: a page to try samlove on."""

from typing import Annotated

import typer

from samlove.cli.predict import Checkpoint


def web(
    checkpoint: Checkpoint = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen. 0.0.0.0: for all machines that reach this one.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any port that is free.")] = 7860,
) -> None:
    """Serve a page in the browser: a video and sentences in, a video with masks out.

    Needs Gradio: pip install "samlove[web]". Ctrl-C ends it. Uploads and results are deleted when their page is closed,
    at the latest after an hour. Nothing is sent to other hosts.
    """
    from samlove.web.page import LOCAL, serve

    def ready(address: str) -> None:
        print(f"open {address} in a browser; Ctrl-C ends the page", flush=True)
        if host not in LOCAL:
            print("note: everyone who reaches this machine can use the page; it has no password", flush=True)

    serve(checkpoint, host, port, ready)
