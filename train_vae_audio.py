"""A VAE on single notes (Kingma & Welling 2013), conditional on pitch and instrument family (Sohn et al. 2015).

    python train_vae_audio.py                                        # on notes synthesised here
    python train_vae_audio.py --data-root nsynth                     # the official folders nsynth-train, -valid, -test
    python train_vae_audio.py --data-root nsynth --representation mel
    python train_vae_audio.py --data-root nsynth --condition both    # asked for a pitch and a family

A note of four seconds is a spectrogram (STFT magnitudes or mel bands, log-compressed), computed once into a cache on
disk; Griffin-Lim turns what is decoded into sound. A run folder holds checkpoint.pt, metrics.json, figures, sounds and
TensorBoard events; `python export.py RUN_DIR` makes graphs of encoder, decoder and vocoder. Results: docs/audio.md.
"""

import base64
import hashlib
import json
import math
import os
import sys
import tarfile
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from common import (
    FOLDER,
    RATE,
    REPRESENTATIONS,
    FiniteRange,
    PresetCommand,
    ResBlock,
    Spectrogram,
    autocast,
    beta_at,
    descend,
    gaussian_kl,
    griffin_lim,
    learning_rate_at,
    log_compress,
    log_expand,
    log_spectral_distance,
    pick_device,
    plotted,
    random_generator,
    reparameterize,
    settle_run,
    spectral_convergence,
    start_distributed,
    start_run,
    train,
    write_json,
)

SCRIPT = Path(__file__).stem
SAMPLES = 4 * RATE  # of a note: NSynth's four seconds
SPLITS = ("train", "valid", "test")
PITCHES = 128  # MIDI numbers
FAMILIES = (
    "bass", "brass", "flute", "guitar", "keyboard", "mallet", "organ", "reed", "string", "synth_lead", "vocal",
)  # fmt: skip

# ---------------------------------------------------------------- Data: notes


class Note(NamedTuple):
    """One note: read from `path`, or synthesised where that is None; `semitones`: transposed by resampling."""

    name: str
    family: str
    pitch: int
    instrument: str
    velocity: int
    path: Path | None = None
    semitones: int = 0


class UnusableError(Exception):
    """A file that cannot be learnt from; the message says what kind of fault it has."""


def read_note(path):
    """An audio file -> its samples at RATE, four seconds of one channel, (SAMPLES,), and what had to be changed.

    Raises UnusableError where the file is not there, no audio, damaged, silent, or holds samples that are no numbers.
    """
    changes = []
    if not path.is_file():
        raise UnusableError("not there")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise UnusableError("no audio, or damaged") from error
    if not np.isfinite(samples).all():
        raise UnusableError("with samples that are no numbers")
    waveform = torch.from_numpy(samples).mean(1)
    if samples.shape[1] > 1:
        changes.append("mixed down to one channel")
    if rate != RATE:
        waveform = torchaudio.functional.resample(waveform, rate, RATE)
        changes.append(f"resampled from {rate} Hz")
    if len(waveform) != SAMPLES:
        changes.append("padded to 4 s" if len(waveform) < SAMPLES else "cut to 4 s")
    if not len(waveform) or waveform.abs().max() < 1e-5:
        raise UnusableError("silent")
    return F.pad(waveform, (0, max(0, SAMPLES - len(waveform))))[:SAMPLES], changes


def transpose(waveform, semitones):
    """Resample a note, so that it sounds `semitones` higher, and shorter, than it was: (SAMPLES,) -> (SAMPLES,).

    By a ratio of small numbers, within two cents: the filters of `resample` are as many as its denominator.
    """
    if not semitones:
        return waveform
    ratio = Fraction(2 ** (semitones / 12)).limit_denominator(50)
    shifted = torchaudio.functional.resample(waveform, ratio.numerator, ratio.denominator)
    return F.pad(shifted, (0, max(0, SAMPLES - len(shifted))))[:SAMPLES]


class Timbre(NamedTuple):
    """A built-in family: additive synthesis of harmonics h with amplitudes h^-rolloff, shaped in time."""

    pitches: tuple
    rolloff: float  # how fast harmonics weaken
    attack: float  # seconds
    decay: float  # seconds to fall by 1/e while the note is held; inf where it is blown or sung
    stiffness: float = 0.0  # how far harmonics are sharp: f_h = h f sqrt(1 + stiffness h^2)
    vibrato: float = 0.0  # semitones
    breath: float = 0.0  # noise, relative to the tone
    pluck: float = 0.0  # where a string is plucked, as a share of its length
    odd: float = 1.0  # weight of the even harmonics
    formants: tuple = ()  # Hz


TIMBRES = {
    "bass": Timbre((28, 55), rolloff=1.6, attack=0.008, decay=1.4, stiffness=5e-5, pluck=0.2),
    "brass": Timbre((40, 83), rolloff=0.8, attack=0.06, decay=math.inf, vibrato=0.05),
    "flute": Timbre((60, 96), rolloff=2.4, attack=0.09, decay=math.inf, vibrato=0.15, breath=0.02),
    "guitar": Timbre((40, 83), rolloff=1.1, attack=0.004, decay=0.9, stiffness=3e-5, pluck=0.13),
    "keyboard": Timbre((28, 99), rolloff=1.5, attack=0.003, decay=1.2, stiffness=3e-4, odd=0.7),
    "vocal": Timbre((43, 84), rolloff=1.2, attack=0.12, decay=math.inf, vibrato=0.3, formants=(600, 1100, 2600)),
}
BUILT_IN = "built-in additive synthesiser"
INSTRUMENTS = {"train": range(8), "valid": range(8, 10), "test": range(10, 12)}  # of every built-in family
NOTES_EACH = 24  # of every built-in instrument


