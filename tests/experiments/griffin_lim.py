"""How well Griffin-Lim inverts the notes' own spectrograms, by its settings: the ceiling of whatever decodes them.

python -m tests.experiments.griffin_lim --data-root nsynth

All rows compare STFT magnitudes at n_fft 1024 of the sound that came out with those of the note that went in: spectral
convergence and log-spectral distance, means over test notes.
"""

import itertools

import click
import torch
import torchaudio

import export
from common import (
    FOLDER,
    RATE,
    TIMBRES,
    Vocoder,
    load_notes,
    log_compress,
    log_expand,
    log_spectral_distance,
)
from recompose import FILE, read_sound, resample_sound
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
        sound = torch.cat([Vocoder(1024)(part) for part in magnitude.split(20)])
        name = f"{representation} {n_mels or ''}".strip()
        yield name, f"{RATE / 256 * spectrogram.bins:.0f}", score(sound, reference)


def by_start(kinds):
    """Of {kind: waveforms}: spectral convergence by the phases that 32 iterations begin with, and of the exported."""
    for (kind, waveforms), n_fft in itertools.product(kinds.items(), (1024, 4096)):
        to_magnitude = torchaudio.transforms.Spectrogram(n_fft, hop_length=n_fft // 4, power=1)
        magnitude = to_magnitude(waveforms[:, : waveforms.shape[1] // 1024 * 1024])
        at_random = torchaudio.transforms.GriffinLim(n_fft, 32, hop_length=n_fft // 4, power=1)
        torch.manual_seed(0)
        sounds = [Vocoder(n_fft)(magnitude), at_random(magnitude), export.GriffinLim(n_fft)(magnitude)]
        scores = [spectral_convergence(to_magnitude(sound), magnitude.clamp(min=1e-9)) for sound in sounds]
        worse = (scores[2] - scores[0]).max()
        yield kind, len(waveforms), n_fft, *(f"{score.mean():.1f}" for score in scores), f"{worse:.2f}"


def kinds_of(split, most, sounds):
    """{kind: waveforms} of at most so many notes of every family, of silence, and of sound files."""
    index = {}
    for i in split.spread(len(split.notes)).tolist():
        index.setdefault(split.notes[i].family, []).append(i)
    kinds = {name: split.waveform(torch.tensor(some[:: -(-len(some) // most)])) for name, some in index.items()}
    for path in sounds:
        samples, rate = read_sound(path)
        kinds[path.stem] = torch.from_numpy(resample_sound(samples.mean(1), rate, RATE)).float()[None]
    return kinds | {"silence": torch.zeros(1, RATE)}


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, the built-in notes.")
@click.option("--notes", type=click.IntRange(1), default=30, help="Test notes.")
@click.option(
    "--sound", "sounds", multiple=True, type=FILE, help="A sound beside notes in the last table: speech, say."
)
@torch.inference_mode()
def main(data_root, notes, sounds):
    """Print the tables of the study: iterations and momentum, n_fft and hop, mel bands, phases to begin with."""
    splits, source = load_notes({"data_root": data_root, "families": list(TIMBRES), "download": False})
    waveforms = splits["test"].waveform(splits["test"].spread(notes))
    reference, scores = stft_magnitude(waveforms), ("convergence", "LSD")
    click.echo(f"data: {source}; {len(waveforms)} notes")
    print_table(("iterations", "momentum", *scores), by_iterations(waveforms, reference))
    print_table(("n_fft", "hop", "values a second", *scores), by_frames(waveforms, reference))
    print_table(("representation", "values a second", *scores), by_representation(waveforms, reference))
    starts = ("sounds", "n", "n_fft", "zero phases", "random phases", "exported", "worse than zero, at most")
    print_table(starts, by_start(kinds_of(splits["test"], notes, sounds)))


if __name__ == "__main__":
    main()
