"""A VAE on single notes (Kingma & Welling 2013), conditional on pitch and instrument family (Sohn et al. 2015).

    python train_vae_audio.py                                        # on notes synthesised here
    python train_vae_audio.py --data-root nsynth                     # the official folders nsynth-train, -valid, -test
    python train_vae_audio.py --data-root nsynth --representation mel
    python train_vae_audio.py --data-root nsynth --condition both    # asked for a pitch and a family
    python train_vae_audio.py --data-root my_notes                   # any folder of sounds, each a note

For who wants notes of four seconds (16 kHz) as a few latents, and back as sound through Griffin-Lim. They are seen as
spectrograms, STFT magnitudes or mel bands, log-compressed. Results: docs/audio.md; whether samples have the pitch and
family asked for: tests/experiments/conditional.py.
"""

import copy
import math
from collections import defaultdict
from functools import partial
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from torch import nn
from tqdm import tqdm

from common import (  # isort: skip
    COMPRESSION, PITCHES, RATE, SAMPLES, Graph, NoteSplit, ResBlock, Run, Vocoder, beta_at,
    build_model, families_option, gaussian_kl, learning_rate_at, load_model, load_notes, log_compress,
    log_expand, log_spectral_distance, optimizer_step, random_generator, reparameterize, settle_options,
    start_device, training_command,
)  # fmt: skip
from recompose import TILE, Tile, contact_sheet, heat_map, with_scales

SCRIPT = Path(__file__).stem

# ---------------------------------------------------------------- Data: notes as spectrograms


class STFTMagnitude(nn.Module):
    """(B, samples) -> magnitudes (B, F, T) of torchaudio's STFT; `abs` of complex numbers is five times as slow."""

    def __init__(self, n_fft):
        super().__init__()
        self.n_fft, self.stft = n_fft, torchaudio.transforms.Spectrogram(n_fft, hop_length=n_fft // 4, power=None)

    def forward(self, waveform):
        spectrum = self.stft(waveform)
        return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag).sqrt_()


