"""What the page does, without a browser: turns, the form, the makers, and what a visitor is shown."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.generate.previews import Previews
from lfdm_export.pictures.clips import load_clip
from lfdm_export.pictures.faces import Face
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.pictures.preprocess import to_uint8
from lfdm_export.protocol.contract import preview_indices
from lfdm_export.web.page.examples import draw_examples
from lfdm_export.web.page.form import Form
from lfdm_export.web.page.makers import LocalMaker, RemoteMaker
from lfdm_export.web.page.shelf import Shelf
from lfdm_export.web.page.studio import Studio
from lfdm_export.web.turns import Turns
from tests.fake_bundle import CHUNK, FRAMES, SIZE, write_fake_bundle

pytest.importorskip("av", reason="the extra `video` is not installed")
PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
MOST_PIXELS = 100 * 100
#: Seconds after which a test has failed; nothing takes that long.
PATIENCE = 120.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("page") / "fake")


@pytest.fixture
def pipeline(bundle: Bundle) -> Pipeline:
    return Pipeline.open(bundle, threads=1, target="onnxruntime")


@pytest.fixture
def photo(tmp_path: Path) -> str:
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def values_of(form: Form) -> list[object]:
    """A form as a browser sends it."""
    files = ("photo", "motion", "clip")
    plain = dataclasses.asdict(form)
    return [{"path": value} if name in files and value is not None else value for name, value in plain.items()]


class Visit:
    """A studio over a pipeline, and what it showed."""

    def __init__(self, pipeline: Pipeline, folder: Path, turns: Turns | None = None, queue: int = 4) -> None:
        self.shelf = Shelf(folder)
        self.studio = Studio(LocalMaker(pipeline, turns or Turns(), queue), self.shelf, folder.parent, MOST_PIXELS)

    def make(self, form: Form) -> Generator[tuple[str, str], None, None]:
        return cast("Generator[tuple[str, str], None, None]", self.studio.make("visitor", values_of(form)))

    def shown(self, form: Form) -> list[tuple[str, str]]:
        return list(self.make(form))

    def files(self, picture: str) -> dict[str, Path]:
        """The files that a picture of the page leads to, by their names."""
        paths = re.findall(r'(?:src|href)="clips/([0-9a-f]{32}/[a-z0-9.]+)"', picture)
        return {Path(path).name: self.shelf.folder / path for path in paths}


@pytest.fixture
def visit(pipeline: Pipeline, tmp_path: Path) -> Visit:
    (tmp_path / "shelf").mkdir()
    return Visit(pipeline, tmp_path / "shelf")


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Held:
    """Holds a pipeline before a step until it is let go."""

    def __init__(self, pipeline: Pipeline, before: int = 1) -> None:
        self.reached, self.free, self.steps = threading.Event(), threading.Event(), 0
        run = pipeline.stages.run

        def held(stage: str, *tensors: Any) -> Any:
            if stage == "step":
                self.steps += 1
                if self.steps >= before:
                    self.reached.set()
                    assert self.free.wait(PATIENCE)
            return run(stage, *tensors)

        pipeline.stages.run = held  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------- previews


def test_previews_show_the_estimates_and_change_nothing(pipeline: Pipeline):
    shown: list[tuple[int, int, Any]] = []
    indices = preview_indices(FRAMES, CHUNK)
    previews = Previews(2, indices, lambda step, steps, frames: shown.append((step, steps, frames)))
    with_them = pipeline.generate(PIXELS, label="Anger", steps=5, seed=[3, 4], previews=previews)
    plain = pipeline.generate(PIXELS, label="Anger", steps=5, seed=[3, 4])
    np.testing.assert_array_equal(with_them.frames, plain.frames)
    assert [(step, steps) for step, steps, _ in shown] == [(2, 5), (4, 5)]

    estimates: list[Any] = []
    encoded = pipeline.encode(PIXELS).repeat(2)
    embedding = pipeline.bundle.embeddings[[pipeline.bundle.label_index("Anger")]]
    latent = pipeline.sample(
        encoded, embedding, steps=5, seed=[3, 4], on_estimate=lambda _, estimate: estimates.append(estimate.copy())
    )
    assert len(estimates) == 5
    expected, _ = pipeline.decode(encoded, np.ascontiguousarray(estimates[1][:, :, indices]))
    np.testing.assert_array_equal(shown[0][2], to_uint8(expected))
    assert np.abs(estimates[-1] - latent).max() < np.abs(estimates[0] - latent).max()
    with pytest.raises(InputError, match="previews every 0 steps"):
        Previews(0, indices, lambda *_: None)


# ---------------------------------------------------------------------------------------------------- turns


def test_turns_go_in_the_order_of_coming():
    turns, order = Turns(), []
    waiting = [threading.Event() for _ in range(3)]

    def take(number: int) -> None:
        def stand(before: int) -> None:
            if before == number + 1:
                waiting[number].set()

        with turns.taken(on_wait=stand):
            order.append(number)

    with ThreadPoolExecutor(3) as pool:
        with turns.taken():
            futures = []
            for number in range(3):
                futures.append(pool.submit(take, number))
                assert waiting[number].wait(PATIENCE)
        for future in futures:
            future.result(PATIENCE)
    assert order == [0, 1, 2]


def test_who_leaves_the_line_is_in_nobodys_way():
    turns = Turns()

    def leave(before: int) -> None:
        raise KeyError(before)

    with turns.taken(), pytest.raises(KeyError), turns.taken(on_wait=leave):
        pass
    with turns.taken(most=1), pytest.raises(InputError, match="1 clips are queued already"), turns.taken(most=1):
        pass
    with turns.taken(most=1):
        pass


# ------------------------------------------------------------------------------------------------- the clip


def test_a_visitor_sees_progress_previews_and_the_clip_of_generate(visit: Visit, pipeline: Pipeline, photo: str):
    held = Held(pipeline, before=6)
    seen = []
    for status, picture in visit.make(Form(photo, label="happiness", steps=19, seed=7, panels=True)):
        seen.append((status, picture))
        if "denoise 5 of 19" in status:
            assert '<progress aria-label="progress" value="0.2632" max="1">' in status
            held.free.set()
    assert held.free.is_set(), "the progress was seen"
    statuses, pictures = zip(*seen, strict=True)
    assert "starting" in statuses[0]
    assert statuses[-1].startswith(f'<p role="status">{FRAMES} frames of {SIZE} × {SIZE} in ')
    assert any(re.search('src="data:image/gif;base64,.*alt="preview after step 4 of 19"', one) for one in pictures)

    files = visit.files(pictures[-1])
    assert set(files) == {"clip.mp4", "clip.gif", "clip.motion", "panels.mp4"}
    assert 'download="happiness-7.gif"' in pictures[-1]
    expected = pipeline.generate(PIXELS, label="happiness", steps=19, seed=7)
    (gif,) = expected.save(files["clip.gif"].with_name("again.gif"))
    assert files["clip.gif"].read_bytes() == gif.read_bytes()
    assert load_clip(files["clip.mp4"]).shape == (FRAMES, SIZE, SIZE, 3)
    assert load_clip(files["panels.mp4"]).shape[2] == 5 * SIZE
    assert clip_metadata(files["clip.mp4"])["seed"] == 7

    saved = str(files["clip.motion"])
    _, picture = visit.shown(Form(photo, source="motion", motion=saved))[-1]
    moved = visit.files(picture)["clip.gif"]
    np.testing.assert_array_equal(load_clip(moved), load_clip(files["clip.gif"]))
    assert clip_metadata(moved)["made_by"] == "animate"


def test_another_clip_drives(visit: Visit, pipeline: Pipeline, photo: str, tmp_path: Path):
    (driving,) = pipeline.generate(PIXELS, label="Anger", steps=2).save(tmp_path / "driving.gif", fps=20)
    _, picture = visit.shown(Form(photo, source="clip", clip=str(driving), part="center"))[-1]
    expected = pipeline.transfer_motion(PIXELS, driving, crop="center")
    (gif,) = expected.save(tmp_path / "expected.gif")
    assert visit.files(picture)["clip.gif"].read_bytes() == gif.read_bytes()


@pytest.mark.parametrize("driven", [False, True])
def test_a_part_is_put_back_into_the_photograph(visit: Visit, pipeline: Pipeline, tmp_path: Path, driven: bool):
    wide = np.concatenate([np.full_like(PIXELS, 90), PIXELS], axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    height, width = PIXELS.shape[:2]
    region = (width, 0, width, height)
    text = ",".join(map(str, region))
    form = Form(str(tmp_path / "wide.png"), "region", text, paste_back=True, label="Anger", steps=2, seed=0)
    if driven:
        (driving,) = pipeline.generate(PIXELS, label="Anger", steps=2).save(tmp_path / "driving.gif", fps=20)
        form = dataclasses.replace(form, source="clip", clip=str(driving))
        expected = pipeline.transfer_motion(wide, driving, crop=region)
    else:
        expected = pipeline.generate(wide, label="Anger", steps=2, seed=0, crop=region)
    status, picture = visit.shown(form)[-1]
    assert f"{2 * width} × {height} in" in status
    assert f'width="{2 * width}" height="{height}"' in picture
    (gif,) = expected.paste_back(wide, region).save(tmp_path / "expected.gif")
    assert visit.files(picture)["clip.gif"].read_bytes() == gif.read_bytes()


def test_the_largest_face_moves(
    visit: Visit, pipeline: Pipeline, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The search itself is tested in `tests/pictures`; the crop is found once, in the photograph as it was sent."""
    found: list[tuple[int, ...]] = []

    def face(picture: object) -> Face:
        found.append(picture.shape)  # type: ignore[attr-defined]
        return Face((1, 2, 8, 8), 1)

    monkeypatch.setattr("lfdm_export.pictures.preprocess.largest_face", face)
    _, picture = visit.shown(Form(photo, "face", label="Anger", steps=2, seed=0))[-1]
    expected = pipeline.generate(np.asarray(Image.open(photo)), label="Anger", steps=2, seed=0, crop=(1, 2, 8, 8))
    (gif,) = expected.save(tmp_path / "expected.gif")
    assert visit.files(picture)["clip.gif"].read_bytes() == gif.read_bytes()
    assert len(found) == 1


