"""The page of `samlove web` in a real browser: headless Chromium, driven by Playwright."""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from urllib.parse import urlsplit
from zipfile import ZipFile

import numpy as np
import pytest

from samlove.media import write_video
from samlove.web.job import MAX_MB

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
REPOSITORY = Path(__file__).parents[1]
WAIT = 240_000  # milliseconds
CHANGED = """before => {
    const result = document.querySelector("#result");
    const waiting = result.querySelector(".pending") || result.innerText.includes("processing");
    return !waiting && result.innerText !== before && result.querySelector(".bad, video");
}"""
VIDEO = "document.querySelector('#result video')"


def _start() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "samlove.cli.main", "web", "--port", "0"]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().split()[1]


def _folders() -> set[Path]:
    return set(Path(gettempdir()).glob("samlove-web-*"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    before = _folders()
    server, url = _start()
    yield url
    server.send_signal(signal.SIGTERM)  # as a service manager ends it
    _, errors = server.communicate(timeout=300)
    assert server.returncode == 1
    assert errors == "stopped; run the same command again\n"
    assert _folders() <= before


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page at the width of a desktop. Nothing may be asked of other hosts."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    opened.set_default_timeout(WAIT)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#go")
    yield opened
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).netloc}
    opened.close()


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "silent.mp4"
    frames = np.full((20, 96, 128, 3), 60, np.uint8)
    frames[:, 20:60, 30:70] = (200, 60, 30)
    write_video(path, list(frames), fps=10)
    return path


def _ask(page: Any, video: Path | None, sentences: str) -> str:
    """Upload a video, ask, and return the text of the result."""
    if video is not None:
        with page.expect_response("**/gradio_api/upload?*"):
            page.set_input_files("#video input[type=file]", video)
        page.wait_for_selector(f"#video >> text={video.suffix}")
    page.fill("#sentences textarea", sentences)
    before = page.inner_text("#result")
    page.click("#go")
    page.wait_for_function(CHANGED, arg=before)
    return page.inner_text("#result")


def _fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_example_plays_with_its_masks_and_sound(page: Any, tmp_path: Path) -> None:
    assert "The result appears here" in page.inner_text("#result") and _fits(page)
    page.get_by_role("button", name="Example 1").click()
    page.wait_for_selector("#preview video")
    page.click("#go")
    page.wait_for_selector("#result video")
    page.wait_for_function(f"{VIDEO}.readyState >= 2")
    assert page.evaluate(f"[{VIDEO}.duration, {VIDEO}.videoWidth]") == [10, 320]
    page.evaluate(f"{VIDEO}.play()")
    page.wait_for_function(f"{VIDEO}.currentTime > 0.5 && {VIDEO}.webkitAudioDecodedByteCount > 0")
    page.wait_for_function("document.querySelector('#result img').naturalWidth > 0")
    assert page.locator("#result li").count() == 2
    with page.expect_download() as waiting:
        page.get_by_text("Download the masks (zip)").click()
    waiting.value.save_as(tmp_path / "masks.zip")
    with ZipFile(tmp_path / "masks.zip") as archive:
        names = set(archive.namelist())
        described = json.loads(archive.read("prediction.json"))
    assert {"masks/1/00000.png", "masks/2/00019.png", "masks.json"} <= names
    assert len(described["times"]) == 20
    page.set_viewport_size({"width": 420, "height": 900})
    assert _fits(page)


def test_a_video_without_sound_works_and_says_so(page: Any, silent: Path) -> None:
    sentence = "<b>the</b> thing"
    text = _ask(page, silent, sentence)
    assert "This video has no sound" in text and sentence in text
    page.wait_for_function(f"{VIDEO}.readyState >= 2")


def test_broken_files_and_requests_give_a_message(page: Any, silent: Path, tmp_path: Path) -> None:
    assert _ask(page, None, "the dog").startswith("Choose a video first")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(silent.read_bytes()[:1000])
    text = _ask(page, broken, "the dog")
    assert text.startswith("broken.mp4: truncated: expected 2.0 s") and str(gettempdir()) not in text
    assert _fits(page)


def test_files_are_deleted_when_their_page_is_closed(browser: Any, address: str, silent: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.mp4"
    own.write_bytes(silent.read_bytes() + b"\0" * 64)  # other bytes than in other tests: another upload
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.wait_for_selector("#go")
    _ask(page, own, "the thing")
    links = [page.get_attribute("#result video", "src"), page.get_attribute("#preview video", "src")]
    assert all(_status(f"{address}/{link}") == 200 for link in links)
    page.close()
    deadline = time.monotonic() + 60
    while any(_status(f"{address}/{link}") == 200 for link in links):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_large_uploads_and_other_names_of_the_server_are_refused(address: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    body += bytes(MAX_MB * 2**20 + 1) + b"\r\n--x--\r\n"
    assert _status(f"{address}/gradio_api/upload", {"Content-Type": "multipart/form-data; boundary=x"}, body) == 413
    assert _status(address, {"Host": "example.org"}) == 400


def _status(url: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}), timeout=100) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_ctrl_c_ends_a_running_request_and_deletes_everything(browser: Any) -> None:
    before = _folders()
    server, url = _start()
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.get_by_role("button", name="Example 1").click()
    page.wait_for_selector("#preview video")
    page.click("#go")
    page.wait_for_function("/Listening|Looking|Reading|Encoding|Tracking/.test(document.body.innerText)")
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=300)
    page.close()
    assert server.returncode == 1
    assert errors.startswith("stopped;") and errors.count("\n") == 1
    assert _folders() <= before