class Spectrogram(nn.Module):
    """Waveforms to compressed magnitudes and back to magnitudes; T = samples / hop + 1 frames.

    `representation`: "stft" or "mel". `mean` (bins, 1) and `std` scale what a model sees; they are kept in the
    checkpoint. Raises ValueError where a mel band would hold no bin.
    """

    def __init__(self, representation, n_fft, n_mels):
        super().__init__()
        self.representation, self.n_fft, self.hop = representation, n_fft, n_fft // 4
        self.magnitude = STFTMagnitude(n_fft)
        self.bins = n_fft // 2 + 1 if representation == "stft" else n_mels
        if representation == "mel":
            ends = (n_fft // 2 + 1, 0, RATE / 2, n_mels, RATE)
            bank = torchaudio.functional.melscale_fbanks(*ends, mel_scale="slaney").T
            if (bank.amax(1) == 0).any():
                raise ValueError(f"{n_mels} mel bands are too many for n_fft {n_fft}: some would hold no bin")
            self.register_buffer("bank", bank.contiguous(), persistent=False)  # (bands, F)
            inverse = torch.linalg.pinv(bank.double()).float()
            self.register_buffer("bank_inverse", inverse.contiguous(), persistent=False)  # (F, bands)
        self.register_buffer("mean", torch.zeros(self.bins, 1))
        self.register_buffer("std", torch.ones(()))

    def forward(self, waveform):
        """(B, samples) -> levels (B, bins, T)."""
        return self.level(self.magnitude(waveform))

    def level(self, magnitude):
        """STFT magnitudes (B, F, T) -> levels (B, bins, T)."""
        return log_compress(magnitude if self.representation == "stft" else self.bank @ magnitude)

    def to_stft_magnitude(self, magnitude):
        """Magnitudes (B, bins, T) -> those of the STFT, (B, F, T): for mel bands the least that give them, cut at 0."""
        return magnitude if self.representation == "stft" else (self.bank_inverse @ magnitude).clamp(min=0)

    def scale(self, level):
        return (level - self.mean) / self.std

    def unscale(self, scaled):
        return (scaled * self.std + self.mean).clamp(min=0)


def stft_magnitude(waveform):
    """The magnitudes all sound is compared by, n_fft 1024: (B, samples) -> (B, 513, T)."""
    return STFTMagnitude(1024).to(waveform.device)(waveform)


def spectral_convergence(magnitude, reference):
    """|| |reference| - |magnitude| || / || reference || in dB (Frobenius norms): two of (B, F, T) -> (B,)."""
    error = (magnitude - reference).flatten(1).norm(dim=1)
    return 20 * torch.log10(error / reference.flatten(1).norm(dim=1))


def load_splits(options):
    """The splits of `load_notes`, training notes up to --transpose semitones higher and lower too; and their source.

    What would leave MIDI's pitches is left out; pitches that are not known stay so.
    """
    splits, source = load_notes(options)
    if options["transpose"]:
        moves = range(-options["transpose"], options["transpose"] + 1)
        pairs = ((note, k) for note in splits["train"].notes for k in moves)
        moved = [(note, k) for note, k in pairs if note.pitch < 0 or 0 <= note.pitch + k < PITCHES]
        moved = [note._replace(pitch=note.pitch + k * (note.pitch >= 0), semitones=k) for note, k in moved]
        splits["train"] = NoteSplit(moved, options["families"], "train")
    return splits, source


def check_labels(splits):
    """Raise click.UsageError where notes have no pitch."""
    pitches = {note.name: note.pitch for split in splits.values() for note in split.notes}
    if unknown := [name for name, pitch in pitches.items() if pitch < 0]:
        found = f"{len(unknown)} of {len(pitches)} files carry no pitch, such as {unknown[0]}"
        raise click.UsageError(f"--condition both: {found}; expected names like piano_A#3.wav or piano-060-100.wav")


def note_batch(split, index, device):
    """The notes at `index`: waveform (B, SAMPLES), pitch and family (B,), on the device."""
    return tuple(v.to(device) for v in (split.waveform(index), split.pitch[index], split.family[index]))


# ---------------------------------------------------------------- Model

PATCH = 4  # frames that one convolution takes together, in both steps
START_NOTES = 1000  # that the start is computed from


def principal(x, n):
    """The n principal components of the rows of x: mean (k,), scales (n,), 0 beyond the data, directions (k, n)."""
    mean = x.mean(0)
    centred = x - mean
    wide = x.shape[1] > x.shape[0]
    gram = (centred @ centred.T if wide else centred.T @ centred) / len(x)
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0)[:n].clamp(min=0).float(), vectors.flip(1)[:, :n].float()
    if wide:
        vectors = F.normalize(centred.T @ vectors, dim=0)
    missing = n - len(values)
    return mean, F.pad(values.sqrt(), (0, missing)), F.pad(vectors, (0, missing))


class FittedPrior(nn.Module):
    """p(z | y) after training: a Gaussian for every family, its mean quadratic in the pitch; or one for all notes.

    Samples from N(0, I), which it is before, combine latents that never occur together (Ghosh et al. 2020). A flow upon
    it learns the instruments by heart (docs/prior.md).
    """

    def __init__(self, d, conditional, n_families):
        super().__init__()
        self.conditional, groups = conditional, n_families if conditional else 1
        self.register_buffer("mean", torch.zeros(groups, 3, d))
        self.register_buffer("factor", torch.eye(d).repeat(groups, 1, 1))  # of the covariance, by Cholesky
        # The range of pitches fitted, beyond which the parabola does not go on.
        self.register_buffer("lowest", torch.zeros(groups))
        self.register_buffer("highest", torch.full((groups,), float(PITCHES)))

    def groups_and_powers(self, like, pitch, family):
        """The Gaussian each of `like` (n, ...) belongs to, and 1, x, x^2 of its pitch in octaves from C4: (n, 3)."""
        x = torch.zeros_like(like[:, 0])
        group = family if self.conditional else x.long()
        if self.conditional:
            x = (torch.minimum(torch.maximum(pitch.float(), self.lowest[family]), self.highest[family]) - 60) / 12
        return group, torch.stack([torch.ones_like(x), x, x.square()], dim=1)

    def forward(self, noise, pitch=None, family=None):
        """Standard normal noise (n, D), and of a conditional model the label, pitch and family (n,) -> z (n, D)."""
        group, powers = self.groups_and_powers(noise, pitch, family)
        mean = (powers[:, :, None] * self.mean[group]).sum(1)
        return mean + (self.factor[group] @ noise[:, :, None])[:, :, 0]

    @torch.no_grad()
    def fit(self, mu, logvar, pitch, family):
        """Fit to posteriors (n, D) of notes of pitch and family (n,): their means' covariance and mean variance."""
        # The curve has a ridge of 1, and N(0, I) weighs as much as one note, so that few notes do no harm.
        for k in family.unique() if self.conditional else range(1):
            some = family == k if self.conditional else slice(None)
            self.lowest[k], self.highest[k] = pitch[some].min(), pitch[some].max()
            _, x = self.groups_and_powers(mu[some], pitch[some], family[some])
            self.mean[k] = torch.linalg.solve(x.T @ x + torch.eye(3), x.T @ mu[some])
            rest = mu[some] - x @ self.mean[k]
            scatter = rest.T @ rest + torch.diag(1 + logvar[some].exp().sum(0))
            self.factor[k] = torch.linalg.cholesky(scatter / (1 + len(rest)))


