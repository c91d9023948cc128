"""A VAE on single notes (Kingma & Welling 2013), conditional on pitch and instrument family (Sohn et al. 2015).

    python train_vae_audio.py                                        # on notes synthesised here
    python train_vae_audio.py --data-root nsynth                     # the official folders nsynth-train, -valid, -test
    python train_vae_audio.py --data-root nsynth --condition both    # asked for a pitch and a family
    python train_vae_audio.py --data-root my_notes                   # any folder of sounds, each a note
    python train_vae_audio.py --representation waveform --D 256 --beta 0.02 --lr 3e-4 --batch 16

For notes of four seconds (16 kHz) as a few latents, and back. They are seen as spectrograms, log-compressed STFT
magnitudes or mel bands, and sound through Griffin-Lim; or as waveforms, a vector of latents for every block of samples.
Results: docs/audio.md; whether samples have the pitch and family asked for: tests/experiments/conditional.py."""

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
from scipy.signal import firwin, kaiser_beta
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
        return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag).add_(1e-20).sqrt_()  # 0 has no gradient


class Spectrogram(nn.Module):
    """Waveforms -> levels, T = samples / hop + 1 frames; and magnitudes, no longer compressed, -> those of an STFT.
    `representation`: "stft" or "mel". Raises ValueError where a mel band would hold no bin."""

    def __init__(self, representation, n_fft, n_mels):
        super().__init__()
        self.representation, self.n_fft, self.hop = representation, n_fft, n_fft // 4
        self.magnitude = STFTMagnitude(n_fft)
        self.bins = n_fft // 2 + 1 if representation == "stft" else n_mels
        if representation == "mel":
            bank = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0, RATE / 2, n_mels, RATE, mel_scale="slaney")
            if (bank.amax(0) == 0).any():
                raise ValueError(f"{n_mels} mel bands are too many for n_fft {n_fft}: some would hold no bin")
            self.register_buffer("bank", bank.T.contiguous(), persistent=False)  # (bands, F)
            self.register_buffer("bank_inverse", torch.linalg.pinv(self.bank.double()).float(), persistent=False)

    def forward(self, waveform):
        """(B, samples) -> levels (B, bins, T)."""
        magnitude = self.magnitude(waveform)
        return log_compress(magnitude if self.representation == "stft" else self.bank @ magnitude)

    def to_stft_magnitude(self, magnitude):
        """Magnitudes (B, bins, T) -> those of the STFT, (B, F, T): for mel bands the least that give them, cut at 0."""
        return magnitude if self.representation == "stft" else (self.bank_inverse @ magnitude).clamp(min=0)


def stft_magnitude(waveform):
    """The magnitudes all sound is compared by, n_fft 1024: (B, samples) -> (B, 513, T)."""
    return STFTMagnitude(1024).to(waveform.device)(waveform)


def spectral_convergence(magnitude, reference):
    """|| |reference| - |magnitude| || / || reference || in dB (Frobenius norms): two of (B, F, T) -> (B,)."""
    return 20 * torch.log10((magnitude - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1))


def load_splits(options):
    """The splits of `load_notes`, training notes up to --transpose semitones higher and lower too, within MIDI's; and
    their source. Raises click.UsageError where a model is to be asked for pitches, and some are not known."""
    splits, source = load_notes(options)
    unknown = [note.name for split in splits.values() for note in split.notes if note.pitch < 0]
    if options["condition"] == "both" and unknown:
        found = f"{len(unknown)} files carry no pitch, such as {unknown[0]}"
        raise click.UsageError(f"--condition both: {found}; expected names like piano_A#3.wav or piano-060-100.wav")
    moves = range(-options["transpose"], options["transpose"] + 1)
    pairs = ((n, k) for n in splits["train"].notes for k in moves if n.pitch < 0 or 0 <= n.pitch + k < PITCHES)
    moved = [note._replace(pitch=note.pitch + k * (note.pitch >= 0), semitones=k) for note, k in pairs]
    splits["train"] = NoteSplit(moved, options["families"], "train")
    return splits, source


def note_batch(model, split, index):
    """The notes at `index`: waveforms (B, SAMPLES), and their label, on the model's device."""
    numbers = split.pitch[index], split.family[index]
    return split.waveform(index).to(model.mean.device), model.label(*(n.to(model.mean.device) for n in numbers))


# ---------------------------------------------------------------- Model

PATCH, START_NOTES, EXEMPLARS = 4, 1000, 2001  # frames of a convolution; notes to start at, and that a prior knows
SCORES, NEAR, SHARES = 64, 2.0, torch.linspace(0.1, 1.2, 12).square()  # of latents; semitones; of notes' variance


def principal(x, n):
    """PCA of the rows of x (m, k): mean (k,), standard deviations (n,), directions (k, n); 0 beyond the data."""
    mean, wide = x.mean(0), x.shape[1] > x.shape[0]
    centred = x - mean
    gram = (centred @ centred.T if wide else centred.T @ centred) / len(x)
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0)[:n].clamp(min=0).float(), vectors.flip(1)[:, :n].float()
    vectors = F.normalize(centred.T @ vectors, dim=0) if wide else vectors
    return mean, *(F.pad(part, (0, n - len(values))) for part in (values.sqrt(), vectors))


