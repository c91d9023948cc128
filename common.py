"""What the stages share: probability, layers, KL top-N selection, composition, and a short tail of run helpers.

Shapes are written (B, N, C, H, W): batch, slots, channels, height, width; D is the size of one latent vector.
Losses are negative ELBOs in nats per example. Positions are (y, x) in [-1, 1], the middle of the picture at (0, 0).
"""

import contextlib
import importlib.metadata
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import click
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from click.core import ParameterSource
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn
from torch._higher_order_ops.scan import scan
from tqdm import tqdm

# ---------------------------------------------------------------- Probability


def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) of every element, in nats (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1)


def reparameterize(mu, logvar, noise):
    """A sample of N(mu, exp(logvar)) from standard normal `noise` of the same shape (Kingma & Welling 2013, 2.4)."""
    return mu + (0.5 * logvar).exp() * noise


def gaussian_log_likelihood(x, mean, sigma):
    """log N(x; mean, sigma^2) summed over all but the first axis: (B, ...) -> (B,), in nats."""
    log_density = -0.5 * ((x - mean) / sigma).square() - math.log(sigma) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).sum(1)


def bernoulli_log_likelihood(x, logits):
    """log Bernoulli(x; sigmoid(logits)) summed over the last axis: (..., n) -> (...), in nats.

    x log p + (1 - x) log(1 - p) = x l - log(1 + exp(l)) for p = sigmoid(l). The logarithm is taken of exponentials of
    at most 1, which cannot overflow; this way because log1p, and with it softplus, is ten times as slow on a CPU.
    """
    top = logits.detach().clamp(min=0)
    return (x * logits - top - ((-top).exp() + (logits - top).exp()).log()).sum(-1)


def beta_at(progress, beta, beta_from, warmup):
    """The KL weight at `progress` in [0, 1]: a half cosine from `beta_from` to `beta` over the first `warmup`.

    The cosine leaves its start slowly: the layers take shape while the KL is nearly free, and the slots separate
    while its price rises.
    """
    if progress >= warmup:
        return beta
    return beta_from + (beta - beta_from) * 0.5 * (1 - math.cos(math.pi * progress / warmup))


# ---------------------------------------------------------------- Layers


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); GroupNorm before each convolution where `norm` is set."""

    def __init__(self, channels, norm=False, conv=nn.Conv2d, kernel=3):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels) if norm else nn.Identity()
        self.conv1 = conv(channels, channels, kernel, padding=kernel // 2)
        self.norm2 = nn.GroupNorm(8, channels) if norm else nn.Identity()
        self.conv2 = conv(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def column_conv(channels_in, channels_out, kernel, stride=1, padding=0):
    """A convolution along the height of maps one cell wide, as spectra are."""
    return nn.Conv2d(channels_in, channels_out, (kernel, 1), (stride, 1), (padding, 0))


class ColumnShuffle(nn.Module):
    """What `nn.PixelShuffle` is to pictures, to maps one cell wide: (B, C * factor, H, 1) -> (B, C, H * factor, 1)."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        parts = x.unflatten(1, (-1, self.factor))  # (B, C, factor, H, 1)
        return parts.transpose(2, 3).flatten(2, 3)  # (B, C, H * factor, 1)


def centres(n):
    """The positions of n equal cells along one axis of [-1, 1]: (n,)."""
    return (2 * torch.arange(n) + 1) / n - 1


def position_grid(height, width):
    """The (y, x) of every cell of a grid: (2, height, width)."""
    return torch.stack(torch.meshgrid(centres(height), centres(width), indexing="ij"))


def fourier_features(position, octaves):
    """(..., 2, h, w) -> (..., 2 + 4 * octaves, h, w): positions, and sines and cosines of them of rising frequency."""
    waves = [f(math.pi * 2**k * position) for k in range(octaves) for f in (torch.sin, torch.cos)]
    return torch.cat([position, *waves], dim=-3)


class BroadcastDecoder(nn.Module):
    """Spatial-broadcast decoder (Watters et al. 2019): a latent vector -> a feature map, every cell told where it is.

    With `coords="relative"` a cell is told its offset from the slot's own cell, so that a slot is drawn the same
    wherever it stands; with "absolute" it is told its place in the picture, and the latent must say where to draw; with
    "both" it is told both. `octaves`: how fine positions are told.
    """

    def __init__(self, d, channels, grid, blocks, coords, octaves=3, conv=nn.Conv2d):
        super().__init__()
        self.octaves = octaves
        self.register_buffer("grid", position_grid(*grid), persistent=False)
        features = fourier_features(self.grid, octaves).shape[0]
        self.from_latent = nn.Linear(d, channels)
        self.from_offset = nn.Conv2d(features, channels, 1) if coords != "absolute" else None
        self.from_place = nn.Conv2d(features, channels, 1) if coords != "relative" else None
        self.body = nn.Sequential(*[ResBlock(channels, conv=conv) for _ in range(blocks)])

    def forward(self, z, cell):
        """z (M, D), cell (M, 2) -> features (M, channels, h, w)."""
        h = self.from_latent(z)[:, :, None, None]
        if self.from_offset is not None:
            h = h + self.from_offset(fourier_features(self.grid - cell[:, :, None, None], self.octaves))
        if self.from_place is not None:
            h = h + self.from_place(fourier_features(self.grid[None], self.octaves))
        return self.body(h)


