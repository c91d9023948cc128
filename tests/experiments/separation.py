"""What a model of two notes is held against: NMF, and ideal masks, on the mixtures that a run is judged by.

    python -m tests.experiments.separation                     # built-in notes
    python -m tests.experiments.separation --data-root nsynth
    python -m tests.experiments.separation --data-root nsynth --run runs/mvae-nsynth-duo-sum-N2-seed0

Prints the SI-SDR gained, in dB: that of the mixture itself, which nothing is done to, is 0 by definition. With --run
also the run's own, before and after training, on all mixtures and on kinds of them, how many of them leave a slot all
but empty, and whether a classifier hears the families of the notes in its slots. The data may be others than the run's.
"""

from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio

import train_mvae
from common import FOLDER, Vocoder, random_generator
from recompose import inverse_stft, soft_masks, stft
from tests.experiments.judges import train_classifier
from tests.experiments.slots import load_start
from train_mvae import SOUND_FFT, assign, root_mean_square, separate

CHUNK = 20  # mixtures at a time
HEARD = 100  # mixtures whose slots are heard through Griffin-Lim, which takes its time


def factorize(magnitude, components, iterations=200):
    """Non-negative matrix factorisation under the KL divergence (Lee & Seung 2001): (B, F, T) -> (B, K, F, T).

    Every component is a spectrum times an activation in time.
    """
    b, f, t = magnitude.shape
    generator = random_generator("nmf")
    w = torch.rand(b, f, components, generator=generator) + 0.1
    h = torch.rand(b, components, t, generator=generator) + 0.1
    for _ in range(iterations):
        w = w * ((magnitude / (w @ h + 1e-9)) @ h.mT) / (h.sum(2)[:, None] + 1e-9)
        h = h * (w.mT @ (magnitude / (w @ h + 1e-9))) / (w.sum(1)[..., None] + 1e-9)
    return w.mT[..., None] * h[:, :, None]  # (B, K, F, T)


def stft_magnitude(waveform, n_fft):
    """(B, samples), zero-padded to whole hops -> magnitudes (B, F, T)."""
    hop = n_fft // 4
    padded = F.pad(waveform, (0, -waveform.shape[1] % hop))
    return torchaudio.transforms.Spectrogram(n_fft, hop_length=hop, power=1)(padded)


