"""Slot Attention and the MVAE on the same pictures and one CPU thread: ARI-FG against minutes of training.

    python -m tests.experiments.race --data-root CLEVR_v1.0 --minutes 60 --out runs/slot-attention
    OMP_NUM_THREADS=1 python train_mvae.py --dataset clevr --data-root CLEVR_v1.0 --minutes 60 --out runs/mvae
    python -m tests.experiments.race --draw runs/mvae --out runs/slot-attention --figure docs/figures/race.png

The first trains Slot Attention (tests/benchmarks/slot_attention.py), and goes on where it was cut; without --data-root
on built-in scenes. ARI-FG as in the literature, on scenes of the valid split; the third reads the same score in the
curve.json of a run of train_mvae.py. No side of it is stacked against Slot Attention: drawn are the minutes that its
thread computed, `cpu_minutes`, evaluations left out, and the MVAE's by the clock, evaluations and figures among them.

Width and batch are what led after 70 to 90 seconds of one thread: MSE 0.0072 with 32 channels and 4 pictures a step,
0.0079 with 16, 0.0087 with 64 channels and 16; a learning rate of 1e-3 was no better, step by step, than the paper's.
"""

import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import train_mvae
from common import (
    FOLDER,
    POSITIVE,
    load_checkpoint,
    optimizer_step,
    random_generator,
    read_json,
    versions,
    write_json,
)
from recompose import write_atomically
from tests.benchmarks.slot_attention import LR, SLOT, SlotAttention, learning_rate_at
from tests.experiments.curves import read_curve

LEVELS = (0.9, 0.95)  # of ARI-FG
EVALUATIONS = 20  # of a run, at equal distances
CHUNK = 16  # scenes that are evaluated together
NAMES = ("MVAE", "Slot Attention")


@torch.no_grad()
def evaluate(model, images, labels):
    """ARI-FG, of the largest of all masks on true object pixels, and MSE: images (n, 3, H, W), labels (n, H, W)."""
    aris, errors = [], []
    for part, true in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        generator = random_generator("evaluation", len(errors))  # of every scene the same noise each time
        noise = torch.randn(len(part), model.n_slots, SLOT, generator=generator)
        mean, masks, _ = model(part, noise)
        errors += (mean - part).square().mean((1, 2, 3)).tolist()
        for segment, label in zip(masks.argmax(1), true, strict=True):
            foreground = label > 0
            aris += [train_mvae.adjusted_rand_index(segment[foreground], label[foreground])] if foreground.any() else []
    return {"ari_fg": float(np.mean(aris)), "mse": float(np.mean(errors))}


def train_step(model, optimizer, data, step, progress, batch, lr):
    """One step down the mean squared error on the data's next pictures; returns the numbers to log."""
    image = data.batch(step, slice(0, batch), batch).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(batch, model.n_slots, SLOT, generator=random_generator("slots", data.seed, step))
    loss = (model(image, noise)[0] - image).square().mean()
    rate = learning_rate_at(progress, step, lr)
    return optimizer_step(loss, {"loss/mse": loss}, optimizer, rate, math.inf)


def save(folder, model, optimizer, state, curve):
    """Everything the loop changes; the checkpoint first, so that a curve is never ahead of it."""
    state = state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_atomically(folder / "checkpoint.pt", lambda path: torch.save(state, path))
    write_json(folder / "curve.json", curve)


def train(data, folder, minutes, batch, lr, channels, scenes):
    """Train for so many minutes by the clock, evaluations left out, from `folder`'s checkpoint on; writes its curve."""
    images, labels = data.scenes("valid", scenes)
    if not labels.any():
        raise click.UsageError(f"{data.source} has no masks to score by")
    torch.manual_seed(data.seed)
    model = SlotAttention(data.size, channels=channels).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    state, curve = {"step": 0, "elapsed": 0.0, "cpu": 0.0, "progress": 0.0}, []
    if (folder / "checkpoint.pt").is_file():
        state = load_checkpoint(folder, "cpu", model=model, optimizer=optimizer)
        curve = read_json(folder / "curve.json")
    while True:
        state["progress"] = min(1.0, state["elapsed"] / (60 * minutes))  # of these minutes, whatever a run had before
        since = state["elapsed"] / 60 - curve[-1]["minutes"] if curve else math.inf
        if since >= minutes / EVALUATIONS or (state["progress"] == 1 and since > 0):
            point = {"step": state["step"], "minutes": state["elapsed"] / 60, "cpu_minutes": state["cpu"] / 60}
            curve.append(point | evaluate(model, images, labels))
            save(folder, model, optimizer, state, curve)
            click.echo(", ".join(f"{name} {value:.4g}" for name, value in curve[-1].items()))
        if state["progress"] == 1:
            return
        wall, cpu = time.monotonic(), time.process_time()
        train_step(model, optimizer, data, state["step"], state["progress"], batch, lr)
        state["step"] += 1
        state["elapsed"] += time.monotonic() - wall
        state["cpu"] += time.process_time() - cpu


