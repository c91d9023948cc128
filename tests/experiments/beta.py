"""What beta does to a VAE: rate against distortion, active units, what a linear probe reads, samples of the prior.

    python -m tests.experiments.beta --betas 0,0.5,1,2,4,8 -- --steps 8000 --eval-samples 100

Trains one run of train_vae_mnist.py for every beta, each with the options after "--"; goes on where a sweep in the same
folder stopped. Writes table.json and beta.png there, and prints the table: its first row is the untrained model, and
the baseline below it the mean picture's likelihood.
"""

import json
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import train_vae_mnist as stage
from common import random_generator, reparameterize, write_json
from recompose import Tile, contact_sheet
from tests.experiments import plotted

COLUMNS = ("kl", "reconstruction", "elbo", "nll", "active_units", "probe_accuracy")
NAMES = ("beta", "rate", "distortion", "ELBO", "NLL", "active units", "probe")
BLUE, ORANGE = "#1e88e5", "#e65100"


def parse_betas(context, parameter, value):
    try:
        betas = [float(word) for word in value.split(",")]
    except ValueError:
        betas = [-1.0]
    if not all(0 <= beta < float("inf") for beta in betas):
        raise click.BadParameter(f"{value!r}: expected numbers of at least 0 with commas between them")
    return betas


def train(beta, folder, options):
    """One run, new or resumed; returns its scores, None where it was stopped before its end."""
    if not (folder / "metrics.json").is_file():
        where = (
            ["--resume", folder]
            if (folder / "checkpoint.pt").is_file()
            else [*options, "--beta", beta, "--out", folder]
        )
        stage.main.main([str(word) for word in where], "train_vae_mnist.py", standalone_mode=False)
    scores = folder / "metrics.json"
    return json.loads(scores.read_text()) if scores.is_file() else None


@torch.no_grad()
def sample_posteriors(model, x):
    """A sample of every posterior, the same in every run: (n, 784) -> (n, D)."""
    mu, logvar = map(torch.cat, zip(*(model.encode(part) for part in x.split(1000)), strict=True))
    return reparameterize(mu, logvar, torch.randn(mu.shape, generator=random_generator("probe")))


def probe_accuracy(train_z, train_labels, test_z, test_labels):
    """Accuracy of a logistic regression from latents (n, D) to labels (n,), fitted on train, read on test.

    To be given samples of the posteriors. Their means would also show what is lost in the noise: a latent that moves
    by 0.01 where its posterior is 1 wide says nothing to the decoder, but all to a regression on means.
    """
    weight = torch.zeros(train_z.shape[1], 10, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(train_z @ weight + bias, train_labels) + 1e-5 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((test_z @ weight + bias).argmax(1) == test_labels).float().mean().item()


def read_labels(options):
    """Labels of the digits of train (without valid) and test."""
    kind, root = stage.DATASETS[options["dataset"]], options["data_root"] or "data"
    train, test = (kind(root, train=first).targets for first in (True, False))
    return train[: len(train) - min(320, len(train) // 10)], test


def curves_figure(table):
    """Rate against distortion, and what the latents hold, by beta: one PIL picture."""
    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["kl"] for row in table], [row["reconstruction"] for row in table], "o-", color=BLUE)
    for row in table:
        left.annotate(f"  {row['beta']:g}", (row["kl"], row["reconstruction"]))
    title = "Rate and distortion of test digits, by beta"
    left.set(xscale="log", xlabel="rate: KL, nats", ylabel="distortion: reconstruction, nats", title=title)
    betas = range(len(table))
    right.bar(betas, [row["active_units"] for row in table], color=BLUE, alpha=0.6)
    right.set(xlabel="beta", ylabel="active units", xticks=betas, xticklabels=[f"{row['beta']:g}" for row in table])
    right.set_title("What the latents hold")
    if "probe_accuracy" in table[0]:
        accuracy = right.twinx()
        accuracy.plot(betas, [100 * row["probe_accuracy"] for row in table], "o-", color=ORANGE)
        accuracy.set(ylim=(0, 100))
        accuracy.set_ylabel("linear probe, %", color=ORANGE)
    return plotted(figure)


def strip(pictures):
    """Pictures (n, 784) side by side, at twice their size."""
    row = torch.cat(list(pictures.view(-1, stage.SIDE, stage.SIDE)), dim=1)  # (28, n * 28)
    image = Image.fromarray((row.clamp(0, 1) * 255).round().byte().numpy())
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


@torch.no_grad()
def beta_figure(models, table, x):
    """The curves, and for every beta samples of the prior and traversals of x[0] (n, 784) along two latents."""
    rows = [[Tile(curves_figure(table))]]
    for model in models:
        z = torch.randn(10, model.d, generator=random_generator("draws"))
        tiles = [Tile(strip(model.decode(z).sigmoid()), "decoded samples of the prior")]
        moved, names = stage.traverse(model, x, 2, torch.linspace(-3, 3, 7))
        captions = (f"{name}: -3 to 3" for name in names)
        rows.append(tiles + [Tile(strip(row), caption) for row, caption in zip(moved, captions, strict=True)])
    labels = ["", *(f"beta {row['beta']:g}" for row in table)]
    return contact_sheet(rows, "A VAE by beta, the weight of its KL", labels)


def table_lines(table):
    """A Markdown table, the untrained model of the first run above the runs."""
    untrained = {"beta": "step 0"} | {name: table[0].get(f"step_0/{name}") for name in COLUMNS}
    yield "| " + " | ".join(NAMES) + " |\n|" + "-|" * len(NAMES)
    for row in [untrained, *table]:
        cells = (row.get(name) for name in ("beta", *COLUMNS))
        yield "| " + " | ".join(f"{v:.4g}" if isinstance(v, (int, float)) else v or "" for v in cells) + " |"
    yield f"mean picture: NLL {table[0]['nll_mean_picture']:.4g}; K = {table[0]['eval_samples']}"


@click.command(context_settings={"show_default": True})
@click.option("--betas", default="0,0.5,1,2,4,8", callback=parse_betas, help="Weights of the KL, with commas.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/vae-beta", help="Folder of all runs.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="-- [OPTIONS OF TRAIN_VAE_MNIST]")
def main(betas, out, options):
    """Train a VAE for every beta; a table and a figure of them all."""
    if {"--out", "--beta", "--resume"} & {word.split("=")[0] for word in options}:
        raise click.UsageError("--out and --beta belong before the --, and what was begun is resumed by itself")
    table, models = [], []
    for beta in betas:
        folder = out / f"beta-{beta:g}"
        scores = train(beta, folder, options)
        if scores is None:
            raise click.ClickException("stopped; the same command goes on")
        models.append(stage.load(folder))
        table.append({"beta": beta} | scores)
    settings = models[0].config["options"]
    data = stage.Digits(settings, torch.device("cpu"))
    if settings["binarize"] != "static":  # whose labels are not known
        labels = read_labels(settings)
        for model, row in zip(models, table, strict=True):
            z = [sample_posteriors(model, x) for x in (data.train_fixed, data.test)]
            row["probe_accuracy"] = probe_accuracy(z[0], labels[0], z[1], labels[1])
    write_json(out / "table.json", table)
    beta_figure(models, table, data.valid[:1000]).save(out / "beta.png")
    click.echo("\n".join(table_lines(table)))


if __name__ == "__main__":
    main()