def synthesise(note):
    """One note of a built-in instrument, held for three seconds: (SAMPLES,), the same in every run."""
    timbre = TIMBRES[note.family]
    instrument = random_generator("instrument", note.instrument)
    rolloff, attack, decay, vibrato, breath, pluck = (
        value * math.exp(0.25 * torch.randn((), generator=instrument))
        for value in (timbre.rolloff, timbre.attack, timbre.decay, timbre.vibrato, timbre.breath, timbre.pluck)
    )
    colour = (0.3 * torch.randn(64, generator=instrument)).exp()  # of every harmonic
    generator = random_generator("note", note.name)
    t = torch.arange(SAMPLES) / RATE
    frequency = 440 * 2 ** ((note.pitch - 69) / 12)
    wobble = vibrato * math.log(2) / 12 * torch.sin(2 * math.pi * 5.5 * t) / (2 * math.pi * 5.5) * (t > 0.3)
    phase = 2 * math.pi * frequency * (t + wobble)
    h = torch.arange(1, 65)
    sharp = h * (1 + timbre.stiffness * h**2) ** 0.5
    h, sharp, colour = (v[sharp * frequency < 0.47 * RATE] for v in (h, sharp, colour))
    softness = 0.6 * (1 - note.velocity / 127)  # soft notes are duller
    amplitude = colour * h ** -(rolloff + softness)
    amplitude[1::2] *= timbre.odd
    if pluck:
        amplitude = amplitude * torch.sin(math.pi * h * pluck).abs()
    for formant in timbre.formants:
        amplitude = amplitude * (1 + 3 * torch.exp(-(((h * frequency - formant) / 250) ** 2)))
    start = torch.rand(len(h), generator=generator)[:, None] * 2 * math.pi
    fall = torch.exp(-t / decay * (1 + 0.15 * (h[:, None] - 1)))  # high harmonics die first
    tone = (amplitude[:, None] * fall * torch.sin(sharp[:, None] * phase + start)).sum(0)
    tone = tone / tone.abs().max() + breath * torch.randn(SAMPLES, generator=generator)
    envelope = (t / attack).clamp(max=1) * torch.exp(-(t - 3).clamp(min=0) / 0.08)
    return 0.6 * note.velocity / 127 * envelope * tone


def built_in_notes(split, families):
    """The notes of the built-in instruments: pitches spread over their family's range, three velocities."""
    notes = []
    for family in families:
        low, high = TIMBRES[family].pitches
        for k in INSTRUMENTS[split]:
            for i in range(NOTES_EACH):
                pitch = low + round((high - low) * (i + 0.5 * (k % 2)) / (NOTES_EACH - 0.5))
                velocity, instrument = (50, 75, 100)[(i + k) % 3], f"{family}_built-in_{k:03}"
                notes.append(Note(f"{instrument}-{pitch:03}-{velocity:03}", family, pitch, instrument, velocity))
    return notes


def nsynth_notes(folder, families):
    """The notes of one official NSynth folder (`examples.json`, `audio/*.wav` or `.flac`), and how many are missing.

    Raises click.UsageError where there is no examples.json, it is damaged, or no note of the families is there.
    """
    listing = folder / "examples.json"
    if not listing.is_file():
        raise click.UsageError(f"{folder}: no examples.json; expected NSynth's folders nsynth-train, -valid and -test")
    notes, missing = [], 0
    there = {path.name: path for path in sorted((folder / "audio").glob("*")) if path.suffix in (".flac", ".wav")}
    try:
        for name, about in sorted(json.loads(listing.read_text()).items()):
            family, pitch = about["instrument_family_str"], int(about["pitch"])
            path = there.get(f"{name}.wav") or there.get(f"{name}.flac")
            if family in families and not 0 <= pitch < PITCHES:
                raise ValueError(f"{name} has pitch {pitch}")
            if family in families and path:
                notes.append(Note(name, family, pitch, about["instrument_str"], int(about["velocity"]), path))
            missing += family in families and not path
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.UsageError(f"{listing} is damaged, or not NSynth's ({error})") from error
    if not notes:
        raise click.UsageError(f"{folder}: none of the {missing} notes of {', '.join(families)} it lists is in audio/")
    return notes, missing


# ---------------------------------------------------------------- Data: the cache of spectrograms

CACHE_VERSION = 1  # to be raised whenever what is cached changes
CHUNK = 32  # notes computed at a time


class Split(NamedTuple):
    """The notes of one split: their levels (n, bins, T) on disk, in half precision, their pitch and family (n,)."""

    notes: list
    levels: np.ndarray
    pitch: torch.Tensor
    family: torch.Tensor

    def batch(self, index):
        """Levels (B, bins, T), pitch and family (B,) of the notes at `index`, a tensor or list of B numbers."""
        index = torch.as_tensor(index)
        return torch.from_numpy(self.levels[index.numpy()]).float(), self.pitch[index], self.family[index]

    def waveforms(self, index):
        """The notes at `index` as they sound: (B, SAMPLES)."""
        return torch.stack([waveform_of(self.notes[i])[0] for i in index])


def waveform_of(note):
    """(SAMPLES,), and what of the file had to be changed; raises UnusableError as `read_note` does."""
    waveform, changes = (synthesise(note), []) if note.path is None else read_note(note.path)
    return transpose(waveform, note.semitones), changes


def prepare(note, spectrogram):
    """One note -> levels (bins, T) in half precision, or None, and what had to be changed or is wrong."""
    try:
        waveform, changes = waveform_of(note)
    except UnusableError as fault:
        return None, [f"left out: {fault}"]
    return spectrogram(waveform[None])[0].half().numpy(), changes


def cache_key(notes, spectrogram):
    """What a cache's name hangs on: the version, the notes with their files' sizes and times, the settings."""
    digest = hashlib.sha256(
        f"{CACHE_VERSION} {spectrogram.representation} {spectrogram.n_fft} {spectrogram.bins}".encode()
    )
    for note in notes:
        file = note.path.stat() if note.path else None
        digest.update(f"{note} {file and (file.st_size, file.st_mtime_ns)}".encode())
    return digest.hexdigest()[:16]


def say_changes(split, notes, seen, example):
    """One line for every kind of change made to the notes, with how many had it, and one of them."""
    for change, count in seen.most_common():
        click.echo(f"{split}: {count} of {len(notes)} notes {change}, {example[change]} for one")


def write_cache(path, notes, spectrogram, split):
    """Compute the levels of all notes, in as many threads as there are cores, into `path`; returns the notes used.

    Raises click.ClickException where the disk is full, or no note can be used.
    """
    seen, example, used = Counter(), {}, []
    size = len(notes) * spectrogram.bins * spectrogram.frames(SAMPLES) * 2 / 1e9
    threads, cores = torch.get_num_threads(), os.cpu_count()
    torch.set_num_threads(1)
    wait = 0 if sys.stderr.isatty() else 30
    try:
        with ThreadPoolExecutor(cores) as pool, path.open("wb") as file:
            bar = tqdm(
                total=len(notes), desc=f"{split}: {size:.1f} GB", unit=" notes", delay=wait, mininterval=wait or 0.1
            )
            for first in range(0, len(notes), CHUNK * cores):
                some = notes[first : first + CHUNK * cores]
                for note, (levels, changes) in zip(
                    some, pool.map(lambda n: prepare(n, spectrogram), some), strict=True
                ):
                    for change in changes:
                        seen[change] += 1
                        example.setdefault(change, note.name)
                    if levels is not None:
                        file.write(levels.tobytes())
                        used.append(note)
                bar.update(len(some))
            bar.close()
            file.flush()
            os.fsync(file.fileno())
            seconds = bar.format_dict["elapsed"]
    except OSError as error:
        path.unlink(missing_ok=True)
        raise click.ClickException(
            f"{path.parent}: no {size:.1f} GB cache can be written ({error.strerror})"
        ) from error
    finally:
        torch.set_num_threads(threads)
    say_changes(split, notes, seen, example)
    if not used:
        path.unlink()
        raise click.ClickException(f"{split}: none of {len(notes)} notes can be used")
    click.echo(
        f"{split}: {len(used)} notes cached in {seconds:.1f} s, {len(notes) / seconds:.0f} notes/s on {cores} cores"
    )
    return used