def read_computed(folder):
    """The curve of Slot Attention in a folder, by the minutes that its thread computed."""
    return [point | {"minutes": point["cpu_minutes"]} for point in read_json(folder / "curve.json")]


def first_reached(curve, level):
    """Minutes after which the ARI-FG of a curve first reached `level`, or that it did not: a text."""
    reached = (point["minutes"] for point in curve if point["ari_fg"] >= level)
    missed = f"not in {curve[-1]['minutes']:.0f} minutes: best {max(point['ari_fg'] for point in curve):.3f}"
    return next((f"{minutes:.1f} minutes" for minutes in reached), missed)


def race_figure(curves, title):
    """{name: points with "minutes" and "ari_fg"}: a matplotlib figure, minutes on a logarithmic axis."""
    figure = Figure(figsize=(6.5, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        later = [point for point in curve if point["minutes"] > 0]  # a logarithmic axis has no zero
        axes.plot([p["minutes"] for p in later], [p["ari_fg"] for p in later], marker=".", label=name)
    for level in LEVELS:
        axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(f"{level}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="minutes on one CPU thread", ylabel="ARI-FG", title=title, xscale="log", ylim=(-0.05, 1.02))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def draw(mvae, folder, path):
    """Both curves in one figure, and when each reached LEVELS."""
    points, source = read_curve(mvae)
    curves = dict(zip(NAMES, (points, read_computed(folder)), strict=True))
    race_figure(curves, f"Valid split of {source}").savefig(path)
    click.echo("| ARI-FG first at | " + " | ".join(map(str, LEVELS)) + " |\n|-|-|-|")
    for name, curve in curves.items():
        click.echo(f"| {name} | " + " | ".join(first_reached(curve, level) for level in LEVELS) + " |")
    click.echo(f"written: {path}")


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, help="CLEVR's folder, with masks.")
@click.option("--minutes", type=POSITIVE, default=60.0, help="Of training; a run that is there goes on to them.")
@click.option("--batch", type=click.IntRange(1), default=4, help="Pictures a step; the paper's 64 leave few steps.")
@click.option("--lr", type=POSITIVE, default=LR, help="Learning rate after its rise; the paper's.")
@click.option("--channels", type=click.IntRange(1), default=32, help="Of convolutions; at 128 x 128 the paper has 64.")
@click.option("--size", type=click.IntRange(16), default=64, help="Height and width of pictures.")
@click.option("--scenes", type=click.IntRange(1), default=train_mvae.SCENES // 5, help="To score by.")
@click.option("--seed", type=int, default=0)
@click.option("--out", type=FOLDER, default="runs/slot-attention", help="Of Slot Attention: curve.json, checkpoint.pt.")
@click.option("--draw", "mvae", type=FOLDER, help="Run folder of train_mvae.py: draw, instead of training.")
@click.option("--figure", type=click.Path(path_type=Path), show_default="OUT/race.png", help="Figure to write.")
def main(data_root, minutes, batch, lr, channels, size, scenes, seed, out, mvae, figure):
    """Train Slot Attention, or draw its curve beside the MVAE's."""
    if mvae:
        draw(mvae, out, figure or out / "race.png")
        return
    torch.set_num_threads(1)
    options = train_mvae.main.make_context("", ["--dataset", "clevr"]).params
    options |= {"data_root": data_root, "size": size, "seed": seed}
    out.mkdir(parents=True, exist_ok=True)
    data = train_mvae.load_data(options, torch.device("cpu"))
    about = {"data": data.source, "minutes": minutes, "batch": batch, "lr": lr, "channels": channels, "seed": seed}
    write_json(out / "config.json", about | versions())
    train(data, out, minutes, batch, lr, channels, scenes)
    for level in LEVELS:
        click.echo(f"ARI-FG {level}: {first_reached(read_computed(out), level)}")


if __name__ == "__main__":
    main()
