"""A note of a mixture moved by recompose.py --transpose: is it heard where it was asked for, and the other as before?

    python -m tests.experiments.transpose                     # built-in notes
    python -m tests.experiments.transpose --data-root nsynth

On held-out mixtures of two test notes slot 0 is moved by 1 to 7 semitones, up or down, decoded at its new cell and
heard through Griffin-Lim; slot 1 is left. Pitches are YIN's (tests/experiments/judges.py) of what is written, against
those it hears in the stems; beside them, what it hears in slot 0 before it is moved, as a mask and decoded, and which
pitch cells tell.
"""

from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

import recompose
import train_mvae
from common import FOLDER, RATE, random_generator
from tests.experiments.judges import detect_pitch, si_sdr

MOST, NEAR = 7, 0.5  # semitones that a note is moved by; that a pitch may be away


def as_written(model, mixture, numbers, semitones=None, vocoder=False):
    """What recompose.py writes of the slots `numbers` of a mixture (samples,) at RATE: (samples,)."""
    kept = {k: {} if semitones is None else {"transpose": (semitones,)} for k in numbers}
    out = recompose.recompose_sound(model, Path("mixture"), mixture[None], RATE, kept, vocoder, [])
    return torch.from_numpy(out[0]).float()


def score(stems, semitones, model):
    """One mixture of stems (2, samples): how far pitches are from those asked for, in semitones; how loud, in dB."""
    mixture = stems.sum(0).numpy()
    mask, left = (as_written(model, mixture, [k]) for k in range(2))
    own = int(si_sdr(mask, stems).argmax())  # the stem that slot 0 has
    decoded = as_written(model, mixture, [0], vocoder=True)
    moved = as_written(model, mixture, [0], semitones)
    pitch = detect_pitch(torch.stack([stems[own], stems[1 - own], mask, left, decoded, moved]))
    away = {"moved": pitch[5] - pitch[0] - semitones, "left": pitch[3] - pitch[1]}
    away |= {"as a mask": pitch[2] - pitch[0], "decoded where it was": pitch[4] - pitch[0]}
    said = model.run("encoder", waveform=recompose.fit(mixture, model.about["samples"])[None])
    y = (said["cell"][0, :, 0] + 1) / 2  # a share of the octaves from LOWEST up
    told = 12 * np.log2(recompose.LOWEST / 440 * (RATE / 2 / recompose.LOWEST) ** y) + 69
    away |= {f"where the cell of slot {k} says": told[k] - pitch[k] for k in range(2)}
    spectrogram = model.compose(model.run("decoder", z=said["mu"], cell=said["cell"])["layer"])
    sung = model.run("vocoder", spectrogram=spectrogram)["waveform"] * said["gain"]
    return away, 10 * np.log10(np.square(sung).mean() / np.square(mixture).mean())


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, built-in notes.")
@click.option("--model", type=FOLDER, help="Folder written by export.py; without, the shipped one.")
@click.option("--mixtures", type=click.IntRange(1), default=200, help="Of the test split.")
def main(data_root, model, mixtures):
    """Print how often pitches are within half a semitone of what was asked for."""
    options = train_mvae.main.make_context("", ["--dataset", "nsynth-duo"]).params
    data = train_mvae.load_data(options | {"data_root": data_root}, torch.device("cpu"))
    model = recompose.Model(model or recompose.SHIPPED["mvae-sound"], "mvae-sound", others=["vocoder"])
    size = torch.randint(1, MOST + 1, (mixtures,), generator=random_generator("transpose"))
    sign = 2 * torch.randint(0, 2, (mixtures,), generator=random_generator("transpose", "sign")) - 1
    asked = zip(tqdm(data.mixtures("test", mixtures), disable=None), (size * sign).tolist(), strict=True)
    away, louder = zip(*(score(stems, semitones, model) for stems, semitones in asked), strict=True)
    click.echo(f"{mixtures} mixtures of test notes of {data.source}; slot 0 by 1 to {MOST} semitones up or down\n")
    click.echo("| slot | within 50 cents | within a semitone | median error, cents |\n|-|-|-|-|")
    for name in away[0]:
        cents = 100 * np.abs([float(one[name]) for one in away])
        near, semitone = (f"{(cents <= most).mean():.1%}" for most in (100 * NEAR, 100))
        click.echo(f"| {name} | {near} | {semitone} | {np.median(cents):.0f} |")
    low, median, high = np.quantile(louder, (0.05, 0.5, 0.95))
    click.echo(
        f"\nboth slots, by the vocoder, times gain: {median:.1f} dB louder than the mixture ({low:.1f} to {high:.1f})"
    )


if __name__ == "__main__":
    main()
