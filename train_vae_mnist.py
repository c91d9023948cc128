"""A VAE on MNIST (Kingma & Welling 2013), beta-VAE, and the importance weighted bound (Burda et al. 2015).

    python train_vae_mnist.py                                        # two tanh layers of 200, D = 50, Burda et al.
    python train_vae_mnist.py --hidden 500 --D 20 --warmup 0         # one layer of 500, Kingma & Welling
    python train_vae_mnist.py --objective iwae --k 50 --k-from 1     # from the ELBO to 50 samples
    python train_vae_mnist.py --arch conv --D 32 --minutes 60
    python train_vae_mnist.py --sweep-beta 0,0.5,1,2,4,8

Without --data-root MNIST is fetched into data/ (11 MB). A run folder holds checkpoint.pt, metrics.json, figures and
TensorBoard curves; `python export.py RUN_DIR` makes the graphs of encoder and decoder. Results: docs/mnist.md.
"""

import gzip
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from click.core import ParameterSource
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.datasets.utils import check_integrity
from torchvision.utils import make_grid
from tqdm import tqdm

from common import (
    FOLDER,
    FiniteRange,
    PresetCommand,
    ResBlock,
    Run,
    autocast,
    bernoulli_log_likelihood,
    beta_at,
    descend,
    earlier_curve,
    gaussian_kl,
    learning_rate_at,
    load_checkpoint,
    load_state,
    new_folder,
    pick_device,
    plotted,
    random_generator,
    reparameterize,
    run_config,
    settle_run,
    start_distributed,
    start_run,
    train,
    write_json,
)

SCRIPT = Path(__file__).stem
SIDE = 28
PIXELS = SIDE * SIDE

# ---------------------------------------------------------------- Data

DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST}
LAROCHELLE = {"train": 50_000, "valid": 10_000, "test": 10_000}
LAROCHELLE_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist_train.amat"


def read_torchvision(dataset, root, download):
    """The images, grey, and labels of train and test: {split: ((n, 784) in [0, 1], (n,))}.

    Raises click.UsageError where the files are not there or are damaged, click.ClickException where they cannot be
    fetched or unpacked.
    """
    kind = DATASETS[dataset]
    raw = root / kind.__name__ / "raw"
    names = [Path(name).name for name, _ in kind.resources]
    unpacked = all((raw / name).with_suffix("").is_file() for name in names)
    if not unpacked and dist.is_initialized():
        raise click.UsageError(f"{raw}: start once in a single process, which unpacks the files, and then several")
    if not unpacked and not download:
        missing = [name for name in names if not (raw / name).is_file()]
        if missing:
            raise click.UsageError(f"{raw}: {', '.join(missing)} not there; put them there, or add --download")
        for name, md5 in kind.resources:
            if not check_integrity(str(raw / name), md5):
                raise click.UsageError(f"{raw / name} is damaged: its MD5 is not {md5}; remove it, or add --download")
    try:
        splits = {split: kind(root, train=split == "train", download=True) for split in ("train", "test")}
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, gzip.BadGzipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "remove what is unpacked there and start again" if unpacked else f"put {', '.join(names)} there"
        raise click.ClickException(f"{dataset}: no usable files in {raw} ({reason}); {hint}") from error
    if any(len(split.data) != len(split.targets) for split in splits.values()):
        raise click.ClickException(f"{raw}: not as many labels as pictures; remove what is unpacked there")
    return {name: (split.data.flatten(1).float() / 255, split.targets) for name, split in splits.items()}