def cached(split, notes, spectrogram, families, folder):
    """The levels of a split, memory-mapped from `folder`, and computed first where they are not there.

    A cache counts once its .json is there, which is written last.
    """
    stem = folder / f"{split}-{spectrogram.representation}-{cache_key(notes, spectrogram)}"
    data, listing = stem.with_suffix(".f16"), stem.with_suffix(".json")
    shape = (spectrogram.bins, spectrogram.frames(SAMPLES))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = json.loads(listing.read_text()) if listing.is_file() else []
        if not names or data.stat().st_size != len(names) * 2 * math.prod(shape):
            listing.unlink(missing_ok=True)
            partial = data.with_suffix(f".{os.getpid()}.partial")  # another run may be writing the same cache
            names = [(note.name, note.semitones) for note in write_cache(partial, notes, spectrogram, split)]
            partial.replace(data)
            write_json(listing, names)
    except OSError as error:
        raise click.UsageError(f"--cache {folder} cannot be used: {error.strerror}") from error
    by_name = {(note.name, note.semitones): note for note in notes}
    used = [by_name[tuple(name)] for name in names]
    return Split(
        used,
        np.memmap(data, np.float16, "r", shape=(len(used), *shape)),
        torch.tensor([note.pitch for note in used]),
        torch.tensor([families.index(note.family) for note in used]),
    )


# ---------------------------------------------------------------- Data: download

ARCHIVES = "http://download.magenta.tensorflow.org/datasets/nsynth/nsynth-{split}.jsonwav.tar.gz"


def fetch(url, path):
    """Download a file, going on where an earlier download stopped, and compare it with the MD5 the server names.

    Google's storage names one in `x-goog-hash`; where there is none, only the length is compared. Raises
    click.ClickException where the server cannot be reached, stops short, or the sum is another.
    """
    partial = path.with_name(path.name + ".partial")
    begun = partial.stat().st_size if partial.is_file() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            begun = begun if response.status == 206 else 0
            total = begun + int(response.headers["Content-Length"])
            named = ",".join(response.headers.get_all("x-goog-hash", []))  # one header, or one a sum
            sums = dict(part.strip().split("=", 1) for part in named.split(",") if part)
            bar = tqdm(total=total, initial=begun, desc=path.name, unit="B", unit_scale=True, mininterval=1)
            with partial.open("ab" if begun else "wb") as file, bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # more is here than there: of another file, or of this one unchecked
            partial.unlink()
            raise click.ClickException(f"{partial} was not the beginning of {url}; it was removed") from error
        raise click.ClickException(f"{url}: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise click.ClickException(f"{url}: {error}; the same command goes on from {partial}") from error
    if partial.stat().st_size != total:
        raise click.ClickException(f"{url} stopped early; the same command goes on from {partial}")
    if "md5" in sums:
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").digest()
        if base64.b64encode(digest).decode() != sums["md5"]:
            partial.unlink()
            raise click.ClickException(f"{url}: the file that came is not the server's (MD5); it was removed")
    partial.replace(path)


def download_nsynth(root):
    """Fetch and unpack the official archives of all splits that are not in `root` yet: over 20 GB packed."""
    for split in SPLITS:
        if (root / f"nsynth-{split}" / "examples.json").is_file():
            continue
        url = ARCHIVES.format(split=split)
        archive, unpacking = root / Path(url).name, root / f"nsynth-{split}.partial"
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not archive.is_file():
                fetch(url, archive)
            with tarfile.open(archive) as tar:
                tar.extractall(unpacking, filter="data")
            (unpacking / f"nsynth-{split}").replace(root / f"nsynth-{split}")
            unpacking.rmdir()
            archive.unlink()
        except (OSError, tarfile.TarError, EOFError) as error:
            raise click.ClickException(f"{archive} cannot be unpacked: {error}") from error


class Notes:
    """The three splits; `source` says whose notes they are."""

    def __init__(self, data_root, families, semitones, spectrogram, cache):
        self.families, self.source = families, BUILT_IN
        if data_root:
            self.source = f"notes in NSynth's layout, folder {data_root.name}"
        for split in SPLITS:
            if data_root:
                notes, missing = nsynth_notes(data_root / f"nsynth-{split}", families)
            else:
                notes, missing = built_in_notes(split, families), 0
            if missing:
                click.echo(f"{split}: {missing} of {len(notes) + missing} notes that examples.json lists are not there")
            if split == "train":
                moves = range(-semitones, semitones + 1)
                notes = [
                    n._replace(pitch=n.pitch + k, semitones=k) for n in notes for k in moves if 0 <= n.pitch + k < 128
                ]
            setattr(self, split, cached(split, notes, spectrogram, families, cache))


# ---------------------------------------------------------------- Model

PATCH = 4  # frames that one convolution takes together, in both steps
START_NOTES = 1000  # from which the start is computed


def principal(x, n):
    """The n principal components of the rows of x: mean (k,), scales (n,), directions (k, n) of norm 1.

    Through the smaller of the two Gram matrices; where the data have fewer components the rest have scale 0.
    """
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
    """p(z | y) after training: a Gaussian for every family, its mean quadratic in the pitch.

    N(0, I) is what training pulls every posterior towards, not what the posteriors of all notes add up to; its draws
    hold latents that do not belong together, or contradict the label. A Gaussian fitted to the posteriors afterwards
    draws better (ex-post density estimation, Ghosh et al. 2020). Until it is fitted, and for families without notes, it
    is N(0, I). A model whose label has no pitch, or no family, has one mean for all pitches, or one Gaussian for all.
    """

    def __init__(self, d, condition, n_families):
        super().__init__()
        self.by_pitch, self.by_family = condition in ("pitch", "both"), condition in ("family", "both")
        groups = n_families if self.by_family else 1
        self.register_buffer("mean", torch.zeros(groups, 3 if self.by_pitch else 1, d))
        self.register_buffer("factor", torch.eye(d).repeat(groups, 1, 1))  # of the covariance, by Cholesky
        self.register_buffer("lowest", torch.zeros(groups))  # and highest pitch fitted: no parabola goes on beyond
        self.register_buffer("highest", torch.full((groups,), float(PITCHES)))

    def group(self, family, like):
        """The Gaussian that each of `like` (n, ...) is drawn from: (n,)."""
        return family if self.by_family else torch.zeros_like(like[:, 0], dtype=torch.long)

    def powers(self, pitch, group):
        """1, x, x^2 of the pitch in octaves from middle C: (n, 3), or only the first, (n, 1)."""
        one = torch.ones_like(group, dtype=torch.float)
        if not self.by_pitch:
            return one[:, None]
        x = (torch.minimum(torch.maximum(pitch.float(), self.lowest[group]), self.highest[group]) - 60) / 12
        return torch.stack([one, x, x.square()], dim=1)

    def forward(self, noise, pitch=None, family=None):
        """Standard normal noise (n, D), and the label as far as there is one, pitch and family (n,) -> z (n, D)."""
        group = self.group(family, noise)
        mean = (self.powers(pitch, group)[:, :, None] * self.mean[group]).sum(1)
        return mean + (self.factor[group] @ noise[:, :, None])[:, :, 0]

    @torch.no_grad()
    def fit(self, mu, logvar, pitch, family):
        """Fit to posteriors, (n, D) each, of notes of pitch and family (n,).

        Their covariance is that of their means about the curve, and their mean variance. The curve has a ridge of 1,
        and N(0, I) weighs as much as one note, so that few notes do no harm.
        """
        of = self.group(family, mu)
        for group in of.unique():
            some = of == group
            self.lowest[group], self.highest[group] = pitch[some].min(), pitch[some].max()
            x = self.powers(pitch[some], of[some])
            self.mean[group] = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ mu[some])
            rest = mu[some] - x @ self.mean[group]
            scatter = rest.T @ rest + torch.diag(1 + logvar[some].exp().sum(0))
            self.factor[group] = torch.linalg.cholesky(scatter / (1 + len(rest)))


