"""Wall time and peak memory of the README's recomposition, from process start to file, beside `import torch`.

    python -m tests.benchmarks.recompose
    OMP_NUM_THREADS=1 python -m tests.benchmarks.recompose --run runs/mvae-clevr-alpha-N6-seed0   # warm, beside PyTorch

With --run, a run of pictures that is exported: two pictures taken apart, four of their slots put together, all slots
drawn alone, in onnxruntime and in PyTorch (eager, as training uses it), turn about, with as many threads.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import onnxruntime
import torch

import train_mvae
from common import FOLDER
from recompose import SHIPPED, load_picture

ROOT = Path(__file__).parents[2]
WARM_UP, ROUNDS = 1, 7
KEPT = [0, 2]  # slots


def measure(command):
    """Median seconds and largest MB of ROUNDS runs of a command, after WARM_UP to warm the disk cache."""
    seconds, peaks = [], []
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - start)
        peaks.append(usage.ru_maxrss / 1024)
        if status:
            raise SystemExit(f"{command} failed")
    return statistics.median(seconds[WARM_UP:]), max(peaks)


def from_start():
    """Print what commands take, beside `import torch`."""
    pictures = [str(SHIPPED["mvae-image"] / name) for name in ("a.png", "b.png")]
    sounds = [str(SHIPPED["mvae-sound"] / name) for name in ("a.flac", "b.flac")]
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "two pictures": ["recompose.py", *pictures, "--slots", "0,2", "--out", f"{folder}/out.png"],
            "two sounds": ["recompose.py", *sounds, "--slots", "0", "--out", f"{folder}/out.wav"],
            "two sounds, --vocoder": ["recompose.py", *sounds, "--vocoder", "--out", f"{folder}/out.wav"],
            "import torch": ["-c", "import torch"],
        }
        measured = {name: measure([sys.executable, *command]) for name, command in commands.items()}
    seconds_torch, memory_torch = measured["import torch"]
    for name, (seconds, memory) in measured.items():
        share = f"{seconds / seconds_torch:.2f} of the time, {memory / memory_torch:.2f} of the memory of import torch"
        click.echo(f"{name:22} {seconds:.2f} s, {memory:.0f} MB: {share}")


def in_onnxruntime(folder, images):
    """A function that recomposes, and draws slots alone, by the graphs of an exported folder."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    encoder, decoder, composer = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=providers)
        for name in ("encoder", "decoder", "composer")
    )

    def recompose():
        layers, backgrounds = [], []
        for image in images.split(1):
            mu, cell, background = encoder.run(["mu", "cell", "background"], {"image": image.numpy()})
            (layer,) = decoder.run(None, {"z": mu, "cell": cell})
            backgrounds.append(torch.from_numpy(background))
            layers.append(torch.from_numpy(layer))
            alone = {"layer": layer[0][:, None], "background": background.repeat(layer.shape[1], 0)}
            composer.run(None, alone)
        parts = torch.cat([layer[:, KEPT] for layer in layers], dim=1)
        return torch.from_numpy(composer.run(None, {"layer": parts.numpy(), "background": backgrounds[0].numpy()})[0])

    return recompose


def in_pytorch(model, images):
    """The same by the trained model."""

    def recompose():
        layers, backgrounds = [], []
        for image in images.split(1):
            encoding, layer, _ = train_mvae.reconstruct(model, image)
            layers.append(layer)
            backgrounds.append(encoding.background)
            model.compose(layer[0][:, None], encoding.background.expand(layer.shape[1], -1, -1, -1))
        return model.compose(torch.cat([layer[:, KEPT] for layer in layers], dim=1), backgrounds[0])

    return recompose


@torch.inference_mode()
def when_warm(run):
    """Print what the graphs of a run take, beside its model."""
    model = train_mvae.load(run)
    crop = model.config["data"]["crop"]
    pictures = [load_picture(SHIPPED["mvae-image"] / name, model.size, crop) for name in ("a.png", "b.png")]
    images = torch.stack([torch.from_numpy(picture.copy()) for picture in pictures]).permute(0, 3, 1, 2).float() / 255
    ways = {"onnxruntime": in_onnxruntime(run / "export", images), "PyTorch": in_pytorch(model, images)}
    seconds = {name: [] for name in ways}
    for _ in range(WARM_UP + 5 * ROUNDS):
        for name, recompose in ways.items():
            start = time.perf_counter()
            recompose()
            seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(some[WARM_UP:]) for name, some in seconds.items()}
    found, expected = (recompose() for recompose in ways.values())
    click.echo(f"largest difference of a pixel: {(found - expected).abs().max():.1e}")
    for name, some in took.items():
        click.echo(f"{name:12} {1000 * some:.1f} ms: {some / took['PyTorch']:.2f} of PyTorch's time")


@click.command()
@click.option("--run", type=FOLDER, help="Run folder with an export/ in it.")
def main(run):
    """Time recomposition from process start, or, of a run, its graphs beside its model."""
    if run:
        when_warm(run)
    else:
        from_start()


if __name__ == "__main__":
    main()
