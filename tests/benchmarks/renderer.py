"""Scenes a second that the built-in CLEVR renderer draws, and that training consumes; its scenes beside a folder's.

python -m tests.benchmarks.renderer
python -m tests.benchmarks.renderer --data-root CLEVR_v1.0 --figure docs/figures/renderer.png
"""

import statistics
import time
from pathlib import Path

import click
import torch

import train_mvae
from common import FOLDER, optimizer_step, random_generator
from recompose import Tile, contact_sheet, to_uint8

ROUNDS = 5


def scenes_a_second(work, scenes):
    """Median over ROUNDS of `work()`, which draws or uses so many scenes, after one round to warm up."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return scenes / statistics.median(seconds)


def draw_figure(options, data_root, columns=8):
    """Two rows of pictures from a CLEVR folder over two rows of built-in scenes, all of the valid split."""
    rows, labels = [], []
    for root in (data_root, None):
        data = train_mvae.load_data(options | {"data_root": root}, torch.device("cpu"))
        tiles = [Tile(to_uint8(image.numpy())) for image in data.scenes("valid", 2 * columns)[0]]
        rows += [tiles[:columns], tiles[columns:]]
        labels += [data.source] * 2
    return contact_sheet([row for row in rows if row], "A CLEVR folder, and scenes of the built-in renderer", labels)


@click.command()
@click.option("--data-root", type=FOLDER, help="CLEVR's folder, to draw its scenes beside the built-in ones.")
@click.option("--figure", type=click.Path(path_type=Path), help="Write the scenes here, instead of timing.")
def main(data_root, figure):
    """Time the built-in CLEVR renderer, or draw its scenes beside those of a folder."""
    options = train_mvae.main.make_context("", ["--dataset", "clevr"]).params
    if figure:
        draw_figure(options, data_root).save(figure)
        return
    data, batch, sigma = train_mvae.load_data(options, torch.device("cpu")), options["batch"], options["sigma"]
    generator, scenes = random_generator("benchmark"), train_mvae.CHUNK
    drawn = scenes_a_second(lambda: data.render(data.sample(scenes, generator)), scenes)

    model = train_mvae.build(options).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"])
    image = torch.rand(batch, 3, options["size"], options["size"])
    noise = torch.randn(batch, sum(model.noise_sizes))

    def train(steps=10):
        for _ in range(steps):
            encoding, mean, offset = model(image, noise)
            loss, terms = train_mvae.objective(image, mean, encoding, offset, 1.0, sigma)
            optimizer_step(loss, terms, optimizer, options["lr"], train_mvae.CLIP)

    used = scenes_a_second(train, 10 * batch)
    click.echo(f"{torch.get_num_threads()} threads, {options['size']} x {options['size']} pictures")
    click.echo(f"drawn:    {drawn:6.0f} scenes/s")
    click.echo(f"consumed: {used:6.0f} scenes/s by training ({drawn / used:.1f} drawn for each)")


if __name__ == "__main__":
    main()
