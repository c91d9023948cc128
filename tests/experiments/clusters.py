"""What a picture's colours alone tell of its objects: ARI-FG of pixels that k-means groups, with nothing learnt.

    python -m tests.experiments.clusters --dataset sprites
    python -m tests.experiments.clusters --dataset clevr --data-root CLEVR_mini

The baseline of docs/mvae.md. Clusters are of each picture's own pixels by (red, green, blue, y, x), by k-means++
(Arthur & Vassilvitskii 2007); how many, and how much places weigh, is what suits valid scenes best.
"""

import warnings
from itertools import product

import click
import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from tqdm import tqdm

import train_mvae
from common import FOLDER
from train_mvae import SMALLEST, adjusted_rand_index, position_grid

CLUSTERS, WEIGHTS = (5, 7, 9, 11, 15, 20), (0.0, 0.2, 0.4, 0.8, 1.2)  # of y and x, in [-1, 1], beside colours in [0, 1]
CHOSEN_BY = 64  # valid scenes


def segment(image, clusters, weight):
    """A picture (3, H, W) in [0, 1] -> the cluster of every pixel (H, W)."""
    places = weight * position_grid(*image.shape[1:])
    pixels = torch.cat([image, places]).flatten(1).T.double().numpy()  # (H W, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cluster that is left empty is as good as none
        _, label = kmeans2(pixels, clusters, minit="++", rng=np.random.default_rng(0))
    return torch.from_numpy(label).long().unflatten(0, image.shape[1:])


def score(scenes, clusters, weight):
    """Mean ARI-FG of scenes with an object of at least SMALLEST of the picture, as train_mvae.py scores its own."""
    found = []
    for image, label in tqdm(list(zip(*scenes, strict=True)), disable=None, leave=False):
        if (label.flatten().bincount()[1:] >= SMALLEST * label.numel()).any():
            objects = label > 0
            found.append(adjusted_rand_index(segment(image, clusters, weight)[objects], label[objects]))
    return float(np.mean(found))


@click.command(context_settings={"show_default": True})
@click.option("--dataset", type=click.Choice(["sprites", "clevr", "pictures"]), default="sprites")
@click.option("--data-root", type=FOLDER, help="As of train_mvae.py.")
@click.option("--size", type=click.IntRange(16), help="Height and width, if not those of train_mvae.py.")
@click.option("--scenes", type=click.IntRange(1), default=train_mvae.SCENES, help="Of the test split.")
def main(dataset, data_root, size, scenes):
    """Print the ARI-FG of clusters of colours."""
    options = train_mvae.main.make_context("", ["--dataset", dataset]).params
    settings = train_mvae.PRESETS[dataset] | {"data_root": data_root} | ({"size": size} if size else {})
    data = train_mvae.load_data(options | settings, torch.device("cpu"))
    valid, test = data.scenes("valid", CHOSEN_BY), data.scenes("test", scenes)
    if not (valid[1].any() and test[1].any()):
        raise click.UsageError(f"{data.source} has no masks to score by")
    best = max(product(CLUSTERS, WEIGHTS), key=lambda pair: score(valid, *pair))
    click.echo(f"{data.source}, {len(test[0])} test scenes: ari_fg {score(test, *best):.3f}, of {best[0]} clusters,")
    click.echo(f"places weighing {best[1]}, as suits valid scenes best; without places {score(test, best[0], 0.0):.3f}")


if __name__ == "__main__":
    main()
