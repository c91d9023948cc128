"""Every graph of exported folders in other runtimes: the largest difference from onnxruntime, or why there is none.

    python export.py RUN --static --fp16 --int8 --out exported
    python -m tests.experiments.runtimes exported --node-modules node_modules

Graphs get what the graph before gave, of the pictures and sounds that ship. Differences are relative to an output's
largest value where that exceeds 1, as export.py has them; of vocoders, in dB of spectral convergence. Installs nothing:
a runtime that is not there is left out. Those of JavaScript are `npm install --ignore-scripts onnxruntime-node
onnxruntime-web`; the browser is Chromium, through Playwright; C++ is compiled by g++ against the libtorch of PyTorch.
"""

import base64
import contextlib
import functools
import http.server
import importlib.util
import json
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime

from recompose import fit, load_picture, read_sound, resample_sound, stft
from tests.experiments.griffin_lim import print_table

MODELS = Path(__file__).parents[2] / "models"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")

# ---------------------------------------------------------------- What graphs are given


def first_inputs(folder, about, seed=0):
    """What the model in a folder begins with: {name: array}, a picture or a sound that ships, labels, noise."""
    given, noise = {"pitch": np.array([60]), "family": np.array([0])}, np.random.default_rng(seed).standard_normal
    if (folder / "prior.onnx").exists():  # which says how much noise it takes
        for one in onnx.load(folder / "prior.onnx").graph.input:
            sizes = [axis.dim_value or 1 for axis in one.type.tensor_type.shape.dim]
            given |= {one.name: noise(sizes, np.float32)} if one.name in ("noise", "given") else {}
        given["kept"] = np.array([1])
    if "sample_rate" in about:
        samples, rate = read_sound(MODELS / "nsynth-duo" / "a.flac")
        waveform = fit(resample_sound(samples.mean(1), rate, about["sample_rate"]), about["samples"])
        return given | {"waveform": waveform[None].astype(np.float32)}
    picture = load_picture(MODELS / "clevr" / "a.png", about["size"], "clevr").transpose(2, 0, 1)[None] / 255
    picture = picture.mean(1, keepdims=True) if about["kind"] == "vae-image" else picture
    return given | {"image": picture.astype(np.float32)}


def run_onnxruntime(path, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))


def chain(folder, suffix=".onnx"):
    """{graph: (inputs, outputs of onnxruntime)} of an exported folder, each graph fed by those before."""
    about = json.loads((folder / "model.json").read_text())
    values, said = first_inputs(folder, about), {}
    for name, tensors in about["graphs"].items():
        inputs = {key: values[key] for key in tensors["inputs"] if key != "slots"}  # that has a default
        path = folder / f"{name}{suffix}"
        outputs = run_onnxruntime(path if path.exists() else folder / f"{name}.onnx", inputs)
        said[name] = inputs, outputs
        if name != "prior" or "cell" not in values:  # else all that follows is of what was encoded
            values |= outputs
        values["z"] = values.get("mu", values.get("z"))
    return said


# ---------------------------------------------------------------- Runtimes


def run_openvino(path, inputs):
    import openvino

    core = openvino.Core()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {name: value for output, value in model(inputs).items() for name in output.names}


def run_opencv(path, inputs):
    import cv2

    net, names = cv2.dnn.readNetFromONNX(str(path)), [output.name for output in onnx.load(path).graph.output]
    for name, value in inputs.items():
        net.setInput(value, name)
    return dict(zip(names, net.forward(names), strict=True))


def run_tract(path, inputs):
    import tract

    graph = onnx.load(path).graph
    model = tract.onnx().load(str(path)).into_model().into_runnable()
    outputs = model.run([inputs[value.name] for value in graph.input if value.name in inputs])
    return {output.name: value.to_numpy() for output, value in zip(graph.output, outputs, strict=True)}


JAVASCRIPT = """
const run = async (ort, read, jobs) => {
  const said = {}, types = { float32: Float32Array, int64: BigInt64Array };
  for (const { path, inputs } of jobs) {
    try {
      const session = await ort.InferenceSession.create(await read(path), { executionProviders: EP });
      const feeds = {};
      for (const { name, type, dims, data } of inputs) {
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
        feeds[name] = new ort.Tensor(type, new types[type](bytes.buffer), dims);
      }
      const found = await session.run(feeds), outputs = said[path] = {};
      for (const [name, { dims, data }] of Object.entries(found)) {
        const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
        let text = "";
        for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
        outputs[name] = { dims, data: btoa(text) };
      }
    } catch (error) { said[path] = String(error); }
  }
  return said;
};
"""


def as_json(jobs):
    """[(path, inputs)] -> what JAVASCRIPT takes."""
    return [
        {
            "path": str(path),
            "inputs": [
                {"name": k, "type": str(v.dtype), "dims": v.shape, "data": base64.b64encode(v.tobytes()).decode()}
                for k, v in inputs.items()
            ],
        }
        for path, inputs in jobs
    ]