def read_larochelle(root):
    """The static binarisation of Larochelle & Murray (2011): {split: ((n, 784) of 0 and 1, labels or None)}.

    Read from binarized_mnist*.npz (arrays train, valid, test of packed bits, (n, 98) bytes; labels where it has them)
    or the original binarized_mnist_{train,valid,test}.amat. Raises click.UsageError where neither is there, or damaged.
    """
    packed = [root] if root.is_file() else sorted(root.glob("binarized_mnist*.npz"))
    text = {split: root / f"binarized_mnist_{split}.amat" for split in LAROCHELLE}
    labels = {}
    try:
        if packed:
            with np.load(packed[0]) as arrays:
                bits = {split: np.unpackbits(arrays[split], axis=1) for split in LAROCHELLE}
                names = {"train": "train_labels_inferred", "test": "test_labels"}
                labels = {split: arrays[name] for split, name in names.items() if name in arrays}
        elif all(file.is_file() for file in text.values()):
            bits = {split: np.loadtxt(file, dtype=np.uint8) for split, file in text.items()}
        else:
            raise click.UsageError(
                f"{root}: neither binarized_mnist*.npz nor {', '.join(file.name for file in text.values())} is there; "
                f"the latter are at {LAROCHELLE_URL}"
            )
    except click.UsageError:
        raise
    except Exception as error:  # NumPy and zipfile raise many kinds on a damaged file
        raise click.UsageError(f"{root}: damaged, or no static binarisation of MNIST ({error})") from error
    for split, n in LAROCHELLE.items():
        if bits[split].shape != (n, PIXELS) or bits[split].max() > 1:
            raise click.UsageError(f"{root}: {split} is {bits[split].shape}, expected ({n}, {PIXELS}) of 0 and 1")
        if split in labels and labels[split].shape != (n,):
            raise click.UsageError(f"{root}: {split} has labels of shape {labels[split].shape}, expected ({n},)")
    known = {split: torch.from_numpy(values).long() for split, values in labels.items()}
    return {split: (torch.from_numpy(bits[split]).float(), known.get(split)) for split in LAROCHELLE}


class Digits:
    """A data set that lives on the device whole, so that no loader slows a step.

    `train` (n, 784) are grey values in [0, 1]; with "dynamic" binarisation every presentation draws its pixels anew
    from them. `test` and `train_fixed` are binarised once, the same in every run. `labels` are None where unknown.
    """

    def __init__(self, dataset, data_root, download, binarize, seed, device):
        self.binarize, self.seed, self.device = binarize, seed, device
        if binarize == "static":
            splits, self.source = read_larochelle(data_root), "MNIST, static binarisation (Larochelle)"
        else:
            splits = read_torchvision(dataset, data_root, download)
            names = {"dynamic": "dynamic binarisation", "none": "grey values"}
            self.source = f"{DATASETS[dataset].__name__}, {names[binarize]}"
        (train, train_labels), (test, test_labels) = splits["train"], splits["test"]
        self.train = train.to(device)
        self.train_fixed = self.binarized(train, random_generator("binarized train")).to(device)
        self.test = self.binarized(test, random_generator("binarized test")).to(device)
        known = train_labels is not None and test_labels is not None
        self.labels = (train_labels.to(device), test_labels.to(device)) if known else None
        self.epoch, self.order = None, None

    def binarized(self, grey, generator):
        return torch.bernoulli(grey, generator=generator) if self.binarize == "dynamic" else grey

    def batch(self, step, first, last, total):
        """Examples first to last of the `total` of a step: (last - first, 784). Every epoch has an order of its own."""
        epoch, i = divmod(step, len(self.train) // total)
        if epoch != self.epoch:
            order = torch.randperm(len(self.train), generator=random_generator("order", self.seed, epoch))
            self.epoch, self.order = epoch, order.to(self.device)
        grey = self.train[self.order[i * total : (i + 1) * total]]
        return self.binarized(grey, random_generator("binarize", self.seed, step, device=self.device))[first:last]


# ---------------------------------------------------------------- Model


def mlp(d, widths):
    """Encoder and decoder of tanh layers, as in Kingma & Welling (2013) and Burda et al. (2015)."""

    def layers(sizes):
        modules = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*modules[:-1])

    return layers((PIXELS, *widths, 2 * d)), layers((d, *reversed(widths), PIXELS))


def conv(d, channels):
    """Encoder and decoder of residual blocks at 14 x 14 and, with twice the channels, at 7 x 7 pixels."""
    small, wide = channels, 2 * channels
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, small, 5, stride=2, padding=2),  # 14 x 14
        ResBlock(small),
        nn.SiLU(),
        nn.Conv2d(small, wide, 3, stride=2, padding=1),  # 7 x 7
        ResBlock(wide),
        ResBlock(wide),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(wide * 49, 2 * d),
    )
    decoder = nn.Sequential(
        nn.Linear(d, wide * 49),
        nn.Unflatten(1, (wide, 7, 7)),
        ResBlock(wide),
        ResBlock(wide),
        nn.SiLU(),
        nn.Conv2d(wide, 4 * small, 3, padding=1),
        nn.PixelShuffle(2),  # 14 x 14
        ResBlock(small),
        ResBlock(small),
        nn.SiLU(),
        nn.Conv2d(small, 4, 3, padding=1),
        nn.PixelShuffle(2),  # 28 x 28
        nn.Flatten(),
    )
    return encoder, decoder


