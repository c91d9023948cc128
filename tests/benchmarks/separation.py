"""What a model of two notes is held against: NMF, and ideal masks, on the mixtures that a run is judged by.

python -m tests.benchmarks.separation                     # built-in notes
python -m tests.benchmarks.separation --data-root nsynth
"""

from pathlib import Path

import click
import torch

from common import random_generator
from train_mvae import MIXTURES, PRESETS, NoteDuos, assign, main, masked, si_sdr, soft_masks, stft_of

AT_ONCE = 20


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


def ways(levels, stems):
    """{name: masks (B, 2, F, T)} of mixtures of stems (B, 2, samples)."""
    magnitude = stft_of(stems).abs()  # (B, 2, F, T)
    seen = levels.stft_of(levels.of_magnitude(magnitude.flatten(0, 1))).unflatten(0, magnitude.shape[:2])
    masks = {}
    for n_fft in (512, 1024, 2048, 4096):
        found = factorize(stft_of(stems.sum(1), n_fft).abs(), 2)
        masks[f"NMF, two components, n_fft {n_fft}"] = found / found.sum(1, keepdim=True).clamp(min=1e-12)
    return masks | {"ideal masks at the model's resolution": soft_masks(seen), "ideal masks": soft_masks(magnitude)}


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=click.Path(exists=True, path_type=Path), help="NSynth's folders.")
@click.option("--mixtures", type=int, default=MIXTURES)
def run(data_root, mixtures):
    """Print the SI-SDR gained, in dB, by every way."""
    options = {p.name: p.get_default(click.Context(main)) for p in main.params} | PRESETS["nsynth-duo"]
    options |= {"data_root": data_root, "cache": Path(options["cache"])}
    options["families"] = options["families"].split(",")
    data, gained = NoteDuos(options, torch.device("cpu")), {}
    stems = data.held_out("test", mixtures)[0]
    for some in stems.split(AT_ONCE):
        before = si_sdr(some.sum(1, keepdim=True), some)
        for name, masks in ways(data.levels, some).items():
            ratio = si_sdr(masked(some.sum(1), masks)[:, :, None], some[:, None])  # (B, estimates, stems)
            best = ratio.mT.gather(2, assign(ratio)[..., None])[..., 0]
            gained.setdefault(name, []).append((best - before).flatten())
    click.echo(f"{mixtures} mixtures, {data.source}")
    for name, parts in gained.items():
        values = torch.cat(parts)
        click.echo(f"{name}: {values.mean():.1f} dB, median {values.median():.1f}")


if __name__ == "__main__":
    run()