def start_patches(x, encoder, decoder):
    """Initialise two convolutions of PATCH steps each, in and out, as a PCA of x (n, channels, T): x encoded."""
    patches = x.unfold(2, PATCH, PATCH).transpose(1, 2).flatten(2).flatten(0, 1)  # (n T / PATCH, channels * PATCH)
    mean, scales, directions = principal(patches[:: max(1, len(patches) // 20_000)], encoder.out_channels)
    scale = scales.square().mean().sqrt()
    encoder.weight.copy_((directions / scale).T.view_as(encoder.weight))
    encoder.bias.copy_(-mean @ directions / scale)
    decoder.weight.copy_((directions * scale).T.view_as(decoder.weight))
    decoder.bias.copy_(mean.view(-1, PATCH).mean(1))
    return encoder(x)


def start_latents(h, label, posterior, latents):
    """Initialise the layers from and to features h (n, k) as a PCA of what the label (n, n_labels) does not explain."""
    y = torch.ones(len(h), 1) if label is None else F.pad(label, (0, 1), value=1.0)  # the constant comes last
    by_label = torch.linalg.solve(y.T @ y + torch.eye(y.shape[1]), y.T @ h)  # ridge: (n_labels + 1, k)
    d = len(posterior.bias) // 2
    mean, scales, directions = principal(h - y @ by_label, d)
    inward = torch.where(scales > 1e-3 * scales[0] + 1e-6, directions / scales, 0.0)  # none of too few notes
    weight = torch.cat([inward.T, -(by_label[:-1] @ inward).T], dim=1)
    posterior.weight.copy_(F.pad(weight, (0, 0, 0, d)).view_as(posterior.weight))
    posterior.bias[:d] = -(by_label[-1] + mean) @ inward
    posterior.bias[d:] = 3.0  # narrow: a log-variance of -softplus(3) = -3.05
    latents.weight.copy_(torch.cat([directions * scales, by_label[:-1].T], dim=1).view_as(latents.weight))
    latents.bias.copy_(by_label[-1] + mean)


class ExemplarPrior(nn.Module):
    """p(z | y) after training: a Gaussian around each of EXEMPLARS notes, all of one covariance (Norouzi et al. 2020);
    given a label, around those of its family, the more the nearer their pitch. Samples of N(0, I) combine latents that
    never occur together. Of more latents than SCORES it has as many principal components."""

    def __init__(self, latents, conditional):
        super().__init__()
        self.latents, self.conditional = latents, conditional
        d, self.d = math.prod(latents), min(math.prod(latents), SCORES)
        self.register_buffer("typical", torch.zeros(d))
        self.register_buffer("directions", torch.eye(d, self.d))
        self.register_buffer("scores", torch.zeros(EXEMPLARS, self.d))
        self.register_buffer("labels", torch.full((2, EXEMPLARS), -1.0))  # pitch and family; -1 is no note's family
        self.register_buffer("factor", torch.eye(self.d))  # of the covariance, by Cholesky

    def log_weights(self, pitch, family):
        """log p(exemplar | pitch, family), not normalised, of both (n,), 0 if not conditional: (n, EXEMPLARS)."""
        far = (pitch[:, None] - self.labels[0]) / NEAR
        return -0.5 * far.square() - 1e4 * (family[:, None] != self.labels[1]).float()

    def forward(self, noise, pitch=None, family=None):
        """Standard normal noise (n, 1 + d), and of a conditional model the label, pitch and family (n,) -> z (n, D)."""
        label = (pitch, family) if self.conditional else [torch.zeros_like(noise[:, 0])] * 2
        at = (0.4999 + 0.5 * torch.erf(noise[:, :1] / 2**0.5)).clamp(min=1e-6)  # 0.5 would tie; 0 be of any family
        below = self.log_weights(*label).softmax(1).cumsum(1) < at
        note = self.scores.index_select(0, below.float().sum(1).clamp(max=EXEMPLARS - 1).long())  # (n, d)
        return (self.typical + (note + noise[:, 1:] @ self.factor.T) @ self.directions.T).unflatten(1, self.latents)

    @torch.no_grad()
    def fit(self, mu, logvar, pitch, family):
        """Fit to posteriors (n, D) of n <= EXEMPLARS notes of pitch, family (n,). The covariance is their mean variance
        and a share of that of leave-one-out residuals: the share of SHARES of highest leave-one-out likelihood."""
        if self.d < len(self.typical):
            self.typical[:], _, self.directions[:] = principal(mu, self.d)
        scores, variance = (mu - self.typical) @ self.directions, logvar.exp() @ self.directions.square()
        label = torch.stack([pitch, family]) * self.conditional
        self.scores[: len(mu)], self.labels[:, : len(mu)], self.labels[1, len(mu) :] = scores, label, -1
        others = self.log_weights(*label)[:, : len(mu)].fill_diagonal_(-1e6).log_softmax(1)
        rest = scores - others.exp() @ scores
        residual = (rest.T @ rest + torch.eye(self.d)) / (len(mu) + 1)  # N(0, I) weighs as much as one note
        factors = torch.linalg.cholesky(variance.mean(0).diag() + SHARES[:, None, None] * residual)  # (12, d, d)
        z = scores + variance.sqrt() * torch.randn(scores.shape, generator=random_generator("exemplars"))
        white = (torch.linalg.solve_triangular(factors, x.T, upper=False).mT for x in (z, scores))  # (12, n, d)
        density = (others - 0.5 * torch.cdist(*white).square()).logsumexp(2).mean(1)
        self.factor[:] = factors[(density - factors.diagonal(dim1=1, dim2=2).log().sum(1)).argmax()]


def with_label(x, label):
    """x (B, n) or (B, n, T), and label (B, n_labels) side by side, at every step in time."""
    label = label if label is None or x.ndim == 2 else label[:, :, None].expand(-1, -1, x.shape[2])
    return x if label is None else torch.cat([x, label], dim=1)


class ColumnNorm(nn.GroupNorm):
    """Of (B, C, T), as of pictures one pixel wide: some runtimes know no other."""

    def forward(self, x):
        return super().forward(x[..., None])[..., 0]


class FrameNorm(nn.LayerNorm):
    """Of (B, C, T), at every step in time by itself."""

    def forward(self, x):
        return super().forward(x.mT).mT


def blocks(channels, n, conv, norm):
    """Residual blocks that start as the identity."""
    body = nn.Sequential(*[ResBlock(channels, conv=conv) for _ in range(n)])
    for block in body:
        block.norm1, block.norm2 = norm(channels), norm(channels)
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
    return body


class NoteVAE(nn.Module):
    """q(z | x, y), p(x | z, y): diagonal Gaussians; p(z) = N(0, I), while `prior`, fitted later, is for sampling alone.
    y, the label: one-hot pitch and family, or None (Sohn et al. 2015). `latents`: shape of a note's z; `crop`: samples
    of it that training sees. Both kinds convolve over time, and start as PCAs, the linear VAE's optimum (Lucas et al.
    2019). They add encoder, posterior, decode(z, y); `front`: waveform -> x; `level`, `sound`: x -> log spectrogram,
    waveform; `compared`: x, z, y -> [(decoded, true)], the pairs that the objective compares."""

    def __init__(self, d, latents, crop, bins, channels, condition, families):
        super().__init__()
        if channels % 8:
            raise ValueError(f"--channels {channels} must be a multiple of 8")
        self.d, self.latents, self.crop, self.condition = d, latents, crop, condition
        self.n_labels = 0 if condition == "none" else PITCHES + len(families)
        self.prior = ExemplarPrior(latents, condition == "both")
        self.register_buffer("pitches", torch.eye(PITCHES), persistent=False)
        self.register_buffer("families", torch.eye(len(families) if self.n_labels else 0), persistent=False)
        self.register_buffer("mean", torch.zeros(bins, 1))  # of levels, and their deviation
        self.register_buffer("std", torch.ones(()))

    def label(self, pitch=None, family=None):
        """MIDI pitch, family (B,), refused if negative -> (B, n_labels); None of a model without a label."""
        if self.condition == "none":
            return None
        known = (self.pitches, pitch), (self.families, family)
        return torch.cat([table[torch.where(index < 0, 10**6, index)] for table, index in known], dim=1)

    def scaled(self, level):
        return (level - self.mean) / self.std

    def encode(self, x, label):
        """x, label (B, n_labels) -> mu, logvar; no posterior is wider than the prior."""
        mu, width = self.posterior(with_label(self.encoder(self.scaled(x)), label)).float().chunk(2, dim=1)
        return mu, -F.softplus(width)

    def reconstruct(self, x, label):
        """x -> what is decoded from the posterior's mean, mu and logvar."""
        mu, logvar = self.encode(x, label)
        return self.decode(mu, label), mu, logvar


class SpectrumVAE(NoteVAE):
    """D latents a note, all of which is seen at once: its spectrogram, levels (B, bins, T)."""

    def __init__(self, *, representation, n_fft, n_mels, d, channels, condition, families):
        spectrogram = Spectrogram(representation, n_fft, n_mels)
        super().__init__(d, (d,), SAMPLES, spectrogram.bins, channels, condition, families)
        self.front, self.level = spectrogram, partial(torch.clamp, min=0)
        self.vocoder = Vocoder(n_fft, to_stft_magnitude=spectrogram.to_stft_magnitude)
        self.frames, around = SAMPLES // spectrogram.hop + 1, (nn.Conv1d, partial(ColumnNorm, 8))
        self.coarse = math.ceil(self.frames / PATCH**2)  # steps in time that the latents see
        self.encoder = nn.Sequential(
            nn.ConstantPad1d((0, self.coarse * PATCH**2 - self.frames), 0.0),
            nn.Conv1d(spectrogram.bins, channels, PATCH, stride=PATCH), blocks(channels, 1, *around),
            nn.Conv1d(channels, channels, PATCH, stride=PATCH), blocks(channels, 2, *around), nn.Flatten(),
        )  # fmt: skip
        self.posterior = nn.Linear(channels * self.coarse + self.n_labels, 2 * d)
        self.latent_layer = nn.Linear(d + self.n_labels, channels * self.coarse)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (channels, self.coarse)), blocks(channels, 2, *around),
            nn.ConvTranspose1d(channels, channels, PATCH, stride=PATCH), blocks(channels, 1, *around),
            nn.ConvTranspose1d(channels, spectrogram.bins, PATCH, stride=PATCH),
        )  # fmt: skip

    def compared(self, x, z, label):
        return [(self.scaled(self.decode(z, label)), self.scaled(x))]

    def sound(self, x):  # (B, bins, T) -> (B, SAMPLES), through Griffin-Lim
        return self.vocoder(log_expand(self.level(x)))

    def decode(self, z, label):
        """z (B, D), label (B, n_labels) -> levels (B, bins, T)."""
        h = self.decoder(self.latent_layer(with_label(z, label)))
        return h[..., : self.frames].float() * self.std + self.mean

    @torch.no_grad()
    def start_at(self, level, label):
        """Scaling, and the net as a PCA: of patches of frames of levels (n, bins, T), of patches of those, and of what
        the label (n, n_labels) does not explain of a note; posterior means get variance 1."""
        self.mean.copy_(level.mean((0, 2))[:, None])
        self.std.copy_(level.std())
        x = start_patches(self.encoder[0](self.scaled(level)), self.encoder[1], self.decoder[4])
        x = start_patches(x, self.encoder[3], self.decoder[2])
        start_latents(x.flatten(1), label, self.posterior, self.latent_layer)


# ---------------------------------------------------------------- Model of waveforms

BANDS, TAPS, CUTOFF = 16, 193, 0.0367312  # of the filters; with this cutoff the sum of all bands is flattest
NARROW, HOP = 16, 8  # narrow bands and oscillators of every band, and how many of its samples one value stands for
BLOCK = BANDS * HOP * PATCH  # samples of one step of the latents
WINDOW, DELAY, AHEAD = 64, 704, 2  # samples of a band seen at once; that decoded sound is late; blocks for these
RESOLUTIONS = 2048, 1024, 512, 256  # n_fft of the spectra that the objective compares


class Causal(nn.Module):
    """A layer that looks back: at zeros, or, within `stream`, at what it saw in the block before."""

    past = None

    def recall(self, x):
        """x (B, C, T) after its past, of shape `memory`, (C, frames): (B, C, frames + T)."""
        x = torch.cat([x.new_zeros(len(x), *self.memory) if self.past is None else self.past, x], dim=2)
        self.past = None if self.past is None else x[:, :, -self.memory[1] :]
        return x


def stream(function, net, x, cache):
    """function(x) of a block (B, ...) that goes on from `cache` (B, n), zeros at the start, of layers of `net`; and the
    cache for the next. Blocks, one after another, give what the whole gives."""
    layers = [layer for layer in net.modules() if isinstance(layer, Causal)]
    for layer, part in zip(layers, cache.split([math.prod(layer.memory) for layer in layers], dim=1), strict=True):
        layer.past = part.unflatten(1, layer.memory)
    output, cache = function(x), torch.cat([layer.past.flatten(1) for layer in layers], dim=1)
    for layer in layers:
        layer.past = None
    return output, cache


class CausalConv(Causal, nn.Conv1d):
    def __init__(self, channels, out_channels, kernel, padding=0):  # its past is all the padding that it has
        super().__init__(channels, out_channels, kernel)
        self.memory = channels, kernel - 1

    def forward(self, x):
        return super().forward(self.recall(x))


MIDDLES = (torch.arange(BANDS * NARROW, dtype=torch.float64) + 0.5) * RATE / 2 / BANDS / NARROW  # of narrow bands, Hz
PROTOTYPE = torch.from_numpy(firwin(TAPS, CUTOFF, window=("kaiser", kaiser_beta(90))))  # of all filters of bands


class PQMF(Causal):
    """Cosine-modulated filters that nearly reconstruct (Rothweiler 1983): waveforms (B, T BANDS) <-> bands (B, BANDS,
    T) of 500 Hz, by convolutions of polyphase components. Back, sound is 177 samples late."""

    def __init__(self, synthesis):
        super().__init__()
        self.synthesis, band, time = synthesis, torch.arange(BANDS)[:, None], torch.arange(TAPS) - TAPS // 2
        phase = (-1) ** band * math.pi / 4 * (-1 if synthesis else 1)
        filters = 2 * PROTOTYPE * torch.cos((band + 0.5) * math.pi / BANDS * time + phase)
        parts = F.pad(filters, (0, -TAPS % BANDS)).unflatten(1, (-1, BANDS)).flip(1)  # (band, step, sample)
        weight = BANDS * parts.permute(2, 0, 1) if synthesis else parts.flip(2).transpose(1, 2)
        self.register_buffer("weight", weight.float().contiguous(), persistent=False)
        self.memory = BANDS, weight.shape[2] - 1

    def forward(self, x):
        if self.synthesis:
            return F.conv1d(self.recall(x), self.weight).transpose(1, 2).flatten(1)
        return F.conv1d(self.recall(x.unflatten(1, (-1, BANDS)).transpose(1, 2)), self.weight)


class NarrowBands(Causal):
    """An STFT in each band, as a phase vocoder (Flanagan & Golden 1966): (B, BANDS, T) -> (B, 2, BANDS * NARROW, T /
    HOP): levels, and how far frequencies are off narrow bands' middles, in halves of these, times level / 4."""

    def __init__(self):
        super().__init__()
        angle = math.pi / NARROW * (torch.arange(NARROW)[:, None] + 0.5) * torch.arange(WINDOW)
        even = torch.stack([angle.cos(), -angle.sin()], dim=1) * torch.hann_window(WINDOW)  # (NARROW, 2, WINDOW)
        odd = (even * torch.tensor([1.0, -1.0])[:, None]).flip(0)  # every other band is upside down
        weight = BANDS * torch.stack([even, odd]).repeat(BANDS // 2, 1, 1, 1)  # so that levels are as n_fft 1024 gives
        turn = 2 * math.pi * HOP * BANDS / RATE * MIDDLES[:, None]  # of a middle's phase in a hop
        self.register_buffer("weight", weight.flatten(0, 2)[:, None], persistent=False)
        self.register_buffer("turn", torch.stack([turn.cos(), turn.sin()]).float(), persistent=False)
        self.memory = BANDS, WINDOW

    def forward(self, x):
        spectrum = F.conv1d(self.recall(x), self.weight, stride=HOP, groups=BANDS).unflatten(1, (-1, 2))
        re, im = spectrum.unbind(2)  # (B, n, 1 + T / HOP): the frame before, too
        magnitude = (re.square() + im.square()).clamp(min=1e-12).sqrt()
        cosine = re[..., 1:] * re[..., :-1] + im[..., 1:] * im[..., :-1]
        sine = im[..., 1:] * re[..., :-1] - re[..., 1:] * im[..., :-1]
        turned = (sine * self.turn[0] - cosine * self.turn[1]) / (magnitude[..., 1:] * magnitude[..., :-1])
        return self.off_middle(turned, log_compress(magnitude[..., 1:]))

    @staticmethod
    def off_middle(turned, level):  # by the sine of what phases turn by; an eighth turn is at a band's end
        return torch.stack([level, (turned * 2**0.5).clamp(-1, 1) * level / 4], dim=1)

    def of_sines(self, loud, shift):
        """What `forward` finds of steady sines (`Oscillators`), powers averaged over phases, by the window's kernel."""
        x, power, turned = shift + 2e-4 * ((shift - shift.round()).abs() < 1e-4), 1e-12, 0.0  # whole x would be 0 / 0
        sine = torch.sin(math.pi * (x - x.round())) / math.pi  # sin(pi x) / pi, but for its sign, which is squared
        for k in range(-2, 3):  # five bands hear a sine, from `off` their middle
            off = x - 2 * k
            part = (loud * sine * (1 / off - 0.5 / (off - 1) - 0.5 / (off + 1))).square()
            power = power + F.pad(part, (0, 0, k, -k))
            turned = turned + F.pad(part * torch.sin(math.pi / 4 * off), (0, 0, k, -k))
        return self.off_middle(turned / power, log_compress(power.sqrt()))


class Oscillators(Causal):
    """A sine in each of n narrow bands -> bands (B, BANDS, T HOP).
    `loud` (B, n, T) is the STFT's magnitude (n_fft 1024) at their peaks, `shift` how far they are off the middle of
    narrow bands, in halves of these, 2 at most. Amplitudes and frequencies go on in lines, and phases are sums of these
    (McAulay & Quatieri 1986): steady sounds have steady latents. Gains of bands are nearly linear in frequency."""

    def __init__(self):
        super().__init__()
        step, n = torch.arange(1, HOP + 1) / HOP, len(MIDDLES)
        line, area = torch.stack([1 - step, step]), HOP * step * (step + 1 / HOP) / 2  # from the frame before to this
        turns, edge = MIDDLES[:, None] * step * HOP * BANDS / RATE, RATE / 4 / n
        hertz = MIDDLES + torch.tensor([[-edge], [0], [edge]])  # of waves that begin in the filters' middle
        angle = 2 * math.pi / RATE * hertz[..., None] * (torch.arange(TAPS // 2 - 32 * BANDS, TAPS // 2) + 1)
        waves = PQMF(synthesis=False)(torch.stack([angle.cos(), -angle.sin()]).flatten(0, 2).float())[:, :, -1]
        low, middle, high = waves.unflatten(0, (2, 3, -1)).mT.unbind(1)  # (2, BANDS, n) each
        swept = torch.stack([HOP * step - area, area]) * edge * BANDS / RATE
        mix = torch.cat([middle, (high - low) / 2])  # (4, BANDS, n)
        for name, table in {"line": line, "swept": swept, "turns": turns, "mix": mix}.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.memory = 4 * n, 1  # what pairs of frames are made of, and phases

    def forward(self, loud, shift):
        values = torch.cat([loud / 256, loud / 256 * shift, shift], dim=1)  # amplitude 1 has magnitude 256: (B, 3 n, T)
        past = loud.new_zeros(len(loud), *self.memory) if self.past is None else self.past
        before, phase = past.split([values.shape[1], loud.shape[1]], dim=1)
        pairs = torch.stack([torch.cat([before, values[..., :-1]], dim=2), values], dim=3).chunk(3, dim=1)
        swept, (loud, changed) = pairs[2] @ self.swept, [(pair @ self.line).flatten(2) for pair in pairs[:2]]
        exact = torch.float32 if shift.device.type == "mps" else torch.float64  # sums of thousands of turns
        ends = (phase + (swept[..., -1] + self.turns[:, -1:]).to(exact).cumsum(2)).remainder(1).float()  # (B, n, T)
        angle = math.tau * (torch.cat([phase, ends[..., :-1]], 2)[..., None] + swept + self.turns[:, None]).flatten(2)
        cos, sin = angle.cos(), angle.sin()  # (B, n, T HOP)
        self.past = None if self.past is None else torch.cat([values[..., -1:], ends[..., -1:]], dim=1)
        return sum(map(torch.matmul, self.mix, (loud * cos, loud * sin, changed * cos, changed * sin)))


def nearest_partials(label):
    """Of the pitch of a label (B, n_labels), how far partials are off the middles of narrow bands, as shifts (B, n)."""
    middles, midi = MIDDLES.to(label), (label[:, :PITCHES] * torch.arange(PITCHES).to(label)).sum(1)
    hertz = 440 * 2 ** ((midi[:, None] - 69) / 12)
    return (((middles / hertz).round().clamp(min=1) * hertz - middles) / middles[0]).clamp(-1, 1)


class WaveVAE(NoteVAE):
    """D latents every BLOCK samples of sound, which is compared in spectra. Causal: the encoder sees levels of narrow
    bands, and the decoder tells oscillators in these how to sound: in bands, as RAVE (Caillon & Esling 2021), with
    phases that no net needs to learn (Engel et al. 2020)."""

    def __init__(self, *, d, channels, condition, families):
        n, around, latents = len(MIDDLES), (CausalConv, FrameNorm), (d, SAMPLES // BLOCK + AHEAD)
        super().__init__(d, latents, 32 * BLOCK, n, channels, condition, families)
        self.front, self.level, self.sound = nn.Identity(), Spectrogram("stft", 1024, 0), nn.Identity()
        self.magnitudes = nn.ModuleList(STFTMagnitude(n_fft) for n_fft in RESOLUTIONS)
        self.analysis = nn.Sequential(PQMF(synthesis=False), NarrowBands())
        self.encoder = nn.Sequential(nn.Conv1d(n, channels, PATCH, stride=PATCH), blocks(channels, 3, *around))
        self.posterior = nn.Conv1d(channels + self.n_labels, 2 * d, 1)
        self.latent_layer = nn.Conv1d(d + self.n_labels, channels, 1)
        self.decoder = blocks(channels, 3, *around)
        self.loudness = nn.Sequential(nn.ConvTranspose1d(channels, n, PATCH, stride=PATCH), blocks(n, 2, *around))
        self.shift = copy.deepcopy(self.loudness).append(nn.Conv1d(n, n, 1))
        nn.init.zeros_(self.shift[2].weight)
        nn.init.zeros_(self.shift[2].bias)
        self.oscillators, self.synthesis = Oscillators(), PQMF(synthesis=True)

    def compared(self, x, z, label):
        """Levels at RESOLUTIONS, and how far off sines are. Of spectra only loudness learns: frequencies change them by
        phases, sums of all frequencies before, and would fill the gradient with what these happen to be."""
        loud, shift = self.controls(z, label)
        with torch.autocast(x.device.type, enabled=False):
            decoded = self.synthesis(self.oscillators(loud, shift.detach()))[:, DELAY : DELAY - AHEAD * BLOCK]
            narrow = self.analysis[1].of_sines(loud, shift)[..., : -AHEAD * PATCH], self.analysis(x)
            return [[log_compress(f(w)) for w in (decoded, x)] for f in self.magnitudes] + [[v[:, 1] for v in narrow]]

    def scaled(self, waveform):
        with torch.autocast(waveform.device.type, enabled=False):
            return super().scaled(self.analysis(waveform)[:, 0])  # (B, n, T PATCH)

    def encode(self, x, label):
        """Waveforms (B, T BLOCK), zero-padded, label (B, n_labels) -> mu, logvar (B, D, T + AHEAD)."""
        return super().encode(F.pad(x, (0, AHEAD * BLOCK)), label)

    def decode(self, z, label):
        """z (B, D, T + AHEAD), label (B, n_labels) -> waveforms (B, T BLOCK)."""
        return self.synthesise(z, label)[:, DELAY : DELAY - AHEAD * BLOCK]

    def controls(self, z, label):
        """z (B, D, T), label (B, n_labels) -> `loud` and `shift` of sines (B, n, T PATCH)."""
        h = self.decoder(self.latent_layer(with_label(z, label)))  # (B, channels, T)
        level, shift = (head(h).float() for head in (self.loudness, self.shift))
        shift = shift.tanh() + (0 if label is None else nearest_partials(label)[:, :, None])
        return log_expand(F.softplus(level * self.std + self.mean, beta=4)), shift

    def synthesise(self, z, label):
        """z (B, D, T), label (B, n_labels) -> waveforms (B, T BLOCK), DELAY samples late; not under autocast."""
        return self.synthesis(self.oscillators(*self.controls(z, label)))

    @torch.no_grad()
    def start_at(self, waveform, label):
        """Scaling, and the net as a PCA: of levels in blocks of waveforms (n, samples), and of what the label
        (n, n_labels) does not explain of these."""
        level = torch.cat([self.analysis(some)[:, 0] for some in waveform.split(CHUNK)])
        self.mean.copy_(level.mean((0, 2))[:, None])
        self.std.copy_(level.std())
        h = start_patches(super().scaled(level), self.encoder[0], self.loudness[0])
        label = None if label is None else label.repeat_interleave(h.shape[2], dim=0)
        start_latents(h.transpose(1, 2).flatten(0, 1), label, self.posterior, self.latent_layer)


def build(options):
    """An untrained model of these options."""
    return build_model(WaveVAE if options.get("representation") == "waveform" else SpectrumVAE, options)


load = partial(load_model, build=build)  # a run folder -> its trained model


def start_at_notes(model, split):
    """`start_at` on at most START_NOTES notes of a split, spread evenly, transposed ones among them."""
    even = torch.linspace(0, len(split.notes) - 1, min(len(split.notes), START_NOTES)).round().long()
    index = torch.tensor(split.usable(even.tolist()))
    x = torch.cat([model.front(note_batch(model, split, some)[0]) for some in index.split(CHUNK)])
    model.start_at(x, model.label(split.pitch[index], split.family[index]))
    return model


# ---------------------------------------------------------------- Objective, evaluation

EVALUATED, WATCHED, QUICK = 500, 200, 50  # notes scored of the test split, the validation split, by --eval quick
CHUNK = 32  # notes that are encoded, decoded and heard at a time


def objective(model, x, label, noise, beta):
    """The loss of a batch, in nats per value of its first view, and its terms, in nats per note, or `crop` of one.
    The Gaussian's variance is the mean squared error over the batch of all processes, held constant: the likeliest one
    (sigma-VAE, Rybkin et al. 2021): beta = 1 is the ELBO of spectra; waveforms' views count alike, and have none."""
    mu, logvar = model.encode(x, label)  # of a part of a note, which has fewer latents
    pairs = model.compared(x, reparameterize(mu, logvar, noise[..., : mu.shape[-1]]), label)
    error = torch.stack([(decoded - view).square().mean() for decoded, view in pairs])
    variance = error.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(variance.div_(dist.get_world_size()))
    kl, values = gaussian_kl(mu, logvar).flatten(1).sum(1).mean(), pairs[0][0][0].numel()
    reconstruction = 0.5 * values * ((2 * math.pi * variance).log() + error / variance).mean()
    terms = {"loss/reconstruction": reconstruction, "loss/kl": kl, "loss/sigma": variance.mean().sqrt()}
    return (reconstruction + beta * kl) / values, terms


@torch.no_grad()
def fit_prior(model, split):
    """Fit the model's prior to the posteriors of at most EXEMPLARS of a split's notes, as they are."""
    index, device = split.spread(EXEMPLARS), model.mean.device
    notes = (note_batch(model, split, some) for some in index.split(CHUNK))
    parts = [model.encode(model.front(waveform), label) for waveform, label in notes]
    mu, logvar = (torch.cat(part).flatten(1).cpu() for part in zip(*parts, strict=True))
    model.prior.cpu().fit(mu, logvar, split.pitch[index], split.family[index])
    model.prior.to(device)


@torch.no_grad()
def evaluate(model, split, most, heard=True):
    """{score: mean over at most so many notes of a split}: KL in nats, distances in dB, "lsd" of levels, others of the
    decoded sound. What a linear code and Griffin-Lim reach: tests/experiments/waveforms.py."""
    index, values = split.spread(most), defaultdict(list)
    for some in tqdm(index.split(CHUNK), desc="evaluation", disable=None if heard else True):
        waveform, label = note_batch(model, split, some)
        x = model.front(waveform)
        decoded, mu, logvar = model.reconstruct(x, label)
        values["lsd"].append(log_spectral_distance(model.level(decoded), model.level(x)))
        values["kl"].append(gaussian_kl(mu, logvar).flatten(1).sum(1))
        if heard:
            sound, reference = stft_magnitude(model.sound(decoded)), stft_magnitude(waveform)
            values["lsd_sound"].append(log_spectral_distance(log_compress(sound), log_compress(reference)))
            values["convergence_sound"].append(spectral_convergence(sound, reference))
    return {name: torch.cat(parts).mean().item() for name, parts in values.items()} | {"notes": len(index)}


@torch.no_grad()
def sample(model, pitch, family, *key, fitted=True, same=False):
    """Notes of pitch and family (n,), by the fitted prior or N(0, I), of noise that `key` seeds; `same`: of one z."""
    n, size = 1 if same else len(pitch), (1 + model.prior.d,) if fitted else model.latents
    noise = torch.randn(n, *size, generator=random_generator("sample", *key))
    z, pitch, family = (v.to(model.mean.device) for v in (noise, pitch, family))
    z = model.prior(z, pitch[:n], family[:n]) if fitted else z
    return model.decode(z.expand(len(pitch), *model.latents), model.label(pitch, family))


# ---------------------------------------------------------------- Figures and sounds


def slerp(a, b, share):
    """Spherical interpolation (Shoemake 1985) of the directions of a and b, (D,), linear of lengths: share (n, 1)."""
    u, v = F.normalize(a, dim=0), F.normalize(b, dim=0)
    angle = torch.arccos((u @ v).clamp(-1, 1))
    if angle.sin() < 1e-4:  # one direction, or two opposite ones, which span no plane
        return torch.lerp(a, b, share)
    turned = torch.sin((1 - share) * angle) * u + torch.sin(share * angle) * v
    return torch.lerp(a.norm(), b.norm(), share) * turned / angle.sin()


def show(model, run, name, title, rows):
    """A figure and sounds of `rows` {label: (n notes as the model sees them, or has decoded them; n captions)}."""
    levels = {label: model.level(x).cpu() for label, (x, _) in rows.items()}
    top = max(level.max().item() for level in levels.values())
    end = f"band {run.options['n_mels']}" if run.options["representation"] == "mel" else "8 kHz"
    unit, fade, sheet = 20 / math.log(10), (torch.arange(RATE, 0, -1) / 320).clamp(max=1), []  # a level of 1 in dB
    for label, (x, captions) in rows.items():
        level = F.adaptive_avg_pool2d(levels[label], TILE).flip(1).numpy()
        images = [heat_map(values, top) for values in level]
        images[-1] = with_scales(images[-1], unit * top, "dB", ("0", "4 s"), ("0", end))
        sheet.append([Tile(*pair) for pair in zip(images, captions, strict=True)])
        waveforms = model.sound(x)
        for k, waveform in enumerate(waveforms):
            run.sound(f"{name}-{label}-{k}", waveform)
        run.sound(f"{name}-{label}", (waveforms[:, :RATE].cpu() * fade).flatten())  # a second of each
    run.figure(name, contact_sheet(sheet, title, [*rows]))


def captions_of(run, pitch, family):
    """What a figure calls notes of pitch and family (n,)."""
    names, pairs = run.options["families"], zip(pitch.tolist(), family.tolist(), strict=True)
    return [names[f] + (f", MIDI {p}" if p >= 0 else "") for p, f in pairs]


@torch.no_grad()
def show_reconstructions(model, split, run):
    """Validation notes, spread evenly over families, and what is decoded from their posterior means."""
    index = split.spread(8)
    waveform, label = note_batch(model, split, index)
    x = model.front(waveform)
    captions, decoded = captions_of(run, split.pitch[index], split.family[index]), model.reconstruct(x, label)[0]
    rows = {"note": (x, captions), "decoded": (decoded, [""] * len(x))}
    show(model, run, "reconstructions", "Validation notes and what is decoded from their posterior means", rows)


@torch.no_grad()
def show_latents(model, splits, run):
    """Samples from either prior, of a conditional model asked for labels of training notes; from one validation note to
    another, straight and spherical; asked for a scale of every family, around the middle of the pitches it knows."""
    split, conditional = splits["train"], model.condition == "both"
    asked = torch.randint(len(split.notes), (8,), generator=random_generator("asked for a figure"))
    label = split.pitch[asked], split.family[asked]
    captions = captions_of(run, *label) if conditional else [""] * 8
    rows = {k: (sample(model, *label, "figure", fitted=k == "fitted"), captions) for k in ("fitted", "standard")}
    show(model, run, "samples", "Samples from the fitted prior, and from the standard normal one", rows)

    index, share = splits["valid"].spread(2)[[0, -1]], torch.linspace(0, 1, 7, device=model.mean.device)[:, None]
    waveform, label = note_batch(model, splits["valid"], index)
    mu, _ = model.encode(model.front(waveform), label)
    first, last = captions_of(run, splits["valid"].pitch[index], splits["valid"].family[index])
    captions, rows = [first, *(f"{s:.0%}" for s in share[1:-1, 0].tolist()), last], {}
    for name, way in (("linear", torch.lerp), ("spherical", slerp)):
        z = way(*mu.flatten(1), share).unflatten(1, model.latents)
        rows[name] = model.decode(z, torch.lerp(*label, share) if conditional else None), captions
    show(model, run, "interpolations", "Between the posterior means of two validation notes", rows)

    steps, rows = torch.tensor([0, 2, 4, 5, 7, 9, 11, 12]), {}
    known, families = model.prior.labels
    for family in families[families >= 0].unique().long().tolist() if conditional else ():
        pitch = (int(sum(known[families == family].aminmax())) // 2 - 6 + steps).clamp(0, PITCHES - 1)
        x = sample(model, pitch, torch.full_like(steps, family), "scale", family, same=True)
        rows[run.options["families"][family]] = x, [f"MIDI {p}" for p in pitch.tolist()]
    if rows:
        show(model, run, "scale", "One sample of every family, asked for a major scale", rows)


# ---------------------------------------------------------------- Graphs


def graphs(model):
    """{graph: (module, example inputs)}, as the contract says; the sounds are decaying chords."""
    generator, inward, outward = random_generator("graphs"), copy.deepcopy(model), copy.deepcopy(model)
    for name in ("prior", "latent_layer", "decoder", "loudness", "shift", "oscillators", "synthesis"):
        setattr(inward, name, None)  # not in its file
    outward.prior = outward.analysis = outward.encoder = outward.posterior = None

    def posterior(waveform, *label):
        mu, logvar = inward.encode(inward.front(waveform), inward.label(*label))
        return mu, logvar, gaussian_kl(mu, logvar).sum(1)

    def hear(waveform, cache, *label):
        encode = partial(super(WaveVAE, inward).encode, label=inward.label(*label))
        (mu, logvar), cache = stream(encode, inward, waveform, cache)
        return mu, logvar, gaussian_kl(mu, logvar).sum(1), cache

    def play(z, cache, *label):
        return stream(partial(outward.synthesise, label=outward.label(*label)), outward, z, cache)

    t, frequency = torch.arange(SAMPLES) / RATE, 80 + 1000 * torch.rand(2, 6, 1, generator=generator)  # s, Hz
    waveform = 0.1 * (torch.sin(2 * math.pi * frequency * t) * torch.exp(-t)).sum(1)
    label = {} if model.condition == "none" else {"pitch": torch.tensor([45, 70]), "family": torch.tensor([0, 0])}
    prior = Graph(("z",), model.prior), {"noise": torch.randn(2, 1 + model.prior.d, generator=generator)} | label
    if isinstance(model, WaveVAE):
        waveform, z = waveform[:, : 4 * BLOCK].contiguous(), torch.randn(2, model.d, 4, generator=generator)
        sizes = [sum(math.prod(m.memory) for m in net.modules() if isinstance(m, Causal)) for net in (inward, outward)]
        heard, played = ({"cache": torch.zeros(2, size)} | label for size in sizes)
        encoder = Graph(("mu", "logvar", "kl", "next_cache"), hear, inward), {"waveform": waveform} | heard
        decoder = Graph(("waveform", "next_cache"), play, outward), {"z": z} | played
        return {"encoder": encoder, "prior": prior, "decoder": decoder}
    spectrogram = log_expand(model.front(waveform))[:, :, :120].contiguous()
    decoder = Graph(("spectrogram",), lambda z, *label: log_expand(outward.decode(z, outward.label(*label))), outward)
    return {
        "encoder": (Graph(("mu", "logvar", "kl"), posterior, inward), {"waveform": waveform} | label),
        "prior": prior,
        "decoder": (decoder, {"z": torch.randn(2, model.d, generator=generator)} | label),
        "vocoder": (copy.deepcopy(model.vocoder), {"spectrogram": spectrogram}),
    }


class Tilde(nn.Module):
    """A model of waveforms, as nn~ plays it in Max and Pure Data: sound (B, 1, T BLOCK) <-> latents (B, D, T)."""

    def __init__(self, encoder, decoder, caches, d):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("heard", caches[0])
        self.register_buffer("played", caches[1])
        for name, params in {"encode": (1, 1, d, BLOCK), "decode": (d, BLOCK, 1, 1), "forward": (1, 1, 1, 1)}.items():
            self.register_buffer(f"{name}_params", torch.tensor(params))  # channels and samples a value, in and out

    @torch.jit.export
    def encode(self, x):
        heard = self.heard if len(self.heard) == len(x) else self.heard.new_zeros(len(x), self.heard.shape[1])
        mu, _, _, self.heard = self.encoder(x[:, 0], heard)
        return mu

    @torch.jit.export
    def decode(self, z):
        played = self.played if len(self.played) == len(z) else self.played.new_zeros(len(z), self.played.shape[1])
        waveform, self.played = self.decoder(z, played)
        return waveform[:, None]

    def forward(self, x):
        return self.decode(self.encode(x))

    @torch.jit.export
    def get_methods(self):
        return ["encode", "decode", "forward"]

    @torch.jit.export
    def get_attributes(self) -> list[str]:
        return []


def scripted(model):
    """{name: (TorchScript module, example, what the model makes of it)} beside the graphs."""
    if not isinstance(model, WaveVAE) or model.condition != "none":
        return {}
    pairs = [graphs(model)[name] for name in ("encoder", "decoder")]
    traced = [torch.jit.trace(graph, tuple(inputs.values()), check_trace=False) for graph, inputs in pairs]
    module = Tilde(*traced, [inputs["cache"][:1] for _, inputs in pairs], model.d).eval()
    x = pairs[0][1]["waveform"]
    heard = model.synthesise(super(WaveVAE, model).encode(x, None)[0], None)
    return {"nn_tilde": (torch.jit.script(module), x[:, None], heard[:, None])}


def describe(model):
    """What a program needs to know of the model beside its options and graphs, for model.json."""
    about = {"sample_rate": RATE, "samples": SAMPLES, "scores": model.prior.d}
    if isinstance(model, WaveVAE):
        return about | {"kind": "vae-waveform", "frames": model.latents[1], "block": BLOCK, "delay": DELAY}
    scaling = f"log(1 + {COMPRESSION:g} magnitude), mean 0 and variance 1; inside the graphs"
    return about | {"kind": "vae-sound", "scaling": scaling, "hop": model.front.hop, "frames": model.frames}


# ---------------------------------------------------------------- Command line

PRESETS = {"nsynth": {"lr": 1e-3, "warmup": 0.3, "minutes": 15.0}}
CLIP = 1.0  # of the gradient's norm
RUN_NAME = "vae-notes-{representation}-{condition}-D{d}-beta{beta:g}-seed{seed}"


@training_command(SCRIPT, PRESETS)
@families_option
@click.option("--transpose", type=click.IntRange(0, 12), default=0, help="Semitones training notes are moved, at most.")
@click.option("--gain-db", type=click.FloatRange(0), default=6.0, help="Training notes get louder, softer, at most so.")
@click.option("--representation", type=click.Choice(["stft", "mel", "waveform"]), default="stft", help="What it sees.")
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
    model, train, valid = build(options), splits["train"], splits["valid"]
    watched, evaluated = (QUICK, QUICK) if options["evaluation"] == "quick" else (WATCHED, EVALUATED)
    if not (options["resume"] and (options["resume"] / "checkpoint.pt").exists()):
        start_at_notes(model, train)
    optimizer = torch.optim.Adam(model.to(device).parameters(), lr=options["lr"], eps=1e-6, fused=True)
    for tensor in model.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(tensor, src=0)  # machines may round a PCA apart
    about = {"name": options["dataset"], "source": source, "notes": {k: len(part.notes) for k, part in splits.items()}}

    # 2. Train: the score of the start first, figures and scores of the validation split on the way.
    with Run(options, SCRIPT, RUN_NAME.format(**options), about, model, optimizer, device) as run:
        if run.folder and run.step == 0:
            run.report(evaluate(model, valid, watched, heard=False))
        for step, progress in run.steps():
            generator = random_generator("batch", options["seed"], step)
            index = torch.randint(len(train.notes), (run.total,), generator=generator)[run.own]
            index = torch.tensor(train.usable(index.tolist()))
            loudness = 2 * torch.rand(run.total, 1, generator=generator)[run.own].to(device) - 1
            noise = torch.randn(run.total, *model.latents, generator=generator)[run.own].to(device)
            begin = torch.randint(SAMPLES - model.crop + 1, (run.total, 1), generator=generator)[run.own].to(device)
            waveform, label = note_batch(model, train, index)
            gain, crop = 10 ** (options["gain_db"] / 20 * loudness), begin + torch.arange(model.crop, device=device)
            lr = learning_rate_at(progress, step, options["lr"])
            beta = beta_at(progress, options["beta"], options["warmup"])
            with run.autocast():
                loss, terms = objective(model, model.front(gain * waveform.gather(1, crop)), label, noise, beta)
            run.log(optimizer_step(loss, terms, optimizer, lr, CLIP) | {"schedule/beta": beta})
            if run.looks:
                show_reconstructions(model, valid, run)
            if run.folder and (run.due or run.stopped):
                fit_prior(model, train)
            if run.due:
                show_latents(model, splits, run)
                run.report(evaluate(model, valid, watched, heard=False))

        # 3. Score on the test split, beside the start.
        if run.complete:
            start = start_at_notes(build(options), train).to(device)
            run.finish(*(evaluate(m, splits["test"], evaluated) for m in (model, start)))


if __name__ == "__main__":
    main()