def with_label(x, label):
    """x (B, n) and label (B, n_labels) side by side."""
    return x if label is None else torch.cat([x, label], dim=1)


class ColumnNorm(nn.GroupNorm):
    """Of (B, C, T), as of pictures one pixel wide: some runtimes know no other."""

    def forward(self, x):
        return super().forward(x[..., None])[..., 0]


class NoteVAE(nn.Module):
    """p(z) = N(0, I), p(x | z, y) Gaussian around a decoded spectrogram, q(z | x, y) a Gaussian of diagonal covariance.

    y, the label, is one-hot of pitch and of family, or empty (Sohn et al. 2015). Convolutions run along time, with the
    frequency bins as channels: a note's partials move together, which no filter that is local in frequency can see.
    `start_at` initialises the net as a three-stage PCA, the linear VAE's optimum (Lucas et al. 2019).
    """

    def __init__(self, *, representation, n_fft, n_mels, d, channels, condition, families):
        super().__init__()
        if channels % 8:
            raise ValueError(f"--channels {channels} must be a multiple of 8")
        self.d, self.condition = d, condition
        self.spectrogram = Spectrogram(representation, n_fft, n_mels)
        bins, self.frames = self.spectrogram.bins, SAMPLES // self.spectrogram.hop + 1
        n_labels = 0 if condition == "none" else PITCHES + len(families)
        self.prior = FittedPrior(d, condition == "both", len(families))
        self.register_buffer("pitches", torch.eye(PITCHES), persistent=False)
        self.register_buffer("families", torch.eye(len(families) if n_labels else 0), persistent=False)
        self.coarse = math.ceil(self.frames / PATCH**2)  # steps in time that the latents see
        wide = channels * self.coarse
        self.encoder = nn.ModuleDict({
            "patches": nn.Conv1d(bins, channels, PATCH, stride=PATCH),
            "fine": self.blocks(channels, 1),
            "merge": nn.Conv1d(channels, channels, PATCH, stride=PATCH),
            "coarse": self.blocks(channels, 2),
            "posterior": nn.Linear(wide + n_labels, 2 * d),
        })  # fmt: skip
        self.decoder = nn.ModuleDict({
            "latents": nn.Linear(d + n_labels, wide),
            "coarse": self.blocks(channels, 2),
            "split": nn.ConvTranspose1d(channels, channels, PATCH, stride=PATCH),
            "fine": self.blocks(channels, 1),
            "patches": nn.ConvTranspose1d(channels, bins, PATCH, stride=PATCH),
        })  # fmt: skip

    @staticmethod
    def blocks(channels, n):
        """Residual blocks that start as the identity."""
        blocks = nn.Sequential(*[ResBlock(channels, norm=True, conv=nn.Conv1d) for _ in range(n)])
        for block in blocks:
            block.norm1, block.norm2 = (ColumnNorm(norm.num_groups, channels) for norm in (block.norm1, block.norm2))
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
        return blocks

    @property
    def device(self):
        return self.pitches.device

    def label(self, pitch=None, family=None):
        """MIDI pitch (B,) and index of the family (B,) -> (B, n_labels); None for a model without a label."""
        if self.condition == "none":
            return None
        known = (self.pitches, pitch), (self.families, family)
        # A negative number would count from the end; this one is refused.
        return torch.cat([table[torch.where(index < 0, PITCHES, index)] for table, index in known], dim=1)

    def encode(self, level, label):
        """Levels (B, bins, T), label (B, n_labels) -> mu, logvar, each (B, D); no posterior is wider than the prior."""
        x = F.pad(self.spectrogram.scale(level), (0, self.coarse * PATCH**2 - self.frames))
        for name in ("patches", "fine", "merge", "coarse"):
            x = self.encoder[name](x)
        mu, width = self.encoder["posterior"](with_label(x.flatten(1), label)).float().chunk(2, dim=1)
        return mu, -F.softplus(width)

    def decode(self, z, label):
        """z (B, D), label (B, n_labels) -> scaled levels (B, bins, T); `spectrogram.unscale` makes levels of them."""
        h = self.decoder["latents"](with_label(z, label)).unflatten(1, (-1, self.coarse))  # (B, channels, coarse)
        for name in ("coarse", "split", "fine", "patches"):
            h = self.decoder[name](h)
        return h[:, :, : self.frames].float()

    def reconstruct(self, level, label):
        """Levels (B, bins, T) -> the levels decoded from the posterior's mean, mu and logvar (B, D)."""
        mu, logvar = self.encode(level, label)
        return self.spectrogram.unscale(self.decode(mu, label)), mu, logvar

    @torch.no_grad()
    def start_at(self, level, label):
        """Set the scaling from levels (n, bins, T), and initialise the net as a PCA in stages: of patches of frames, of
        patches of those, and what the label (n, n_labels) does not explain of a note; latents get variance 1."""
        self.spectrogram.mean.copy_(level.mean((0, 2))[:, None])
        self.spectrogram.std.copy_(level.std())
        x = F.pad(self.spectrogram.scale(level), (0, self.coarse * PATCH**2 - self.frames))
        for inward, outward in (("patches", "patches"), ("merge", "split")):
            patches = x.unfold(2, PATCH, PATCH).transpose(1, 2).flatten(2)  # (n, T', channels * PATCH)
            few = patches.flatten(0, 1)
            few = few[:: max(1, len(few) // 20_000)]
            encoder, decoder = self.encoder[inward], self.decoder[outward]
            mean, scales, directions = principal(few, encoder.out_channels)
            scale = scales.square().mean().sqrt()
            encoder.weight.copy_((directions / scale).T.view_as(encoder.weight))
            encoder.bias.copy_(-mean @ directions / scale)
            decoder.weight.copy_((directions * scale).T.view_as(decoder.weight))
            decoder.bias.copy_(mean.view(-1, PATCH).mean(1))
            x = encoder(x)
        h = x.flatten(1)  # (n, wide)
        y = torch.ones(len(h), 1) if label is None else F.pad(label, (0, 1), value=1.0)  # the constant comes last
        by_label = torch.linalg.solve(y.T @ y + torch.eye(y.shape[1]), y.T @ h)  # ridge: (n_labels + 1, wide)
        mean, scales, directions = principal(h - y @ by_label, self.d)
        inward = torch.where(scales > 1e-3 * scales[0] + 1e-6, directions / scales, 0.0)  # none of too few notes
        posterior, latents = self.encoder["posterior"], self.decoder["latents"]
        posterior.weight.zero_()
        posterior.weight[: self.d] = torch.cat([inward.T, -(by_label[:-1] @ inward).T], dim=1)
        posterior.bias[: self.d] = -(by_label[-1] + mean) @ inward
        posterior.bias[self.d :] = 3.0
        latents.weight.copy_(torch.cat([directions * scales, by_label[:-1].T], dim=1))
        latents.bias.copy_(by_label[-1] + mean)


build = partial(build_model, NoteVAE)  # options -> an untrained model
load = partial(load_model, kind=NoteVAE)  # a run folder -> its trained model


def start_at_notes(model, split):
    """`start_at` on at most START_NOTES notes of a split, spread evenly, transposed ones among them."""
    even = torch.linspace(0, len(split.notes) - 1, min(len(split.notes), START_NOTES)).round().long()
    index = torch.tensor(split.usable(even.tolist()))
    level = torch.cat([level for _, level, _ in in_chunks(model, split, index)])
    model.start_at(level, model.label(split.pitch[index], split.family[index]))
    return model


# ---------------------------------------------------------------- Objective


def mean_over_processes(value):
    """A number, averaged over all processes, in which it is the same afterwards."""
    if not dist.is_initialized():
        return value
    total = value.double()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def objective(model, level, label, noise, beta):
    """The loss of a batch, and its terms in nats per note: levels (B, bins, T), label (B, n_labels), noise (B, D).

    The Gaussian's variance is the mean squared error over the batch of all processes, the most likely one (sigma-VAE,
    Rybkin et al. 2021), so that beta = 1 is the evidence bound whatever the net can reach. It is held constant: at the
    optimum the loss does not change with it to first order. The loss is in nats per value of the spectrogram.
    """
    mu, logvar = model.encode(level, label)
    decoded = model.decode(reparameterize(mu, logvar, noise), label)
    error = (decoded - model.spectrogram.scale(level)).square().mean()
    variance = torch.as_tensor(mean_over_processes(error.detach()), dtype=torch.float32)
    kl, values = gaussian_kl(mu, logvar).sum(1).mean(), level[0].numel()
    reconstruction = 0.5 * values * ((2 * math.pi * variance).log() + error / variance)
    terms = {"loss/reconstruction": reconstruction, "loss/kl": kl, "loss/sigma": variance.sqrt()}
    return (reconstruction + beta * kl) / values, terms


# ---------------------------------------------------------------- Evaluation

EVALUATED = 500  # notes of the test split that a run is judged by
WATCHED = 200  # notes of the validation split that are scored while training
QUICK = 50  # notes of either with --eval quick
CHUNK = 32  # notes that are encoded, decoded and heard at a time


@torch.no_grad()
def in_chunks(model, split, index):
    """Of the notes at `index`, CHUNK at a time, on the model's device: waveforms, levels (B, bins, T), labels."""
    for some in index.split(CHUNK):
        waveform, pitch, family = note_batch(split, some, model.device)
        yield waveform, model.spectrogram(waveform), model.label(pitch, family)


@torch.no_grad()
def posteriors(model, split, index):
    """The posteriors of the notes at `index`: mu and logvar (n, D), on the CPU."""
    parts = [model.encode(level, label) for _, level, label in in_chunks(model, split, index)]
    return tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))