def apply_masks(waveform, magnitude):
    """Sounds (B, samples) through the masks that a model's slots get, as `soft_masks` says: (B, M, samples).

    magnitude (B, M, F, T), not yet squared.
    """
    n_fft, parts = 2 * (magnitude.shape[2] - 1), []
    for sound, slots in zip(waveform.numpy(), magnitude.numpy(), strict=True):
        spectrum = stft(sound, n_fft, n_fft // 4)
        masked = soft_masks(slots, np.abs(spectrum)) * spectrum  # (M, F, T)
        parts.append([inverse_stft(part, n_fft, n_fft // 4, len(sound)) for part in masked])
    return torch.from_numpy(np.array(parts, np.float32))


def masking_magnitudes(levels, stems):
    """{name: magnitudes (B, 2, F, T)} that masks for mixtures of stems (B, 2, samples) are made of."""
    own, mixture = stems.flatten(0, 1), stems.sum(1)
    ways = {
        f"NMF, two components, n_fft {n_fft}": factorize(stft_magnitude(mixture, n_fft), 2)
        for n_fft in (512, 1024, 2048, 4096)
    }
    ideal = {
        "ideal masks at the model's resolution": levels.to_stft_magnitude(levels.as_loud(own)),
        "ideal masks": stft_magnitude(own, SOUND_FFT)
    }  # fmt: skip
    return ways | {name: magnitude.unflatten(0, stems.shape[:2]) for name, magnitude in ideal.items()}


@torch.no_grad()
def compare(data, n, models):
    """{name: dB of SI-SDR gained (n, 2)} on the first n test mixtures, of every way and of the models {name: model}."""
    gained = {}
    for some in data.mixtures("test", n).split(CHUNK):
        for name, magnitude in masking_magnitudes(data.levels, some).items():
            gained.setdefault(name, []).append(assign(apply_masks(some.sum(1), magnitude), some)[1])
        for name, model in models.items():
            gained.setdefault(name, []).append(assign(separate(model, data.levels, some.sum(1)).parts, some)[1])
    return {name: torch.cat(parts) for name, parts in gained.items()}


def pairs_of(data, n):
    """The notes of the first n test mixtures: (n, 2)."""
    return data.sample("test", max(n, train_mvae.MIXTURES), random_generator("held out"))[0][:n]


def kinds(data, families, n):
    """{kind of mixture: which of the first n test mixtures are of it, (n,) bool}."""
    notes, pair = data.notes["test"], pairs_of(data, n)
    apart, bass = notes.pitch[pair].diff(dim=1)[:, 0].abs(), torch.zeros(n, dtype=torch.bool)
    if "bass" in families:
        bass = (notes.family[pair] == families.index("bass")).any(1)
    fifths, near = apart % 12 == 7, apart <= 2
    return {"a bass among them": bass, "no bass": ~bass, "fifths, twelfths": fifths, "one or two semitones": near}


@torch.no_grad()
def nearly_empty(model, data, n):
    """The share of the first n test mixtures whose weaker slot has less than 10 nats."""
    least = [model.encode(data.levels(some.sum(1))).kl.amin(1) for some in data.mixtures("test", n).split(CHUNK)]
    return (torch.cat(least) < 10).double().mean().item()


@torch.no_grad()
def family_agreement(classifier, model, data, n):
    """How often a classifier hears the family of a stem: in its slot alone, its mask, the mixture, the stem itself.

    All are brought to the loudness that the note had. A slot alone is heard through Griffin-Lim, of the first HEARD
    mixtures. What is heard in a mixture is held against both stems, and right for both only where they are of one
    family: "ceiling".
    """
    notes, stems, right = data.notes["test"], data.mixtures("test", n), {}
    pair = pairs_of(data, n)
    family = notes.family[pair]
    for i in range(0, n, CHUNK):
        some, own = stems[i : i + CHUNK], pair[i : i + CHUNK].flatten()
        loudness = root_mean_square(notes.waveform(own))
        found, b = separate(model, data.levels, some.sum(1)), torch.arange(len(some))[:, None]
        slot, _ = assign(found.parts, some)
        heard = {"stem": some.flatten(0, 1), "mixture": some.sum(1).repeat_interleave(2, 0)}
        heard["masked"] = found.parts[b, slot].flatten(0, 1)
        if i < HEARD:
            heard["slot"] = Vocoder(SOUND_FFT)(data.levels.to_stft_magnitude(found.alone[b, slot].flatten(0, 1)))
        for name, waveform in heard.items():
            louder = waveform * (loudness / root_mean_square(waveform))
            right.setdefault(name, []).append(classifier(louder) == notes.family[own])
    shares = {f"family_{name}": torch.cat(hits).double().mean().item() for name, hits in right.items()}
    alike = (family[:, 0] == family[:, 1]).double().mean().item()
    return shares | {"family_mixture_ceiling": (1 + alike) / 2}


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, those of the run, or built-in notes.")
@click.option("--run", "run_dir", type=FOLDER, help="Run folder of train_mvae.py --dataset nsynth-duo.")
@click.option("--mixtures", type=click.IntRange(1), default=train_mvae.MIXTURES, help="Of the test split.")
def main(data_root, run_dir, mixtures):
    """Print the SI-SDR gained, in dB, by every way to take two notes apart."""
    models = {}
    options = train_mvae.main.make_context("", ["--dataset", "nsynth-duo"]).params
    if run_dir:
        model = train_mvae.load(run_dir)
        options |= model.config["options"]
    root = data_root or options["data_root"]
    data = train_mvae.load_data(options | {"data_root": root and Path(root), "download": False}, torch.device("cpu"))
    click.echo(f"{mixtures} mixtures of the test split; data: {data.source}")
    if run_dir:
        if not model.sound or data.parts != 2:
            raise click.UsageError(f"--run {run_dir}: expected a run on two notes at once, not of other --voices")
        models = {"the run at step 0": load_start(model, data), f"the run, step {model.config['step']}": model}
        click.echo(f"the run was trained on: {model.config['data']['source']}")
    click.echo("\n| SI-SDR gained, dB | mean | median |\n|-|-|-|\n| the mixture itself (baseline) | 0 | 0 |")
    gained = compare(data, mixtures, models)
    for name, values in gained.items():
        click.echo(f"| {name} | {values.mean():.1f} | {values.flatten().quantile(0.5):.1f} |")
    click.echo(
        "\n| SI-SDR gained, dB, by kind | mixtures | NMF, n_fft 512 | ideal masks, model's resolution | the run |"
    )
    click.echo("|-|-|-|-|-|")
    shown = *list(gained)[:1], "ideal masks at the model's resolution", *list(models)[1:]
    for kind, chosen in kinds(data, options["families"], mixtures).items():
        means = [f"{gained[name][chosen].mean():.1f}" if chosen.any() else "" for name in shown]
        click.echo(f"| {kind} | {int(chosen.sum())} | {' | '.join(means)} |")
    if run_dir:
        click.echo(f"\nmixtures whose weaker slot has less than 10 nats: {nearly_empty(model, data, mixtures):.1%}")
        click.echo("\n| share of families heard by a classifier | trained | step 0 |\n|-|-|-|")
        classifier = train_classifier(data.notes["train"], len(model.config["options"]["families"]))
        start, trained = (family_agreement(classifier, m, data, mixtures) for m in models.values())
        for name, share in trained.items():
            click.echo(f"| {name} | {share:.1%} | {start[name]:.1%} |")


if __name__ == "__main__":
    main()