class NoteVAE(nn.Module):
    """p(z) = N(0, I), p(x | z, y) Gaussian around a decoded spectrogram, q(z | x, y) a Gaussian of diagonal covariance.

    y, the label, is one-hot of pitch, of family, of both, or empty (Sohn et al. 2015). Convolutions run along time,
    with the frequency bins as channels: a note's partials move together, and no filter that is local in frequency
    would know of them. `start_at` makes of the untrained net a principal component analysis in three steps, the
    linear VAE's optimum (Lucas et al. 2019), which training leaves behind. `prior` is fitted when it has ended.
    """

    def __init__(self, *, representation, n_fft, n_mels, d, channels, condition, families):
        super().__init__()
        self.d, self.condition = d, condition
        self.spectrogram = Spectrogram(representation, n_fft, n_mels)
        bins, self.frames = self.spectrogram.bins, SAMPLES // self.spectrogram.hop + 1
        self.n_labels = {"none": 0, "pitch": PITCHES, "family": len(families), "both": PITCHES + len(families)}[
            condition
        ]
        self.prior = FittedPrior(d, condition, len(families))
        self.register_buffer("pitches", torch.eye(PITCHES), persistent=False)
        self.register_buffer("families", torch.eye(len(families)), persistent=False)
        self.coarse = math.ceil(self.frames / PATCH**2)  # steps in time that the latents see
        wide = channels * self.coarse
        self.encoder = nn.ModuleDict(
            {
                "patches": nn.Conv1d(bins, channels, PATCH, stride=PATCH),
                "fine": self.blocks(channels, 1),
                "merge": nn.Conv1d(channels, channels, PATCH, stride=PATCH),
                "coarse": self.blocks(channels, 2),
                "posterior": nn.Linear(wide + self.n_labels, 2 * d),
            }
        )
        self.decoder = nn.ModuleDict(
            {
                "latents": nn.Linear(d + self.n_labels, wide),
                "coarse": self.blocks(channels, 2),
                "split": nn.ConvTranspose1d(channels, channels, PATCH, stride=PATCH),
                "fine": self.blocks(channels, 1),
                "patches": nn.ConvTranspose1d(channels, bins, PATCH, stride=PATCH),
            }
        )

    @staticmethod
    def blocks(channels, n):
        """Residual blocks that start as the identity."""
        blocks = nn.Sequential(*[ResBlock(channels, norm=True, conv=nn.Conv1d) for _ in range(n)])
        for block in blocks:
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
        return blocks

    def label(self, pitch, family):
        """MIDI pitch (B,) and index of the family (B,) -> (B, n_labels); None for a model without a label."""
        if self.condition == "none":
            return None
        known = {"pitch": (self.pitches, pitch), "family": (self.families, family)}
        names = ("pitch", "family") if self.condition == "both" else (self.condition,)
        # A negative number would count from the end.
        parts = [known[name][0][torch.where(known[name][1] < 0, PITCHES, known[name][1])] for name in names]
        return torch.cat(parts, dim=1)

    @staticmethod
    def with_label(x, label):
        """x (B, n) and label (B, n_labels) side by side."""
        return x if label is None else torch.cat([x, label], dim=1)

    def encode(self, level, label):
        """Levels (B, bins, T), label (B, n_labels) -> mu, logvar, each (B, D); no posterior is wider than the prior."""
        x = F.pad(self.spectrogram.scale(level), (0, self.coarse * PATCH**2 - self.frames))
        for name in ("patches", "fine", "merge", "coarse"):
            x = self.encoder[name](x)
        mu, width = self.encoder["posterior"](self.with_label(x.flatten(1), label)).float().chunk(2, dim=1)
        return mu, -F.softplus(width)

    def decode(self, z, label):
        """z (B, D), label (B, n_labels) -> scaled levels (B, bins, T); `spectrogram.unscale` makes levels of them."""
        h = self.decoder["latents"](self.with_label(z, label)).unflatten(1, (-1, self.coarse))
        for name in ("coarse", "split", "fine", "patches"):
            h = self.decoder[name](h)
        return h[:, :, : self.frames].float()

    @torch.no_grad()
    def start_at(self, level, label):
        """Set the scaling from levels (n, bins, T), and the net to a principal component analysis of them.

        Principal components of patches of frames, of patches of those, and of what the label (n, n_labels) does not
        explain of a whole note; latents start with variance 1.
        """
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
        one = torch.ones(len(h), 1)
        y = one if label is None else self.with_label(label, one)
        by_label = torch.linalg.solve(
            y.T @ y + torch.eye(y.shape[1]), y.T @ h
        )  # ridge regression, (n_labels + 1, wide)
        mean, scales, directions = principal(h - y @ by_label, self.d)
        inward = torch.where(scales > 1e-3 * scales[0] + 1e-6, directions / scales, 0.0)  # none of too few notes
        posterior, latents = self.encoder["posterior"], self.decoder["latents"]
        posterior.weight.zero_()
        posterior.weight[: self.d] = torch.cat([inward.T, -(by_label[:-1] @ inward).T], dim=1)
        posterior.bias[: self.d] = -(by_label[-1] + mean) @ inward
        posterior.bias[self.d :] = 3.0
        latents.weight.copy_(torch.cat([directions * scales, by_label[:-1].T], dim=1))
        latents.bias.copy_(by_label[-1] + mean)