def from_json(said):
    """What JAVASCRIPT gives -> {path: {output: array}, or an error's text}."""
    return {
        Path(path): outputs
        if isinstance(outputs, str)
        else {
            name: np.frombuffer(base64.b64decode(value["data"]), np.float32).reshape(value["dims"])
            for name, value in outputs.items()
        }
        for path, outputs in said.items()
    }


def run_node(jobs, modules):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "jobs.json").write_text(json.dumps(as_json(jobs)))
        program = f"""
          const fs = require("fs"), ort = require({json.dumps(str(modules / "onnxruntime-node"))});
          {JAVASCRIPT.replace("EP", '["cpu"]')}
          run(ort, path => fs.promises.readFile(path), JSON.parse(fs.readFileSync("jobs.json")))
            .then(said => fs.writeFileSync("said.json", JSON.stringify(said)));"""
        subprocess.run(["node", "-e", program], cwd=folder, check=True, capture_output=True)
        return from_json(json.loads((Path(folder) / "said.json").read_text()))


@contextlib.contextmanager
def served(folder):
    """The address of a folder, served over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()


def run_web(jobs, modules):
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, CHROMIUM)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder)
        (root / "ort").symlink_to((modules / "onnxruntime-web" / "dist").resolve())
        for i, (path, _) in enumerate(jobs):
            (root / f"{i}.onnx").symlink_to(path.resolve())
        places = {str(path): f"{i}.onnx" for i, (path, _) in enumerate(jobs)}
        (root / "index.html").write_text(f"""<script src="ort/ort.wasm.min.js"></script><script>
          ort.env.wasm.numThreads = 1;
          {JAVASCRIPT.replace("EP", '["wasm"]')}
          const places = {json.dumps(places)};
          const read = async path => new Uint8Array(await (await fetch(places[path])).arrayBuffer());
        </script>""")
        with served(folder) as address:
            browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
            page = browser.new_page()
            page.goto(address)
            said = page.evaluate("jobs => run(ort, read, jobs)", as_json(jobs))
            browser.close()
    return from_json(said)


CPP = """#include <torch/script.h>
#include <fstream>
#include <iostream>
// GRAPH.pt, then "f" or "l", rank, sizes and a file of every input; writes 0.bin, 1.bin, ... of float32
int main(int argc, char** argv) {
  torch::NoGradGuard no_grad;
  auto graph = torch::jit::load(argv[1]);
  std::vector<torch::jit::IValue> inputs;
  for (int i = 2; i < argc;) {
    auto type = *argv[i++] == 'f' ? torch::kFloat32 : torch::kInt64;
    std::vector<int64_t> sizes(atoi(argv[i++]));
    for (auto& size : sizes) size = atoi(argv[i++]);
    auto tensor = torch::empty(sizes, type);
    std::ifstream(argv[i++], std::ios::binary).read((char*)tensor.data_ptr(), tensor.nbytes());
    inputs.push_back(tensor);
  }
  auto said = graph.forward(inputs);
  auto outputs = said.isTuple() ? said.toTuple()->elements().vec() : std::vector<torch::jit::IValue>{said};
  for (size_t k = 0; k < outputs.size(); k++) {
    auto value = outputs[k].toTensor().contiguous();
    std::ofstream(std::to_string(k) + ".bin", std::ios::binary).write((char*)value.data_ptr(), value.nbytes());
  }
}
"""


def compile_cpp(source, program):
    """Compile C++ against the libtorch within the installed PyTorch; raises subprocess.CalledProcessError."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    linked = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    command = ["g++", "-std=c++20", "-O1", *includes, str(source), "-o", str(program), *linked]
    subprocess.run(command, check=True, capture_output=True)


def run_cpp(jobs, like):
    """TorchScript files in C++; `like`: {path: outputs}, whose names and shapes a .pt file does not hold."""
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.cpp").write_text(CPP)
        compile_cpp(Path(folder) / "run.cpp", Path(folder) / "run")
        for path, inputs in jobs:
            words = [str(path.resolve())]
            for name, value in inputs.items():
                (Path(folder) / name).write_bytes(value.tobytes())
                words += [value.dtype.kind.replace("i", "l"), str(value.ndim), *map(str, value.shape), name]
            done = subprocess.run([Path(folder) / "run", *words], cwd=folder, capture_output=True, text=True)
            said[path] = done.stderr
            if done.returncode == 0:
                found = {n: np.fromfile(Path(folder) / f"{k}.bin", np.float32) for k, n in enumerate(like[path])}
                said[path] = {name: value.reshape(like[path][name].shape) for name, value in found.items()}
    return said


def one_by_one(run, jobs):
    said = {}
    for path, inputs in jobs:
        try:
            said[path] = run(path, inputs)
        except Exception as error:  # every runtime has kinds of its own
            said[path] = f"{type(error).__name__}: {error}"
    return said


def runtimes(modules):
    """{name: function of [(path, inputs)]} of what is installed."""
    found = {"onnxruntime": functools.partial(one_by_one, run_onnxruntime)}
    for name, package, run in (
        ("OpenVINO", "openvino", run_openvino), ("OpenCV", "cv2", run_opencv), ("tract", "tract", run_tract),
    ):  # fmt: skip
        if importlib.util.find_spec(package):
            found[name] = functools.partial(one_by_one, run)
    if modules and (modules / "onnxruntime-node").exists():
        found["-node"] = functools.partial(run_node, modules=modules)
    browser = any(map(shutil.which, CHROMIUM)) and importlib.util.find_spec("playwright")
    if modules and (modules / "onnxruntime-web").exists() and browser:
        found["-web"] = functools.partial(run_web, modules=modules)
    return found


