"""Scores of the valid split while runs of train_mvae.py trained, against minutes or steps.

    python -m tests.experiments.curves runs/mvae-sprites-alpha-N4-seed0
    python -m tests.experiments.curves runs/mvae-sprites-alpha-N4-seed0 runs/mvae-sprites-alpha-N4-seed1 --by step

Draws every RUN_DIR/curve.json, a colour a run, and writes RUN_DIR/figures/curve.png of the first, or --out. Of pictures
with masks ARI-FG; of mixtures SI-SDR gained; of all else the squared error.
"""

import json
from pathlib import Path

import click
from matplotlib.figure import Figure

from common import FOLDER, load_config

# {axis: {score: (name, line)}}: drawn is the first axis whose scores all points have.
CURVES = {
    "ARI-FG, 1 is best": {"ari_fg": ("ARI-FG", "-")},
    "SI-SDR gained, dB": {"si_sdr_gained": ("mean", "-"), "si_sdr_gained_median": ("median", "--")},
    "mean squared error": {"mse": ("MSE", "-")}
}  # fmt: skip
COLOURS = ("#1e88e5", "#e65100", "#43a047", "#8e24aa", "#6d4c41", "#00acc1")


def curve_figure(curves, by="minutes", title=""):
    """{run: points of curve.json} against "minutes" or "step": a matplotlib figure."""
    points = [point for curve in curves.values() for point in curve]
    unit, wanted = next((u, w) for u, w in CURVES.items() if all(w.keys() <= point.keys() for point in points))
    figure = Figure(figsize=(6.5, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for k, (run, curve) in enumerate(curves.items()):
        x, colour = [point[by] for point in curve], COLOURS[k % len(COLOURS)]
        for score, (name, line) in wanted.items():
            label = f"{name}, {run}" if len(curves) > 1 else name
            axes.plot(x, [point[score] for point in curve], line, marker=".", color=colour, label=label)
    axes.set(xlabel={"minutes": "minutes of training", "step": "steps of training"}[by], ylabel=unit, title=title)
    if "mse" in wanted:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1 if "ari_fg" in wanted else None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def read_curve(folder):
    """The points of a run's curve.json, and its data; raises click.UsageError where it is no such run."""
    config, path = load_config(folder), folder / "curve.json"
    if config["script"] != "train_mvae" or not path.is_file() or not (points := json.loads(path.read_text())):
        raise click.UsageError(f"{folder} is no run of train_mvae.py with a curve.json")
    return points, config["data"]["source"]


@click.command(context_settings={"show_default": True})
@click.argument("run_dirs", type=FOLDER, nargs=-1, required=True)
@click.option(
    "--by", type=click.Choice(["minutes", "step"]), default="minutes", help="What the scores are drawn against."
)
@click.option(
    "--out", type=click.Path(path_type=Path), show_default="RUN_DIR/figures/curve.png", help="Figure to write."
)
def main(run_dirs, by, out):
    """Draw the scores of the valid split of runs, one or several, while they trained."""
    read = {folder.name: read_curve(folder) for folder in run_dirs}
    if len({source for _, source in read.values()}) > 1:
        raise click.UsageError("these runs saw different data; draw them apart")
    title = f"Valid split of {next(iter(read.values()))[1]}"
    out = out or run_dirs[0] / "figures" / "curve.png"
    curve_figure({name: points for name, (points, _) in read.items()}, by, title).savefig(out)
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()