# ---------------------------------------------------------------- Objective


def louder(level, gain):
    """Levels (B, bins, T) of notes made louder by factors `gain` (B,)."""
    return log_compress(gain[:, None, None] * log_expand(level))


def objective(model, level, label, noise, beta):
    """The loss of a batch, and its terms in nats per note: levels (B, bins, T), label (B, n_labels), noise (B, D).

    The Gaussian's variance is the batch's mean squared error, the most likely one (sigma-VAE, Rybkin et al. 2021), so
    that beta = 1 is the evidence bound whatever the net can reach. The loss is in nats per value of the spectrogram.
    """
    mu, logvar = model.encode(level, label)
    decoded = model.decode(reparameterize(mu, logvar, noise), label)
    error = (decoded - model.spectrogram.scale(level)).square().mean()
    kl = gaussian_kl(mu, logvar).sum(1).mean()
    values = level[0].numel()
    reconstruction = 0.5 * values * (error.log() + 1 + math.log(2 * math.pi))
    terms = {"loss/reconstruction": reconstruction, "loss/kl": kl, "loss/sigma": error.sqrt()}
    return (reconstruction + beta * kl) / values, terms


def update(compute, model, optimizer, level, label, noise, beta, lr, options):
    """One step of Adam on what `compute` (the objective, maybe compiled) returns; returns the values to log."""
    with autocast(level.device, options["precision"]):
        loss, terms = compute(model, level, label, noise, beta)
    return descend(loss, terms, optimizer, lr, CLIP) | {"schedule/beta": beta, "schedule/lr": lr}


# ---------------------------------------------------------------- Evaluation

EVALUATED = 500  # notes of the test split, and draws of a conditional model, that a run is judged by
AT_ONCE = 33  # notes decoded at a time
STANDARD = 200  # draws from N(0, I), to compare


