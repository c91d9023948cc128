"""How fast the exported Griffin-Lim is in onnxruntime, beside torchaudio's: four seconds, 32 iterations against 12.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.griffin_lim --n-fft 4096    # of more, the two's threads collide

How well it inverts spectrograms, by its settings: tests/experiments/griffin_lim.py.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import click
import onnxruntime
import torch
import torchaudio

import export
from common import NOTES_EACH, TIMBRES, Vocoder, built_in_notes, synthesise
from train_vae_audio import spectral_convergence

ROUNDS, REPEATS = 3, 15


def median_time(function):
    """Median seconds of REPEATS calls, after two to warm up."""
    seconds = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def onnx_session(magnitude, n_fft):
    """The vocoder's graph in onnxruntime, with as many threads as torch has."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocoder.onnx"
        graph = Vocoder(n_fft)
        export.in_real_arithmetic(graph)
        export.write_onnx(graph.eval(), {"spectrogram": magnitude.repeat(2, 1, 1)}, path, {"kind": "vae-sound"})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@click.command(context_settings={"show_default": True})
@click.option("--n-fft", type=click.Choice([1024, 4096]), default=1024, help="Of notes, or of two notes at once.")
@torch.no_grad()
def main(n_fft):
    """Time Griffin-Lim on one built-in note in torchaudio and in onnxruntime, turn about; convergence is of twelve."""
    to_magnitude = torchaudio.transforms.Spectrogram(n_fft, hop_length=n_fft // 4, power=1)
    notes = built_in_notes("test", list(TIMBRES))[:: NOTES_EACH + 1]  # of each instrument another
    magnitude = to_magnitude(torch.stack([synthesise(note) for note in notes]))
    session, vocoder = onnx_session(magnitude[:1], n_fft), Vocoder(n_fft)
    runs = {
        "torchaudio": vocoder,
        "onnxruntime": lambda some: torch.from_numpy(session.run(None, {"spectrogram": some.numpy()})[0])
    }  # fmt: skip
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(median_time(partial(run, magnitude[:1])))
    click.echo(f"| 4 s, {torch.get_num_threads()} threads | ms | convergence, dB |\n|-|-|-|")
    for name, run in runs.items():
        convergence = spectral_convergence(to_magnitude(run(magnitude)), magnitude).mean().item()
        click.echo(f"| {name} | {1000 * statistics.median(times[name]):.1f} | {convergence:.3f} |")
    ratio = statistics.median(times["onnxruntime"]) / statistics.median(times["torchaudio"])
    click.echo(f"\nratio: {ratio:.2f} of torchaudio's time")


if __name__ == "__main__":
    main()