def test_the_shelf_keeps_the_newest(visit: Visit, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lfdm_export.web.page.shelf._MOST", 2)
    clip = pipeline.generate(PIXELS, label="Anger", steps=1)
    places = [visit.shelf.keep(clip, panels=False).place for _ in range(4)]
    assert {path.name for path in visit.shelf.folder.iterdir()} == set(places[2:])


def test_examples_are_drawn(tmp_path: Path):
    pictures = [np.asarray(Image.open(path)) for path in draw_examples(tmp_path)]
    assert {picture.shape for picture in pictures} == {(256, 256, 3)}
    assert len({picture.tobytes() for picture in pictures}) == len(pictures) == 4


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"photo": None}, "there is no photograph; choose one"),
        ({"label": None}, "there is no label; give one"),
        ({"label": "happines"}, "did you mean &#x27;happiness&#x27;"),
        ({"label": "<b>nod</b>"}, "&lt;b&gt;nod&lt;/b&gt;"),
        ({"source": "text", "text": " "}, "there is no text; give one"),
        ({"source": "text", "text": "to nod"}, "this bundle has no text encoder"),
        ({"source": "motion"}, "there is no saved motion; choose its file"),
        ({"source": "clip"}, "there is no driving clip; choose its file"),
        ({"steps": 2.5}, "steps is 2.5, expected a whole number"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": float("inf")}, "seed is inf"),
        ({"sampler": "euler"}, "sampler"),
        ({"guidance": float("nan")}, "guidance_scale"),
        ({"part": "region"}, "the crop is &#x27;&#x27;, expected center, face, or X,Y,W,H"),
        ({"part": "region", "region": "0,0,9000,10"}, "is not within the picture"),
        ({"paste_back": True}, "nothing to put the clip back into; animate a part"),
    ],
)
def test_what_cannot_be_made_is_said_in_the_librarys_words(
    visit: Visit, photo: str, fields: dict[str, Any], message: str
):
    given: dict[str, Any] = {"photo": photo, "label": "Anger", "steps": 2, **fields}
    status, picture = visit.shown(Form(**given))[-1]
    assert status.startswith('<p class="lfdm-error" role="alert">')
    assert message in status
    assert "Traceback" not in status
    assert "clips/" not in picture


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, "text.png", "the photo was not uploaded"), (7, __file__, "the motion was not uploaded"),
        (0, 3, "photo is &#x27;3&#x27;, expected text"),
        (0, {"path": 3}, "photo is"), (0, {}, "there is no photograph"),
        (1, "ear", "the part is &#x27;ear&#x27;, expected one of whole, center, face, region"),
        (1, None, "the part is None"),
        (2, 3, "region is"), (3, "yes", "paste_back is &#x27;yes&#x27;, expected yes or no"),
        (4, "film", "the source is &#x27;film&#x27;"), (4, None, "the source is None"),
        (5, ["Anger"], "label is"), (9, 3, "sampler is"), (10, "2", "steps is"),
        (10, True, "steps is &#x27;True&#x27;, expected a number"), (12, {}, "seed is"), (13, 1, "panels is"),
    ],
)  # fmt: skip
def test_values_that_no_browser_sends(visit: Visit, photo: str, place: int, value: object, message: str):
    values = values_of(Form(photo, label="Anger", steps=2))
    values[place] = value
    status, _ = list(visit.studio.make("visitor", values))[-1]
    assert 'role="alert"' in status
    assert message in status


