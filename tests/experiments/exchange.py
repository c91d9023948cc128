"""The pitch of one note with the timbre of the other: two slots of a mixture exchange their cells.

    python -m tests.experiments.exchange runs/mvae-nsynth-duo-sum-N2-seed0 --data-root nsynth

Slots of test mixtures are decoded at each other's cells and heard through Griffin-Lim. Pitches are YIN's, and families
those that the classifier of tests/experiments/judges.py hears: both held against what is heard in the stems, beside
slots that stay where they are, and all of it beside the model at step 0. DisMix (Luo et al. 2024), which learns from
pitch labels, reports 93.4 % of pitches and 100 % of instruments on a set of its own.
"""

from pathlib import Path

import click
import torch
from tqdm import tqdm

import train_mvae
from common import FOLDER, Vocoder, random_generator
from tests.experiments.judges import detect_pitch, train_classifier
from tests.experiments.slots import load_start
from train_mvae import SOUND_FFT, assign, root_mean_square, separate

TOGETHER, NEAR = 10, 0.5  # mixtures; semitones that a pitch may be away


@torch.no_grad()
def heard(model, data, stems):
    """Stems (B, 2, samples) -> each one's slot where it is, and where the other stem's is: (B, 2, samples) each."""
    found, b = separate(model, data.levels, stems.sum(1)), torch.arange(len(stems))[:, None]
    slot, _ = assign(found.parts, stems)
    mu, cell = found.encoding.mu[b, slot], found.encoding.cell[b, slot]
    alone = [model.alone(model.decode(mu, where)).flatten(0, 1) for where in (cell, cell.flip(1))]
    sounds = [Vocoder(SOUND_FFT)(data.levels.to_stft_magnitude(levels))[:, : stems.shape[2]] for levels in alone]
    return [sound.unflatten(0, stems.shape[:2]) for sound in sounds]


def judge(stems, stay, move, loudness, classifier):
    """{what: hits of every slot, (B * 2,) bool}; loudness (B, 2, 1) is what notes had before they were mixed."""
    sounds = {"stem": stems, "stay": stay, "move": move}
    pitch = {name: detect_pitch(sound.flatten(0, 1)).unflatten(0, stems.shape[:2]) for name, sound in sounds.items()}
    family = {
        name: classifier((sound * loudness / root_mean_square(sound)).flatten(0, 1)).unflatten(0, stems.shape[:2])
        for name, sound in sounds.items()
    }
    hits = {
        "pitch, where it is": (pitch["stay"] - pitch["stem"]).abs() < NEAR,
        "pitch, exchanged": (pitch["move"] - pitch["stem"].flip(1)).abs() < NEAR,
        "family, where it is": family["stay"] == family["stem"],
        "family, exchanged": family["move"] == family["stem"],
        "family of the other stem (baseline)": family["stem"].flip(1) == family["stem"],
    }
    return {name: hit.flatten() for name, hit in hits.items()}


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=FOLDER)
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, built-in notes.")
@click.option("--mixtures", type=click.IntRange(1), default=100, help="Of the test split.")
def main(run_dir, data_root, mixtures):
    """Print how often pitch and family are heard where they were put."""
    model = train_mvae.load(run_dir)
    options = train_mvae.main.make_context("", ["--dataset", "nsynth-duo"]).params | model.config["options"]
    root = data_root and Path(data_root)
    data = train_mvae.load_data(options | {"data_root": root, "download": False}, torch.device("cpu"))
    if not model.sound or data.parts != 2:
        raise click.UsageError(f"{run_dir}: expected a run of train_mvae.py on two notes at once")
    classifier = train_classifier(data.notes["train"], len(options["families"]))
    pair = data.sample("test", max(mixtures, train_mvae.MIXTURES), random_generator("held out"))[0]
    models, hits = (model, load_start(model, data)), []
    parts = data.mixtures("test", mixtures).split(TOGETHER), pair[:mixtures].split(TOGETHER)
    for stems, own in tqdm(zip(*parts, strict=True), total=len(parts[0]), disable=None):
        loudness = root_mean_square(data.notes["test"].waveform(own.flatten())).unflatten(0, own.shape)
        hits.append([judge(stems, *heard(one, data, stems), loudness, classifier) for one in models])
    click.echo(f"{mixtures} mixtures of the test split; data: {data.source}\n")
    click.echo("| heard as in the stem | trained | step 0 |\n|-|-|-|")
    for name in hits[0][0]:
        shares = (torch.cat([one[name] for one in of_model]).double().mean() for of_model in zip(*hits, strict=True))
        click.echo(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |")


if __name__ == "__main__":
    main()