# ---------------------------------------------------------------- Comparing


def convergence(waveform, spectrogram):
    """Spectral convergence of a sound (1, samples) with the magnitudes (1, F, T) that it was made of, in dB."""
    n_fft = 2 * (spectrogram.shape[1] - 1)
    missed = np.linalg.norm(np.abs(stft(waveform, n_fft, n_fft // 4)) - spectrogram)
    return 20 * np.log10(max(missed / np.linalg.norm(spectrogram), 1e-6))


def difference(inputs, found, expected):
    """A number, its unit and whether it is within the bar; or the first line of an error."""
    if isinstance(found, str):
        return found.strip().splitlines()[0][:90]
    if "waveform" in expected and "spectrogram" in inputs and inputs["spectrogram"].shape[1] in (257, 513, 1025, 2049):
        scores = (convergence(outputs["waveform"], inputs["spectrogram"]) for outputs in (found, expected))
        return f"{abs(np.subtract(*scores)):.0e} dB"
    worst = 0.0
    for name, value in expected.items():
        if found[name].shape != value.shape or not np.isfinite(found[name]).all():
            return f"{name} {found[name].shape}, expected {value.shape}, finite"
        worst = max(worst, float(np.abs(found[name] - value).max() / max(1, np.abs(value).max())))
    return f"{worst:.0e}"


def compare(folder, suffix, found):
    """Rows of a table: every graph of a folder in every runtime."""
    said = chain(folder)
    jobs = [(folder / f"{name}{suffix}", inputs) for name, (inputs, _) in said.items()]
    jobs = [(path, inputs) for path, inputs in jobs if path.exists()]
    results = {name: run(jobs) for name, run in found.items()}
    for path, inputs in jobs:
        expected = said[path.name.split(".")[0]][1]
        yield [f"{folder.name}/{path.name}", *(difference(inputs, results[name][path], expected) for name in found)]


def compare_small(folder):
    """Rows of a table: graphs with weights of fewer bits, alone and in what the chain gives in the end."""
    exact = chain(folder)
    composed = {"image": 255, "spectrogram": None}
    for path in sorted([*folder.glob("*.fp16.onnx"), *folder.glob("*.int8.onnx")]):
        name = path.name.split(".")[0]
        if name == "prior":  # from whose samples nothing is composed here
            continue
        inputs, expected = exact[name]
        alone, size = difference(inputs, run_onnxruntime(path, inputs), expected), path.stat().st_size
        last = [key for key in exact if key in ("decoder", "composer")][-1]
        said, ((output, true),) = dict(exact), exact[last][1].items()
        layers = run_onnxruntime(path, inputs) | (exact["encoder"][1] if name == "decoder" else {})
        if name == "encoder":
            layers["z"] = layers["mu"]
            layers |= run_onnxruntime(folder / "decoder.onnx", {k: layers[k] for k in said["decoder"][0]})
        wanted = {key: layers[key] for key in said[last][0]} if last == "composer" else {}
        made = run_onnxruntime(folder / "composer.onnx", wanted)[output] if wanted else layers[output]
        if composed[output]:
            end = f"{255 * np.abs(made - true).max():.2f} grey levels"
        else:
            end = f"{20 * np.log10(np.linalg.norm(made - true) / np.linalg.norm(true)):.0f} dB of the magnitudes"
        yield [f"{folder.name}/{path.name}", size, f"{size / (folder / f'{name}.onnx').stat().st_size:.2f}", alone, end]


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path, resolve_path=True))
@click.option("--node-modules", "modules", type=click.Path(exists=True, path_type=Path), help="Where npm put them.")
def main(folders, modules):
    found = runtimes(modules and modules.resolve())
    for suffix in (".onnx", ".static.onnx"):
        rows = [row for folder in folders for row in compare(folder, suffix, found)]
        print_table([f"graph, {'dynamic' if suffix == '.onnx' else 'static'}", *found], rows)
    rows = []
    for folder in folders:
        said = chain(folder)
        slots = {"slots": np.arange(len(said["encoder"][1]["cell"][0]))} if "cell" in said["encoder"][1] else {}
        jobs = [(folder / f"{name}.pt", i | (slots if name == "encoder" else {})) for name, (i, _) in said.items()]
        like = {path: said[path.stem][1] for path, _ in jobs}
        if all(path.exists() for path, _ in jobs) and shutil.which("g++"):
            results = run_cpp(jobs, like)
            rows += [[f"{folder.name}/{p.name}", difference(inputs, results[p], like[p])] for p, inputs in jobs]
    print_table(["graph", "torch.jit in C++"], rows)
    rows = [row for folder in folders for row in compare_small(folder)]
    print_table(["graph", "bytes", "share", "largest difference", "in the recomposition"], rows)


if __name__ == "__main__":
    main()
