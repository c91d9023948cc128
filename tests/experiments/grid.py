"""Train one MVAE for every row of a table, and print the table; runs that are there are not trained again.

    python -m tests.experiments.grid ablation --seeds 0,1,2                   # what each part of the model is worth
    python -m tests.experiments.grid operators                                # op x compose x N
    python -m tests.experiments.grid operators --dataset clevr --data-root CLEVR_v1.0
    python -m tests.experiments.grid sounds --dataset nsynth-duo --data-root nsynth --steps 600    # op, on sounds

Scores are of the test split, means over seeds; "step 0" is the first score before training, and the last row what a
trivial baseline scores: ARI of one component for all, the mean picture's MSE, an input left as it is.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from PIL import Image

from common import OPS
from recompose import GAP, Tile, contact_sheet
from tests.experiments.slots import load_run, measure_masks, measure_recomposition

ROOT = Path(__file__).parents[2]
DATA = {
    "sprites": ["--objects", "3", "3", "--size", "32", "--beta", "1"],
    "clevr": [],
    "nsynth-duo": []
}  # fmt: skip
SOFTMAX = "alpha_masks.__code__ = (lambda layer: F.pad(layer[:, :, -1:], (0, 0) * 3 + (1, 0)).softmax(dim=1)).__code__"
ABLATION = {  # options, or Python that changes the script
    "all of it": [],
    "no closer look": ["--detail", "0"],
    "a closer look from the first step on": "DETAILED = 0.0",
    "beta does not fall": "FALL = (1.0, 2.0)",
    "haze has no price": "HAZE = 0.0",
    "colours are free beyond the mask": "bleed = lambda colours, mask: colours",
    "masks by softmax, whatever is nearer": SOFTMAX,
    "slots do not shade": "DARKEST = 0.0",
    "slots stand in the middle of their cells": "SHIFT = 1e-6"
}  # fmt: skip
OPERATORS = {
    f"{op}, {where}, N = {n}": ["--op", op, "--compose", where, "--N", str(n)]
    for op in OPS for where in ("data", "feature") for n in (2, 4, 6, 8)
}  # fmt: skip
SOUNDS = {op: ["--op", op] for op in OPS if op != "alpha"}
ROWS = {"ablation": ABLATION, "operators": OPERATORS, "sounds": SOUNDS}
SCORES = {
    "pictures": ("ari_fg", "ari_fg_slots", "mse", "miou", "duplicates", "slot_count_error", "recomposition_psnr"),
    "sounds": ("si_sdr_gained", "si_sdr_gained_median", "mse", "own_instrument", "lsd", "lsd_recomposed")
}  # fmt: skip
BASELINES = {"ari_fg": 0.0, "ari_fg_slots": 0.0, "si_sdr_gained": 0.0, "si_sdr_gained_median": 0.0}
FIGURES = {"pictures": ("decomposition", 6), "sounds": ("separation", 5)}  # of a run, and the rows it has


def train(folder, options, steps, change=""):
    """Run train_mvae.py, with a `change` to it, into `folder`, or on to its end; returns its scores."""
    done = folder / "metrics.json"
    if not done.is_file() or json.loads(done.read_text())["step"] < steps:
        args = ["--resume", str(folder)] if (folder / "checkpoint.pt").is_file() else [*options, "--out", str(folder)]
        program = ["-c", f"import train_mvae\ntrain_mvae.{change}\ntrain_mvae.main()"] if change else ["train_mvae.py"]
        command = [sys.executable, *program, *args, "--steps", str(steps)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(done.read_text()) | recomposition(folder, steps)


def recomposition(folder, steps):
    """Scores of a run's slots, from its recomposition.json where that is of its end; on folders' pictures of masks."""
    done = folder / "recomposition.json"
    scores = json.loads(done.read_text()) if done.is_file() else {"step": 0}
    if scores["step"] < steps:
        model, data = load_run(folder)
        drawn = model.sound or hasattr(data, "render")
        scores = measure_recomposition(folder, model, data) if drawn else measure_masks(model, data)
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def cell(values):
    values = [value for value in values if value is not None]
    return f"{np.mean(values):.3g}" if values else ""


def table_lines(rows, scores):
    """{name: a list of scores, one a seed} -> lines of Markdown: means, and of the first score every seed's."""
    yield f"| | step 0: {scores[0]} | " + " | ".join(scores) + " |"
    yield "|-" * (len(scores) + 2) + "|"
    for name, runs in rows.items():
        cells = [cell([run.get(score) for run in runs]) for score in (f"step_0/{scores[0]}", *scores)]
        if len(runs) > 1:
            cells[1] += f" ({', '.join(f'{run[scores[0]]:.2f}' for run in runs)})"
        yield f"| {name} | " + " | ".join(cells) + " |"
    every = [run for runs in rows.values() for run in runs]
    cells = [cell([run.get(f"{score}_baseline", BASELINES.get(score)) for run in every]) for score in scores]
    yield "| trivial baseline | | " + " | ".join(cells) + " |"