class VAE(nn.Module):
    """p(z) = N(0, I), p(x | z) Bernoulli in every pixel, q(z | x) a Gaussian with a diagonal covariance.

    `bias` is added to what the decoder returns, so that `start_at` need not know the decoder's layers.
    """

    def __init__(self, *, arch, d, hidden, channels):
        super().__init__()
        self.d = d
        self.encoder, self.decoder = mlp(d, hidden) if arch == "mlp" else conv(d, channels)
        self.bias = nn.Parameter(torch.zeros(PIXELS))

    @torch.no_grad()
    def start_at(self, mean):
        """Start where the data are: the pixels' logits as their means over the data, (784,), have them."""
        self.bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())

    def encode(self, x):
        """x (B, 784) -> mu, logvar, each (B, D)."""
        return self.encoder(x).float().chunk(2, dim=1)

    def decode(self, z):
        """z (..., D) -> the pixels' logits (..., 784)."""
        return self.decoder(z.flatten(0, -2)).float().unflatten(0, z.shape[:-1]) + self.bias


# ---------------------------------------------------------------- Objective


def sample_terms(model, x, mu, logvar, noise):
    """log p(x | z) and log p(z) - log q(z | x) of z = mu + sigma * noise; noise (k, B, D) -> two of (k, B), nats."""
    z = reparameterize(mu, logvar, noise)  # (k, B, D)
    log_ratio = 0.5 * (noise.square() + logvar - z.square()).sum(-1)
    return bernoulli_log_likelihood(x, model.decode(z)), log_ratio


def objective(model, x, noise, beta, options):
    """The loss of a batch, and its terms: x (B, 784), noise (k, B, D), nats per example.

    "elbo": reconstruction + beta * KL, the KL in closed form, and at least `free_bits` nats charged for every latent
    (Kingma et al. 2016, appendix C.8). "iwae": the importance weighted bound of k samples (Burda et al. 2015, eq. 8),
    where beta weighs log p(z) - log q(z | x); "loss/negative_bound" is the bound itself, whatever beta.
    """
    mu, logvar = model.encode(x)
    log_likelihood, log_ratio = sample_terms(model, x, mu, logvar, noise)
    kl = gaussian_kl(mu, logvar).mean(0)  # (D,)
    terms = {"loss/reconstruction": -log_likelihood.mean(), "loss/kl": kl.sum()}
    if options["objective"] == "iwae":
        at_beta, bound = (
            (log_likelihood + weight * log_ratio).logsumexp(0).mean() - math.log(len(noise)) for weight in (beta, 1)
        )
        return -at_beta, terms | {"loss/negative_bound": -bound}
    loss = terms["loss/reconstruction"] + beta * kl.clamp(min=options["free_bits"]).sum()
    return loss, terms | {"loss/negative_bound": terms["loss/reconstruction"] + terms["loss/kl"]}


def samples_at(progress, k, k_from):
    """Samples of a step: from `k_from` to `k`, by equal factors in equal parts of the run.

    Most of what is learnt, a cheap importance weighted bound of few samples teaches as well.
    """
    return round(k_from * (k / k_from) ** progress)


def update(compute, model, optimizer, x, noise, beta, lr, options):
    """One step of Adam on what `compute` (the objective, maybe compiled) returns; returns the values to log."""
    with autocast(x.device, options["precision"]):
        loss, terms = compute(model, x, noise, beta, options)
    return descend(loss, terms, optimizer, lr, CLIP) | {"schedule/beta": beta, "schedule/lr": lr}


# ---------------------------------------------------------------- Evaluation

# Latents decoded at a time while a likelihood is estimated: bounds the memory whatever --eval-samples, and on a CPU
# keeps what is computed within its caches, which halves the time.
ROWS = {"cpu": 256, "mps": 4096, "cuda": 65536}
BLOCK = 32  # pictures whose likelihood is estimated together
ENCODED = 1000  # pictures encoded at a time
BOUND_DIGITS = 2000  # of train and of test, for the bounds computed while training
CURVE_DIGITS, CURVE_SAMPLES = 200, 50  # for the likelihoods estimated while training


