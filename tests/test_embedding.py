"""The programs of docs/embedding.md, as they stand there, and exported graphs in other runtimes than onnxruntime."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from PIL import Image

import recompose
import train_vae_audio
from tests.experiments import runtimes

ROOT = Path(recompose.__file__).parent
NODE_MODULES = ROOT / "node_modules"
PAGE = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, flags=re.DOTALL))
KNOWN = [name for name in ("openvino", "cv2", "tract") if importlib.util.find_spec(name)]
BROWSER = next(filter(None, map(shutil.which, runtimes.CHROMIUM)), None)

needs_node = pytest.mark.skipif(
    not (shutil.which("node") and (NODE_MODULES / "onnxruntime-node").is_dir()),
    reason="no node, or no onnxruntime-node in node_modules/",
)
needs_web = pytest.mark.skipif(
    not (BROWSER and (NODE_MODULES / "onnxruntime-web").is_dir()),
    reason="no Chromium, or no onnxruntime-web in node_modules/",
)


def write_program(folder, name):
    path = folder / name
    path.write_text(PROGRAMS[name], encoding="utf-8")
    return path


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), int)


def test_programs_are_short_and_whole():
    assert set(PROGRAMS) == {"move.py", "transpose.js", "move.html", "move.cpp", "stream.py"}
    for name, program in PROGRAMS.items():
        assert len(program.splitlines()) <= 40, name


# ---------------------------------------------------------------- Programs


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """What the Python program makes of the shipped example."""
    folder = tmp_path_factory.mktemp("move")
    target, shipped = folder / "moved.png", ROOT / "models" / "clevr"
    command = [sys.executable, write_program(folder, "move.py"), shipped, shipped / "a.png", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return target


def test_the_python_program_moves_an_object_as_recompose_does(moved):
    model = recompose.Model(ROOT / "models" / "clevr", "mvae-image")
    source = ROOT / "models" / "clevr" / "a.png"
    image = recompose.load_picture(source, 128, "clevr").transpose(2, 0, 1)[None].astype(np.float32) / 255
    kept = {int(k): {} for k in np.flatnonzero(model.run("encoder", image=image)["kl"][0] >= 4)}
    kept[0] = {"move": (-0.2, 0), "front": ()}
    expected, _ = recompose.recompose_pictures(model, [source], [kept])
    assert len(kept) > 2
    assert np.abs(pixels(moved) - np.asarray(expected, int)).max() <= 1


@needs_node
def test_the_node_program_transposes_a_note(tmp_path):
    shipped = ROOT / "models" / "nsynth-duo"
    samples, rate = soundfile.read(shipped / "a.flac", dtype="float32")
    soundfile.write(tmp_path / "in.wav", samples, rate, "PCM_16")
    whole = (tmp_path / "in.wav").read_bytes()
    odd = b"note\3\0\0\0abc\0"  # a chunk of three bytes, and the one that fills it up
    (tmp_path / "in.wav").write_bytes(whole[:36] + odd + whole[36:])
    (tmp_path / "node_modules").symlink_to(NODE_MODULES.resolve())
    program = write_program(tmp_path, "transpose.js")
    command = ["node", program, shipped, tmp_path / "in.wav", tmp_path / "out.wav", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    heard, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    model = recompose.Model(shipped, "mvae-sound")
    before, after = (model.run("encoder", waveform=recompose.fit(x, 64000)[None]) for x in (samples, heard))
    semitone = 1 / 6 / np.log2(8000 / 32.7)
    wanted = sorted([before["cell"][0, 0, 0] + 3 * semitone, before["cell"][0, 1, 0]])
    np.testing.assert_allclose(sorted(after["cell"][0, :, 0]), wanted, atol=semitone)
    louder = 10 * np.log10(np.square(heard).mean() / np.square(samples).mean())
    assert -6 < louder < 2, "as loud as the input, but for what smooth magnitudes lose"


@needs_web
def test_the_page_moves_an_object_as_the_python_program(moved):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, runtimes.served(ROOT) as address:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=runtimes.FLAGS)
        page, faults = browser.new_page(), []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))

        def answer(route):
            name = route.request.url.rsplit("/", 1)[1]
            if "cdn.jsdelivr.net" in route.request.url:
                route.fulfill(path=NODE_MODULES / "onnxruntime-web" / "dist" / name)
            elif name == "move.html":
                route.fulfill(body=PROGRAMS["move.html"], content_type="text/html")
            elif name == "favicon.ico":
                route.fulfill(status=204)
            else:
                route.continue_()

        page.route("**/*", answer)
        page.goto(f"{address}/move.html")
        page.wait_for_function("document.title == 'done'", timeout=20_000)
        found = page.locator("canvas").evaluate(
            "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        )
        browser.close()
    difference = np.array(found).reshape(128, 128, 4)[:, :, :3] - pixels(moved)
    assert not faults
    assert np.sqrt(np.square(difference).mean()) < 4, "grey levels: a canvas resizes otherwise than PIL"


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_the_cpp_program_moves_an_object_as_the_python_program(tmp_path, clevr_run):
    exported, size = clevr_run / "export", 64
    picture = Image.open(ROOT / "models" / "clevr" / "a.png").convert("RGB").crop((96, 24, 384, 312))
    picture.resize((size, size)).save(tmp_path / "in.ppm")
    command = [sys.executable, write_program(tmp_path, "move.py"), exported, tmp_path / "in.ppm", tmp_path / "py.png"]
    subprocess.run(command, check=True, capture_output=True)
    runtimes.compile_cpp(write_program(tmp_path, "move.cpp"), tmp_path / "move")
    about = json.loads((exported / "model.json").read_text())
    words = exported, tmp_path / "in.ppm", tmp_path / "cpp.ppm", about["N"], about["empty"]
    subprocess.run([tmp_path / "move", *map(str, words)], check=True, capture_output=True)
    assert np.abs(pixels(tmp_path / "cpp.ppm") - pixels(tmp_path / "py.png")).max() <= 1


def test_the_stream_program_plays_what_the_model_decodes(tmp_path, wave_run):
    t = np.arange(40 * 512 - 100) / 16000  # the last block is not whole
    soundfile.write(tmp_path / "in.wav", 0.3 * np.sin(2 * np.pi * 330 * t), 16000, subtype="FLOAT")
    words = write_program(tmp_path, "stream.py"), tmp_path / "in.wav", wave_run / "export", tmp_path / "out.wav"
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    model, (sound, _) = train_vae_audio.load(wave_run), soundfile.read(tmp_path / "in.wav", dtype="float32")
    with torch.no_grad():
        expected, _, _ = model.reconstruct(torch.from_numpy(np.pad(sound, (0, 100)))[None], None)
    found, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert rate == 16000 and len(found) == len(sound)
    assert np.abs(found - expected[0, : len(sound)].numpy()).max() < 1e-3


# ---------------------------------------------------------------- Runtimes


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("run", ["vae_run", "clevr_run", "sprites_run", "notes_run", "duo_run"])
def test_graphs_of_every_stage_agree_in_other_runtimes(run, name, request):
    """The encoder of notes was once silently wrong in OpenVINO, and so was a vocoder: by more than any rounding."""
    folder = request.getfixturevalue(run) / "export"
    runner = {"openvino": runtimes.run_openvino, "cv2": runtimes.run_opencv, "tract": runtimes.run_tract}[name]
    for graph, (inputs, expected) in runtimes.chain(folder).items():
        for path in (path for path in (folder / f"{graph}.onnx", folder / f"{graph}.static.onnx") if path.exists()):
            said = runtimes.difference(inputs, runner(path, inputs), expected)
            assert float(said.split()[0]) <= (0.1 if said.endswith("dB") else 1e-4), (path.name, said)


def test_the_chain_goes_on_from_what_was_encoded_and_not_from_what_a_prior_drew(clevr_run):
    said = runtimes.chain(clevr_run / "export")
    assert not np.array_equal(said["prior"][1]["cell"], said["encoder"][1]["cell"])
    for graph, name in (("decoder", "cell"), ("composer", "background")):
        np.testing.assert_array_equal(said[graph][0][name], said["encoder"][1][name])


def test_a_runtime_that_is_wrong_or_fails_is_told(duo_run):
    said = runtimes.chain(duo_run / "export")
    inputs, expected = said["composer"]
    wrong = {"spectrogram": expected["spectrogram"] * 1.01}
    assert float(runtimes.difference(inputs, wrong, expected)) > 1e-3
    cut = {"spectrogram": wrong["spectrogram"][:, :5]}
    assert runtimes.difference(inputs, cut, expected).startswith("spectrogram (1, 5")
    assert runtimes.difference(inputs, "Error: no Scan\nat line 3", expected) == "Error: no Scan"
    inputs, expected = said["vocoder"]
    noise = np.random.default_rng(0).standard_normal(expected["waveform"].shape).astype(np.float32)
    assert float(runtimes.difference(inputs, {"waveform": noise}, expected).split()[0]) > 1


@needs_node
def test_onnxruntime_for_node_agrees(duo_run):
    said = runtimes.chain(duo_run / "export")
    jobs = [(duo_run / "export" / f"{name}.onnx", inputs) for name, (inputs, _) in said.items()]
    results = runtimes.run_node(jobs, NODE_MODULES)
    for path, inputs in jobs:
        found = runtimes.difference(inputs, results[path], said[path.stem][1])
        assert float(found.split()[0]) <= 1e-3, (path.name, found)


# ---------------------------------------------------------------- The contract


@pytest.mark.parametrize("run", ["vae_run", "clevr_run", "sprites_run", "notes_run", "wave_run", "duo_run"])
def test_every_tensor_is_described_in_the_files_and_in_model_json(run, request):
    folder = request.getfixturevalue(run) / "export"
    about = json.loads((folder / "model.json").read_text())
    for name, described in about["graphs"].items():
        graph = onnx.load(folder / f"{name}.onnx").graph
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        sizes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
        for values, texts in ((graph.input, described["inputs"]), (graph.output, described["outputs"])):
            assert {value.name: value.doc_string for value in values} == texts
        for tensor, text in (described["inputs"] | described["outputs"]).items():
            axes = re.match(r"(?:int64 )?\(([^:]*?),?\)[:,]", text)[1].split(", ")
            assert tensor not in sizes or len(axes) == len(sizes[tensor]), (tensor, text)
    assert not any(value.name.startswith("s") and value.name[1:].isdigit() for value in graph.output)


def test_no_file_holds_a_scan_or_what_old_runtimes_refuse(duo_run):
    for path in (duo_run / "export").glob("*.onnx"):
        nodes = onnx.load(path).graph.node
        assert not {"Scan", "Loop", "If"} & {node.op_type for node in nodes}
        assert not any(attribute.name == "allowzero" for node in nodes for attribute in node.attribute)
        assert path.stat().st_size < 3e6, "matrices of the Fourier transform are small"