def sound(model, level):
    """Levels (B, bins, T) -> waveforms (B, samples), through Griffin-Lim."""
    return NoteVocoder(model.spectrogram).to(level.device)(log_expand(level))


@torch.no_grad()
def watch(model, split, most):
    """What is watched while training: mean LSD and KL of at most so many notes."""
    parts = []
    for _, level, label in in_chunks(model, split, split.spread(most)):
        decoded, mu, logvar = model.reconstruct(level, label)
        parts.append((log_spectral_distance(decoded, level), gaussian_kl(mu, logvar).sum(1)))
    lsd, kl = (torch.cat(part).mean().item() for part in zip(*parts, strict=True))
    return {"lsd": lsd, "kl": kl}


def fit_prior(model, split):
    """Fit the model's prior to the posteriors of at most 2,000 of a split's notes, as they are."""
    index, device = split.spread(2000), model.device
    model.prior.cpu().fit(*posteriors(model, split, index), split.pitch[index], split.family[index])
    model.prior.to(device)


@torch.no_grad()
def evaluate(model, start, splits, most):
    """Distances in dB on test notes, and what they are held against: means over at most `most` notes.

    "lsd" is between levels, the others between STFT magnitudes of the decoded sound and of the note. "step_0/":
    `start`, the model before training; "_pca": as many principal components as the model has latents; "_ceiling": the
    notes' own spectrograms, through Griffin-Lim.
    """
    index, values, latents = splits["test"].spread(most), defaultdict(list), []
    train = in_chunks(model, splits["train"], splits["train"].spread(2000))
    own = torch.cat([level.flatten(1).cpu() for _, level, _ in train])
    mean, _, directions = (part.to(model.device) for part in principal(own, model.d))
    chunks, total = in_chunks(model, splits["test"], index), math.ceil(len(index) / CHUNK)
    for waveform, level, label in tqdm(chunks, desc="evaluation", total=total, disable=None):
        (decoded, mu, logvar), reference = model.reconstruct(level, label), stft_magnitude(waveform)
        latents.append((mu, gaussian_kl(mu, logvar).sum(1)))
        by_components = (((level.flatten(1) - mean) @ directions) @ directions.T + mean).clamp(min=0).view_as(level)
        others = {"step_0/{}": start.reconstruct(level, label)[0], "{}_pca": by_components, "{}_ceiling": level}
        for form, candidate in ({"{}": decoded} | others).items():
            heard = stft_magnitude(sound(model, candidate))
            values[form.format("lsd")].append(log_spectral_distance(candidate, level))
            distance = log_spectral_distance(log_compress(heard), log_compress(reference))
            values[form.format("lsd_sound")].append(distance)
            values[form.format("convergence_sound")].append(spectral_convergence(heard, reference))
    del values["lsd_ceiling"]  # 0
    mu, kl = (torch.cat(part) for part in zip(*latents, strict=True))
    scores = {name: torch.cat(parts).mean().item() for name, parts in values.items()}
    active = int((mu.var(0, correction=0) > 0.01).sum())
    return scores | {"kl": kl.mean().item(), "active_units": active, "notes": len(index)}


