"""A VAE on MNIST (Kingma & Welling 2013), beta-VAE, a learned prior, the importance weighted bound (Burda et al. 2015).

    python train_vae_mnist.py                                        # two tanh layers of 200, D = 50, Burda et al.
    python train_vae_mnist.py --hidden 500 --D 20 --warmup 0         # one layer of 500, Kingma & Welling
    python train_vae_mnist.py --arch conv --D 32 --batch 100 --lr 2e-3 --minutes 60 --prior flow
    python train_vae_mnist.py --objective iwae --k 50 --batch 100 --lr 1e-3
    python train_vae_mnist.py --binarize static --data-root binarized_mnist
    python train_vae_mnist.py --resume runs/vae-mnist-dynamic-mlp-D50-elbo1-beta1-seed0 --eval-samples 5000

For who wants a small VAE whose likelihoods can be held against the literature. Without --data-root MNIST is fetched
into data/ (11 MB). Results, by command and seed: docs/mnist.md; the sweep over beta: tests/experiments/beta.py.
"""

import copy
import math
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from common import (  # isort: skip
    SPLITS, FlowPrior, Graph, ResBlock, Run, beta_at, build_model, gaussian_kl, learning_rate_at,
    load_model, optimizer_step, random_generator, reparameterize, settle_options, start_device, training_command,
)  # fmt: skip
from recompose import Tile, contact_sheet

SCRIPT = Path(__file__).stem
SIDE, PIXELS = 28, 28 * 28

# ---------------------------------------------------------------- Data

DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST}
BINARIZE = {"dynamic": "dynamic binarisation", "static": "static binarisation (Larochelle)", "none": "grey values"}
LAROCHELLE = {"train": 50_000, "valid": 10_000, "test": 10_000}
STATIC_FILES = "binarized_mnist*.npz, or binarized_mnist_{train,valid,test}.amat of www.cs.toronto.edu/~larocheh/public"