def test_files_that_are_not_what_they_should_be(visit: Visit, photo: str, tmp_path: Path):
    (tmp_path / "odd").write_bytes(b"nonsense" * 100)
    odd = str(tmp_path / "odd")
    for form, message in (
        (Form(odd, label="Anger"), "odd cannot be read as an image"),
        (Form(photo, source="motion", motion=odd), "expected a motion"),
        (Form(photo, source="clip", clip=odd), "odd"),
    ):
        status, _ = visit.shown(form)[-1]
        assert 'role="alert"' in status
        assert message in status
    status, _ = visit.shown(Form(str(tmp_path / "gone.png"), label="Anger"))[-1]
    assert "the photograph was removed from the server" in status
    Image.new("RGB", (101, 100)).save(tmp_path / "large.png")
    status, _ = visit.shown(Form(str(tmp_path / "large.png"), label="Anger"))[-1]
    assert "10,000" in status


def test_a_fault_of_the_program_is_said_and_logged(
    visit: Visit, pipeline: Pipeline, photo: str, caplog: pytest.LogCaptureFixture
):
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("odd")

    pipeline.generate = fail  # type: ignore[method-assign, assignment]
    status, _ = visit.shown(Form(photo, label="Anger", steps=2))[-1]
    assert "ValueError: odd (a fault of this program" in status
    assert "a clip of the page failed" in caplog.text


