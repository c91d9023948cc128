"""Scenes a second that the built-in CLEVR renderer draws, and that training consumes.

python -m tests.benchmarks.renderer
"""

import statistics
import time
from pathlib import Path

import click
import torch

import train_mvae
from common import random_generator
from recompose import contact_sheet

ROUNDS = 5


def scenes_a_second(draw, scenes):
    """Median over ROUNDS of `draw()`, which makes or uses so many scenes, after one round to warm up."""
    draw()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - start)
    return scenes / statistics.median(seconds)


def draw_figure(data_root, path, columns=8):
    """Two rows of pictures from a CLEVR folder over two rows of built-in scenes."""
    settings = 64, (3, 6), 0, torch.device("cpu")
    rows = []
    for data in (train_mvae.ClevrFolder(data_root, *settings), train_mvae.BuiltInClevr(*settings)):
        images, _ = data.held_out(2 * columns)
        tiles = [(train_mvae.picture(image), "", False) for image in images]
        tiles[0] = (tiles[0][0], data.source, False)
        rows += [tiles[:columns], tiles[columns:]]
    contact_sheet(rows).save(path)


@click.command()
@click.option("--data-root", type=click.Path(path_type=Path, exists=True))
@click.option("--figure", type=click.Path(path_type=Path))
def main(data_root, figure):
    if figure:
        draw_figure(data_root, figure)
        return
    device = torch.device("cpu")
    options = train_mvae.main.make_context("", ["--dataset", "clevr"]).params
    renderer = train_mvae.ClevrRenderer(options["size"], options["objects"], device)
    generator = random_generator("benchmark")
    drawn = scenes_a_second(lambda: renderer.render(renderer.draw(train_mvae.BLOCK, generator)), train_mvae.BLOCK)

    model = train_mvae.MVAE(**{name: options[name] for name in train_mvae.MODEL_OPTIONS})
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"])
    image = torch.rand(options["batch"], 3, options["size"], options["size"])
    noise = torch.randn(options["batch"], model.noise_size)

    def train(steps=10):
        for _ in range(steps):
            train_mvae.update(model, optimizer, image, noise, 1.0, options["lr"], options)

    used = scenes_a_second(train, 10 * options["batch"])
    print(f"{torch.get_num_threads()} threads, {options['size']} x {options['size']} pictures")
    print(f"drawn:    {drawn:6.0f} scenes/s")
    print(f"consumed: {used:6.0f} scenes/s by training ({drawn / used:.1f} drawn for each)")


if __name__ == "__main__":
    main()