def read_torchvision(kind, root, download):
    """Grey pictures, {split: (n, 784)}, the last tenth of train, at most 320, being valid; unpacks whole archives."""
    download |= all(check_integrity(root / kind.__name__ / "raw" / name, md5) for name, md5 in kind.resources)
    splits = {}
    for split in ("train", "test"):
        part = kind(root, train=split == "train", download=download and not dist.is_initialized())
        if part.data.shape != (len(part.targets), SIDE, SIDE):
            raise ValueError(f"{split}: pictures {tuple(part.data.shape)}, {len(part.targets)} labels")
        splits[split] = part.data.flatten(1).float() / 255  # (n, 784)
    n = len(splits["train"]) - min(320, len(splits["train"]) // 10)
    return splits | {"train": splits["train"][:n], "valid": splits["train"][n:]}


def read_larochelle(root):
    """Larochelle & Murray's (2011) text files, or an .npz of their bits packed in (n, 98) bytes: {split: (n, 784)}."""
    packed, splits = [root] if root.is_file() else sorted(root.glob("binarized_mnist*.npz")), {}
    arrays = np.load(packed[0]) if packed else {}
    for split, n in LAROCHELLE.items():
        text = root / f"binarized_mnist_{split}.amat"
        bits = np.unpackbits(arrays[split], axis=1) if packed else np.loadtxt(text, dtype=np.uint8)
        if bits.shape != (n, PIXELS) or bits.max() > 1:
            raise ValueError(f"{split} is {bits.shape}, expected ({n}, {PIXELS}) of 0 and 1")
        splits[split] = torch.from_numpy(bits).float()
    return splits


class Digits:
    """A data set on the device whole: `train` (n, 784) in [0, 1], with "dynamic" binarised anew at every presentation;

    `train_fixed`, `valid` and `test` binarised once, the same in every run. Raises click.UsageError for bad files.
    """

    def __init__(self, options, device):
        self.binarize, self.seed, self.device = options["binarize"], options["seed"], device
        kind, root, static = DATASETS[options["dataset"]], options["data_root"], self.binarize == "static"
        if static and (kind is not MNIST or not root):
            raise click.UsageError("--binarize static is Larochelle's MNIST: name its folder or .npz by --data-root")
        folder, download = Path(root or "data"), options["download"] or not root
        self.source = f"{kind.__name__}, {BINARIZE[self.binarize]}"
        try:
            splits = read_larochelle(folder) if static else read_torchvision(kind, folder, download)
        except Exception as error:  # torchvision, NumPy and zipfile raise many kinds on a damaged file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            files = ", ".join(f"{kind.__name__}/raw/{name}" for name, _ in kind.resources)
            files = STATIC_FILES if static else f"{files}, nothing unpacked beside them, or --download"
            raise click.UsageError(f"{folder}: no usable {kind.__name__} ({reason}); expected {files}") from error
        self.train = splits["train"].to(device)
        self.train_fixed, self.valid, self.test = (
            self.binarized(splits[split], random_generator(f"binarized {split}")).to(device) for split in SPLITS
        )
        self.mean_logit = self.train.mean(0).clamp(1e-3, 1 - 1e-3).logit()  # (784,), of the mean picture
        self.epoch, self.order = None, None
        if options["batch"] * (dist.get_world_size() if dist.is_initialized() else 1) > len(self.train):
            raise click.UsageError(f"--batch {options['batch']}: there are only {len(self.train)} pictures to train on")

    def binarized(self, grey, generator):
        return torch.bernoulli(grey, generator=generator) if self.binarize == "dynamic" else grey

    def batch(self, step, own, total):
        """The slice `own` of the `total` examples of a step: (own, 784). Every epoch has an order of its own."""
        epoch, i = divmod(step, len(self.train) // total)
        if epoch != self.epoch:
            order = torch.randperm(len(self.train), generator=random_generator("order", self.seed, epoch))
            self.epoch, self.order = epoch, order.to(self.device)
        grey = self.train[self.order[i * total : (i + 1) * total]]
        return self.binarized(grey, random_generator("binarize", self.seed, step, device=self.device))[own]


# ---------------------------------------------------------------- Model


def tanh_layers(sizes):
    """Layers of Kingma & Welling (2013) and Burda et al. (2015): tanh after all but the last."""
    modules = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*modules[:-1])


def conv(d, channels):
    """Encoder and decoder of residual blocks at 14 x 14 and, with twice the channels, at 7 x 7 pixels."""
    small, wide = channels, 2 * channels
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, small, 5, stride=2, padding=2), ResBlock(small), nn.SiLU(),  # 14 x 14
        nn.Conv2d(small, wide, 3, stride=2, padding=1), ResBlock(wide), ResBlock(wide), nn.SiLU(),  # 7 x 7
        nn.Flatten(), nn.Linear(wide * 49, 2 * d),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(d, wide * 49), nn.Unflatten(1, (wide, 7, 7)), ResBlock(wide), ResBlock(wide), nn.SiLU(),
        nn.Conv2d(wide, 4 * small, 3, padding=1), nn.PixelShuffle(2), ResBlock(small), ResBlock(small), nn.SiLU(),
        nn.Conv2d(small, 4, 3, padding=1), nn.PixelShuffle(2), nn.Flatten(),  # 14 x 14 -> 28 x 28 -> 784
    )  # fmt: skip
    return encoder, decoder


