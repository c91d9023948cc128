"""Train one MVAE for every row of a table, and print the table; runs that are there are not trained again.

python -m tests.benchmarks.grid selection --seeds 0,1,2                  # what makes top-N cells fall on objects
python -m tests.benchmarks.grid operators                                # op x compose x N
python -m tests.benchmarks.grid operators --dataset clevr --data-root CLEVR_v1.0
python -m tests.benchmarks.grid domains --dataset nsynth-duo --data-root nsynth --steps 600   # of sounds: op x domain
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from PIL import Image

from common import OPS

ROOT = Path(__file__).parents[2]
DATA = {
    "sprites": ["--objects", "3", "--size", "32"],
    "clevr": ["--objects", "3-6", "--size", "32"],
    "nsynth-duo": [],
}
BARE = ["--shift", "0", "--no-explore"]
SELECTION = {
    "absolute coordinates, KL of selected cells": [
        *("--coords", "absolute", "--reach", "0", "--kl-cells", "selected", "--suppress", "none"), *BARE,
    ],
    "absolute, KL of all cells": ["--coords", "absolute", "--reach", "0", "--suppress", "none", *BARE],
    "absolute, all, 3x3 suppressed": ["--coords", "absolute", "--reach", "0", "--suppress", "window", *BARE],
    "relative, selected": ["--kl-cells", "selected", "--suppress", "none", *BARE],
    "relative, all": ["--suppress", "none", *BARE],
    "relative, all, 3x3 suppressed": ["--suppress", "window", *BARE],
    "and shifted": ["--suppress", "window", "--no-explore"],
    "and what is drawn suppressed": ["--no-explore"],
    "and exploring (the default)": [],
    "the default, KL of selected cells": ["--kl-cells", "selected"],
}  # fmt: skip
COUNTS = (2, 4, 6, 8)
OPERATORS = {
    f"{op}, {where}, N = {n}": ["--op", op, "--compose", where, "--N", str(n)]
    for op in OPS
    for where in ("data", "feature")
    for n in COUNTS
}
DOMAINS = {f"{op}, {domain}": ["--op", op, "--domain", domain] for op, domain in (
    ("sum", "magnitude"), ("sum", "power"), ("max", "log"), ("sum", "log"), ("mean", "log"), ("mean", "magnitude"),
    ("min", "log"),
)} | {"sum, feature maps": ["--compose", "feature"]}  # fmt: skip
ROWS = {"selection": SELECTION, "operators": OPERATORS, "domains": DOMAINS}
SCORES = {
    "pictures": ("ari_fg", "mse", "miou", "duplicates", "slot_count_error", "recomposition_psnr"),
    "sounds": ("si_sdr_gained", "mse", "si_sdr_gained_median", "own_instrument", "lsd", "lsd_recomposed"),
}  # the first is that by which rows are held against each other


def train(folder, options, steps):
    """Run train_mvae.py into `folder`, or to its end; returns its metrics."""
    done = folder / "metrics.json"
    scores = json.loads(done.read_text()) if done.is_file() else {"step": 0}
    if scores["step"] < steps or scores["split"] != "test":
        args = ["--resume", str(folder)] if (folder / "checkpoint.pt").is_file() else [*options, "--out", str(folder)]
        command = [sys.executable, "train_mvae.py", *args, "--steps", str(steps)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(done.read_text())


def table(rows, scores):
    """{name: a list of metrics, one a seed} -> lines of Markdown: means, and of the first score all."""
    lines = ["| | " + " | ".join(scores) + " |", "|-" * (len(scores) + 1) + "|"]
    for name, runs in rows.items():
        means = [np.mean([run.get(score, np.nan) for run in runs]) for score in scores]
        cells = [f"{mean:.3g}" for mean in means]
        if len(runs) > 1:
            every = ", ".join(f"{run[scores[0]]:.2f}" for run in runs)
            cells[0] += f" ({every})"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def first_rows(folders, scene, sounds):
    """The row of one scene, or mixture, from the figures of several runs, below each other."""
    rows = []
    for folder in folders:
        with Image.open(folder / "figures" / ("separation.png" if sounds else "decomposition.png")) as figure:
            height = figure.height // (5 if sounds else 6)
            rows.append(figure.crop((0, scene * height, figure.width, (scene + 1) * height)))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for k, row in enumerate(rows):
        sheet.paste(row, (0, sum(r.height for r in rows[:k])))
    return sheet


@click.command(context_settings={"show_default": True})
@click.argument("rows", type=click.Choice(list(ROWS)))
@click.option("--dataset", type=click.Choice(list(DATA)), default="sprites")
@click.option("--data-root", type=click.Path(exists=True, path_type=Path))
@click.option("--steps", type=int, default=1500)
@click.option("--seeds", default="0", help="With commas between them.")
@click.option("--only", default="", help="Rows whose name contains it.")
@click.option("--scene", type=click.IntRange(0, 4), default=0, help="Of those in a run's figure.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/grid")
def main(rows, dataset, data_root, steps, seeds, only, scene, out):
    """Train what is missing, print the table, and draw one scene as every row takes it apart."""
    chosen = {name: options for name, options in ROWS[rows].items() if only in name}
    common, sounds = ["--dataset", dataset, *DATA[dataset]], dataset == "nsynth-duo"
    if sounds != (rows == "domains"):
        raise click.UsageError(f"{rows} is not for --dataset {dataset}")
    wanted = SCORES["sounds" if sounds else "pictures"]
    if data_root:
        common += ["--data-root", str(data_root.absolute())]
    measured, folders = {}, []
    for name, options in chosen.items():
        for seed in seeds.split(","):
            folder = out / dataset / re.sub(r"\W+", "-", f"{name}-seed{seed}")
            scores = train(folder.absolute(), [*common, *options, "--seed", seed], steps)
            measured.setdefault(name, []).append(scores)
            click.echo(f"{name}, seed {seed}: {wanted[0]} {scores[wanted[0]]:.3f}", err=True)
        folders.append(folder)
    first_rows(folders, scene, sounds).save(out / f"{dataset}-{rows}.png")
    click.echo(table(measured, wanted))


if __name__ == "__main__":
    main()
