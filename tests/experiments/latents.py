"""Where a run of train_vae_audio.py puts the valid notes: its posterior means on their first two principal components.

python -m tests.experiments.latents runs/vae-notes-stft-none-D32-beta1-seed0 --data-root nsynth
"""

from pathlib import Path

import click
import torch
from matplotlib.figure import Figure

import train_vae_audio as audio
from common import FOLDER, load_notes


@torch.no_grad()
def posterior_means(model, split, index):
    """Of the notes at `index`, flat: (n, D)."""
    notes = (audio.note_batch(model, split, some) for some in index.split(audio.CHUNK))
    return torch.cat([model.encode(model.front(waveform), label)[0].flatten(1) for waveform, label in notes])


@click.command()
@click.argument("run_dir", type=FOLDER)
@click.option("--data-root", type=FOLDER, help="Where NSynth's folders are, if the run was on them.")
def main(run_dir: Path, data_root):
    """Draw RUN_DIR/figures/latents.png, coloured by family and by pitch."""
    model = audio.load(run_dir)
    options = model.config["options"] | {"data_root": data_root, "download": False}
    splits, source = load_notes(options)
    if source != model.config["data"]["source"]:
        raise click.UsageError(f"{run_dir} was trained on {model.config['data']['source']}; --data-root gives {source}")
    split = splits["valid"]
    index = split.spread(1000)
    mu = posterior_means(model, split, index)
    mean, scales, directions = audio.principal(mu, 2)
    points = (mu - mean) @ directions
    share = scales.square() / mu.var(0, correction=0).sum()
    figure = Figure(figsize=(10, 4.4), dpi=110, layout="constrained")
    figure.suptitle("Posterior means of valid notes on their first two principal components")
    left, right = figure.subplots(1, 2)
    for k, name in enumerate(options["families"]):
        left.scatter(*points[split.family[index] == k].T, s=14, label=name)
    left.legend(fontsize=8)
    coloured = right.scatter(*points.T, s=14, c=split.pitch[index], cmap="viridis")
    figure.colorbar(coloured, ax=right, label="pitch (MIDI number)")
    for axes in (left, right):
        axes.set(xlabel=f"first: {share[0]:.0%} of the variance", ylabel=f"second: {share[1]:.0%} of the variance")
    figure.savefig(run_dir / "figures" / "latents.png")
    click.echo(f"{run_dir}/figures/latents.png")


if __name__ == "__main__":
    main()