class VAE(nn.Module):
    """p(z) = N(0, I) or `prior`, p(x | z) Bernoulli in every pixel, q(z | x) a Gaussian with a diagonal covariance.

    `bias` (784,) is added to what the decoder returns: set to the logits of the mean picture, training starts there.
    """

    def __init__(self, prior, *, arch, d, hidden, channels):
        super().__init__()
        self.d = d
        if arch == "mlp":
            self.encoder = tanh_layers((PIXELS, *hidden, 2 * d))
            self.decoder = tanh_layers((d, *reversed(hidden), PIXELS))
        else:
            self.encoder, self.decoder = conv(d, channels)
        self.bias = nn.Parameter(torch.zeros(PIXELS))
        self.prior = FlowPrior(d) if prior == "flow" else None  # last: the other weights are as without

    def encode(self, x):
        """x (B, 784) -> mu, logvar, each (B, D)."""
        return self.encoder(x).float().chunk(2, dim=1)

    def decode(self, z):
        """z (..., D) -> the pixels' logits (..., 784)."""
        return self.decoder(z.flatten(0, -2)).float().unflatten(0, z.shape[:-1]) + self.bias

    def sample(self, noise):
        """Standard normal noise (..., D) -> samples (..., D) of p(z)."""
        return self.prior.sample(noise) if self.prior else noise


# ---------------------------------------------------------------- Objective


def bernoulli_log_likelihood(x, logits):
    """log Bernoulli(x; sigmoid(logits)) summed over the last axis: (..., n) -> (...), in nats."""
    top = logits.detach().clamp(min=0)  # log1p, and with it softplus, is ten times as slow on a CPU
    return (x * logits - top - ((-top).exp() + (logits - top).exp()).log()).sum(-1)


def sample_terms(model, x, mu, logvar, noise):
    """log p(x | z) and log p(z) - log q(z | x) of z = mu + sigma * noise; noise (k, B, D) -> two of (k, B), nats."""
    z = reparameterize(mu, logvar, noise)  # (k, B, D)
    log_ratio = 0.5 * (noise.square() + logvar - z.square()).sum(-1)  # with p(z) = N(0, I)
    if model.prior:
        log_ratio = log_ratio + model.prior.log_prob(z) + 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    return bernoulli_log_likelihood(x, model.decode(z)), log_ratio


def objective(model, x, noise, beta, kind):
    """The loss of a batch, and its terms: x (B, 784), noise (k, B, D), nats per example.

    "elbo": reconstruction + beta * KL, in closed form to N(0, I), at the samples to a learned prior. "iwae": the bound
    of k samples (Burda et al. 2015, eq. 8), where beta weighs log p(z) - log q(z | x). "negative_bound" has beta 1.
    """
    mu, logvar = model.encode(x)
    log_likelihood, log_ratio = sample_terms(model, x, mu, logvar, noise)
    reconstruction, kl = -log_likelihood.mean(), -log_ratio if model.prior else gaussian_kl(mu, logvar).sum(1)
    loss, bound = reconstruction + beta * kl.mean(), reconstruction + kl.mean()
    if kind == "iwae":
        loss, bound = (math.log(len(noise)) - (log_likelihood + w * log_ratio).logsumexp(0).mean() for w in (beta, 1))
    return loss, {"loss/reconstruction": reconstruction, "loss/kl": kl.mean(), "loss/negative_bound": bound}


# ---------------------------------------------------------------- Evaluation

# Latents decoded at a time for a likelihood: bounds the memory, and keeps what a CPU computes within its caches.
ROWS = {"cpu": 256, "mps": 4096, "cuda": 65536}
SHARED = 32  # pictures whose likelihood is estimated together