# ---------------------------------------------------------------- KL top-N selection and composition


def select_cells(kl_map, n, window):
    """The `n` cells with the highest KL to the prior, in falling order (Nash et al. 2017).

    One object lifts the KL of neighbouring cells too. A cell that is not the highest of the `window` x `window`
    cells around it therefore ranks behind all cells that are; `window` = 1 selects by KL alone.

    kl_map (B, H_l, W_l) in nats -> index (B, n) into the flattened map.
    """
    score = kl_map
    if window > 1:
        highest = F.max_pool2d(kl_map[:, None], window, stride=1, padding=window // 2)[:, 0]  # (B, H_l, W_l)
        behind = kl_map - kl_map.amax((1, 2), keepdim=True) - 1
        score = torch.where(kl_map >= highest, kl_map, behind)
    return score.flatten(1).topk(n).indices


def gather_cells(values, index):
    """values (B, C, H_l, W_l), index (B, N) -> (B, N, C)."""
    flat = values.flatten(2).transpose(1, 2)  # (B, H_l * W_l, C)
    return flat.gather(1, index[:, :, None].expand(-1, -1, flat.shape[2]))


OPS = ("sum", "max", "min", "mean", "alpha")


def alpha_masks(layer):
    """Softmax over the background, whose logit is 0, and the slots: (B, M, C + 1, h, w) -> (B, M + 1, 1, h, w).

    The last channel of a layer is its mask logit; the background is component 0.
    """
    logits = layer[:, :, -1:]
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1).softmax(dim=1)


def compose(layer, background, op):
    """Combine layers by an operator that learns nothing (Nash et al. 2017): -> (B, C, h, w).

    layer (B, M, C, h, w), with op "alpha" (B, M, C + 1, h, w); background (B, C, h, w) takes part as one more layer,
    and may be None with every op but "alpha".
    """
    if op == "alpha":
        every = torch.cat([background[:, None], layer[:, :, :-1]], dim=1)
        return (alpha_masks(layer) * every).sum(1)
    every = layer if background is None else torch.cat([background[:, None], layer], dim=1)
    if op == "sum":
        return every.sum(1)
    if op == "mean":
        return every.mean(1)
    if op == "max":
        return every.amax(1)
    if op == "min":
        return every.amin(1)
    raise ValueError(f"op {op!r} is none of {', '.join(OPS)}")


# ---------------------------------------------------------------- Sound

REPRESENTATIONS = ("stft", "mel")
RATE = 16_000  # samples a second, of everything that sounds here
COMPRESSION = 100.0  # magnitudes m are seen as log(1 + 100 m): what is 0.01 and below (88 dB under a full sine) fades


def log_compress(magnitude):
    return (1 + COMPRESSION * magnitude).log()  # log1p is ten times as slow on a CPU


def log_expand(level):
    """The inverse of `log_compress`; negative levels, which no magnitude has, give 0."""
    return (level.clamp(min=0).exp() - 1) / COMPRESSION


def spectral_convergence(magnitude, reference):
    """|| |reference| - |magnitude| || / || reference || in dB (Frobenius norms): two of (B, F, T) -> (B,)."""
    error = (magnitude - reference).flatten(1).norm(dim=1)
    return 20 * torch.log10(error / reference.flatten(1).norm(dim=1))


def log_spectral_distance(level, reference):
    """Root mean square over bins, averaged over frames, of the difference of compressed levels, in dB: -> (B,).

    Two of (B, F, T). The usual log-spectral distance (Gray & Markel 1976) with 0.01 added to every magnitude, so that
    bins below what can be heard do not decide it.
    """
    decibels = 20 / math.log(10) * (level - reference)
    return decibels.square().mean(1).sqrt().mean(1)