def first_rows(folders, kind, scene):
    """{row: run folder} -> one scene, or mixture, as it stands in the figure of every run, below each other."""
    (name, count), tiles = FIGURES[kind], []
    for row, folder in folders.items():
        with Image.open(folder / "figures" / f"{name}.png") as figure:
            top = GAP + 24  # of the rows: below the title
            height = (figure.height - top) / count
            box = (GAP, math.ceil(top + scene * height), figure.width, int(top + (scene + 1) * height))
            tiles.append([Tile(figure.crop(box), row)])
    return contact_sheet(tiles, f"One {'scene' if kind == 'pictures' else 'mixture'}, by every row of the table")


@click.command(context_settings={"show_default": True})
@click.argument("rows", type=click.Choice(list(ROWS)))
@click.option("--dataset", type=click.Choice(list(DATA)), default="sprites")
@click.option("--data-root", type=click.Path(exists=True, path_type=Path))
@click.option("--steps", type=click.IntRange(1), default=1500)
@click.option("--seeds", default="0", help="With commas between them.")
@click.option("--only", default="", help="Rows whose name contains it.")
@click.option("--scene", type=click.IntRange(0, 4), default=0, help="Of those in a run's figure.")
@click.option("--eval", "evaluation", type=click.Choice(["quick", "full"]), default="full", help="Test examples.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/grid")
def main(rows, dataset, data_root, steps, seeds, only, scene, evaluation, out):
    """Train what is missing, print the table, and draw one scene as every row takes it apart."""
    chosen = {name: options for name, options in ROWS[rows].items() if only in name}
    kind = "sounds" if dataset == "nsynth-duo" else "pictures"
    if (kind == "sounds") != (rows == "sounds") or not chosen:
        raise click.UsageError(f"{rows} is not for --dataset {dataset}" if chosen else f"--only {only}: no such row")
    common = ["--dataset", dataset, *DATA[dataset], "--eval", evaluation]
    if data_root:
        common += ["--data-root", str(data_root.absolute())]
    measured, folders = {}, {}
    for name, options in chosen.items():
        for seed in seeds.split(","):
            folder = out / dataset / re.sub(r"\W+", "-", f"{name}-seed{seed}")
            change, own = (options, []) if isinstance(options, str) else ("", options)
            scores = train(folder.absolute(), [*common, *own, "--seed", seed], steps, change)
            measured.setdefault(name, []).append(scores)
            folders.setdefault(name, folder)
            click.echo(f"{name}, seed {seed}: {SCORES[kind][0]} {scores[SCORES[kind][0]]:.3f}", err=True)
    first_rows(folders, kind, scene).save(out / f"{dataset}-{rows}.png")
    click.echo("\n".join(table_lines(measured, SCORES[kind])))


if __name__ == "__main__":
    main()