@torch.no_grad()
def importance_estimates(model, x, samples, title=None):
    """Estimates by K = `samples` of every posterior: x (n, 784) -> log-likelihood, reconstruction, KL (n,), mu (n, D).

    The first is log 1/K sum_k p(x, z_k) / q(z_k | x), whose expectation is below log p(x) and rises to it with K (Burda
    et al. 2015, theorem 1; Rezende et al. 2014, appendix E); in nats. A `title` shows a progress bar.
    """
    estimates, at_once = [], max(1, ROWS[x.device.type] // SHARED)
    wait = 0 if sys.stderr.isatty() else 30  # seconds: elsewhere than on a terminal, a line every half minute will do
    bar = tqdm(x.split(SHARED), desc=title, disable=title is None, delay=wait, mininterval=max(0.1, wait))
    for i, part in enumerate(bar):
        mu, logvar = model.encode(part)
        log_sum = torch.full_like(mu[:, 0], -math.inf)
        reconstruction, ratio = torch.zeros_like(log_sum), torch.zeros_like(log_sum)
        for first in range(0, samples, at_once):
            count = min(at_once, samples - first)
            generator = random_generator("importance", i, first, device=x.device)
            noise = torch.randn(count, *mu.shape, generator=generator, device=x.device)
            log_likelihood, log_ratio = sample_terms(model, part, mu, logvar, noise)
            log_sum = torch.logaddexp(log_sum, (log_likelihood + log_ratio).logsumexp(0))
            reconstruction -= log_likelihood.sum(0) / samples
            ratio += log_ratio.sum(0) / samples
        kl = -ratio if model.prior else gaussian_kl(mu, logvar).sum(1)
        estimates.append((log_sum - math.log(samples), reconstruction, kl, mu))
    return tuple(map(torch.cat, zip(*estimates, strict=True)))


def evaluate(model, x, samples, title=None):
    """Scores of x (n, 784), K = `samples`; active units are means that vary by over 0.01 (Burda et al. 2015, 5)."""
    log_likelihood, *terms, mu = importance_estimates(model, x, samples, title)
    nll, reconstruction, kl = (value.cpu().double().mean().item() for value in (-log_likelihood, *terms))
    error = log_likelihood.std().item() / math.sqrt(len(x))
    scores = {"nll": nll, "nll_standard_error": error, "eval_samples": samples, "elbo": -reconstruction - kl}
    return scores | {"reconstruction": reconstruction, "kl": kl, "active_units": int((mu.var(0) > 0.01).sum())}


def watch(model, data, samples_seen):
    """What is watched while training: a rough likelihood and the bound of valid, and the bound of train."""
    valid = evaluate(model, data.valid[:: len(data.valid) // 300 or 1], 50)
    train = evaluate(model, data.train_fixed[:: len(data.train_fixed) // 2000 or 1], 1)
    return {"samples_seen": samples_seen, "nll": valid["nll"], "elbo": valid["elbo"], "train/elbo": train["elbo"]}


# ---------------------------------------------------------------- Figures


def digits_figure(rows, title, labels, captions=None):
    """Rows of pictures (columns, 784) in [0, 1], with a label beside every row and a caption above every column."""

    def tile(x, caption):
        grey = (x.view(SIDE, SIDE).cpu().clamp(0, 1) * 255).round().byte().numpy()
        return Tile(Image.fromarray(grey).resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST), caption)

    captions = captions or [""] * len(rows[0])
    return contact_sheet([list(map(tile, row, captions)) for row in rows], title, labels)


def traverse(model, x, n, values):
    """What x[0] decodes to with one of the n latents most active over x (m, 784) moved: (n, values, 784), and names."""
    mu = model.encode(x)[0]
    variance, latents = mu.var(0).topk(min(n, model.d))
    z = mu[0].repeat(len(latents), len(values), 1)  # (n, values, D)
    z[torch.arange(len(latents)), :, latents] = values.to(z.device)
    names = [f"z_{k}, variance {v:.2f}" for k, v in zip(latents.tolist(), variance.tolist(), strict=True)]
    return model.decode(z).sigmoid(), names


@torch.no_grad()
def draw_figures(run, model, data):
    x = data.valid[: min(16, len(data.valid) // 2 * 2)]
    mu, logvar = model.encode(x)
    noise = torch.randn(mu.shape, generator=random_generator("posterior")).to(mu.device)
    rows = [x, *(model.decode(z).sigmoid() for z in (mu, reparameterize(mu, logvar, noise)))]
    run.figure("reconstructions", digits_figure(rows, "Decoded from posteriors of valid", ["digit", "mean", "sample"]))

    z = model.sample(torch.randn(6, 16, model.d, generator=random_generator("draws")).to(mu.device))
    rows, labels = model.decode(z).sigmoid(), [f"{16 * r + 1} to {16 * r + 16}" for r in range(6)]
    run.figure("samples", digits_figure(rows, f"Decoded samples of the prior, D = {model.d}", labels))

    values, share = 0.6 * torch.arange(-5, 6), torch.linspace(0, 1, 11)
    rows, labels = traverse(model, data.valid[:1000], 10, values)
    captions = [f"{v:.1f}" for v in values]
    run.figure("traversals", digits_figure(rows, "A digit, one latent moved to the value above", labels, captions))

    between = torch.lerp(mu[0::2, None], mu[1::2, None], share.to(mu.device)[:, None])  # (pairs, 11, D)
    rows = torch.cat([x[0::2, None], model.decode(between).sigmoid(), x[1::2, None]], dim=1)  # (pairs, 13, 784)
    labels, captions = [f"pair {k}" for k in range(len(rows))], ["digit", *(f"{s:.1f}" for s in share), "digit"]
    run.figure("interpolations", digits_figure(rows, "Between the posterior means of two digits", labels, captions))

    if model.d == 2:  # where 15 x 15 points divide the prior evenly (Kingma & Welling 2013, fig. 4)
        at = torch.special.ndtri((torch.arange(15) + 0.5) / 15)
        noise = torch.cartesian_prod(-at, at).flip(1).view(15, 15, 2).to(mu.device)  # z_0 to the right, z_1 upwards
        labels, captions = [f"z_1 = {v:.2f}" for v in at.flip(0)], [f"{v:.2f}" for v in at]
        rows = model.decode(model.sample(noise)).sigmoid()
        run.figure("manifold", digits_figure(rows, "The plane of z_1 and (above) z_0", labels, captions))


# ---------------------------------------------------------------- Graphs


def graphs(model):
    """{graph: (module, example inputs)}, as the contract says; with a learned prior, `prior`, and no KL of encoder."""
    generator, half = random_generator("graphs"), copy.deepcopy(model)
    del half.encoder, half.prior  # weights that a decoder's file need not hold

    def encode(image):
        mu, logvar = model.encode(image.flatten(1))
        return (mu, logvar) if model.prior else (mu, logvar, gaussian_kl(mu, logvar).sum(1))

    def decode(z):
        return half.decode(z).sigmoid().unflatten(1, (1, SIDE, SIDE))

    image, z = torch.rand(2, 1, SIDE, SIDE, generator=generator), torch.randn(2, model.d, generator=generator)
    encoder = Graph(("mu", "logvar", "kl")[: 2 if model.prior else 3], encode, model.encoder)
    prior = {"prior": (Graph(("z",), model.sample, model.prior), {"noise": z})} if model.prior else {}
    return {"encoder": (encoder, {"image": image}), "decoder": (Graph(("image",), decode, half), {"z": z})} | prior


def describe(model):
    """What a program needs to know of the model beside its options and graphs, for model.json."""
    binarized = "" if model.config["options"]["binarize"] == "none" else ", then binarised"
    return {"kind": "vae-image", "size": SIDE, "scaling": f"grey / 255{binarized}"}


# ---------------------------------------------------------------- Command line

PRESETS = {name: {"batch": 400, "lr": 6e-3, "warmup": 0.3, "minutes": 5.0} for name in DATASETS}
CLIP = 200.0  # of the gradient's norm: far above that of a usual batch


def widths(value):
    """Text "200,200" -> [200, 200]; the list of a config.json stays one. Raises ValueError, which click reports."""
    numbers = [int(word) for word in (value.split(",") if isinstance(value, str) else value)]
    if min(numbers) < 1:
        raise ValueError(value)
    return numbers


build = partial(build_model, VAE)  # options -> an untrained model


def load(folder):
    """The trained model of a run folder; one of before there were priors has N(0, I)."""
    return load_model(folder, lambda options: build({"prior": "standard"} | options))


@training_command(SCRIPT, PRESETS)
@click.option("--binarize", type=click.Choice(list(BINARIZE)), default="dynamic",
              help="Pixels sampled at every presentation, or once, by Larochelle, or left grey.")  # fmt: skip
@click.option("--arch", type=click.Choice(["mlp", "conv"]), default="mlp", help="Tanh layers, or residual blocks.")
@click.option("--hidden", type=widths, default="200,200", help="Widths of the MLP's layers, with commas.")
@click.option("--channels", type=click.IntRange(1), default=16, help="Width of the convolutions at 14 x 14.")
@click.option("--D", "d", type=click.IntRange(1), default=50, help="Latents.")
@click.option("--prior", type=click.Choice(["standard", "flow"]), default="standard", help="N(0, I), or learned.")
@click.option("--objective", type=click.Choice(["elbo", "iwae"]), default="elbo", help="What is raised.")
@click.option("--k", type=click.IntRange(1), default=1, help="Samples of a picture's posterior in one step.")
@click.option("--eval-samples", type=click.IntRange(1), default=100, help="K of the final likelihood estimate.")
@click.pass_context
def main(context, **options):
    # 1. Options, device, data.
    other = "channels" if options["arch"] == "mlp" else "hidden"
    if context.get_parameter_source(other).name == "COMMANDLINE":
        raise click.UsageError(f"--{other} does not belong to --arch {options['arch']}")
    settle_options(context, options)
    device = start_device(options["device"], options["seed"])
    torch.backends.cudnn.benchmark = True  # a GPU's fastest convolutions for batches that are all alike
    data = Digits(options, device)

    # 2. Build; training starts at the mean picture. `start` stays as it is, also where the run is resumed.
    model = build(options)
    model.bias.data.copy_(data.mean_logit)
    model = model.to(device, memory_format=torch.channels_last)
    start = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"], eps=1e-4, fused=True)
    about = {"name": options["dataset"], "source": data.source}
    name = "vae-{dataset}-{binarize}-{arch}-D{d}-{objective}{k}-beta{beta:g}-seed{seed}".format(**options)
    name = name.replace("-seed", "-flow-seed") if options["prior"] == "flow" else name

    # 3. Train: one step, one log line; scores of valid and figures now and then.
    with Run(options, SCRIPT, name, about, model, optimizer, device) as run:
        if run.folder and run.step == 0:
            run.report(watch(model, data, 0))
        for step, progress in run.steps():
            x = data.batch(step, run.own, run.total)
            generator = random_generator("noise", options["seed"], step, device=device)
            noise = torch.randn(options["k"], run.total, model.d, generator=generator, device=device)[:, run.own]
            beta = beta_at(progress, options["beta"], options["warmup"])
            with run.autocast():
                loss, terms = objective(model, x, noise, beta, options["objective"])
            lr = learning_rate_at(progress, step, options["lr"])
            run.log(optimizer_step(loss, terms, optimizer, lr, CLIP) | {"schedule/beta": beta})
            if run.looks:
                run.report(watch(model, data, run.step * run.total))
                draw_figures(run, model, data)

        # 4. Evaluate on test, beside the untrained model and the mean picture.
        if run.complete:
            x = data.test[:: 1 if options["evaluation"] == "full" else 10]  # its first half is easier than its second
            scores = evaluate(model, x, options["eval_samples"], "likelihood of test")
            before = evaluate(start, x, 10)  # few samples: posteriors are near the prior
            scores["nll_mean_picture"] = -bernoulli_log_likelihood(x, data.mean_logit).mean().item()
            run.finish(scores, before)


if __name__ == "__main__":
    main()