@torch.no_grad()
def sample(model, pitch, family, *key, fitted=True, same=False):
    """Levels (n, bins, T) of notes of pitch and family (n,) by the fitted prior, or N(0, I); `key` seeds the noise."""
    noise = torch.randn(1 if same else len(pitch), model.d, generator=random_generator("sample", *key))
    z = noise.expand(len(pitch), -1).to(model.device)
    pitch, family = pitch.to(model.device), family.to(model.device)
    z = model.prior(z, pitch, family) if fitted else z
    return model.spectrogram.unscale(model.decode(z, model.label(pitch, family)))


# ---------------------------------------------------------------- Figures and sounds


def slerp(a, b, share):
    """Spherical interpolation (Shoemake 1985) of the directions of a and b, (D,), linear of lengths: share (n, 1)."""
    u, v = F.normalize(a, dim=0), F.normalize(b, dim=0)
    angle = torch.arccos((u @ v).clamp(-1, 1))
    if angle.sin() < 1e-4:  # one direction, or two opposite ones, which span no plane
        return torch.lerp(a, b, share)
    turned = torch.sin((1 - share) * angle) * u + torch.sin(share * angle) * v
    return torch.lerp(a.norm(), b.norm(), share) * turned / angle.sin()


def show(run, name, title, rows):
    """A figure and sounds of `rows` {label: (levels (n, bins, T), waveforms (n, samples), n captions)}."""
    top = max(level.max().item() for level, _, _ in rows.values())
    end = "8 kHz" if run.options["representation"] == "stft" else f"band {run.options['n_mels']}"
    unit, fade, sheet = 20 / math.log(10), (torch.arange(RATE, 0, -1) / 320).clamp(max=1), []  # a level of 1 in dB
    for label, (level, waveforms, captions) in rows.items():
        level = F.adaptive_avg_pool2d(level.cpu(), TILE).flip(1).numpy()
        images = [heat_map(values, top) for values in level]
        images[-1] = with_scales(images[-1], unit * top, "dB", ("0", "4 s"), ("0", end))
        sheet.append([Tile(*pair) for pair in zip(images, captions, strict=True)])
        for k, waveform in enumerate(waveforms):
            run.sound(f"{name}-{label}-{k}", waveform)
        run.sound(f"{name}-{label}", (waveforms[:, :RATE].cpu() * fade).flatten())  # a second of each
    run.figure(name, contact_sheet(sheet, title, [*rows]))