# ------------------------------------------------------------------------------------------ several at once


def test_clips_wait_for_each_other_and_can_be_given_up(pipeline: Pipeline, photo: str, tmp_path: Path):
    turns, held = Turns(), Held(pipeline)
    visit = Visit(pipeline, tmp_path, turns, queue=2)
    form = Form(photo, label="Anger", steps=19)
    first = visit.make(form)
    next(first)
    assert held.reached.wait(PATIENCE)
    second = visit.make(form)
    assert any("waiting: 1 clip ahead in the queue" in status for status, _ in second), "it stands in line"
    third = visit.shown(form)
    assert "2 clips are queued already; try again later" in third[-1][0]
    first.close()
    held.free.set()
    visit.studio.close()
    assert held.steps < 19, "the first was given up within a step"
    assert "the server is shutting down" in visit.shown(form)[-1][0]
    with turns.taken(most=1):
        pass


def test_stop_is_a_visitors_own(pipeline: Pipeline, photo: str, tmp_path: Path):
    held = Held(pipeline)
    visit = Visit(pipeline, tmp_path)
    shown = []
    for status, picture in visit.make(Form(photo, label="Anger", steps=19)):
        shown.append((status, picture))
        if held.reached.is_set():
            visit.studio.stop("somebody else")
            assert held.steps == 1
            visit.studio.stop("visitor")
            held.free.set()
    assert shown[-1][0] == '<p role="status">Stopped.</p>'
    visit.studio.close()
    assert held.steps == 1


