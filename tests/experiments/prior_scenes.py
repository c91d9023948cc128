"""Whether sampled scenes are like those of the data: objects cut, in one another, floating; numbers; a classifier.

    python -m tests.experiments.prior_scenes runs/mvae-clevr-alpha-N6-seed0 --data-root CLEVR_v1.0

Of 250 samples of every prior, and of N(0, I), beside 250 test pictures as the encoder finds them, by a program on what
slots draw. Cut: an object's mask reaches the picture's edge. In one another: two share a quarter of the smaller one.
Floats: lower edge, width and height are further from the nearest object of valid pictures than 98 % of those of test
pictures are. TV: total variation between numbers of slots, by the prior itself, and in up to 2,000 test pictures;
beside "test pictures", what as many of the same shares are off by chance. D-steps (GNM, Jiang & Ahn 2020): updates
until a small convolutional net tells samples from reconstructions of test pictures, 90 % of the last 20 batches; at
most 2,000.
"""

from collections import deque

import click
import torch
import torch.nn.functional as F
from torch import nn

import train_mvae
from common import FOLDER, random_generator
from tests.experiments.prior import check_masks, drawn, fitted_priors, sampled, scenes_of
from train_mvae import ORDERS, Scene

SCENES, COUNTED, SHARED, MOST = 250, 2000, 0.25, 2000


@torch.no_grad()
def objects_of(model, scene):
    """Of all slots lower edge, width, height (n, 3), whether they are cut (n,); of scenes whether two overlap (B,)."""
    z, cell, _ = model.slots(scene)
    mask = model.decode(z, cell)[:, :, -1] > 0  # (B, N, H, W)
    mask &= (torch.arange(mask.shape[1]) < scene.count[:, None])[..., None, None]
    rows, columns = mask.any(3).float(), mask.any(2).float()
    lowest = (rows * torch.arange(mask.shape[2])).amax(2)
    shape = torch.stack([lowest, columns.sum(2), rows.sum(2)], dim=2) / mask.shape[2]
    cut = rows[:, :, 0] + rows[:, :, -1] + columns[:, :, 0] + columns[:, :, -1] > 0
    flat = mask.flatten(2).float()
    area = flat.sum(2)
    shared = flat @ flat.mT / torch.minimum(area[:, :, None], area[:, None]).clamp(min=1)
    overlap = (shared - 2 * torch.eye(mask.shape[1])).amax((1, 2)) > SHARED
    return shape[area > 0], cut[area > 0], overlap


def numbers_of(scene):
    """Shares of scenes with 0, 1, ... slots: (N + 1,)."""
    return scene.count.bincount(minlength=scene.slots.shape[1] + 1) / len(scene.count)


def chance_variation(shares, n):
    """The mean total variation between shares (K,) and those of n draws of them."""
    draws = torch.multinomial(shares, 200 * n, replacement=True, generator=random_generator("chance")).view(200, n)
    return 0.5 * (F.one_hot(draws, len(shares)).float().mean(1) - shares).abs().sum(1).mean()


def standard(model, n):
    """n Scenes of N(0, I): as many slots as the model has, anywhere."""
    generator = random_generator("standard")
    z = torch.randn(n, model.n_slots, model.d, generator=generator)
    cell = 2 * torch.rand(n, model.n_slots, 2, generator=generator) - 1
    light = torch.randn(n, model.noise_sizes[1], generator=generator)
    return Scene(light, torch.full((n,), model.n_slots), torch.cat([cell, z], dim=2))


def discriminator_steps(real, fake):
    """Updates until a classifier is right on 90 % of 20 batches of 32: the later, the more alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
        layers += [nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 1)]
        net = nn.Sequential(*layers)
    optimizer, right = torch.optim.Adam(net.parameters(), 2e-4), deque(maxlen=20)
    for step in range(MOST):
        generator = random_generator("discriminator", step)
        some = [kind[torch.randint(len(kind), (16,), generator=generator)] for kind in (real, fake)]
        logit, true = net(torch.cat(some))[:, 0], torch.arange(32) < 16
        right.append(((logit > 0) == true).float().mean().item())
        if len(right) == 20 and sum(right) / 20 >= 0.9:
            return step + 1
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logit, true.float()).backward()
        optimizer.step()
    return MOST


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=FOLDER)
@click.option("--objects", type=click.IntRange(1, 10), nargs=2, help="In a scene, if not as in the run.")
@click.option("--data-root", type=FOLDER, help="Of the run's data set.")
@click.option("--steps", type=click.IntRange(1), default=train_mvae.FIT_STEPS, help="Updates of every prior.")
@click.option("--prior", "orders", type=click.Choice(ORDERS), default=ORDERS, multiple=True, help="Those to fit.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of priors, and of the pictures they are fitted to.")
def main(run_dir, objects, data_root, steps, orders, seed):
    """Fit every prior to what a run of train_mvae.py finds, and judge samples of it; prints a table."""
    model = train_mvae.load(run_dir)
    options = model.config["options"] | {"data_root": data_root, "download": False, "seed": seed}
    options["objects"] = objects or options["objects"]
    check_masks(model)
    data = train_mvae.load_data(options, torch.device("cpu"))
    counted, other = scenes_of(model, data, "test", COUNTED), scenes_of(model, data, "valid", SCENES)
    test = Scene(*(values[:SCENES] for values in counted))
    priors, _ = fitted_priors(model, data, orders, steps, seed)
    known, apart = objects_of(model, other)[0], lambda shape: torch.cdist(shape, known).amin(1)
    far = apart(objects_of(model, test)[0]).quantile(0.98)
    click.echo(f"{data.source}; {steps} updates, seed {seed}")
    click.echo("| samples | cut | in one another | float | TV of numbers | D-steps |\n|-|-|-|-|-|-|")
    kinds = {"test pictures": test, "N(0, I)": standard(model, SCENES)}
    kinds |= {order: sampled(prior, model, SCENES, seed) for order, prior in priors.items()}
    true = numbers_of(counted)
    numbers = {order: prior.count(prior.numbers[:1, :1])[0].softmax(0) for order, prior in priors.items()}
    variation = {name: 0.5 * (shares - true).abs().sum() for name, shares in numbers.items()}
    variation |= {"test pictures": chance_variation(true, len(counted.count)), "N(0, I)": 1 - true[-1]}
    real = drawn(model, test)
    for name, scene in kinds.items():
        shape, cut, overlap = objects_of(model, scene)
        floats = (apart(shape) > far).float().mean()
        steps_needed = "" if name == "test pictures" else discriminator_steps(real, drawn(model, scene))
        shares = f"{cut.float().mean():.1%} | {overlap.float().mean():.1%} | {floats:.1%}"
        click.echo(f"| {name} | {shares} | {variation[name]:.3f} | {steps_needed} |")


if __name__ == "__main__":
    main()
