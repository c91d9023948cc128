"""How well Griffin-Lim inverts the notes' own spectrograms, by its settings; and how fast, beside onnxruntime.

python -m tests.benchmarks.griffin_lim --data-root nsynth

The ceiling of whatever decodes spectrograms. All figures compare STFT magnitudes at n_fft 1024 of the sound that came
out with those of the note that went in: spectral convergence and log-spectral distance, means over NOTES test notes.
"""

import statistics
import tempfile
import time
from pathlib import Path

import click
import onnxruntime
import torch
import torchaudio

import export
import train_vae_audio as audio
from common import (
    FOLDER,
    GriffinLim,
    Spectrogram,
    griffin_lim,
    log_compress,
    log_expand,
    log_spectral_distance,
    spectral_convergence,
)

NOTES = 30
ROUNDS = 15


def score(waveform, reference):
    """ "SC dB | LSD dB" of sounds (n, samples), against the magnitudes (n, 513, T) of the notes."""
    heard = audio.stft(waveform)[:, :, : reference.shape[2]]
    reference = reference[:, :, : heard.shape[2]]
    distance = log_spectral_distance(log_compress(heard), log_compress(reference)).mean()
    return f"{spectral_convergence(heard, reference).mean():.1f} | {distance:.2f}"


def inverted(waveforms, n_fft, hop, iterations, momentum):
    """The notes through STFT magnitudes and torchaudio's Griffin-Lim, random phases where momentum is None."""
    magnitude = torchaudio.transforms.Spectrogram(n_fft, hop_length=hop, power=1)(waveforms)
    transform = torchaudio.transforms.GriffinLim(
        n_fft, iterations, hop_length=hop, power=1, momentum=momentum, rand_init=False
    )
    return torch.cat([transform(part) for part in magnitude.split(20)])


def quality(waveforms):
    """The tables of the study: iterations and momentum, n_fft and hop, mel bands."""
    reference = audio.stft(waveforms)
    print("| iterations | momentum | convergence | LSD |\n|-|-|-|-|")
    for momentum in (0.0, 0.9, 0.99):
        for iterations in (8, 32, 100):
            sound = inverted(waveforms, 1024, 256, iterations, momentum)
            print(f"| {iterations} | {momentum} | {score(sound, reference)} |", flush=True)
    print("\n| n_fft | hop | values a second | convergence | LSD |\n|-|-|-|-|-|")
    for n_fft in (512, 1024, 2048):
        for hop in (n_fft // 2, n_fft // 4, n_fft // 8):
            sound = inverted(waveforms, n_fft, hop, 32, 0.99)
            values = 16000 / hop * (n_fft // 2 + 1)
            print(f"| {n_fft} | {hop} | {values:.0f} | {score(sound, reference)} |", flush=True)
    print("\n| representation | values a second | convergence | LSD |\n|-|-|-|-|")
    for representation, n_mels in (("stft", 0), ("mel", 64), ("mel", 96), ("mel", 128), ("mel", 192), ("mel", 256)):
        spectrogram = Spectrogram(representation, 1024, n_mels)
        magnitude = spectrogram.stft_of(log_expand(spectrogram(waveforms)))
        sound = torch.cat([griffin_lim(part) for part in magnitude.split(20)])
        name = f"{representation}{f' {n_mels}' if n_mels else ''}"
        print(f"| {name} | {62.5 * spectrogram.bins:.0f} | {score(sound, reference)} |", flush=True)


def median_time(function):
    """Median seconds of ROUNDS calls, after two to warm up."""
    seconds = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def speed(waveform):
    """One note of four seconds, 32 iterations: torchaudio, and the exported graph in onnxruntime, turn about."""

    class Vocoder(torch.nn.Module):
        outputs = ("waveform",)

        def __init__(self):
            super().__init__()
            self.griffin_lim = GriffinLim(1024)

        def forward(self, spectrogram):
            return self.griffin_lim(spectrogram)

    magnitude = audio.stft(waveform[None])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocoder.onnx"
        export.write_onnx(Vocoder(), {"spectrogram": magnitude.repeat(2, 1, 1)}, path, {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    theirs = torchaudio.transforms.GriffinLim(1024, 32, hop_length=256, power=1, momentum=0.99, rand_init=False)
    array = magnitude.numpy()
    runs = {
        "torchaudio": lambda: theirs(magnitude)[0],
        "onnxruntime": lambda: session.run(None, {"spectrogram": array})[0][0],
    }
    print(f"\n| 4 s, 32 iterations, {torch.get_num_threads()} threads | ms | convergence |\n|-|-|-|")
    times = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            times[name].append(median_time(run))
    for name, run in runs.items():
        heard = audio.stft(torch.as_tensor(run())[None])
        convergence = spectral_convergence(heard, magnitude).item()
        print(f"| {name} | {1000 * statistics.median(times[name]):.1f} | {convergence:.3f} |")
    ratio = statistics.median(times["onnxruntime"]) / statistics.median(times["torchaudio"])
    print(f"\nratio: {ratio:.2f} of torchaudio's time")


@click.command()
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, the built-in notes.")
@torch.inference_mode()
def main(data_root):
    families = list(audio.TIMBRES)
    if data_root:
        notes, _ = audio.nsynth_notes(data_root / "nsynth-test", families)
    else:
        notes = audio.built_in_notes("test", families)
    chosen = [notes[i] for i in audio.spread(len(notes), NOTES)]
    waveforms = torch.stack([audio.waveform_of(note)[0] for note in chosen])
    quality(waveforms)
    speed(waveforms[len(waveforms) // 2])


if __name__ == "__main__":
    main()
