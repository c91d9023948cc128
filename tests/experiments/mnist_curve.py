"""Bounds and likelihood of a run of train_vae_mnist.py against training samples seen (Kingma & Welling 2013, figure 2).

    python -m tests.experiments.mnist_curve runs/vae-mnist-dynamic-mlp-D20-elbo1-beta1-seed0

Draws the run's curve.json, whose scores are of train and valid, into figures/curve.png.
"""

import json
from pathlib import Path

import click
from matplotlib.figure import Figure

from common import load_config
from tests.experiments import plotted


def curve_figure(curve, title):
    """Points of curve.json -> one PIL picture; the first are left out where they are 60 nats below the best."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    best = max(point["elbo"] for point in curve)
    curve = [point for point in curve if point["samples_seen"] and point["elbo"] > best - 60]
    seen = [point["samples_seen"] for point in curve]
    axes.plot(seen, [point["train/elbo"] for point in curve], "--", color="#e65100", label="ELBO, train")
    axes.plot(seen, [point["elbo"] for point in curve], color="#1e88e5", label="ELBO, valid")
    axes.plot(seen, [-point["nll"] for point in curve], color="#43a047", label="log-likelihood, valid, K = 50")
    axes.set(xscale="log", xlabel="training samples seen", ylabel="nats per digit", title=title)
    axes.tick_params(axis="x", which="minor", labelsize=6)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return plotted(figure)


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
def main(run_dir):
    """Draw the curve of RUN_DIR."""
    config = load_config(run_dir)
    if config["script"] != "train_vae_mnist" or not (run_dir / "curve.json").is_file():
        raise click.UsageError(f"{run_dir} is no run of train_vae_mnist.py with a curve.json")
    curve = json.loads((run_dir / "curve.json").read_text())
    figure, title = run_dir / "figures" / "curve.png", f"{run_dir.name}: {config['data']['source']}"
    curve_figure(curve, title).save(figure)
    click.echo(f"written: {figure}")


if __name__ == "__main__":
    main()
