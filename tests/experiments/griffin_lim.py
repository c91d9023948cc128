"""How well Griffin-Lim inverts the notes' own spectrograms, by its settings: the ceiling of whatever decodes them.

python -m tests.experiments.griffin_lim --data-root nsynth

All rows compare STFT magnitudes at n_fft 1024 of the sound that came out with those of the note that went in: spectral
convergence and log-spectral distance, means over test notes.
"""

import click
import torch
import torchaudio

from common import (
    FOLDER,
    RATE,
    TIMBRES,
    griffin_lim,
    load_notes,
    log_compress,
    log_expand,
    log_spectral_distance,
)
from train_vae_audio import Spectrogram, spectral_convergence, stft_magnitude


def score(waveform, reference):
    """ "SC dB | LSD dB" of sounds (n, samples), against the magnitudes (n, 513, T) of the notes."""
    heard = stft_magnitude(waveform)[:, :, : reference.shape[2]]
    reference = reference[:, :, : heard.shape[2]]
    distance = log_spectral_distance(log_compress(heard), log_compress(reference)).mean()
    return f"{spectral_convergence(heard, reference).mean():.1f} | {distance:.2f}"


def inverted(waveforms, n_fft, hop, iterations, momentum):
    """The notes through STFT magnitudes and torchaudio's Griffin-Lim from zero phases."""
    magnitude = torchaudio.transforms.Spectrogram(n_fft, hop_length=hop, power=1)(waveforms)
    transform = torchaudio.transforms.GriffinLim(
        n_fft, iterations, hop_length=hop, power=1, momentum=momentum, rand_init=False
    )
    return torch.cat([transform(part) for part in magnitude.split(20)])


def print_table(columns, rows):
    """`rows`: lists of cells, printed as they come."""
    click.echo(f"\n| {' | '.join(columns)} |\n|{'-|' * len(columns)}")
    for row in rows:
        click.echo(f"| {' | '.join(map(str, row))} |")


def by_iterations(waveforms, reference):
    for momentum in (0.0, 0.9, 0.99):
        for iterations in (8, 32, 100):
            yield iterations, momentum, score(inverted(waveforms, 1024, 256, iterations, momentum), reference)


def by_frames(waveforms, reference):
    for n_fft in (512, 1024, 2048):
        for hop in (n_fft // 2, n_fft // 4, n_fft // 8):
            values = RATE / hop * (n_fft // 2 + 1)
            yield n_fft, hop, f"{values:.0f}", score(inverted(waveforms, n_fft, hop, 32, 0.99), reference)


def by_representation(waveforms, reference):
    for representation, n_mels in (("stft", 0), ("mel", 64), ("mel", 96), ("mel", 128), ("mel", 192), ("mel", 256)):
        spectrogram = Spectrogram(representation, 1024, n_mels)
        magnitude = spectrogram.to_stft_magnitude(log_expand(spectrogram(waveforms)))
        sound = torch.cat([griffin_lim(part) for part in magnitude.split(20)])
        name = f"{representation} {n_mels or ''}".strip()
        yield name, f"{RATE / 256 * spectrogram.bins:.0f}", score(sound, reference)


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, the built-in notes.")
@click.option("--notes", type=click.IntRange(1), default=30, help="Test notes.")
@torch.inference_mode()
def main(data_root, notes):
    """Print the tables of the study: iterations and momentum, n_fft and hop, mel bands."""
    splits, source = load_notes({"data_root": data_root, "families": list(TIMBRES), "download": False})
    waveforms = splits["test"].waveform(splits["test"].spread(notes))
    reference, scores = stft_magnitude(waveforms), ("convergence", "LSD")
    click.echo(f"data: {source}; {len(waveforms)} notes")
    print_table(("iterations", "momentum", *scores), by_iterations(waveforms, reference))
    print_table(("n_fft", "hop", "values a second", *scores), by_frames(waveforms, reference))
    print_table(("representation", "values a second", *scores), by_representation(waveforms, reference))


if __name__ == "__main__":
    main()
