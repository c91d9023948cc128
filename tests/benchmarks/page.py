"""Time of the page docs/index.html in headless Chromium, from dropped files to the recomposition on the screen.

python -m tests.benchmarks.page

What it fetches comes from this machine: the repository's files by http.server, onnxruntime-web from node_modules/. The
first drop includes the graphs: fetched, and made ready to run; others are the median of ROUNDS.
"""

import base64
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
from playwright.sync_api import sync_playwright

from tests.test_page import BROWSER, DUETS, QUIET, SCENES, Visit, serve

ROUNDS = 7
DROP = """async (sources) => {
    const fileOf = ([name, text]) => new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name);
    const files = sources.map(fileOf), started = performance.now();
    await open(files);
    await new Promise(requestAnimationFrame);
    return (performance.now() - started) / 1000;
}"""
START = "start().then(() => performance.now() / 1000)"
TRANSPOSE = """async (semitones) => {
    const started = performance.now();
    inputs[0].slots[1].semitones = semitones;
    await update();
    return (performance.now() - started) / 1000;
}"""


def measure(call):
    """The first, and the median of others, in s."""
    first, *others = [call(i) for i in range(1 + ROUNDS)]
    return f"first {first:.2f} s, then {statistics.median(others):.2f} s"


def drops(browser, address, paths):
    """A fresh tab, whose runtime is there, and its times."""
    visit = Visit(browser, address).go()
    visit.tab.evaluate("start()")
    visit.tab.wait_for_timeout(1000)  # in which a hand brings a file, and the browser goes on compiling
    visit.tab.unroute_all()  # what is fetched from now on does not pass through this process
    sources = [[path.name, base64.b64encode(path.read_bytes()).decode()] for path in paths]
    times = measure(lambda i: visit.tab.evaluate(DROP, sources))
    if visit.faults or visit.error():
        raise SystemExit(f"{paths}: {visit.error()} {visit.faults}")
    return visit, times


def main():
    with tempfile.TemporaryDirectory() as folder, serve() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET.split())
        print(f"Chromium {browser.version}, {len(os.sched_getaffinity(0))} cores")
        visit = Visit(browser, address).go()
        print(f"onnxruntime-web started: {visit.tab.evaluate(START):.2f} s after the page")
        stereo = Path(folder) / "stereo.wav"
        mono = soxr.resample(soundfile.read(DUETS[0])[0], 16000, 44100)
        soundfile.write(stereo, np.stack([mono, mono / 2], axis=1), 44100)
        for what, paths in {
            "a picture": SCENES[:1], "two pictures": SCENES, "4 s of stereo at 44.1 kHz": [stereo],
            "4 s of sound": DUETS[:1], "two sounds of 4 s": DUETS,
        }.items():  # fmt: skip
            visit, times = drops(browser, address, paths)
            print(f"{what}: {times}; {sum(visit.fetched.values()) / 1e6:.1f} MB fetched")
        print(f"a note transposed: {measure(lambda i: visit.tab.evaluate(TRANSPOSE, i + 1))}")
        browser.close()


if __name__ == "__main__":
    main()
