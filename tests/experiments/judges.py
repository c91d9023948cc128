"""Judges of sounds that know nothing of the model: how near to another, which pitch, which family of instruments."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from common import RATE, log_compress, log_expand, random_generator
from train_vae_audio import Spectrogram

LOWEST_PITCH, HIGHEST_PITCH = 21, 108  # that `detect_pitch` can tell: the keys of a piano


def si_sdr(estimate, target):
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019): (..., samples) twice -> (...)."""
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp(min=1e-20)
    distortion = (estimate - scale * target).square().sum(-1)
    return 10 * torch.log10((scale * target).square().sum(-1).clamp(min=1e-20) / distortion.clamp(min=1e-20))


def detect_pitch(waveform):
    """The MIDI pitch of single notes, (B, samples) -> (B,), to a fraction of a semitone, by YIN; from A0 to C8."""
    return yin(waveform)[:, 0]


def yin(waveform, lowest=27.0, highest=4500.0):
    """MIDI pitch, and periodicity, (B, samples) -> (B, 2): 1 less YIN's difference there, 1 for one note.

    De Cheveigne & Kawahara (2002), steps 1 to 5, in windows of 4096 samples every 1024, at lags of quarter samples, as
    high notes have periods of four; the median over windows with a twentieth of the loudest one's energy or more.
    """
    window, fine = 4096, 4
    longest, shortest = fine * (int(RATE / lowest) + 1), int(fine * RATE / highest)
    span = window + longest // fine
    lags = torch.arange(1, longest + 1)
    found = []
    for note in waveform.cpu():
        frames = note.unfold(0, span, 1024)  # (T, span)
        spectra = torch.fft.rfft(frames, 2 * span) * torch.fft.rfft(frames[:, :window], 2 * span).conj()
        correlation = fine * torch.fft.irfft(spectra, fine * 2 * span)[:, : longest + 1]
        energy = F.pad(frames.double().square().cumsum(1), (1, 0))
        energies = (energy[:, window:] - energy[:, : longest // fine + 1]).float()  # of the window at whole lags
        at_lags = energies.repeat_interleave(fine, 1)[:, : longest + 1]
        difference = (energies[:, :1] + at_lags - 2 * correlation)[:, 1:].clamp(min=0)
        normal = difference * lags / difference.cumsum(1).clamp(min=1e-12)  # (T, lags from 1)
        middle = normal[:, 1:-1]
        dips = (middle < normal[:, :-2]) & (middle <= normal[:, 2:]) & (middle < 0.15)
        dips[:, : shortest - 2] = False
        lowest_dip = normal[:, shortest - 1 : -1].argmin(1) + shortest - 1
        at = torch.where(dips.any(1), dips.int().argmax(1) + 1, lowest_dip).clamp(1, longest - 2)
        before, here, after = (normal.gather(1, (at + k)[:, None])[:, 0] for k in (-1, 0, 1))
        bend = (before - 2 * here + after).clamp(min=1e-9)
        period = (at + 1 + (0.5 * (before - after) / bend).clamp(-1, 1)) / fine
        loud = energies[:, 0] >= 0.05 * energies[:, 0].max()
        measured = torch.stack([69 + 12 * torch.log2(RATE / period / 440), 1 - here], dim=1)
        found.append(measured[loud].median(0).values)
    return torch.stack(found) if found else torch.zeros(0, 2)


class FamilyClassifier(nn.Module):
    """Which family a note is of: a small convolutional net along the frequency of 80 mel bands at six times.

    The times are spans that grow, as a note changes fastest at its start. Convolutions along frequency, and training on
    bands moved up and down, keep it from learning which instrument plays which pitch.
    """

    SPANS = (0, 4, 16, 64, 128, 190, 251)  # in frames of 16 ms
    STEPS, BATCH, MOVES = 900, 64, 5

    def __init__(self, n_families):
        super().__init__()
        self.mel = Spectrogram("mel", 1024, 80)
        sizes = (len(self.SPANS) - 1, 64, 128, 128)
        layers = [
            layer
            for a, b in pairwise(sizes)
            for layer in (nn.Conv1d(a, b, 5, padding=2), nn.BatchNorm1d(b), nn.ReLU(), nn.MaxPool1d(2))
        ]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(sizes[-1] * 10, n_families))

    @torch.no_grad()
    def features(self, waveform):
        """(B, samples) -> (B, 6, 80): levels averaged over the spans."""
        level = self.mel(waveform)
        return torch.stack([level[:, :, a:b].mean(2) for a, b in pairwise(self.SPANS)], dim=1)

    def fit(self, features, family):
        """Train on features (n, 6, 80) and families (n,)."""
        generator = random_generator("classifier")
        self.mean, self.std = features.mean(), features.std()
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, self.STEPS)
        self.train()
        for _ in range(self.STEPS):
            index = torch.randint(len(features), (self.BATCH,), generator=generator)
            move = int(torch.randint(-self.MOVES, self.MOVES + 1, (), generator=generator))
            gain = 10 ** (0.6 * torch.rand(self.BATCH, 1, 1, generator=generator) - 0.3)
            moved = F.pad(features[index], (move, -move))  # bands that come in are silent
            x = log_compress(gain * log_expand(moved))
            loss = F.cross_entropy(self.net((x - self.mean) / self.std), family[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.eval()

    @torch.no_grad()
    def forward(self, waveform):
        """(B, samples) -> the family's index (B,)."""
        return self.net((self.features(waveform) - self.mean) / self.std).argmax(1)


def train_classifier(split, n_families):
    """A FamilyClassifier of at most 5,000 of the split's notes as they are, the same in every run."""
    index = split.spread(5000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = FamilyClassifier(n_families)
        features = torch.cat([classifier.features(split.waveform(some)) for some in index.split(32)])
        return classifier.fit(features, split.family[index])
