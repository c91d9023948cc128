"""How fast a waveform model's exported decoder plays, block by block, beside Griffin-Lim; through onnxruntime.

python -m tests.benchmarks.streams runs/vae-notes-waveform-none-D128-beta0.1-seed0/export

One thread. "x real time": seconds of sound a second. Latency: a block has to be heard before it is encoded, and decoded
sound is `delay` samples late; the time a block takes comes upon that. Griffin-Lim (export.py's twelve steps at n_fft
1024) needs a note's whole spectrogram, whose magnitudes are taken as known.
"""

import json
import statistics
import time
from pathlib import Path

import click
import numpy as np
import onnxruntime
import torch

from common import FOLDER
from tests.benchmarks.griffin_lim import median_time, onnx_session

BLOCKS = (512, 1024, 2048, 4096)


def open_session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def block_time(session, blocks, repeats):
    """Seconds that so many blocks' worth of input take, the median, caches handed on."""
    feeds = {
        i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape], np.float32) for i in session.get_inputs()
    }
    name = next(iter(feeds))
    shape = (1, feeds[name].shape[1], blocks) if name == "z" else (1, 512 * blocks)
    feeds[name], seconds = 0.5 * np.random.default_rng(0).standard_normal(shape).astype(np.float32), []
    for _ in range(repeats):
        start = time.perf_counter()
        *_, feeds["cache"] = session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=FOLDER)
@click.option("--repeats", type=click.IntRange(2), default=200, help="Blocks of every size.")
def main(folder: Path, repeats):
    """Print what blocks take in FOLDER, an export."""
    about = json.loads((folder / "model.json").read_text())
    rate, delay = about["sample_rate"], about["delay"]
    click.echo("| block, samples | encode, ms | decode, ms | decode, x real time | latency, ms |\n|-|-|-|-|-|")
    sessions = [open_session(folder / f"{name}.onnx") for name in ("encoder", "decoder")]
    for samples in BLOCKS:
        encode, decode = (block_time(session, samples // about["block"], repeats) for session in sessions)
        row = f"{1000 * encode:.1f} | {1000 * decode:.1f} | {samples / rate / decode:.0f}"
        click.echo(f"| {samples} | {row} | {1000 * (samples + delay) / rate:.0f} |")
    torch.set_num_threads(1)
    magnitude = torch.rand(1, 513, 251)
    session = onnx_session(magnitude, 1024)
    seconds = median_time(lambda: session.run(None, {"spectrogram": magnitude.numpy()}))
    click.echo(f"Griffin-Lim: 4 s of sound in {1000 * seconds:.0f} ms, {4 / seconds:.0f} x real time; latency 4 s")


if __name__ == "__main__":
    main()
