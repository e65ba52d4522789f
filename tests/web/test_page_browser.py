"""The page in a real browser, without a network: `make test-page` installs what this needs, and runs it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export.pictures.clips import load_clip
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.pictures.motion import load_motion

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = {"Chromium": BROWSER, **{name: importlib.util.find_spec(name) for name in ("playwright", "gradio", "uvicorn")}}
MISSING = [name for name, found in NEEDED.items() if found is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not found: `make test-page` installs them and runs these tests"
)
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "character.png"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
#: Milliseconds after which a test has failed; nothing takes that long.
PATIENCE = 120_000
#: The command; a clip's next to last step lasts while the file named first is there, or until the clip is stopped.
COMMAND = """
import sys
from pathlib import Path
from lfdm_export.cli import web_main
from lfdm_export.web.page.watch import Watch

tell, held = Watch.progress, Path(sys.argv.pop(1))

def progress(watch, stage, done, total):
    tell(watch, stage, done, total)
    while stage == "denoise" and done == total - 1 and held.exists() and not watch.stopped:
        watch._stopped.wait(0.01)

Watch.progress = progress
sys.exit(web_main())
"""


class Served:
    """The command, serving the shipped model."""

    def __init__(self, folder: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        #: While this file is there, no clip comes to its end.
        self.held = folder / "held"
        words = ["characters", "--port", "0", "--state", str(folder / "state"), "--target", "onnxruntime"]
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", COMMAND, str(self.held), *words], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = next(line for line in self.process.stdout if line.startswith("page")).split()[1]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE / 1000)
        finally:
            self.process.kill()
            self.process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER,
            args=[
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
            ],
        )  # fmt: skip
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end, nothing must have been asked for elsewhere, nor held back by the page's policy."""
    contexts: list[Any] = []
    asked: list[str] = []
    complaints: list[str] = []

    def visit(viewport: dict[str, int] = DESKTOP, address: str = served.address, **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.on("console", lambda message: complaints.extend([message.text] if message.type == "error" else []))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#make")
        page.wait_for_selector("#examples button[aria-label='drawing 4']")
        return page

    yield visit
    served.held.unlink(missing_ok=True)
    for context in contexts:
        context.close()
    here = ("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:")
    assert [url for url in asked if not url.startswith(here)] == []
    assert asked
    assert complaints == []


def choose_picture(page: Any, path: Path = PICTURE) -> None:
    page.set_input_files("#photo input[type=file]", str(path))
    page.wait_for_selector("#photo img")


def wait_for_clip(page: Any) -> None:
    page.wait_for_selector("#result video, #status [role=alert]")
    assert page.locator("#status [role=alert]").all_inner_texts() == []
    page.wait_for_function("document.querySelector('#result video').readyState >= 2")


def save(page: Any, words: str, folder: Path) -> Path:
    with page.expect_download() as found:
        page.get_by_role("link", name=words, exact=True).click()
    path = folder / found.value.suggested_filename
    found.value.save_as(path)
    return path


def test_from_upload_to_download(visit: Callable[..., Any], served: Served, tmp_path: Path):
    page = visit(accept_downloads=True)
    served.held.touch()
    choose_picture(page)
    page.get_by_label("Label", exact=True).last.click()
    page.get_by_role("option", name="nod").click()
    page.get_by_label("Steps").fill("100")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Show the panels").check()
    page.click("#make")
    page.wait_for_selector("#status progress[value]")
    preview = page.wait_for_selector("#result img[alt^='preview after step']")
    assert preview.evaluate("picture => [picture.naturalWidth, picture.naturalHeight]") == [64, 64]
    served.held.unlink()
    wait_for_clip(page)
    assert page.inner_text("#status").startswith("16 frames of 64 × 64 in ")
    assert page.evaluate("[...document.querySelectorAll('#result video')].map(v => v.videoWidth)") == [64, 320]

    gif, mp4, motion, panels = (save(page, words, tmp_path) for words in ("GIF", "MP4", "Motion", "Panels"))
    assert [path.name for path in (gif, mp4, motion)] == ["nod-3.gif", "nod-3.mp4", "nod-3.motion"]
    assert load_clip(gif).shape == load_clip(mp4).shape == (16, 64, 64, 3)
    assert load_clip(panels).shape[2] == 5 * 64
    found = clip_metadata(gif)
    assert found is not None
    assert (found["label"], found["seed"], found["steps"]) == ("nod", 3, 100)
    assert load_motion(motion).latent.shape[1] == 16

    page.get_by_role("radio", name="Saved motion").check()
    page.wait_for_selector("#steps", state="hidden")
    page.set_input_files("#motion input[type=file]", str(motion))
    page.wait_for_selector("#motion :text('nod-3')")
    before = page.get_attribute("#result video", "src")
    page.click("#make")
    page.wait_for_function(
        "before => { const v = document.querySelector('#result video'); return v && v.getAttribute('src') !== before }",
        arg=before,
    )
    again = save(page, "GIF", tmp_path / "again")
    np.testing.assert_array_equal(load_clip(again), load_clip(gif))


def test_errors_are_sentences(visit: Callable[..., Any], tmp_path: Path):
    page = visit()
    page.click("#make")
    alert = page.wait_for_selector("#status [role=alert]")
    assert alert.inner_text().startswith("there is no photograph; choose one")
    (tmp_path / "odd.png").write_bytes(b"nonsense" * 100)
    page.set_input_files("#photo input[type=file]", str(tmp_path / "odd.png"))
    page.wait_for_function("document.querySelector('#photo img')?.src.includes('odd.png')")
    page.click("#make")
    page.wait_for_selector("#status :text('odd.png cannot be read as an image: its format is unknown')")
    choose_picture(page)
    page.get_by_label("Steps").fill("-3")
    page.click("#make")
    page.wait_for_selector("#status [role=alert]:has-text('steps: found -3')")
    assert "Traceback" not in page.inner_text("body")
    with (tmp_path / "large.png").open("wb") as stream:
        stream.truncate((20 << 20) + 1)
    page.set_input_files("#photo input[type=file]", str(tmp_path / "large.png"))
    page.wait_for_selector(":text('maximum allowed size of 20.0 Mb')")


def test_a_phone(visit: Callable[..., Any]):
    page = visit(PHONE, has_touch=True)
    page.get_by_role("button", name="drawing 2").tap()
    page.wait_for_selector("#photo img")
    page.get_by_label("Show the panels").check()
    page.locator("#make").tap()
    wait_for_clip(page)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    outside = """() => [...document.querySelectorAll('button, input, a, video, p, h1')]
        .filter(e => e.checkVisibility() && !e.closest('.lfdm-panels') && e.type !== 'file')
        .map(e => [e.outerHTML.slice(0, 80), e.getBoundingClientRect()])
        .filter(([_, box]) => box.width && (box.left < 0 || box.right > innerWidth)).map(([words]) => words)"""
    assert page.evaluate(outside) == []


def test_a_keyboard_is_enough(visit: Callable[..., Any]):
    page = visit()
    name = """() => { const e = document.activeElement;
        return e.getAttribute('aria-label') || e.innerText || (e.labels?.[0]?.innerText ?? '') }"""
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(page.evaluate(name).strip())
        if order[-1] == "drawing 1":
            page.keyboard.press("Enter")
            page.wait_for_selector("#photo img")
            page.wait_for_function("document.activeElement.getAttribute('aria-label') === 'drawing 1'")
        if order[-1] == "Make the clip":
            break
    page.keyboard.press("Enter")
    wait_for_clip(page)
    expected = [
        "drawing 1", "drawing 2", "drawing 3", "drawing 4", "All, with black bars",
        "Label", "Label", "Sampler", "Steps", "Guidance (1: as trained)", "Seed",
        "Show the panels (source, clip, warped, grid, occlusion)", "Make the clip",
    ]  # fmt: skip
    assert "" not in order
    start = order.index("drawing 1")
    choices = ("Centered square", "Largest face", "A region", "Saved motion")  # whether Tab stops at each is Gradio's
    assert [one for one in order[start:] if one not in choices] == expected
    nameless = """() => [...document.querySelectorAll('a, button, input, textarea, video')]
        .filter(e => e.checkVisibility() && e.type !== 'file')
        .filter(e => !(e.getAttribute('aria-label') || e.innerText.trim() || e.labels?.length || e.title))
        .map(e => e.outerHTML.slice(0, 120))"""
    assert page.evaluate(nameless) == []


def test_the_camera(visit: Callable[..., Any]):
    page = visit(permissions=["camera"])
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#photo video')?.readyState >= 2")
    page.get_by_label("capture photo").click()
    page.wait_for_selector("#photo img")
    page.get_by_label("Centered square").check()
    page.click("#make")
    wait_for_clip(page)


def test_a_part_moves_in_the_whole_photograph(visit: Callable[..., Any], tmp_path: Path):
    page = visit(accept_downloads=True)
    drawing = Image.open(PICTURE).convert("RGB").resize((90, 90))
    whole = Image.new("RGB", (160, 100), (40, 90, 160))
    whole.paste(drawing, (60, 5))
    whole.save(tmp_path / "party.png")
    choose_picture(page, tmp_path / "party.png")
    page.get_by_label("A region").check()
    page.get_by_label("Region", exact=True).fill("60,5,90,90")
    page.get_by_label("Put it back into the photograph").check()
    page.click("#make")
    wait_for_clip(page)
    assert page.evaluate("(v => [v.videoWidth, v.videoHeight])(document.querySelector('#result video'))") == [160, 100]
    shown = page.locator("#result video").bounding_box()
    assert shown["width"] / shown["height"] == pytest.approx(1.6, abs=0.02)
    frames = load_clip(save(page, "GIF", tmp_path))
    assert frames.shape == (16, 100, 160, 3)
    still = np.abs(np.diff(frames.astype(int), axis=0)).max((0, 3)) == 0
    assert still[:, :60].all(), "only the region moves"
    assert not still[10:90, 70:140].all()

    page.get_by_label("All, with black bars").check()
    page.wait_for_selector("#region", state="hidden")
    page.wait_for_selector("#paste-back", state="hidden")
    page.click("#make")
    page.wait_for_function("document.querySelector('#result video')?.videoWidth === 64")


def test_the_clipboard(visit: Callable[..., Any]):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async () => { const canvas = document.createElement('canvas'); canvas.width = canvas.height = 90;
        canvas.getContext('2d').fillRect(0, 0, 50, 50);
        const picture = await new Promise(done => canvas.toBlob(done, 'image/png'));
        await navigator.clipboard.write([new ClipboardItem({'image/png': picture})]) }"""
    )
    page.get_by_label("Paste from clipboard").click()
    page.wait_for_selector("#photo img")
    page.click("#make")
    wait_for_clip(page)


def test_stop_and_the_next_clip(visit: Callable[..., Any], served: Served):
    page = visit()
    served.held.touch()
    choose_picture(page)
    page.get_by_label("Steps").fill("9")
    page.click("#make")
    page.wait_for_selector("#status :text('of 9')")
    page.click("#stop")
    page.wait_for_selector("#status :text('Stopped.')")
    served.held.unlink()
    assert page.inner_text("#status").strip() == "Stopped."
    page.get_by_label("Steps").fill("2")
    page.click("#make")
    wait_for_clip(page)


def test_the_server_ends_while_a_browser_looks_on(browser: Any, tmp_path: Path):
    served = Served(tmp_path)
    (folder,) = served.temporary.glob("lfdm-web-*")
    assert folder.stat().st_mode & 0o077 == 0, "nobody else reads what visitors send"
    page = browser.new_page()
    try:
        page.goto(served.address)
        served.held.touch()
        choose_picture(page)
        page.get_by_label("Steps").fill("9")
        page.click("#make")
        page.wait_for_selector("#status :text('of 9')", timeout=PATIENCE)
        assert any(folder.rglob("character.png"))
        assert served.end() == 128 + signal.SIGTERM
        assert not folder.exists()
    finally:
        page.close()