class BlockSTFT(nn.Module):
    """The STFT and its inverse in products of real matrices, which export to ONNX and are fast in onnxruntime.

    As `torch.stft` with a Hann window, centred frames and hop = n_fft / 4, so that a frame is four blocks a, b, c, d
    of one hop each. One decimation in frequency by four, as in an FFT, leaves products with n_fft / 4 samples:
    bins 4 m see only a + b + c + d, bins 4 m + 2 only a - b + c - d, odd bins only a - c and b - d. Cosines are even
    and sines odd about the middle of a block (for odd bins, of two blocks), so that sums and differences of mirrored
    samples halve the products again: less than a fifth of the dense DFT's multiplications is left.

    Signals are held in blocks (B, 2, T + 3, hop / 2): the first half of every block, and the second half backwards.
    Spectra are held in `groups`, a tuple re, im, re, im, re, im of (B, T, bins of the group); `bins` has their order.
    Phases count from half a sample before the frame's first: X[k] here is exp(-i pi k / n_fft) times torch.stft's.
    """

    def __init__(self, n_fft):
        super().__init__()
        if n_fft % 8:
            raise ValueError(f"n_fft {n_fft} is no multiple of 8")
        self.n_fft, self.hop, self.half = n_fft, n_fft // 4, n_fft // 8
        fold = torch.cat([torch.arange(self.half), torch.arange(self.hop - 1, self.half - 1, -1)])
        window = torch.hann_window(n_fft, dtype=torch.float64).view(4, self.hop)[:, fold]
        self.register_buffer("window", window.view(4, 2, 1, self.half).float(), persistent=False)
        ends = n_fft // 2 + 1
        groups = [torch.arange(0, ends, 4), torch.arange(2, ends, 4), torch.arange(1, ends, 2)]
        self.sizes = [len(group) for group in groups]
        self.register_buffer("samples", fold, persistent=False)
        self.register_buffer("bins", torch.cat(groups), persistent=False)
        self.register_buffer("places", self.bins.argsort(), persistent=False)
        weight = torch.where((self.bins == 0) | (self.bins == n_fft // 2), 1.0, 2.0) / n_fft
        self.register_buffer("weight", weight, persistent=False)

    def matrices(self):
        """The cosine and the negative sine of every group, and the same for the inverse: two tuples of six.

        Computed when needed, from whole numbers of turns: an exported graph would have to store megabytes of them.
        """
        forward, inverse = [], []
        samples = (self.samples[: self.half], self.samples[: self.half], self.samples)
        for own, bins, weight in zip(samples, self.bins.split(self.sizes), self.weight.split(self.sizes), strict=True):
            turns = (2 * own[:, None] + 1) * bins % (2 * self.n_fft)  # (samples, bins of the group)
            angle = turns.to(self.weight.dtype) * (math.pi / self.n_fft)
            for matrix in (angle.cos(), -angle.sin()):
                forward.append(matrix)
                inverse.append((matrix * weight).T.contiguous())
        return tuple(forward), tuple(inverse)

    def forward(self, blocks, matrices):
        """Blocks (B, 2, T + 3, hop / 2), the first of `matrices()` -> groups."""
        first_cos, first_sin, second_cos, second_sin, odd_cos, odd_sin = matrices
        frames = blocks.shape[2] - 3
        a, b, c, d = (blocks.narrow(2, j, frames) * self.window[j] for j in range(4))
        even, odd, mirrored = a + c, a - c, (b - d).flip(1)
        first, second = even + (b + d), even - (b + d)
        cosines, sines = odd - mirrored, odd + mirrored  # (B, 2, T, hop / 2)
        return (
            (first[:, 0] + first[:, 1]) @ first_cos,
            (first[:, 0] - first[:, 1]) @ first_sin,
            (second[:, 0] - second[:, 1]) @ second_cos,
            (second[:, 0] + second[:, 1]) @ second_sin,
            cosines[:, 0] @ odd_cos[: self.half] + cosines[:, 1] @ odd_cos[self.half :],
            sines[:, 0] @ odd_sin[: self.half] + sines[:, 1] @ odd_sin[self.half :],
        )

    def inverse(self, groups, matrices):
        """Groups, the second of `matrices()` -> the windowed frames added up, in blocks: to be divided by `overlap`."""
        first_cos, first_sin, second_cos, second_sin, odd_cos, odd_sin = matrices
        re0, im0, re2, im2, re1, im1 = groups
        even, odd = re0 @ first_cos, im0 @ first_sin
        first = torch.stack([even + odd, even - odd], dim=1)  # (B, 2, T, hop / 2)
        even, odd = im2 @ second_sin, re2 @ second_cos
        second = torch.stack([even + odd, even - odd], dim=1)
        cosines, sines = (
            torch.stack([part @ matrix[:, : self.half], part @ matrix[:, self.half :]], dim=1)
            for part, matrix in ((re1, odd_cos), (im1, odd_sin))
        )
        even, odd, other, mirrored = first + second, cosines + sines, first - second, (sines - cosines).flip(1)
        quarters = (even + odd, other + mirrored, even - odd, other - mirrored)
        return sum(F.pad(quarter * self.window[j], (0, 0, j, 3 - j)) for j, quarter in enumerate(quarters))

    def overlap(self, frames):
        """What the squared windows of so many frames add up to: (1, 2, T + 3, hop / 2), `frames` of shape (1, T)."""
        ones = torch.ones_like(frames)[:, None, :, None]
        return sum(F.pad(ones * w.square(), (0, 0, j, 3 - j)) for j, w in enumerate(self.window)).clamp(min=1e-8)

    def to_blocks(self, waveform):
        """(B, n * hop) -> (B, 2, n, hop / 2)."""
        halves = waveform.unflatten(1, (-1, 2, self.half))  # (B, n, 2, hop / 2)
        return torch.stack([halves[:, :, 0], halves[:, :, 1].flip(2)], dim=1)

    def to_waveform(self, blocks):
        """(B, 2, n, hop / 2) -> (B, n * hop)."""
        return torch.cat([blocks[:, 0], blocks[:, 1].flip(2)], dim=2).flatten(1)

    def reflect(self, blocks):
        """Replace the two blocks beyond either end by the signal's mirror image, as `torch.stft` pads a signal."""
        n, length = blocks.shape[2], 2 * self.hop
        left = self.to_waveform(blocks.narrow(2, 2, 3)).narrow(1, 1, length).flip(1)
        right = self.to_waveform(blocks.narrow(2, n - 5, 3)).narrow(1, self.hop - 1, length).flip(1)
        return torch.cat([self.to_blocks(left), blocks.narrow(2, 2, n - 4), self.to_blocks(right)], dim=2)

    def magnitude(self, waveform):
        """(B, samples), at least three hops, of which what is beyond a whole hop is dropped -> (B, F, T)."""
        whole = waveform[:, : waveform.shape[1] // self.hop * self.hop]
        groups = self.forward(self.reflect(F.pad(self.to_blocks(whole), (0, 0, 2, 2))), self.matrices()[0])
        power = torch.cat([re.square() + im.square() for re, im in zip(groups[0::2], groups[1::2], strict=True)], dim=2)
        return power.sqrt().transpose(1, 2).index_select(1, self.places)


class GriffinLim(nn.Module):
    """The fast Griffin-Lim algorithm (Perraudin et al. 2013) from zero phases, as torchaudio's with rand_init=False.

    In real arithmetic, for export: torchaudio's works with complex numbers, which ONNX does not know. Rounding makes
    the two part over many iterations; they agree in spectral convergence.
    """

    def __init__(self, n_fft, iterations=32, momentum=0.99):
        super().__init__()
        self.stft, self.iterations = BlockSTFT(n_fft), iterations
        self.momentum = momentum / (1 + momentum)
        turn = math.pi / n_fft * self.stft.bins.double()
        self.register_buffer("zero_phase", torch.stack([turn.cos(), -turn.sin()]).float(), persistent=False)

    def step(self, carry, magnitudes, norm, matrices):
        """One iteration: (blocks, the spectrum before) -> the same, one step nearer to `magnitudes`."""
        blocks, before = carry[0], carry[1:]
        spectrum = self.stft(self.stft.reflect(blocks), matrices[0])
        projected = []
        for k, magnitude in enumerate(magnitudes):
            re, im = (spectrum[i] - self.momentum * before[i] for i in (2 * k, 2 * k + 1))
            scale = magnitude / (re * re + im * im + 1e-20).sqrt()
            projected += [re * scale, im * scale]
        return self.stft.inverse(projected, matrices[1]) * norm, *spectrum

    def forward(self, magnitude):
        """(B, F, T), T at least 4 -> waveform (B, (T - 1) * hop)."""
        ordered = magnitude.index_select(1, self.stft.bins).transpose(1, 2).contiguous()  # (B, T, F)
        norm, matrices = 1 / self.stft.overlap(ordered[:1, :, 0]), self.stft.matrices()
        start = [part.clone() for phase in self.zero_phase for part in (ordered * phase).split(self.stft.sizes, dim=2)]
        blocks = self.stft.inverse([start[i + j] for i in range(3) for j in (0, 3)], matrices[1]) * norm
        magnitudes = [part.clone() for part in ordered.split(self.stft.sizes, dim=2)]
        nothing = [torch.zeros_like(part) for part in magnitudes for _ in range(2)]
        blocks = repeat(
            self.iterations, lambda carry: self.step(carry, magnitudes, norm, matrices), (blocks, *nothing)
        )[0]
        return self.stft.to_waveform(blocks.narrow(2, 2, magnitude.shape[2] - 1))


def repeat(times, function, carry):
    """carry = function(carry), so many times. In an export one Scan node of the graph, whose body is written once."""
    if not torch.compiler.is_exporting():
        for _ in range(times):
            carry = function(carry)
        return carry
    carry, _ = scan(lambda carry, i: (function(carry), i.clone()), carry, torch.zeros(times))
    return carry


def log_bands(n_fft, n_bands, lowest=32.7):
    """Triangles at equal steps of pitch from `lowest` Hz (C1) to half the rate: (n_bands, F), rows that sum to one.

    Where those steps are shorter than one of the STFT's bins a triangle is two bins wide.
    """
    step = math.log2(RATE / 2 / lowest) / n_bands  # octaves
    middle = lowest * 2 ** (step * torch.arange(n_bands, dtype=torch.float64))
    width = (middle * (2**step - 1)).clamp(min=RATE / n_fft)
    frequency = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * RATE / n_fft
    bank = (1 - (frequency - middle[:, None]).abs() / width[:, None]).clamp(min=0)
    return (bank / bank.sum(1, keepdim=True)).float()


class Spectrogram(nn.Module):
    """Waveforms to compressed magnitudes and back to magnitudes; T = samples / hop + 1 frames.

    `representation`: "stft", "mel", or "log", whose bands stand at equal steps of pitch. `mean` (bins, 1) and `std`
    scale what a model sees; they are set from the training data and kept in the checkpoint.
    """

    def __init__(self, representation, n_fft, n_mels):
        super().__init__()
        if n_fft % 8:
            raise ValueError(f"n_fft {n_fft} is no multiple of 8")
        self.representation, self.n_fft, self.hop = representation, n_fft, n_fft // 4
        self.magnitude = torchaudio.transforms.Spectrogram(n_fft, hop_length=self.hop, power=1)
        self.bins = n_fft // 2 + 1 if representation == "stft" else n_mels
        if representation == "log":
            bank = log_bands(n_fft, n_mels)
            share = bank.sum(0).clamp(min=1e-9)
            self.register_buffer("bank", bank, persistent=False)  # (bands, F)
            self.register_buffer("bank_inverse", (bank / share).T.contiguous(), persistent=False)  # interpolates
        if representation == "mel":
            bank = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0, RATE / 2, n_mels, RATE, mel_scale="slaney")
            if (bank.amax(0) == 0).any():
                raise ValueError(f"{n_mels} mel bands are too many for n_fft {n_fft}: some would hold no bin")
            self.register_buffer("bank", bank.T.contiguous(), persistent=False)  # (bands, F)
            self.register_buffer("bank_inverse", torch.linalg.pinv(self.bank.double()).float(), persistent=False)
        self.register_buffer("mean", torch.zeros(self.bins, 1))
        self.register_buffer("std", torch.ones(()))

    def frames(self, samples):
        """How many frames so many samples have."""
        return samples // self.hop + 1

    def forward(self, waveform):
        """(B, samples) -> levels (B, bins, T)."""
        return self.level(self.magnitude(waveform))

    def level(self, magnitude):
        """STFT magnitudes (B, F, T) -> levels (B, bins, T)."""
        return log_compress(magnitude if self.representation == "stft" else self.bank @ magnitude)

    def stft_of(self, magnitude):
        """Magnitudes (B, bins, T) -> those of the STFT, (B, F, T).

        Of mel bands they are the least that give the bands, cut at 0; between the bands of "log" they are interpolated.
        """
        return magnitude if self.representation == "stft" else (self.bank_inverse @ magnitude).clamp(min=0)

    def scale(self, level):
        return (level - self.mean) / self.std

    def unscale(self, scaled):
        return (scaled * self.std + self.mean).clamp(min=0)


def griffin_lim(magnitude, iterations=32, momentum=0.99):
    """torchaudio's Griffin-Lim from zero phases, hop = n_fft / 4: (B, F, T) -> waveform (B, (T - 1) * hop)."""
    n_fft = 2 * (magnitude.shape[1] - 1)
    transform = torchaudio.transforms.GriffinLim(
        n_fft, iterations, hop_length=n_fft // 4, power=1, momentum=momentum, rand_init=False
    )
    return transform.to(magnitude.device)(magnitude)


# ---------------------------------------------------------------- Command line


class PresetCommand(click.Command):
    """A training command: RUN_OPTIONS added, defaults from a data set's presets or from the run being resumed.

    Precedence: what is typed, then the `config.json` of `--resume`, then `PRESETS[--dataset]`, then the decorators.
    The defaults are set before parsing, so that `--help` shows the values that will be used.
    """

    def __init__(self, *args, presets, **kwargs):
        super().__init__(*args, **kwargs)
        self.params += RUN_OPTIONS
        self.presets = presets
        unknown = {key for preset in presets.values() for key in preset} - {p.name for p in self.params}
        if unknown:
            raise ValueError(f"presets name options that do not exist: {', '.join(sorted(unknown))}")

    def parse_args(self, ctx, args):
        resume = self._peek(args, "--resume")
        if resume is not None:
            names = {p.name for p in self.params}
            ctx.default_map = {k: v for k, v in load_config(resume)["options"].items() if k in names}
        else:
            dataset = self._peek(args, "--dataset") or next(p.default for p in self.params if p.name == "dataset")
            ctx.default_map = dict(self.presets.get(dataset, {}))
        return super().parse_args(ctx, args)

    def format_options(self, ctx, formatter):
        """The help page: what is particular to this script first, then what every training script has."""
        sections = {"Data and model": [], "Run": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record:
                sections["Run" if parameter in RUN_OPTIONS else "Data and model"].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    @staticmethod
    def _peek(args, name):
        """The value typed for an option, before the real parser runs."""
        for i, arg in enumerate(args):
            if arg == name and i + 1 < len(args):
                return args[i + 1]
            if arg.startswith(name + "="):
                return arg.split("=", 1)[1]
        return None


class FiniteRange(click.FloatRange):
    """A float within a range that is a number: neither NaN nor infinite."""

    def convert(self, value, param, ctx):
        value = super().convert(value, param, ctx)
        if not math.isfinite(value):
            self.fail(f"{value} is no finite number", param, ctx)
        return value


POSITIVE = FiniteRange(0, min_open=True)
FOLDER = click.Path(path_type=Path)
RUN_OPTIONS = [
    click.Option(["--data-root"], type=FOLDER, help="Folder of the data set on disk."),
    click.Option(["--download"], is_flag=True, help="Fetch the official data set into --data-root first."),
    click.Option(["--steps"], type=click.IntRange(1), help="Updates; given alone, the clock plays no part."),
    click.Option(["--minutes"], type=POSITIVE, help="Time; with --steps, whichever ends first."),
    click.Option(["--batch"], type=click.IntRange(1), default=32, help="Examples a step in every process."),
    click.Option(["--lr"], type=POSITIVE, default=2e-3, help="Adam's peak learning rate."),
    click.Option(["--beta"], type=FiniteRange(0), default=1.0, help="Final weight of the KL."),
    click.Option(["--beta-from"], type=FiniteRange(0), default=0.0, help="Weight of the KL at the start."),
    click.Option(["--warmup"], type=FiniteRange(0, 1), default=0.6, help="Share of the run that beta rises."),
    click.Option(["--seed"], type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of weights, data and noise."),
    click.Option(["--device"], type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto"),
    click.Option(
        ["--precision"], type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: bf16 on CUDA."
    ),
    click.Option(["--compile/--no-compile", "compile_model"], default=False, help="torch.compile the model."),
    click.Option(["--out"], type=FOLDER, help="Run folder; by default a new one below runs/."),
    click.Option(["--resume"], type=FOLDER, help="Run folder to go on with."),
    click.Option(["--dry-run"], is_flag=True, help="Print the options that would be used, and stop."),
]


def settle_run(context, options, resumable, script):
    """Complete the run's options in place; raises click.UsageError where they, or the run resumed, contradict them.

    --steps typed without --minutes turns the clock off: such a run is the same on every machine, bit for bit.
    """
    typed = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if "steps" in typed and "minutes" not in typed:
        options["minutes"] = None
    if not options["steps"] and not options["minutes"]:
        raise click.UsageError("one of --steps and --minutes is needed")
    if options["resume"]:
        config = load_config(options["resume"])
        if config["script"] != script:
            raise click.UsageError(f"--resume: {options['resume']} is a run of {config['script']}.py")
        for name in sorted(typed - resumable):
            before = config["options"].get(name)
            if json.loads(json.dumps(options[name], default=str)) != before:
                raise click.UsageError(f"--resume: the run has {name} = {before}, which cannot become {options[name]}")
        if "out" in typed:
            raise click.UsageError("--resume goes on in its own folder; leave --out out")
    elif options["out"] and options["out"].exists() and (options["out"].is_file() or any(options["out"].iterdir())):
        raise click.UsageError(f"--out {options['out']} exists already; name a new folder, or --resume that run")


# ---------------------------------------------------------------- Running


def random_generator(*key, device="cpu"):
    """A generator seeded by its key, e.g. ("noise", seed, step).

    All randomness of a run comes from such generators. A step's draws then depend on nothing but its number, so a
    resumed run repeats them bit for bit, and K processes can each take their share of one global batch.
    """
    return torch.Generator(device=device).manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def pick_device(name):
    """The torch device for `--device`, under torchrun this process's own; click.UsageError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not available[name]():
        raise click.UsageError(f"--device {name}: this machine (or this build of PyTorch) has none")
    if name != "cuda":
        return torch.device(name)
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise click.UsageError(f"process {number} has no GPU of its own: there are {torch.cuda.device_count()}")
    return torch.device(name, number)


def autocast(device, precision):
    """Mixed precision for the forward pass: bfloat16 with "bf16", and with "auto" on a CUDA device."""
    wanted = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def start_distributed(device):
    """Join the group that `torchrun` started: (rank, number of processes); (0, 1) outside one."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def average_gradients(parameters):
    """Average the gradients over all processes, in one message: these models are too small to hide more behind."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    means = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def agree(values, device):
    """The largest of every process's `values`, so that all hold the same schedule and leave the loop together."""
    if not dist.is_initialized():
        return values
    shared = torch.tensor([float(v) for v in values], dtype=torch.float64).to(device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.tolist()


@contextlib.contextmanager
def stop_signals():
    """Within this context Ctrl-C and SIGTERM set `.received` instead of ending the process.

    Ctrl-C again after five seconds ends it; sooner ones are echoes, of which torchrun sends several.
    """

    class Stop:
        received = False
        since = math.inf

    def handler(number, frame):
        if number == signal.SIGINT and time.monotonic() - Stop.since > 5:
            raise KeyboardInterrupt
        Stop.received, Stop.since = True, min(Stop.since, time.monotonic())

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Stop
    finally:
        for s, old in before.items():
            signal.signal(s, old)


class Clock:
    """How far a run is: the larger share of its steps and its minutes, in [0, 1]; `elapsed` counts seconds."""

    def __init__(self, steps, minutes, elapsed=0.0):
        self.steps, self.minutes = steps, minutes
        self.started = time.monotonic() - elapsed

    @property
    def elapsed(self):
        return time.monotonic() - self.started

    def progress(self, step):
        by_steps = step / self.steps if self.steps else 0.0
        by_time = self.elapsed / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


class ProgressBar:
    """Share done, time left, rate and loss terms: a bar on a terminal, elsewhere a plain line every 30 seconds."""

    def __init__(self, rank):
        self.quiet, self.plain = rank > 0, not sys.stderr.isatty()
        form = "{percentage:3.0f}%|{bar:20}|{postfix}"
        self.bar = tqdm(total=1000, bar_format=form, disable=self.quiet or self.plain)
        self.first, self.spoke = None, -math.inf

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def write(self, line):
        if not self.quiet:
            tqdm.write(line)

    def advance(self, progress, step, values):
        now = time.monotonic()
        self.first = self.first or (now, step, progress)
        if self.quiet or now - self.spoke < (30 if self.plain else 0.2):
            return
        self.spoke = now
        seconds, steps, share = (a - b for a, b in zip((now, step, progress), self.first, strict=True))
        terms = ", ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in values.items())
        left = f"{(1 - progress) * seconds / share / 60:.1f} min left, " if share > 0 else ""
        text = f"step {step}, {left}{steps / max(seconds, 1e-9):.1f} steps/s, {terms}"
        if self.plain:
            tqdm.write(f"{progress:4.0%} {text}")
        else:
            self.bar.n = int(1000 * progress)
            self.bar.set_postfix_str(text)


def descend(loss, terms, optimizer, lr, clip):
    """One step of `optimizer` down `loss`, gradients averaged over all processes and cut to the norm `clip`.

    The step is not taken where a term or the gradient is not finite. Returns the terms, of this process's share, and
    the norm, as numbers.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    values = {name: term.item() for name, term in terms.items()} | {"gradient_norm": norm.item()}
    if math.isfinite(sum(values.values())):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return values


def learning_rate_at(progress, step, lr):
    """Linear rise over the first 100 steps, and a half cosine down to 5 % over the whole run."""
    return lr * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------- Run folder


def write_atomically(path, write):
    """Call `write(temporary path)` and rename: whatever happens, `path` holds the old file or the whole new one."""
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=2, default=str, allow_nan=False) + "\n"))


def load_config(folder):
    """The `config.json` of a run folder; raises click.UsageError where there is none, or another program's."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise click.UsageError(f"{folder} is no run folder: it holds no config.json")
    try:
        config = json.loads(path.read_text())
        kinds = {"script": str, "options": dict, "data": dict, "history": list}
        if not all(isinstance(config[name], kind) for name, kind in kinds.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise click.UsageError(f"{path} is damaged or was not written by a training script here") from error
    return config


def load_checkpoint(folder, device):
    """The `checkpoint.pt` of a run folder; raises click.ClickException where it is missing, cut short or foreign."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise click.ClickException(f"{folder} holds no checkpoint.pt: the run stopped before its first one")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        kinds = {"model": dict, "optimizer": dict, "step": int, "elapsed": float}
        if not all(isinstance(state[name], kind) for name, kind in kinds.items()):
            raise ValueError
    except Exception as error:  # torch.load raises many kinds on a damaged file
        raise click.ClickException(f"{path} is damaged or was not written by a training script here") from error
    return state


def load_state(module, state, what):
    """`module.load_state_dict(state)`; raises click.ClickException where the two do not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.ClickException(f"{what} does not fit this model: {str(error).splitlines()[0]}") from error


def typed_command():
    """The command as typed, without the folders of this machine: absolute paths are cut to their names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", Path(sys.argv[0]).name, *words])


def versions():
    """What made a result: versions, commit, hardware."""
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    packages = ("torch", "torchvision", "torchaudio", "numpy", "onnx", "onnxruntime")
    return {
        "commit": commit or "not a git checkout",
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in packages},
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def new_folder(name):
    """runs/<name>, or runs/<name>-2, -3, ... where that exists."""
    folder, k = Path("runs") / name, 1
    while folder.exists():
        k += 1
        folder = Path("runs") / f"{name}-{k}"
    return folder


def plotted(figure):
    """A matplotlib figure as a PIL picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def earlier_curve(folder, step):
    """The points up to `step` of the curve.json in a run folder; none where the file is not usable."""
    try:
        return [point for point in json.loads((folder / "curve.json").read_text()) if point["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return []


class Run:
    """A run folder: config.json, checkpoint.pt, metrics.json, figures/*.png, sounds/*.wav and TensorBoard events.

    Only process 0 writes; the others carry the same object with `folder` None.
    """

    def __init__(self, folder, rank):
        from torch.utils.tensorboard import SummaryWriter  # here, because it takes a second to import

        self.folder = folder if rank == 0 else None
        self.writer = None
        if self.folder:
            try:
                (folder / "figures").mkdir(parents=True, exist_ok=True)
                self.writer = SummaryWriter(folder)
            except OSError as error:
                raise click.UsageError(f"--out {folder} cannot be written: {error.strerror}") from error

    def write_config(self, config):
        if self.folder:
            write_json(self.folder / "config.json", config)

    def scalars(self, values, step):
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def metrics(self, values):
        if self.folder:
            write_json(self.folder / "metrics.json", values)

    def figure(self, name, image, step):
        """`image`: a PIL picture; figures/<name>.png always holds the newest."""
        if self.folder:
            write_atomically(self.folder / "figures" / f"{name}.png", lambda p: image.save(p, format="PNG"))
            self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def sound(self, name, waveform, step):
        """`waveform`: (samples,) at RATE, scaled where it is too loud; sounds/<name>.wav always holds the newest."""
        if self.folder:
            waveform = (waveform / waveform.abs().max().clamp(min=1)).cpu()
            (self.folder / "sounds").mkdir(exist_ok=True)
            write = partial(soundfile.write, data=waveform.numpy(), samplerate=RATE, format="WAV", subtype="PCM_16")
            write_atomically(self.folder / "sounds" / f"{name}.wav", write)
            self.writer.add_audio(name, waveform, step, RATE)

    def save(self, model, optimizer, step, elapsed):
        """All that the loop changes. Random states are no part of it: see `random_generator`."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "elapsed": elapsed}
        if not self.folder:
            return
        try:
            write_atomically(self.folder / "checkpoint.pt", lambda p: torch.save(state, p))
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch.save
            text = str(error).splitlines()[0]
            raise click.ClickException(
                f"step {step}: no checkpoint can be written ({text}); the last is kept"
            ) from error

    def close(self):
        if self.writer:
            self.writer.close()


def run_config(options, script, data, world, history=()):
    """The content of a run's config.json: `data` says what it saw, `history` what its earlier sessions were."""
    kept = {name: value for name, value in options.items() if name not in ("resume", "out", "dry_run")}
    session = {"command": typed_command(), "processes": world, "versions": versions()}
    return {"script": script, "data": data, "options": kept, "history": [*history, session]}


def start_run(options, script, name, data, model, optimizer, device, rank, world):
    """Open the run folder, or go on in the one of --resume: -> Run, step, seconds trained before.

    `name`: of a new folder; `data`: what config.json says of the data. Raises click.UsageError where a resumed run
    saw other data or another number of processes, click.ClickException where its checkpoint does not fit.
    """
    step, elapsed, history = 0, 0.0, []
    if options["resume"]:
        config = load_config(options["resume"])
        history = config["history"]
        if config["data"]["source"] != data["source"] or history[-1]["processes"] != world:
            was, now = f"{config['data']['source']} in {history[-1]['processes']}", f"{data['source']} in {world}"
            raise click.UsageError(f"--resume: the run was trained on {was} process(es); now it would be {now}")
        state = load_checkpoint(options["resume"], device)
        load_state(model, state["model"], "the checkpoint")
        load_state(optimizer, state["optimizer"], "the checkpoint's optimiser state")
        step, elapsed = state["step"], state["elapsed"]
    folder = options["resume"] or options["out"] or new_folder(name)
    run = Run(folder, rank)
    run.write_config(run_config(options, script, data, world, history))
    if rank == 0:
        click.echo(f"data: {data['source']}; device: {device}; run folder: {folder}")
        click.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters; {world} x {options['batch']} a step")
    return run, step, elapsed


def train(run, model, optimizer, options, device, rank, step, elapsed, update, report):
    """Call `update` until the clock or a stop signal ends the run: -> step, minutes, whether the run is complete.

    update(step, progress) takes one step and returns the values to log. report(step, minutes, due) is called in
    process 0 with `due` set at every tenth of the run and at its end, when it returns a line of scores, and at steps
    1, 2, 4, 8, ... (something to see at once) as long as that takes less than a twentieth of the time. A checkpoint
    is written at every tenth, every two minutes, and on a stop.
    """
    clock = Clock(options["steps"], options["minutes"], elapsed)
    tenth, saved, reporting = int(10 * clock.progress(step)), clock.elapsed, 0.0
    with stop_signals() as stop, ProgressBar(rank) as bar:
        while True:
            progress, stopping = agree((clock.progress(step), stop.received), device)
            last = progress >= 1
            due = last or int(10 * progress) > tenth
            if due or stopping or clock.elapsed - saved > 120:
                run.save(model, optimizer, step, clock.elapsed)
                saved = clock.elapsed
            if rank == 0 and (due or (step.bit_count() == 1 and reporting < clock.elapsed / 20)):
                began = clock.elapsed
                line = report(step, clock.elapsed / 60, due)
                reporting += clock.elapsed - began
                if due:
                    bar.write(f"{progress:4.0%} step {step}, {clock.elapsed / 60:.1f} min: {line}")
            tenth = int(10 * progress)
            if last or stopping:
                return step, clock.elapsed / 60, last
            try:
                values = update(step, progress)
            except click.ClickException as error:  # a damaged file
                run.save(model, optimizer, step, clock.elapsed)
                raise click.ClickException(f"step {step}, saved: {error.message}") from error
            if not math.isfinite(sum(values.values())):
                raise click.ClickException(f"step {step} is not finite: {values}; the last checkpoint is kept")
            step += 1
            if step % 20 == 0:
                run.scalars(values, step)
            bar.advance(progress, step, values)