def spread(n, most):
    """At most `most` of the numbers 0 to n - 1, spread evenly: a tensor."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()


LOWEST_PITCH, HIGHEST_PITCH = 21, 108  # that `detect_pitch` can tell: the keys of a piano


def detect_pitch(waveform, lowest=27.0, highest=4500.0):
    """The MIDI pitch of single notes, (B, samples) -> (B,), to a fraction of a semitone, by YIN; from A0 to C8.

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
        found.append((69 + 12 * torch.log2(RATE / period / 440))[loud].median())
    return torch.stack(found) if found else torch.zeros(0)


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
    def features(self, magnitude):
        """STFT magnitudes (B, 513, T) -> (B, 6, 80): levels averaged over the spans."""
        level = self.mel.level(magnitude)
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
            gain = 10 ** (0.6 * torch.rand(self.BATCH, generator=generator) - 0.3)
            x = louder(features[index].roll(move, 2), gain)
            loss = F.cross_entropy(self.net((x - self.mean) / self.std), family[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.eval()

    @torch.no_grad()
    def forward(self, features):
        """Features (B, 6, 80) -> the family's index (B,)."""
        return self.net((features - self.mean) / self.std).argmax(1)


def train_classifier(notes):
    """A FamilyClassifier of the training notes as they are, the same in every run."""
    own = untransposed(notes.train, 5000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = FamilyClassifier(len(notes.families))
        features = [classifier.features(stft(notes.train.waveforms(some))) for some in own.split(AT_ONCE)]
        return classifier.fit(torch.cat(features), notes.train.family[own])


def stft(waveform):
    """The magnitudes all sound is compared by, n_fft 1024: (B, samples) -> (B, 513, T)."""
    return Spectrogram("stft", 1024, 0).magnitude(waveform)


def sound(model, level):
    """Levels (B, bins, T) -> waveforms (B, samples), through Griffin-Lim, on the CPU."""
    magnitude = model.spectrogram.stft_of(log_expand(level)).cpu()
    return torch.cat([griffin_lim(part) for part in magnitude.split(AT_ONCE)])


@torch.no_grad()
def reconstruct(model, split, index):
    """Decoded from the posterior means of the notes at `index`: levels (n, bins, T), mu, logvar (n, D), on the CPU."""
    device, parts = model.spectrogram.mean.device, []
    for some in index.split(AT_ONCE):
        level, pitch, family = (value.to(device) for value in split.batch(some))
        label = model.label(pitch, family)
        mu, logvar = model.encode(level, label)
        parts.append((model.spectrogram.unscale(model.decode(mu, label)), mu, logvar))
    return tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))


@torch.no_grad()
def fit_prior(model, split):
    """Fit the model's prior to the posteriors of at most 2,000 of a split's notes, as they are."""
    device, index = model.spectrogram.mean.device, untransposed(split, 2000)
    parts = []
    for some in index.split(AT_ONCE):
        level, pitch, family = (value.to(device) for value in split.batch(some))
        parts.append(model.encode(level, model.label(pitch, family)))
    mu, logvar = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    model.prior.cpu().fit(mu, logvar, split.pitch[index], split.family[index])
    model.prior.to(device)


def watch(model, split, most=200):
    """What is watched while training: mean LSD and KL of at most so many notes."""
    index = spread(len(split.notes), most)
    decoded, mu, logvar = reconstruct(model, split, index)
    lsd = torch.cat(
        [
            log_spectral_distance(a, split.batch(i)[0])
            for a, i in zip(decoded.split(AT_ONCE), index.split(AT_ONCE), strict=True)
        ]
    )
    return {"lsd": lsd.mean().item(), "kl": gaussian_kl(mu, logvar).sum(1).mean().item()}


def untransposed(split, most):
    """At most so many numbers of notes that were not transposed, spread evenly."""
    own = torch.tensor([i for i, note in enumerate(split.notes) if not note.semitones])
    return own[spread(len(own), most)]


def by_components(model, notes, level):
    """The levels (n, bins, T) as D principal components of at most 2,000 training notes give them back."""
    train_level = notes.train.batch(untransposed(notes.train, 2000))[0].flatten(1)
    mean, _, directions = principal(train_level, model.d)
    return (((level.flatten(1) - mean) @ directions) @ directions.T + mean).clamp(min=0).view_as(level)


def distances(model, decoded, level, reference):
    """How far decoded levels (n, bins, T) are from the notes' own and, as sound, from their magnitudes: means, in dB.

    reference (n, 513, T') are the STFT magnitudes of the notes' waveforms, whatever the model sees.
    """
    heard = stft(sound(model, decoded))
    return {
        "lsd": log_spectral_distance(decoded, level).mean().item(),
        "lsd_sound": log_spectral_distance(log_compress(heard), log_compress(reference)).mean().item(),
        "convergence_sound": spectral_convergence(heard, reference).mean().item(),
    }


def evaluate(model, notes):
    """The numbers a run is judged by, on notes of the test split: reconstruction, and what it is held against.

    "pca": as many principal components as the model has latents; "ceiling": the notes' own spectrograms, through
    Griffin-Lim. Of conditional models the draws are judged as well.
    """
    index = spread(len(notes.test.notes), EVALUATED)
    level, pitch, family = notes.test.batch(index)
    waveforms = notes.test.waveforms(index)
    reference = stft(waveforms)
    decoded, mu, logvar = reconstruct(model, notes.test, index)
    scores = distances(model, decoded, level, reference)
    pca = distances(model, by_components(model, notes, level), level, reference)
    ceiling = distances(model, level, level, reference)
    del ceiling["lsd"]
    scores |= {f"{name}_pca": value for name, value in pca.items()}
    scores |= {f"{name}_ceiling": value for name, value in ceiling.items()}
    scores |= {
        "lsd_below_pca": 1 - scores["lsd"] / scores["lsd_pca"],
        "kl": gaussian_kl(mu, logvar).sum(1).mean().item(),
        "active_units": int((mu.var(0) > 0.01).sum()),
        "notes": len(index),
    }
    if model.condition != "none":
        scores |= evaluate_draws(model, notes, waveforms, reference, pitch, family)
    return scores


@torch.no_grad()
def draw(model, pitch, family, *key, fitted=True):
    """Notes drawn with labels pitch and family (n,): levels (n, bins, T), on the CPU.

    From the fitted prior, or from N(0, I); `key` makes the random numbers.
    """
    device, parts = model.spectrogram.mean.device, []
    noise = torch.randn(len(pitch), model.d, generator=random_generator("draw", *key))
    for some in zip(noise.split(AT_ONCE), pitch.split(AT_ONCE), family.split(AT_ONCE), strict=True):
        z, *label = (value.to(device) for value in some)
        z = model.prior(z, *label) if fitted else z
        parts.append(model.spectrogram.unscale(model.decode(z, model.label(*label))).cpu())
    return torch.cat(parts)


def evaluate_draws(model, notes, waveforms, reference, pitch, family):
    """Whether draws are what was asked for: pitches and families of training notes, each with a draw.

    Draws are from the fitted prior and, "standard", from N(0, I). Pitch is measured by `detect_pitch` where it can be,
    the family by a classifier trained on real training notes; both are checked on real notes of the test split, whose
    waveforms, magnitudes, pitch and family are given.
    """
    asked = torch.randint(len(notes.train.notes), (EVALUATED,), generator=random_generator("asked"))
    asked_pitch, asked_family = notes.train.pitch[asked], notes.train.family[asked]
    heard = sound(model, draw(model, asked_pitch, asked_family, "evaluate"))
    few = sound(model, draw(model, asked_pitch[:STANDARD], asked_family[:STANDARD], "evaluate", fitted=False))
    judged = {
        "": (heard, asked_pitch, asked_family),
        "_standard": (few, asked_pitch[:STANDARD], asked_family[:STANDARD]),
        "_real": (waveforms, pitch, family),
    }
    scores = {}
    if model.condition in ("pitch", "both"):
        for name, (what, wanted, _) in judged.items():
            can = (wanted >= LOWEST_PITCH) & (wanted <= HIGHEST_PITCH)
            within = (detect_pitch(what[can]) - wanted[can]).abs() < 0.5
            scores[f"pitch_within_50_cents{name}"] = within.float().mean().item()
            scores[f"pitches_measured{name}"] = len(within)
    if model.condition in ("family", "both"):
        classifier = train_classifier(notes)
        for name, (what, _, wanted) in judged.items():
            right = classifier(classifier.features(reference if name == "_real" else stft(what))) == wanted
            scores[f"family_agreement{name}"] = right.float().mean().item()
    return scores


# ---------------------------------------------------------------- Figures and sounds

COLUMNS = 7  # of an interpolation


def lerp(a, b, share):
    """The straight line from a to b, (D,): share (n,) in [0, 1] -> (n, D)."""
    return (1 - share[:, None]) * a + share[:, None] * b


def slerp(a, b, share):
    """Spherical interpolation (Shoemake 1985) of the directions of a and b, (D,), and linear of their lengths.

    Draws of N(0, I) have lengths near sqrt(D); the straight line between two passes through points much nearer to 0,
    such as the prior hardly ever draws. share (n,) in [0, 1] -> (n, D).
    """
    u, v = F.normalize(a, dim=0), F.normalize(b, dim=0)
    angle = torch.arccos((u @ v).clamp(-1, 1))
    if angle.sin() < 1e-4:  # one direction, or two opposite ones with no plane of their own
        return lerp(a, b, share)
    turned = torch.sin((1 - share[:, None]) * angle) * u + torch.sin(share[:, None] * angle) * v
    return lerp(a.norm(), b.norm(), share) * turned / angle.sin()


def show_levels(rows, row_names, titles, model):
    """Spectrograms as a figure: `rows` of levels (n, bins, T), time to the right, frequency upwards."""
    columns = len(rows[0])
    figure = Figure(figsize=(1.5 * columns + 0.8, 1.5 * len(rows) + 0.4), dpi=110, layout="constrained")
    every = figure.subplots(len(rows), columns, squeeze=False)
    top = max(row.max() for row in rows)
    for r, row in enumerate(rows):
        for c, level in enumerate(row):
            axes = every[r][c]
            axes.imshow(level.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=top)
            axes.set(xticks=[], yticks=[])
            if titles and c + r * columns < len(titles):
                axes.set_title(titles[c + r * columns], fontsize=8)
        every[r][0].set_ylabel(row_names[r], fontsize=8)
    bins = "mel bands" if model.spectrogram.representation == "mel" else "0 to 8 kHz"
    every[-1][0].set_xlabel(f"4 s; {bins}", fontsize=7)
    return plotted(figure)


def stitched(waveforms, seconds=1.0):
    """The first so many seconds of each, faded out, one after the other: (n, samples) -> (n * samples',)."""
    parts = waveforms[:, : int(seconds * RATE)].clone()
    fade = RATE // 50
    parts[:, -fade:] *= torch.linspace(1, 0, fade)
    return parts.flatten()


def one_of_each(split, families):
    """Numbers of notes, one of every family that is there, from the middle of its notes."""
    members = [(split.family == k).nonzero()[:, 0] for k in range(len(families))]
    return torch.stack([numbers[len(numbers) // 2] for numbers in members if len(numbers)])


def name_of(notes, pitch, family, condition="both"):
    """What a figure calls a note, or the label that was asked for."""
    known = {"none": [], "pitch": [pitch], "family": [notes.families[family]], "both": [notes.families[family], pitch]}
    return ", ".join(str(v.item() if isinstance(v, torch.Tensor) else v) for v in known[condition])


def show_reconstructions(model, notes, run, step):
    """One test note of every family, above what is decoded from its posterior's mean; and both as sounds in turn."""
    index = one_of_each(notes.test, notes.families)
    level, pitch, family = notes.test.batch(index)
    decoded, _, _ = reconstruct(model, notes.test, index)
    titles = [name_of(notes, p, f) for p, f in zip(pitch, family, strict=True)]
    run.figure("reconstructions", show_levels([level, decoded], ["note", "decoded"], titles, model), step)
    pairs = torch.stack([notes.test.waveforms(index), sound(model, decoded)], dim=1).flatten(0, 1)
    run.sound("reconstructions", stitched(pairs, 2), step)


def show_draws(model, notes, run, step):
    """Twelve draws from the fitted prior, asked for labels of training notes where the model is conditional."""
    asked = torch.randint(len(notes.train.notes), (12,), generator=random_generator("asked for a figure"))
    pitch, family = notes.train.pitch[asked], notes.train.family[asked]
    levels = draw(model, pitch, family, "figure")
    titles = [name_of(notes, p, f, model.condition) for p, f in zip(pitch, family, strict=True)]
    run.figure("samples", show_levels(levels.split(6), ["", ""], titles, model), step)
    waveforms = sound(model, levels)
    for k, waveform in enumerate(waveforms):
        run.sound(f"sample-{k:02}", waveform, step)
    run.sound("samples", stitched(waveforms), step)


@torch.no_grad()
def show_interpolations(model, notes, run, step):
    """From one test note to one of another family, straight and spherical: a row a way, a sound a step, and all."""
    index = one_of_each(notes.test, notes.families)[[0, -1]]
    level, pitch, family = (value.to(model.spectrogram.mean.device) for value in notes.test.batch(index))
    label = model.label(pitch, family)
    mu, _ = model.encode(level, label)
    share = torch.linspace(0, 1, COLUMNS, device=mu.device)
    rows = []
    for name, way in (("linear", lerp), ("spherical", slerp)):
        decoded = model.decode(way(*mu, share), None if label is None else lerp(*label, share))
        rows.append(model.spectrogram.unscale(decoded).cpu())
        waveforms = sound(model, rows[-1])
        for k, waveform in enumerate(waveforms):
            run.sound(f"interpolation-{name}-{k}", waveform, step)
        run.sound(f"interpolation-{name}", stitched(waveforms), step)
    titles = [name_of(notes, pitch[0], family[0]), *[""] * (COLUMNS - 2), name_of(notes, pitch[1], family[1])]
    run.figure("interpolations", show_levels(rows, ["linear", "spherical"], titles, model), step)


@torch.no_grad()
def show_scale(model, notes, run, step):
    """One draw of every family, through an octave of pitches that the family was trained on, where it has one."""
    device, rows, names, waveforms = model.spectrogram.mean.device, [], [], []
    for family in range(len(notes.families)):
        known = set(notes.train.pitch[notes.train.family == family].tolist())
        starts = [p for p in sorted(known) if known.issuperset(range(p, p + 13))]
        if not starts:
            continue
        pitch = starts[len(starts) // 2] + torch.tensor([0, 2, 4, 5, 7, 9, 11, 12], device=device)
        noise = torch.randn(model.d, generator=random_generator("scale", family)).to(device).expand(len(pitch), -1)
        label = pitch, torch.full_like(pitch, family)
        decoded = model.decode(model.prior(noise, *label), model.label(*label))
        rows.append(model.spectrogram.unscale(decoded).cpu())
        names.append(f"{notes.families[family]}\nfrom {pitch[0]}")
        waveforms.append(stitched(sound(model, rows[-1]), 0.5))
        run.sound(f"scale-{notes.families[family]}", waveforms[-1], step)
    if rows:
        run.figure("scale", show_levels(rows, names, [], model), step)
        run.sound("scale", torch.cat(waveforms), step)


def show_latents(model, notes, run, step):
    """Posterior means of test notes on their first two principal components, coloured by family and by pitch."""
    index = spread(len(notes.test.notes), 1000)
    _, mu, _ = reconstruct(model, notes.test, index)
    mean, scales, directions = principal(mu, 2)
    x, y = ((mu - mean) @ directions).T
    share = scales.square() / mu.var(0, correction=0).sum()
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, name in enumerate(notes.families):
        chosen = notes.test.family[index] == k
        left.scatter(x[chosen], y[chosen], s=14, label=name, color=f"C{k}")
    left.legend(fontsize=8)
    points = right.scatter(x, y, s=14, c=notes.test.pitch[index], cmap="viridis")
    figure.colorbar(points, ax=right, label="pitch (MIDI)")
    for axes in (left, right):
        axes.set(xlabel=f"{share[0]:.0%} of the variance", ylabel=f"{share[1]:.0%}")
    run.figure("latents", plotted(figure), step)


def explore(model, notes, run, step):
    """All figures and sounds of a run."""
    show_reconstructions(model, notes, run, step)
    show_draws(model, notes, run, step)
    show_interpolations(model, notes, run, step)
    show_latents(model, notes, run, step)
    if model.condition in ("pitch", "both"):
        show_scale(model, notes, run, step)


# ---------------------------------------------------------------- Command line

PRESETS = {"nsynth": {"lr": 1e-3, "warmup": 0.3, "minutes": 15.0}}
MODEL_OPTIONS = ("representation", "n_fft", "n_mels", "d", "channels", "condition", "families")
# What a resumed run may change; the rest made its weights.
RESUMABLE = {
    "steps", "minutes", "device", "precision", "compile_model", "data_root", "download", "cache", "out", "resume",
    "dry_run",
}  # fmt: skip
CLIP = 1.0  # of the gradient's norm


class Families(click.ParamType):
    """Families with commas between them: "bass,flute" -> ["bass", "flute"]."""

    name = "families"

    def convert(self, value, param, ctx):
        names = value.split(",") if isinstance(value, str) else list(value)
        unknown = [name for name in names if name not in FAMILIES]
        if unknown or len(set(names)) < len(names):
            self.fail(f"{value!r}: expected different ones of {', '.join(FAMILIES)}", param, ctx)
        return names


def check_options(options):
    """Raise click.UsageError for options that do not go together."""
    if options["download"] and not options["data_root"]:
        raise click.UsageError(
            "--download fetches NSynth (over 20 GB); it needs --data-root, the folder to fetch it into"
        )
    if options["data_root"] and not options["download"] and not options["data_root"].is_dir():
        raise click.UsageError(f"--data-root {options['data_root']}: no such folder")


def load_notes(options, spectrogram):
    """The notes of the options; under torchrun process 0 makes the cache, and the others wait for it.

    Raises click.UsageError where there are no such notes.
    """
    if not options["data_root"] and not set(options["families"]) <= set(TIMBRES):
        raise click.UsageError(
            f"--families: the built-in synthesiser has {', '.join(TIMBRES)}; others need --data-root"
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    if options["download"] and dist.is_initialized():
        raise click.UsageError("--download: fetch the data in a single process first, then start several")
    if options["download"]:
        download_nsynth(options["data_root"])
    if rank > 0:
        dist.barrier()
    elif not options["data_root"]:
        click.echo(f"data: {BUILT_IN}; --data-root names a folder of real notes")
    notes = Notes(options["data_root"], options["families"], options["transpose"], spectrogram, options["cache"])
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return notes


def run_name(options):
    form = "vae-notes-{representation}-{condition}-D{d}-beta{beta:g}-seed{seed}"
    return form.format(**options)


@click.command(cls=PresetCommand, presets=PRESETS, context_settings={"show_default": True})
@click.option(
    "--dataset", type=click.Choice(list(PRESETS)), default="nsynth", help="Notes in NSynth's layout, or built-in."
)
@click.option("--families", type=Families(), default="bass,brass,flute,guitar,keyboard,vocal", help="Of instruments.")
@click.option(
    "--transpose", type=click.IntRange(0, 12), default=0, help="Semitones that training notes are also moved by."
)
@click.option(
    "--gain-db", type=FiniteRange(0), default=6.0, help="Training notes are made louder or softer by as much."
)
@click.option("--cache", type=FOLDER, default="data/spectrograms", help="Folder that keeps what was computed.")
@click.option("--representation", type=click.Choice(REPRESENTATIONS), default="stft", help="What the model sees.")
@click.option("--n-fft", type=click.IntRange(64, 8192), default=1024, help="Samples of a frame; hop = n_fft / 4.")
@click.option("--n-mels", type=click.IntRange(16), default=192, help="Bands of a mel spectrogram.")
@click.option("--D", "d", type=click.IntRange(1), default=32, help="Latents.")
@click.option("--channels", type=click.IntRange(8), default=256, help="Width of the convolutions, a multiple of 8.")
@click.option("--condition", type=click.Choice(["none", "pitch", "family", "both"]), default="none", help="The label.")
@click.pass_context
def main(context, **options):
    """Train a variational autoencoder on notes of instruments.

    \b
    python train_vae_audio.py --minutes 3
    python train_vae_audio.py --data-root nsynth --condition both
    python train_vae_audio.py --data-root nsynth --download --families guitar,keyboard
    python train_vae_audio.py --resume runs/vae-notes-stft-none-D32-beta1-seed0 --minutes 30
    """
    # 1. Check, load, build; go on from the checkpoint where there is one.
    settle_run(context, options, RESUMABLE, SCRIPT)
    check_options(options)
    if options["dry_run"]:
        click.echo(json.dumps(options, indent=2, default=str))
        return
    device = pick_device(options["device"])
    rank, world = start_distributed(device)
    torch.manual_seed(options["seed"])
    if options["channels"] % 8:
        raise click.UsageError(f"--channels {options['channels']} is no multiple of 8")
    try:
        model = NoteVAE(**{name: options[name] for name in MODEL_OPTIONS})
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    notes = load_notes(options, model.spectrogram)
    if not options["resume"]:
        level, pitch, family = notes.train.batch(spread(len(notes.train.notes), START_NOTES))
        model.start_at(level, model.label(pitch, family))
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"], eps=1e-6, fused=True)
    about = {
        "name": options["dataset"] if options["data_root"] else "built-in notes",
        "source": notes.source,
        "notes": {s: len(getattr(notes, s).notes) for s in SPLITS},
    }
    run, step, elapsed = start_run(options, SCRIPT, run_name(options), about, model, optimizer, device, rank, world)
    compute = torch.compile(objective) if options["compile_model"] else objective

    # 2. Train.
    mine, total = slice(rank * options["batch"], (rank + 1) * options["batch"]), world * options["batch"]

    def update_at(step, progress):
        generator = random_generator("batch", options["seed"], step)
        index = torch.randint(len(notes.train.notes), (total,), generator=generator)[mine]
        gain = 10 ** (options["gain_db"] / 20 * (2 * torch.rand(total, generator=generator)[mine] - 1))
        noise = torch.randn(total, model.d, generator=generator)[mine]
        level, pitch, family, gain, noise = (v.to(device) for v in (*notes.train.batch(index), gain, noise))
        beta = beta_at(progress, options["beta"], options["beta_from"], options["warmup"])
        lr = learning_rate_at(progress, step, options["lr"])
        label = model.label(pitch, family)
        return update(compute, model, optimizer, louder(level, gain), label, noise, beta, lr, options)

    def report(step, minutes, due):
        scores = {name: watch(model, getattr(notes, name)) for name in ("train", "valid")}
        run.scalars({f"{split}/{name}": v for split, values in scores.items() for name, v in values.items()}, step)
        if due:
            fit_prior(model, notes.train)
            explore(model, notes, run, step)
        return "LSD {valid[lsd]:.2f} dB (train {train[lsd]:.2f}), KL {valid[kl]:.0f} nats".format(**scores)

    step, minutes, complete = train(run, model, optimizer, options, device, rank, step, elapsed, update_at, report)

    # 3. Fit the prior, also to a run that was stopped; evaluate.
    if rank == 0:
        fit_prior(model, notes.train)
        run.save(model, optimizer, step, 60 * minutes)
    if rank == 0 and complete:
        click.echo("evaluating: some minutes on a CPU")
        scores = evaluate(model, notes)
        run.metrics(scores | {"step": step, "minutes": minutes, "data": notes.source})
        click.echo(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        click.echo(f"done: {run.folder}/metrics.json, figures and sounds; next: python export.py {run.folder}")
    elif rank == 0:
        click.echo(f"stopped at step {step}; go on with: python {SCRIPT}.py --resume {run.folder}")
    run.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
