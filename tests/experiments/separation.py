"""What a model of two notes is held against: NMF, and ideal masks, on the mixtures that a run is judged by.

    python -m tests.experiments.separation                     # built-in notes
    python -m tests.experiments.separation --data-root nsynth
    python -m tests.experiments.separation --data-root nsynth --run runs/mvae-nsynth-duo-sum-N2-seed0

Prints the SI-SDR gained, in dB: that of the mixture itself, which nothing is done to, is 0 by definition. With --run
also the run's own, before and after training, and whether a classifier hears the families of the notes in its slots.
"""

import click
import torch

import train_mvae
from common import FOLDER, griffin_lim, random_generator
from tests.experiments.judges import train_classifier
from tests.experiments.slots import load_run, load_start
from train_mvae import apply_masks, assign, complex_stft, root_mean_square, separate, si_sdr

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


def masking_magnitudes(levels, stems):
    """{name: magnitudes (B, 2, F, T)} that masks of mixtures of stems (B, 2, samples) are made of, as of a model's."""
    magnitude = complex_stft(stems).abs()  # (B, 2, F, T)
    seen = levels.to_stft_magnitude(levels.of_magnitude(magnitude.flatten(0, 1))).unflatten(0, magnitude.shape[:2])
    ways = {f"NMF, two components, n_fft {n}": factorize(complex_stft(stems.sum(1), n).abs(), 2)
            for n in (512, 1024, 2048, 4096)}  # fmt: skip
    return ways | {"ideal masks at the model's resolution": seen, "ideal masks": magnitude}


@torch.no_grad()
def compare(data, n, models):
    """{name: dB of SI-SDR gained (n, 2)} on the first n test mixtures, of every way and of the models {name: model}."""
    gained = {}
    for some in data.mixtures("test", n)[0].split(CHUNK):
        mixture = some.sum(1)
        before = si_sdr(mixture[:, None], some)
        for name, magnitude in masking_magnitudes(data.levels, some).items():
            ratio = si_sdr(apply_masks(mixture, magnitude)[:, :, None], some[:, None])  # (B, estimates, stems)
            best = ratio.mT.gather(2, assign(ratio)[..., None])[..., 0]
            gained.setdefault(name, []).append(best - before)
        for name, model in models.items():
            gained.setdefault(name, []).append(separate(model, data.levels, some).gained)
    return {name: torch.cat(parts) for name, parts in gained.items()}


@torch.no_grad()
def family_agreement(classifier, model, data, n):
    """How often a classifier hears the family of a stem: in its slot alone, its mask, the mixture, the stem itself.

    All are brought to the loudness that the note had. A slot alone is heard through Griffin-Lim, of the first HEARD
    mixtures. What is heard in a mixture is held against both stems, and right for both only where they are of one
    family: "ceiling".
    """
    stems, loudness, family = data.mixtures("test", n)
    right = {}
    for i in range(0, n, CHUNK):
        some, true = stems[i : i + CHUNK], family[i : i + CHUNK].flatten()
        found = separate(model, data.levels, some)
        heard = {"stem": some.flatten(0, 1), "mixture": some.sum(1).repeat_interleave(2, 0)}
        heard["masked"] = found.parts.flatten(0, 1)
        if i < HEARD:
            heard["slot"] = griffin_lim(data.levels.to_stft_magnitude(found.alone.flatten(0, 1)))
        for name, waveform in heard.items():
            louder = waveform * (loudness[i : i + CHUNK].reshape(-1, 1) / root_mean_square(waveform))
            right.setdefault(name, []).append(classifier(louder) == true)
    shares = {f"family_{name}": torch.cat(hits).double().mean().item() for name, hits in right.items()}
    alike = (family[:, 0] == family[:, 1]).double().mean().item()
    return shares | {"family_mixture_ceiling": (1 + alike) / 2}


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, those of the run, or the built-in notes.")
@click.option("--run", "run_dir", type=FOLDER, help="Run folder of train_mvae.py --dataset nsynth-duo.")
@click.option("--mixtures", type=click.IntRange(1), default=train_mvae.MIXTURES, help="Of the test split.")
def main(data_root, run_dir, mixtures):
    """Print the SI-SDR gained, in dB, by every way to take two notes apart."""
    models = {}
    if run_dir:
        model, data = load_run(run_dir, data_root)
        if not model.domain:
            raise click.UsageError(f"--run {run_dir}: a run on pictures; expected one on nsynth-duo")
        models = {"the run at step 0": load_start(model, data), f"the run, step {model.config['step']}": model}
    else:
        options = train_mvae.main.make_context("", ["--dataset", "nsynth-duo"]).params
        data = train_mvae.load_data(options | {"data_root": data_root}, torch.device("cpu"))
    click.echo(f"{mixtures} mixtures of the test split; data: {data.source}\n")
    click.echo("| SI-SDR gained, dB | mean | median |\n|-|-|-|\n| the mixture itself (baseline) | 0 | 0 |")
    for name, values in compare(data, mixtures, models).items():
        click.echo(f"| {name} | {values.mean():.1f} | {values.flatten().quantile(0.5):.1f} |")
    if run_dir:
        click.echo("\n| share of families heard by a classifier | trained | step 0 |\n|-|-|-|")
        classifier = train_classifier(data.notes["train"], len(model.config["options"]["families"]))
        start, trained = (family_agreement(classifier, m, data, mixtures) for m in models.values())
        for name, share in trained.items():
            click.echo(f"| {name} | {share:.1%} | {start[name]:.1%} |")


if __name__ == "__main__":
    main()