@torch.no_grad()
def encode_all(model, x):
    """Posteriors of any number of pictures: x (n, 784) -> mu, logvar, each (n, D)."""
    parts = [model.encode(part) for part in x.split(ENCODED)]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def draw(mu, logvar, *key):
    """A draw of every posterior, the same in every run: mu, logvar (n, D) -> (n, D)."""
    noise = torch.randn(mu.shape, generator=random_generator(*key, device=mu.device), device=mu.device)
    return reparameterize(mu, logvar, noise)


@torch.no_grad()
def importance_estimates(model, x, samples, show=False):
    """Estimates of every picture's likelihood from `samples` draws of its posterior: x (n, 784) -> dict of (n,), nats.

    "log_likelihood": log 1/K sum_k p(x, z_k) / q(z_k | x), whose expectation is below log p(x) and rises to it with K
    (Burda et al. 2015, theorem 1; Rezende et al. 2014, appendix E); "reconstruction": -E_q log p(x | z); "kl".
    """
    totals = {"log_likelihood": [], "reconstruction": [], "kl": []}
    at_once = max(1, ROWS[x.device.type] // BLOCK)
    wait = 0 if sys.stderr.isatty() else 30  # seconds: elsewhere than on a terminal, a line every half minute will do
    bar = tqdm(x.split(BLOCK), desc="likelihood", disable=not show, delay=wait, mininterval=max(0.1, wait))
    for i, part in enumerate(bar):
        mu, logvar = model.encode(part)
        log_sum, reconstruction = torch.full_like(mu[:, 0], -math.inf), torch.zeros_like(mu[:, 0])
        for first in range(0, samples, at_once):
            count = min(at_once, samples - first)
            generator = random_generator("importance", i, first, device=x.device)
            noise = torch.randn(count, *mu.shape, generator=generator, device=x.device)
            log_likelihood, log_ratio = sample_terms(model, part, mu, logvar, noise)
            log_sum = torch.logaddexp(log_sum, (log_likelihood + log_ratio).logsumexp(0))
            reconstruction -= log_likelihood.sum(0) / samples
        totals["log_likelihood"].append(log_sum - math.log(samples))
        totals["reconstruction"].append(reconstruction)
        totals["kl"].append(gaussian_kl(mu, logvar).sum(1))
    return {name: torch.cat(parts) for name, parts in totals.items()}


@torch.no_grad()
def bound(model, x):
    """The negative ELBO of one sample a picture, in nats, averaged over x (n, 784)."""
    total = 0.0
    for i, part in enumerate(x.split(ENCODED)):
        mu, logvar = model.encode(part)
        log_likelihood = bernoulli_log_likelihood(part, model.decode(draw(mu, logvar, "bound", i)))
        total += (gaussian_kl(mu, logvar).sum(1) - log_likelihood).sum().item()
    return total / len(x)


def active_units(mu):
    """Latents whose posterior mean varies over the data by more than 0.01 (Burda et al. 2015, section 5): mu (n, D)."""
    return int((mu.var(0) > 0.01).sum())


def probe_accuracy(train_z, train_labels, test_z, test_labels):
    """Accuracy of a logistic regression from latents (n, D) to labels (n,), fitted on train, read on test.

    To be given draws of the posteriors. Their means would also show what is lost in the noise: a latent that moves
    by 0.01 where its posterior is 1 wide says nothing to the decoder, but all to a regression on means.
    """
    weight = torch.zeros(train_z.shape[1], 10, device=train_z.device, requires_grad=True)
    bias = torch.zeros(10, device=train_z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(train_z @ weight + bias, train_labels) + 1e-5 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((test_z @ weight + bias).argmax(1) == test_labels).float().mean().item()


def spread(x, n):
    """n examples spread evenly over x: the first half of MNIST's test set is easier than the second."""
    return x[:: max(1, len(x) // n)][:n]


def curve_point(model, data, step, minutes, samples_seen):
    """What is watched while training: bounds on train and test, and a rough likelihood."""
    few = importance_estimates(model, spread(data.test, CURVE_DIGITS), CURVE_SAMPLES)
    return {
        "step": step,
        "minutes": minutes,
        "samples_seen": samples_seen,
        "train_elbo": -bound(model, spread(data.train_fixed, BOUND_DIGITS)),
        "test_elbo": -bound(model, spread(data.test, BOUND_DIGITS)),
        "nll": -few["log_likelihood"].mean().item(),
    }


def evaluate(model, data, samples):
    """The numbers a run is held against the literature by, on the whole test set."""
    estimates = importance_estimates(model, data.test, samples, show=True)
    metrics = {name: value.cpu().double().mean().item() for name, value in estimates.items()}
    test = encode_all(model, data.test)
    scores = {
        "nll": -metrics["log_likelihood"],
        "nll_standard_error": estimates["log_likelihood"].std().item() / math.sqrt(len(data.test)),
        "eval_samples": samples,
        "elbo": -metrics["reconstruction"] - metrics["kl"],
        "reconstruction": metrics["reconstruction"],
        "kl": metrics["kl"],
        "active_units": active_units(test[0]),
    }
    if data.labels is not None:
        drawn = [draw(*posterior, "probe") for posterior in (encode_all(model, data.train_fixed), test)]
        scores["probe_accuracy"] = probe_accuracy(drawn[0], data.labels[0], drawn[1], data.labels[1])
    return scores


# ---------------------------------------------------------------- Figures

GREEN, BLUE, ORANGE = "#43a047", "#1e88e5", "#e65100"


def sheet(pixels, columns):
    """Pictures (n, 784) of values in [0, 1], `columns` in a row, as one PIL picture at twice their size."""
    grid = make_grid(pixels.view(-1, 1, SIDE, SIDE).cpu(), nrow=columns, padding=2, pad_value=0.35)[0]
    picture = Image.fromarray((grid.clamp(0, 1) * 255).round().byte().numpy()).convert("RGB")
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


def draws(model, n):
    """The means of n pictures drawn from the prior, the same latents in every run: (n, 784)."""
    z = torch.randn(n, model.d, generator=random_generator("draws")).to(model.bias.device)
    return model.decode(z).sigmoid()


def reconstructions(model, x):
    """Three rows: pictures (n, 784), decoded from the posterior's mean, and from a draw of it."""
    mu, logvar = model.encode(x)
    means = [model.decode(z).sigmoid() for z in (mu, draw(mu, logvar, "reconstructions"))]
    return sheet(torch.cat([x, *means]), len(x))


def manifold(model, n=20):
    """What a model of D = 2 decodes where n x n points divide the prior evenly (Kingma & Welling 2013, fig. 4)."""
    at = torch.special.ndtri((torch.arange(n) + 0.5) / n).to(model.bias.device)
    z = torch.cartesian_prod(-at, at).flip(1)  # (n * n, 2): the first latent to the right, the second upwards
    return sheet(model.decode(z).sigmoid(), n)


def traversal(model, mu, latent, columns=11):
    """One latent moved from -3 to 3 while the others stay where `mu` (D,) has them: (columns, 784)."""
    z = mu.repeat(columns, 1)
    z[:, latent] = torch.linspace(-3, 3, columns, device=mu.device)
    return model.decode(z).sigmoid()


def most_active(model, x, n):
    """The n latents whose posterior mean varies most over x, the most active first."""
    mu, _ = encode_all(model, x)
    return mu.var(0).argsort(descending=True)[:n].tolist()


def traversals(model, x):
    """A row a latent, for the ten most active: one test digit with that latent moved from -3 to 3."""
    mu, _ = model.encode(x[:1])
    return sheet(torch.cat([traversal(model, mu[0], latent) for latent in most_active(model, x, 10)]), 11)


def interpolations(model, x, columns=11):
    """A row a pair of pictures: decoded on the straight line between their posterior means. x (2 n, 784)."""
    mu, _ = model.encode(x)
    share = torch.linspace(0, 1, columns, device=mu.device)[None, :, None]
    z = (1 - share) * mu[0::2, None] + share * mu[1::2, None]  # (n, columns, D)
    return sheet(model.decode(z).sigmoid().flatten(0, 1), columns)


def curves_figure(curve, title):
    """Bounds and likelihood against training samples seen: the axes of Kingma & Welling (2013), figure 2."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    best = max(-point["nll"] for point in curve)
    curve = [point for point in curve if point["test_elbo"] > best - 60] or curve  # the start is of no interest
    seen = [point["samples_seen"] for point in curve]
    axes.plot(seen, [p["train_elbo"] for p in curve], color=ORANGE, linestyle="--", label="bound, train")
    axes.plot(seen, [p["test_elbo"] for p in curve], color=BLUE, label="bound, test")
    label = f"log-likelihood, {CURVE_DIGITS} of test, K = {CURVE_SAMPLES}"
    axes.plot(seen, [-p["nll"] for p in curve], color=GREEN, label=label)
    axes.set(xscale="log", xlabel="training samples seen", ylabel="nats per example", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return plotted(figure)


@torch.no_grad()
def draw_figures(model, data, run, step):
    run.figure("reconstructions", reconstructions(model, data.test[:16]), step)
    run.figure("samples", sheet(draws(model, 96), 16), step)
    run.figure("traversals", traversals(model, data.test[:1000]), step)
    run.figure("interpolations", interpolations(model, data.test[:16]), step)
    if model.d == 2:
        run.figure("manifold", manifold(model), step)


@torch.no_grad()
def sweep_figure(models, table, x):
    """Rate against distortion, what the latents hold, and for every beta draws of the prior and the first traversal."""
    figure = Figure(figsize=(11, 3.4 + 0.62 * len(models)), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.4, 0.62 * len(models)))
    left, right = top.subplots(1, 2)
    left.plot([row["kl"] for row in table], [row["reconstruction"] for row in table], "o-", color=BLUE)
    for row in table:
        left.annotate(f"  {row['beta']:g}", (row["kl"], row["reconstruction"]))
    left.set(xscale="log", xlabel="rate: KL, nats", ylabel="distortion: reconstruction, nats", title="by beta")
    betas = range(len(table))
    right.bar(betas, [row["active_units"] for row in table], color=BLUE, alpha=0.6)
    right.set(xlabel="beta", ylabel="active units", xticks=betas, xticklabels=[f"{row['beta']:g}" for row in table])
    if "probe_accuracy" in table[0]:
        accuracy = right.twinx()
        accuracy.plot(betas, [100 * row["probe_accuracy"] for row in table], "o-", color=ORANGE)
        accuracy.set_ylabel("linear probe, %", color=ORANGE)
    rows = bottom.subplots(len(models), 2, squeeze=False)
    for (draws_axes, traversal_axes), model, row in zip(rows, models, table, strict=True):
        draws_axes.imshow(sheet(draws(model, 14), 14))
        mu, _ = model.encode(x[:1])
        moved = [traversal(model, mu[0], latent, 7) for latent in most_active(model, x, 2)]
        traversal_axes.imshow(sheet(torch.cat(moved), 14))
        draws_axes.set_ylabel(f"{row['beta']:g}", rotation=0, labelpad=14)
    rows[0, 0].set_title("draws from the prior, by beta")
    rows[0, 1].set_title("the two most active latents, -3 to 3")
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
    return plotted(figure)


# ---------------------------------------------------------------- Command line

PRESETS = {name: {"batch": 400, "lr": 6e-3, "warmup": 0.3, "minutes": 5.0} for name in DATASETS}
MODEL_OPTIONS = ("arch", "d", "hidden", "channels")
# What a resumed run may change; the rest made its weights.
RESUMABLE = {
    "steps", "minutes", "device", "precision", "compile_model", "data_root", "download", "out", "resume", "dry_run",
    "eval_samples",
}  # fmt: skip
CLIP = 200.0  # of the gradient's norm: far above that of a usual batch


class Numbers(click.ParamType):
    """Numbers with commas between them: "200,200" -> [200, 200]."""

    name = "numbers"

    def __init__(self, kind, least):
        self.kind, self.least = kind, least

    def convert(self, value, param, ctx):
        try:
            numbers = [self.kind(v) for v in (value.split(",") if isinstance(value, str) else value)]
        except (ValueError, TypeError):
            self.fail(f"{value!r}: expected numbers with commas between them", param, ctx)
        if not all(math.isfinite(v) and v >= self.least for v in numbers):
            self.fail(f"{value!r}: expected numbers of at least {self.least}", param, ctx)
        return numbers


def check_options(options, typed):
    """Raise click.UsageError for options that do not go together."""
    if options["objective"] == "iwae" and options["free_bits"]:
        raise click.UsageError("--free-bits belongs to --objective elbo: the importance weighted bound has no KL term")
    if options["k_from"] and (options["objective"] == "elbo" or options["k_from"] > options["k"]):
        raise click.UsageError(f"--k-from {options['k_from']}: belongs to --objective iwae, and is at most --k")
    if options["sweep_beta"] and "beta" in typed:
        raise click.UsageError("--beta and --sweep-beta: give one of them")
    other = "channels" if options["arch"] == "mlp" else "hidden"
    if other in typed:
        raise click.UsageError(f"--{other} does not belong to --arch {options['arch']}")
    if options["binarize"] == "static" and (options["dataset"] != "mnist" or not options["data_root"]):
        raise click.UsageError(
            "--binarize static is MNIST as Larochelle binarised it: name its folder or .npz file by --data-root"
        )


def run_name(options):
    form = "vae-{dataset}-{binarize}-{arch}-D{d}-{objective}{k}-beta{beta:g}-seed{seed}"
    return form.format(**options)


def load_data(options, device):
    """The data of --dataset; without --data-root they are fetched into data/."""
    root, download = options["data_root"] or Path("data"), options["download"] or not options["data_root"]
    if not download and not root.exists():
        raise click.UsageError(f"--data-root {root}: no such folder")
    return Digits(options["dataset"], root, download, options["binarize"], options["seed"], device)


def about(options, data):
    """What config.json says of the data."""
    return {"name": options["dataset"], "source": data.source}


def fit(options, data, device, rank, world):
    """Train one model, or go on: -> model, scores ({} where it was stopped before its end)."""
    # 1. Build; go on from the checkpoint where there is one.
    if world * options["batch"] > len(data.train):
        raise click.UsageError(f"--batch {options['batch']}: there are only {len(data.train)} pictures to train on")
    torch.manual_seed(options["seed"])
    model = VAE(**{name: options[name] for name in MODEL_OPTIONS})
    model.start_at(data.train.mean(0).cpu())
    if options["start_from"] and not options["resume"]:
        start = load_checkpoint(options["start_from"], "cpu")["model"]
        load_state(model, start, f"--start-from {options['start_from']}")
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"], eps=1e-4, fused=True)
    name, what = run_name(options), about(options, data)
    run, step, elapsed = start_run(options, SCRIPT, name, what, model, optimizer, device, rank, world)
    compute = torch.compile(objective) if options["compile_model"] else objective

    # 2. Train.
    first, total = rank * options["batch"], world * options["batch"]
    mine = slice(first, first + options["batch"])
    curve = earlier_curve(run.folder, step) if run.folder else []

    def update_at(step, progress):
        x = data.batch(step, mine.start, mine.stop, total)
        generator = random_generator("noise", options["seed"], step, device=device)
        k = samples_at(progress, options["k"], options["k_from"] or options["k"])
        noise = torch.randn(k, total, model.d, generator=generator, device=device)[:, mine]
        beta = beta_at(progress, options["beta"], options["beta_from"], options["warmup"])
        lr = learning_rate_at(progress, step, options["lr"])
        return update(compute, model, optimizer, x, noise, beta, lr, options)

    def report(step, minutes, due):
        point = curve_point(model, data, step, minutes, step * total)
        curve[:] = [*(earlier for earlier in curve if earlier["step"] < step), point]
        run.scalars({f"test/{name}": point[name] for name in ("train_elbo", "test_elbo", "nll")}, step)
        if not all(math.isfinite(value) for value in point.values()):
            raise click.ClickException(f"step {step}: a bound is not finite: {point}")
        write_json(run.folder / "curve.json", curve)
        if due:
            run.figure("curves", curves_figure(curve, run.folder.name), step)
            draw_figures(model, data, run, step)
        return f"bound {point['test_elbo']:.2f} (train {point['train_elbo']:.2f}), NLL about {point['nll']:.2f}"

    step, minutes, complete = train(run, model, optimizer, options, device, rank, step, elapsed, update_at, report)

    # 3. Evaluate.
    scores = {}
    if rank == 0 and complete:
        scores = evaluate(model, data, options["eval_samples"])
        run.metrics(scores | {"step": step, "minutes": minutes, "data": data.source})
        click.echo(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        click.echo(f"done: {run.folder}/metrics.json and {run.folder}/figures; next: python export.py {run.folder}")
    elif rank == 0:
        click.echo(f"stopped at step {step}; go on with: python {SCRIPT}.py --resume {run.folder}")
    run.close()
    return model, scores


def sweep(options, data, device):
    """One run for every beta, in folders below the sweep's own, and a table and figure of them all."""
    betas = options["sweep_beta"]
    name = run_name(options | {"beta": betas[0]}) + f"-to-{betas[-1]:g}"
    folder = options["resume"] or options["out"] or new_folder(name)
    run = Run(folder, rank=0)
    run.write_config(run_config(options, SCRIPT, about(options, data), world=1))
    models, table = [], []
    for beta in betas:
        below = folder / f"beta-{beta:g}"
        begun = (below / "checkpoint.pt").is_file()
        one = options | {"beta": beta, "sweep_beta": None, "resume": below if begun else None, "out": below}
        model, scores = fit(one, data, device, rank=0, world=1)
        if not scores:
            click.echo(f"the sweep goes on with: python {SCRIPT}.py --resume {folder}")
            return
        models.append(model)
        table.append({"beta": beta} | scores)
    run.metrics({"table": table, "data": data.source})
    run.figure("sweep", sweep_figure(models, table, data.test[:1000]), 0)
    run.close()
    columns = list(table[0])
    click.echo("| " + " | ".join(columns) + " |\n|" + "-|" * len(columns))
    for row in table:
        click.echo("| " + " | ".join(f"{row[name]:.4g}" for name in columns) + " |")


@click.command(cls=PresetCommand, presets=PRESETS, context_settings={"show_default": True})
@click.option("--dataset", type=click.Choice(list(PRESETS)), default="mnist")
@click.option(
    "--binarize",
    type=click.Choice(["dynamic", "static", "none"]),
    default="dynamic",
    help="Pixels drawn anew at every presentation; drawn once, by Larochelle; or left grey, and then "
    "what is called likelihood below is a cross-entropy.",
)
@click.option("--arch", type=click.Choice(["mlp", "conv"]), default="mlp", help="Tanh layers, or residual blocks.")
@click.option("--hidden", type=Numbers(int, 1), default="200,200", help="Widths of the MLP's layers.")
@click.option("--channels", type=click.IntRange(1), default=16, help="Width of the convolutions at 14 x 14.")
@click.option("--D", "d", type=click.IntRange(1), default=50, help="Latents.")
@click.option("--objective", type=click.Choice(["elbo", "iwae"]), default="elbo", help="The bound that is raised.")
@click.option("--k", type=click.IntRange(1), default=1, help="Samples of a picture's posterior in one step.")
@click.option("--k-from", type=click.IntRange(1), show_default="as --k", help="Samples at the start, with iwae.")
@click.option("--start-from", type=FOLDER, help="Run folder whose weights are the start.")
@click.option("--free-bits", type=FiniteRange(0), default=0.0, help="Nats of a latent's KL that are charged anyway.")
@click.option("--eval-samples", type=click.IntRange(1), default=100, help="K of the final likelihood estimate.")
@click.option(
    "--sweep-beta",
    type=Numbers(float, 0),
    help="Train for each of these betas, each as long as --minutes says.",
)
@click.pass_context
def main(context, **options):
    """Train a variational autoencoder on MNIST or Fashion-MNIST.

    \b
    python train_vae_mnist.py --minutes 1
    python train_vae_mnist.py --D 2
    python train_vae_mnist.py --beta 4 --beta-from 0 --warmup 1
    python train_vae_mnist.py --binarize static --data-root binarized_mnist
    python train_vae_mnist.py --resume runs/vae-mnist-dynamic-mlp-D50-elbo1-beta1-seed0 --eval-samples 5000
    """
    settle_run(context, options, RESUMABLE, SCRIPT)
    typed = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    check_options(options, typed)
    if options["dry_run"]:
        click.echo(json.dumps(options, indent=2, default=str))
        return
    device = pick_device(options["device"])
    rank, world = start_distributed(device)
    if world > 1 and (options["sweep_beta"] or options["free_bits"]):
        raise click.UsageError("--sweep-beta and --free-bits are for a single process")
    data = load_data(options, device)
    if options["sweep_beta"]:
        sweep(options, data, device)
    else:
        fit(options, data, device, rank, world)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