def one_of_each(split, most=11):
    """Numbers of notes, one of every family that is there, from the middle of its notes; of a single family two."""
    members = [(split.family == family).nonzero()[:, 0] for family in split.family.unique()[:most]]
    middle = [int(numbers[len(numbers) // 2]) for numbers in members]
    return split.spread(2) if len(middle) == 1 else torch.tensor(split.usable(middle))


def captions_of(run, pitch, family):
    """What a figure calls notes of pitch and family (n,)."""
    names, pairs = run.options["families"], zip(pitch.tolist(), family.tolist(), strict=True)
    return [names[f] + (f", MIDI {p}" if p >= 0 else "") for p, f in pairs]


@torch.no_grad()
def show_reconstructions(model, split, run):
    """One validation note of every family, and what is decoded from its posterior's mean."""
    waveform, *label = note_batch(split, one_of_each(split), model.device)
    level = model.spectrogram(waveform)
    decoded, _, _ = model.reconstruct(level, model.label(*label))
    rows = {"note": (level, waveform, captions_of(run, *label))}
    rows["decoded"] = decoded, sound(model, decoded), [""] * len(level)
    show(run, "reconstructions", "Validation notes and what is decoded from their posterior means", rows)


def show_samples(model, split, run):
    """Eight samples from either prior; a conditional model is asked for labels of training notes."""
    asked = torch.randint(len(split.notes), (8,), generator=random_generator("asked for a figure"))
    label, rows = (split.pitch[asked], split.family[asked]), {}
    captions = [""] * 8 if model.condition == "none" else captions_of(run, *label)
    for name, fitted in (("fitted", True), ("standard", False)):
        level = sample(model, *label, "figure", fitted=fitted)
        rows[name] = level, sound(model, level), captions
    show(run, "samples", "Samples from the fitted prior, and from the standard normal one", rows)


@torch.no_grad()
def show_interpolations(model, split, run):
    """From one validation note to one of another family, straight and spherical."""
    waveform, *labels = note_batch(split, one_of_each(split)[[0, -1]], model.device)
    label, (first, last) = model.label(*labels), captions_of(run, *labels)
    mu, _ = model.encode(model.spectrogram(waveform), label)
    share, rows = torch.linspace(0, 1, 7, device=mu.device)[:, None], {}
    captions = [first, *(f"{s:.0%}" for s in share[1:-1, 0].tolist()), last]
    for name, way in (("linear", torch.lerp), ("spherical", slerp)):
        decoded = model.decode(way(*mu, share), None if label is None else torch.lerp(*label, share))
        level = model.spectrogram.unscale(decoded)
        rows[name] = level, sound(model, level), captions
    show(run, "interpolations", "Between the posterior means of two validation notes", rows)


@torch.no_grad()
def show_scale(model, split, run):
    """One sample of every family, through an octave of pitches that the family was trained on, where it has one."""
    steps, rows = torch.tensor([0, 2, 4, 5, 7, 9, 11, 12]), {}
    for family, name in enumerate(run.options["families"] if model.condition == "both" else ()):
        known = set(split.pitch[split.family == family].tolist())
        if starts := [p for p in sorted(known) if known.issuperset(range(p, p + 13))]:
            pitch, families = starts[len(starts) // 2] + steps, torch.full_like(steps, family)
            level = sample(model, pitch, families, "scale", family, same=True)
            rows[name] = level, sound(model, level), [f"MIDI {p}" for p in pitch.tolist()]
    if rows:
        show(run, "scale", "One sample of every family, asked for a major scale", rows)


# ---------------------------------------------------------------- Graphs


class NoteVocoder(Vocoder):
    """Griffin-Lim of magnitudes (B, bins, T) as `spectrogram` has them, mel bands among them."""

    def __init__(self, spectrogram):
        super().__init__(spectrogram.n_fft)
        self.spectrogram = spectrogram

    def to_stft_magnitude(self, spectrogram):
        return self.spectrogram.to_stft_magnitude(spectrogram)


def graphs(model):
    """{graph: (module, example inputs)}, as the contract says; the sounds are decaying chords."""
    generator, inward, outward = random_generator("graphs"), copy.deepcopy(model), copy.deepcopy(model)
    del inward.decoder, inward.prior, outward.encoder, outward.prior  # weights that a graph's file need not hold

    def posterior(waveform, *label):
        mu, logvar = inward.encode(inward.spectrogram(waveform), inward.label(*label))
        return mu, logvar, gaussian_kl(mu, logvar).sum(1)

    def magnitude(z, *label):
        return log_expand(outward.spectrogram.unscale(outward.decode(z, outward.label(*label))))

    t, frequency = torch.arange(SAMPLES) / RATE, 80 + 1000 * torch.rand(2, 6, 1, generator=generator)  # s, Hz
    waveform = 0.1 * (torch.sin(2 * math.pi * frequency * t) * torch.exp(-t)).sum(1)
    spectrogram = log_expand(model.spectrogram(waveform))[:, :, :120].contiguous()
    label = {} if model.condition == "none" else {"pitch": torch.tensor([45, 70]), "family": torch.tensor([0, 0])}
    z = torch.randn(2, model.d, generator=generator)
    return {
        "encoder": (Graph(("mu", "logvar", "kl"), posterior, inward), {"waveform": waveform} | label),
        "prior": (Graph(("z",), lambda *inputs: model.prior(*inputs), model.prior), {"noise": z} | label),
        "decoder": (Graph(("spectrogram",), magnitude, outward), {"z": z} | label),
        "vocoder": (NoteVocoder(copy.deepcopy(model.spectrogram)), {"spectrogram": spectrogram}),
    }


def describe(model):
    """What a program needs to know of the model beside its options and graphs, for model.json."""
    scaling = f"log(1 + {COMPRESSION:g} magnitude), mean 0 and variance 1; inside the graphs"
    sizes = {"sample_rate": RATE, "samples": SAMPLES, "hop": model.spectrogram.hop, "frames": model.frames}
    return {"kind": "vae-sound", "scaling": scaling} | sizes


# ---------------------------------------------------------------- Command line

PRESETS = {"nsynth": {"lr": 1e-3, "warmup": 0.3, "minutes": 15.0}}
CLIP = 1.0  # of the gradient's norm
RUN_NAME = "vae-notes-{representation}-{condition}-D{d}-beta{beta:g}-seed{seed}"


@training_command(SCRIPT, PRESETS)
@families_option
@click.option("--transpose", type=click.IntRange(0, 12), default=0, help="Semitones training notes are also moved by.")
@click.option("--gain-db", type=click.FloatRange(0), default=6.0, help="Training notes get louder, softer by so much.")
@click.option("--representation", type=click.Choice(["stft", "mel"]), default="stft", help="What the model sees.")
@click.option("--n-fft", type=click.Choice([512, 1024, 2048]), default=1024, help="Samples of a frame, four hops.")
@click.option("--n-mels", type=click.IntRange(16), default=192, help="Bands of a mel spectrogram.")
@click.option("--D", "d", type=click.IntRange(1), default=32, help="Latents.")
@click.option("--channels", type=click.IntRange(8), default=256, help="Width of the convolutions, a multiple of 8.")
@click.option("--condition", type=click.Choice(["none", "both"]), default="none", help="Both: pitch and family.")
@click.pass_context
def main(context, **options):
    # 1. Options, device, notes, model.
    settle_options(context, options)
    device = start_device(options["device"], options["seed"])
    splits, source = load_splits(options)
    if options["condition"] == "both":
        check_labels(splits)
    model = build(options)
    train, valid = splits["train"], splits["valid"]
    watched, evaluated = (QUICK, QUICK) if options["evaluation"] == "quick" else (WATCHED, EVALUATED)
    if not options["resume"]:
        start_at_notes(model, train)
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"], eps=1e-6, fused=True)
    counts = {split: len(part.notes) for split, part in splits.items()}
    about = {"name": options["dataset"], "source": source, "notes": counts}

    # 2. Train: the score of the start first, figures and scores of the validation split on the way.
    with Run(options, SCRIPT, RUN_NAME.format(**options), about, model, optimizer, device) as run:
        if run.folder and run.step == 0:
            run.report(watch(model, valid, watched))
        for step, progress in run.steps():
            generator = random_generator("batch", options["seed"], step)
            index = torch.randint(len(train.notes), (run.total,), generator=generator)[run.own]
            index = torch.tensor(train.usable(index.tolist()))
            loudness = 2 * torch.rand(run.total, 1, generator=generator)[run.own] - 1
            noise = torch.randn(run.total, model.d, generator=generator)[run.own].to(device)
            waveform, pitch, family = note_batch(train, index, device)
            gain = 10 ** (options["gain_db"] / 20 * loudness.to(device))
            level, label = model.spectrogram(gain * waveform), model.label(pitch, family)
            beta = beta_at(progress, options["beta"], options["warmup"])
            with run.autocast():
                loss, terms = objective(model, level, label, noise, beta)
            lr = learning_rate_at(progress, step, options["lr"])
            run.log(optimizer_step(loss, terms, optimizer, lr, CLIP) | {"schedule/beta": beta})
            if run.looks:
                show_reconstructions(model, valid, run)
            if run.folder and (run.due or run.stopped):
                fit_prior(model, train)
            if run.due:
                show_samples(model, train, run)
                show_interpolations(model, valid, run)
                show_scale(model, train, run)
                run.report(watch(model, valid, watched))

        # 3. Score on the test split, beside the start.
        if run.complete:
            start = start_at_notes(build(options), train).to(device)
            run.finish(evaluate(model, start, splits, evaluated), {})  # the scores of the start are among them


if __name__ == "__main__":
    main()
