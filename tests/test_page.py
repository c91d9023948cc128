"""The page that recomposes in a browser, docs/index.html, in headless Chromium, against recompose.py.

Needs a Chromium on the PATH, and onnxruntime-web in node_modules/ (npm install onnxruntime-web@1.30.0): the page's own
address of it, and its hashes, are tested, but what it fetches from there comes from this folder.
"""

import contextlib
import functools
import http.server
import re
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from PIL import Image

import recompose

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "node_modules" / "onnxruntime-web" / "dist"
CDN = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/"
SCENES = [ROOT / "models" / "clevr" / name for name in ("a.png", "b.png")]
DUETS = [ROOT / "models" / "nsynth-duo" / name for name in ("a.flac", "b.flac")]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason="no onnxruntime-web in node_modules/"),
]

# ---------------------------------------------------------------- The page, served and opened


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve():
    """The page's address, while the repository is served as `python -m http.server` does it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=ROOT)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/docs/"
        server.shutdown()


@pytest.fixture(scope="module")
def address():
    with serve() as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET.split())
        yield browser
        browser.close()


class Visit:
    """A tab on the page, what it has fetched, and what went wrong there: faults are for a test to assert."""

    def __init__(self, browser, address, answer=None, **options):
        self.faults, self.fetched, self.answer = [], {}, answer
        self.tab = browser.new_page(**options)
        self.tab.set_default_timeout(20_000)
        self.tab.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        self.tab.on("request", self.count)
        self.tab.route("**/*", self.answer_or_serve)
        self.address = address

    def answer_or_serve(self, route):
        url = route.request.url
        if self.answer and self.answer(route):
            return
        path = RUNTIME / url.removeprefix(CDN)
        if url.startswith(CDN) and path.is_file():
            kind = "application/wasm" if path.suffix == ".wasm" else "text/javascript"
            route.fulfill(path=path, headers={"access-control-allow-origin": "*", "content-type": kind})
        elif re.match(r"(http://127\.0\.0\.1|blob:|data:)", url):
            route.continue_()
        else:
            self.faults.append(f"asked {url}")
            route.abort()

    def count(self, request):
        """Note the size of a file that is asked for, by its name."""
        path = re.sub(r"^http://[^/]*/|\?.*", "", request.url.replace(CDN, f"{RUNTIME.relative_to(ROOT)}/"))
        path = ROOT / path / ("index.html" if path.endswith("/") else "")
        if path.is_file():
            self.fetched[path.relative_to(ROOT).as_posix()] = path.stat().st_size

    def go(self, query=""):
        self.tab.goto(self.address + query)
        return self

    def open(self, *paths):
        """Choose files, and wait until they are taken apart and recomposed, or a sentence says why not."""
        self.tab.set_input_files("#files", paths)
        return self.settle()

    def settle(self):
        self.tab.wait_for_selector("#main[aria-busy=false] #stage:not(.busy)", state="attached")
        return self

    def keep(self, *wanted):
        """Toggle slots by keyboard until these are kept: names as the page shows them, such as A0."""
        for button in self.tab.locator(".slot").all():
            name = re.match(r"Slot (\w+) ", button.get_attribute("aria-label"))[1]
            if (button.get_attribute("aria-pressed") == "true") != (name in wanted):
                button.focus()
                self.tab.keyboard.press("Space")
        return self.settle()

    def handle(self, name):
        return self.tab.locator(".handle:visible").filter(has_text=name)

    def download(self):
        with self.tab.expect_download() as found:
            self.tab.click("#download")
        return found.value.path()

    def error(self):
        return self.tab.inner_text("#error") if self.tab.is_visible("#error") else ""

    def notes(self):
        return " ".join(self.tab.locator(".note").all_inner_texts())


@pytest.fixture(scope="module")
def visit(browser, address):
    return Visit(browser, address).go()


@pytest.fixture(autouse=True)
def no_faults(request):
    """After every test with the common tab: nothing on its console, and nobody else asked."""
    yield
    if "visit" in request.fixturenames:
        assert request.getfixturevalue("visit").faults == []


@functools.cache
def model(kind):
    return recompose.Model(recompose.SHIPPED[kind], kind, others=("vocoder",) * (kind == "mvae-sound"))


def recomposed_picture(paths, kept, crop=None):
    return np.asarray(recompose.recompose_pictures(model("mvae-image"), paths, kept, crop)[0]).astype(int)


def recomposed_sound(paths, kept):
    return recompose.recompose_sounds(model("mvae-sound"), paths, kept)[0].T


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pull(tab, place, by):
    """Drag from a place to another with the mouse, in pixels."""
    (x, y), (dx, dy) = place, by
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + dx, y + dy, steps=5)
    tab.mouse.up()


# ---------------------------------------------------------------- Pictures


def test_a_pair_of_pictures_is_recomposed_as_by_recompose(visit):
    visit.tab.click("[data-example=picture]")
    visit.settle().keep("A0", "A2", "B0", "B2")
    assert "4 of 20 slots" in visit.tab.inner_text("#status")
    expected = recomposed_picture(SCENES, [{0: {}, 2: {}}] * 2)
    assert np.abs(pixels(visit.download()) - expected).max() <= 1
    empty = visit.tab.locator(".slot.empty")
    assert empty.count() == 9 and visit.tab.get_by_text("empty", exact=True).count() == 9


@pytest.mark.parametrize("size", [(320, 240), (1003, 777), (600, 600), (57, 57), (800, 400), (301, 150)])
def test_pictures_of_any_size_are_cropped_and_resized_as_pil_does(visit, tmp_path, size):
    path, wide = tmp_path / "picture.png", size in [(800, 400), (301, 150)]
    Image.open(SCENES[0]).resize(size).save(path)
    visit.open(path)
    assert ("largest square in the middle" in visit.notes()) == wide
    expected = recompose.load_picture(path, 128, "centre" if wide else "clevr")
    found = visit.tab.evaluate("[...inputs[0].pixels]")
    assert np.array_equal(np.reshape(found, expected.shape), expected)


def test_an_object_is_dragged_and_brought_in_front(visit):
    visit.open(SCENES[0]).keep("0", "1", "2")
    box = visit.handle("0").bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    pull(visit.tab, centre, (60, -41))
    visit.settle()
    (x, y), _ = moves = visit.tab.evaluate("inputs[0].slots.slice(0, 2).map((slot) => slot.move)")
    side = visit.tab.locator("#stage").bounding_box()["width"]
    assert abs(x - 60 / side) < 0.01 and abs(y + 41 / side) < 0.01 and moves[1] == [0, 0]
    assert (
        np.abs(pixels(visit.download()) - recomposed_picture(SCENES[:1], [{0: {"move": (x, y)}, 1: {}, 2: {}}])).max()
        <= 1
    )

    visit.handle("1").focus()  # and by keyboard, in front of all others
    visit.tab.keyboard.press("Shift+ArrowRight")
    visit.tab.keyboard.press("ArrowUp")
    visit.tab.keyboard.press("f")
    visit.settle()
    kept = {0: {"move": (x, y)}, 1: {"move": (0.1, -0.02), "front": []}, 2: {}}
    assert np.abs(pixels(visit.download()) - recomposed_picture(SCENES[:1], [kept])).max() <= 1
    visit.tab.click("#reset")
    visit.settle()
    assert visit.tab.evaluate("allSlots().every((slot) => !slot.front && !slot.move.some(Boolean))")


def test_an_object_is_dragged_where_it_is_seen(visit):
    """Not by its handle: slot 2 of a.png is a cube, whose lower left corner is grasped."""
    visit.open(SCENES[0])
    box = visit.handle("2").bounding_box()
    pull(visit.tab, (box["x"] - 15, box["y"] + 45), (-30, 30))
    assert visit.settle().tab.evaluate("inputs[0].slots.map((slot) => slot.move.some(Boolean))")[2]


def test_files_may_be_dropped(visit):
    content = list(SCENES[1].read_bytes())
    visit.tab.evaluate(
        """(content) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([new Uint8Array(content)], "dropped.png"));
            for (const type of ["dragover", "drop"]) dispatchEvent(new DragEvent(type, { dataTransfer }));
        }""",
        content,
    )
    assert "dropped.png" in visit.settle().tab.inner_text("#inputs")


# ---------------------------------------------------------------- Sounds


def test_a_pair_of_sounds_is_recomposed_as_by_recompose(visit):
    visit.tab.click("[data-example=sound]")
    visit.settle().keep("A0", "B1")
    found, rate = soundfile.read(visit.download(), always_2d=True)
    assert rate == 16000 and np.abs(found - recomposed_sound(DUETS, [{0: {}}, {1: {}}])).max() < 1e-3


@pytest.mark.parametrize("form", ["44100 PCM_24 wav", "22050 PCM_16 flac", "48000 VORBIS ogg"])
def test_sounds_of_other_rates_and_forms_in_stereo(visit, tmp_path, form):
    rate, coding, suffix = form.split()
    left, right = (soxr.resample(soundfile.read(path)[0], 16000, int(rate)) for path in DUETS)
    path = tmp_path / f"sound.{suffix}"
    soundfile.write(path, np.stack([left, 0.5 * left + 0.2 * right], axis=1)[: int(2.7 * int(rate))], int(rate), coding)
    visit.open(path, DUETS[1]).keep("A0", "B0")
    found, _ = soundfile.read(visit.download(), always_2d=True)
    expected = recomposed_sound([path, DUETS[1]], [{0: {}}, {0: {}}])
    assert found.shape == expected.shape and np.abs(found - expected / max(1, np.abs(expected).max())).max() < 1e-3


def test_a_note_is_transposed_by_keyboard_and_by_mouse(visit):
    visit.open(DUETS[0]).keep("1")
    visit.handle("1").focus()
    for _ in range(3):
        visit.tab.keyboard.press("ArrowDown")
    visit.settle()
    found = soundfile.read(visit.download())[0]
    expected = recomposed_sound(DUETS[:1], [{1: {"transpose": [-3]}}])[:, 0]
    one, other = (np.abs(recompose.stft(sound, 4096, 1024)) for sound in (found, expected))
    assert np.linalg.norm(one - other) < 0.1 * np.linalg.norm(other)  # Griffin-Lim makes much of rounding
    assert abs(np.square(found).mean() / np.square(expected).mean() - 1) < 1e-3
    assert visit.handle("1").get_attribute("aria-valuetext") == "\N{MINUS SIGN}3 semitones, A4"  # of a C5

    box, stage = visit.handle("1").bounding_box(), visit.tab.locator("#stage").bounding_box()
    pull(visit.tab, (box["x"] + 8, box["y"] + 8), (0, -2 * stage["height"] / visit.tab.evaluate("span()")))
    visit.settle()
    assert visit.tab.evaluate("inputs[0].slots[1].semitones") == -1
    assert "B4, \N{MINUS SIGN}1 semitone" in visit.tab.inner_text("#edit")


def test_each_slot_and_the_mix_are_heard(visit):
    from playwright.sync_api import expect

    visit.open(DUETS[0])
    for button in visit.tab.locator(".play:visible").all():
        button.click()
        expect(button).to_have_class(re.compile("playing"))
        assert visit.tab.evaluate("playing.source.buffer.duration") == 4
    assert visit.tab.locator(".play.playing").count() == 1
    visit.tab.locator(".play.playing").click()
    assert visit.tab.locator(".play.playing").count() == 0


# ---------------------------------------------------------------- Bad input

GIF = [Image.new("L", (64, 64), level) for level in (0, 255)]
SOUND = soundfile.read(DUETS[0])[0]
BAD = {  # what a sentence must say, and what writes the file
    "notes.txt": ("neither a picture nor a sound", lambda path: path.write_text("to do")),
    "text.png": ("neither a picture nor a sound", lambda path: path.write_text("no picture at all")),
    "empty.wav": ("neither a picture nor a sound", lambda path: path.write_bytes(b"")),
    "damaged.jpg": ("damaged", lambda path: path.write_bytes(b"\xff\xd8\xff" + bytes(500))),
    "cut.png": ("damaged", lambda path: path.write_bytes(SCENES[0].read_bytes()[:9000])),
    "moving.gif": ("animated", lambda path: GIF[0].save(path, save_all=True, append_images=GIF[1:])),
    "moving.png": ("animated", lambda path: GIF[0].save(path, save_all=True, append_images=GIF[1:])),
    "silent.wav": ("is silent", lambda path: soundfile.write(path, np.zeros(9000), 16000)),
    "late.wav": ("silent for its first 4 s", lambda path: soundfile.write(path, np.r_[np.zeros(70000), SOUND], 16000)),
    "no.wav": ("is empty", lambda path: soundfile.write(path, np.zeros(0), 16000)),
    "damaged.flac": ("damaged", lambda path: path.write_bytes(b"fLaC" + bytes(900))),
    "nan.wav": ("NaN", lambda path: soundfile.write(path, np.full(9000, np.nan), 16000, "FLOAT")),
    "slow.wav": ("3000 Hz", lambda path: soundfile.write(path, SOUND, 3000)),
    "cut.wav": ("cut off", lambda path: path.write_bytes(struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 9036, b"WAVE",
                b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", 9000) + bytes(800))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_answered_by_a_sentence_in_place(visit, tmp_path, name):
    says, write = BAD[name]
    write(tmp_path / name)
    visit.open(SCENES[0]).open(tmp_path / name)
    assert says in visit.error() and "expected" in visit.error() and name in visit.error()
    assert "a.png" in visit.tab.inner_text("#inputs")  # what was there stays
    visit.open(SCENES[0])
    assert visit.error() == ""


@pytest.mark.parametrize("files", [[SCENES[0], DUETS[0]], [*SCENES, SCENES[0]]])
def test_files_that_do_not_go_together(visit, files):
    visit.open(*files)
    says = "A picture and a sound cannot" if len(files) == 2 else "3 files were given"
    assert says in visit.error() and "one or two pictures" in visit.error()


def test_a_large_photo_and_a_long_sound_are_taken(visit, tmp_path):
    photo, long, cut = tmp_path / "photo.jpg", tmp_path / "long.wav", tmp_path / "cut.wav"
    Image.open(SCENES[0]).convert("RGB").resize((7752, 5168), Image.Resampling.NEAREST).save(photo)  # 40 megapixels
    visit.open(photo)
    found = np.reshape(visit.tab.evaluate("[...inputs[0].pixels]"), (128, 128, 3))
    assert np.abs(found - recompose.load_picture(photo, 128, "clevr").astype(int)).max() <= 1

    soundfile.write(long, np.tile(SOUND, 150), 16000)  # ten minutes
    soundfile.write(cut, SOUND, 16000)
    visit.open(long).keep("0")
    assert "first 4 seconds" in visit.notes() and "recompose.py" in visit.notes()
    found, _ = soundfile.read(visit.download(), always_2d=True)
    assert np.abs(found - recomposed_sound([cut], [{0: {}}])).max() < 1e-3


def test_material_unlike_what_the_model_knows_is_warned_of(visit, tmp_path):
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "noise.png")
    soundfile.write(tmp_path / "noise.wav", 0.1 * generator.standard_normal(64000), 16000)
    for name in ("noise.png", "noise.wav"):
        assert "expect nonsense" in visit.open(tmp_path / name).notes()


def test_without_slots_there_is_the_background_or_silence(visit):
    visit.open(SCENES[0]).keep()
    assert np.ptp(pixels(visit.download())) > 50 and visit.error() == ""
    visit.open(DUETS[0]).keep()
    assert not soundfile.read(visit.download())[0].any()


# ---------------------------------------------------------------- Where something is missing


def abort(pattern):
    return lambda route: re.search(pattern, route.request.url) and not route.abort()


@pytest.mark.parametrize(
    ("missing", "says"),
    [("jsdelivr", "onnxruntime-web could not be fetched"), ("models/.*(onnx|json)$", "could not be fetched; serve")],
)
def test_what_cannot_be_fetched_is_named_and_tried_again(browser, address, missing, says):
    visit = Visit(browser, address, abort(missing)).go()
    visit.open(SCENES[0])
    assert says in visit.error()
    assert all("net::ERR_FAILED" in fault for fault in visit.faults)  # the browser's own lines
    visit.answer = None
    assert visit.open(SCENES[0]).error() == "" and visit.tab.locator(".slot").count() == 10
    visit.tab.close()


def test_a_runtime_of_another_content_is_refused(browser, address):
    def other(route):
        if route.request.url.endswith(".wasm"):
            route.fulfill(body="other", headers={"access-control-allow-origin": "*"})
            return True

    visit = Visit(browser, address, other).go()
    assert "is not version 1.30.0" in visit.open(SCENES[0]).error()
    visit.tab.close()


def test_a_browser_without_webassembly_is_told_so(browser, address):
    visit = Visit(browser, address)
    visit.tab.add_init_script("delete globalThis.WebAssembly")
    assert "no WebAssembly" in visit.go().open(SCENES[0]).error() and visit.faults == []
    visit.tab.close()


def test_opened_as_a_file_it_says_how_to_serve_it(browser):
    tab = browser.new_page()
    tab.goto(f"{ROOT.as_uri()}/docs/index.html")
    tab.wait_for_selector("#error:visible")
    assert "python -m http.server" in tab.inner_text("#error")
    tab.close()


# ---------------------------------------------------------------- What it loads, and how it looks


def test_the_load_is_small_and_graphs_come_when_needed(browser, address):
    visit = Visit(browser, address).go().open(*SCENES)
    graphs = sorted(name for name in visit.fetched if name.endswith("onnx"))
    assert graphs == [f"models/clevr/{name}.onnx" for name in ("composer", "decoder", "encoder")]
    assert 14e6 < sum(visit.fetched.values()) < 20e6 and visit.faults == []
    visit.open(DUETS[0])
    assert not any("vocoder" in name for name in visit.fetched)
    visit.tab.close()


def test_a_local_copy_of_the_runtime_is_used(browser, address):
    visit = Visit(browser, address, abort("jsdelivr")).go("?ort=../node_modules/onnxruntime-web/dist/")
    assert visit.open(DUETS[1]).error() == "" and visit.faults == []
    visit.tab.close()


def test_times_are_measured(browser, address, monkeypatch):
    from tests.benchmarks import page

    monkeypatch.setattr(page, "ROUNDS", 1)
    visit, times = page.drops(browser, address, SCENES[:1])
    assert re.fullmatch(r"first [\d.]+ s, then [\d.]+ s", times)
    visit.tab.close()


def test_nothing_is_wider_than_the_window(visit):
    visit.go()
    for files in ([], SCENES, [SCENES[0], DUETS[0]], DUETS[:1]):
        if files:
            visit.open(*files)
        for width, scheme in ((390, "dark"), (1280, "light")):
            visit.tab.emulate_media(color_scheme=scheme)
            visit.tab.set_viewport_size({"width": width, "height": 844})
            assert visit.tab.evaluate("document.documentElement.scrollWidth") <= width