def test_the_next_in_line_is_made(pipeline: Pipeline, photo: str, tmp_path: Path):
    turns, held = Turns(), Held(pipeline)
    visit = Visit(pipeline, tmp_path, turns)
    form = Form(photo, label="Anger", steps=3)
    first = visit.make(form)
    next(first)
    assert held.reached.wait(PATIENCE)
    shown = []
    for status, picture in visit.make(form):
        shown.append((status, picture))
        if "waiting: 1 clip" in status:
            held.free.set()
    assert set(visit.files(shown[-1][1])) == {"clip.mp4", "clip.gif", "clip.motion"}
    assert set(visit.files(list(first)[-1][1])) == {"clip.mp4", "clip.gif", "clip.motion"}


# ---------------------------------------------------------------------------------------------- over a server


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Any, Visit]]:
    pytest.importorskip("grpc", reason="the extra `client` is not installed")
    from lfdm_export.client import Client, Settings
    from tests.fake_triton import FakeTriton, Serving

    fake = FakeTriton()
    with Serving(fake) as serving, Client(serving.address, Settings(timeout=PATIENCE)) as client:
        visit = Visit.__new__(Visit)
        visit.shelf = Shelf(tmp_path)
        visit.studio = Studio(RemoteMaker(client, serving.address), visit.shelf, tmp_path, MOST_PIXELS)
        yield fake, visit
        fake.gate.set()
        visit.studio.close()


def test_a_server_streams(served: tuple[Any, Visit], photo: str):
    fake, visit = served
    seen = visit.shown(Form(photo, label="anger", steps=4, seed=5))
    (request,) = fake.seen
    assert (request.model, int(request.tensors["seed"][0])) == ("lfdm_stream", 5)
    assert int(request.tensors["preview_every"][0]) == 1
    files = visit.files(seen[-1][1])
    assert set(files) == {"clip.mp4", "clip.gif"}, "a stream has no latent and no warped pictures"
    assert len(load_clip(files["clip.gif"])) == 5


def test_panels_and_motion_of_a_server_come_whole(served: tuple[Any, Visit], photo: str):
    fake, visit = served
    _, picture = visit.shown(Form(photo, label="anger", steps=4, seed=1, panels=True))[-1]
    assert fake.seen[0].model == "lfdm"
    assert set(visit.files(picture)) == {"clip.mp4", "clip.gif", "clip.motion", "panels.mp4"}


@pytest.mark.parametrize("panels", [False, True])
def test_what_a_server_makes_can_be_given_up(served: tuple[Any, Visit], photo: str, *, panels: bool):
    fake, visit = served
    fake.gate.clear()
    shown = visit.make(Form(photo, label="anger", steps=4, panels=panels))
    next(shown)
    wait_for(lambda: fake.seen)
    shown.close()
    visit.studio.close()
    wait_for(lambda: fake.cut_off or fake.cancelled)


def test_a_server_that_refuses_is_quoted(served: tuple[Any, Visit], photo: str):
    fake, visit = served
    fake.refusals = [("INVALID_ARGUMENT", "the label is odd")]
    status, _ = visit.shown(Form(photo, label="anger", steps=4))[-1]
    assert "the label is odd" in status
    assert 'role="alert"' in status
