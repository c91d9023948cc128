"""What two or more stages share: files, probability, layers, slots, sounds, notes, options, the run and its loop.

Shapes: B batch, N slots, D size of a latent vector, C, H, W channels, height, width; F, T frequency bins and frames.
"""

import contextlib
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchaudio.transforms import GriffinLim
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from recompose import LONGEST, SOUNDS, fit, read_sound, resample_sound, save_sound, write_atomically

# ---------------------------------------------------------------- Files

SPLITS = ("train", "valid", "test")
OPS = ("sum", "max", "min", "mean", "alpha")  # of `compose`


def write_json(path, content):
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=2, default=str, allow_nan=False) + "\n"))


def read_json(path):
    return json.loads(path.read_text())


def load_file(path, read, kinds, error):
    """read(path), a dict that holds `kinds` {name: type}; raises `error` where it is missing, damaged or another's."""
    try:
        content = read(path)
        if not all(isinstance(content[name], kind) for name, kind in kinds.items()):
            raise ValueError
    except Exception as fault:  # pickle, zip and JSON raise many kinds on a damaged file
        raise error(f"{path}: missing, damaged, or not the file that was expected") from fault
    return content


def split_files(root, suffixes, most, skipped=()):
    """{split: at most `most` paths} below `root`, not in `skipped` ones; click.UsageError where a split has none."""
    # 80, 10, 10 % by a hash of each path: none changes sides when others come.
    found, total = {split: [] for split in SPLITS}, 0
    for folder, folders, names in os.walk(root):  # one folder at a time: there may be millions of files
        place = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if name[0] != "." and (place / name).as_posix() not in skipped]
        for path in ((place / name).as_posix() for name in names if name[0] != "." and name.lower().endswith(suffixes)):
            share = int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest()) / 2**64
            files, total = found[SPLITS[(share >= 0.8) + (share >= 0.9)]], total + 1
            files.append((share, path))
            if len(files) > 2 * most:
                files[:] = sorted(files)[:most]  # millions of paths would take a gigabyte
    kept = {split: sorted(files)[:most] for split, files in found.items()}
    if split := next((split for split, files in kept.items() if not files), None):
        there = f"--data-root {root}: {total} files {', '.join(suffixes)} there and in folders in it, none for {split}"
        raise click.UsageError(f"{there} (names decide: 80 % train, 10 % valid, 10 % test); about 30 are mostly enough")
    if (used := sum(map(len, kept.values()))) < total:
        click.echo(f"{root}: {used:,} of {total:,} files are used")
    return {split: [path for _, path in files] for split, files in kept.items()}


class Reader:
    """Examples of `files`, read when needed, by number, `most` kept; click.UsageError where load refuses all."""

    def __init__(self, files, load, most, split):
        self.files, self.load, self.most, self.split, self.kept, self.left_out = files, load, most, split, {}, set()
        if all(self.example(i) is None for i in range(len(files))):
            raise click.UsageError(f"none of the {len(files)} examples for {split} can be used")

    def load_or_report(self, file):
        try:
            return None if file in self.left_out else self.load(file)
        except click.UsageError as fault:
            self.left_out.add(file)
            text = f"left out of {self.split}, {len(self.left_out)} so far: {fault.message}"
            tqdm.write(text.encode(errors="replace").decode())  # a file's name may not be UTF-8

    def fetch(self, numbers):
        """Read the files of these examples that are not in memory, together."""
        while len(self.kept) > self.most:
            del self.kept[next(iter(self.kept))]  # the oldest
        if missing := [file for file in dict.fromkeys(self.files[i] for i in numbers) if file not in self.kept]:
            with ThreadPoolExecutor(8) as pool:  # decoders work outside the interpreter's lock
                self.kept |= zip(missing, pool.map(self.load_or_report, missing), strict=True)

    def example(self, i):
        """Example i, or None where it is left out."""
        self.fetch([i])
        return self.kept[self.files[i]]

    def usable(self, numbers):
        """These numbers, those of examples that are left out replaced by the next that is not: a list."""
        self.fetch(numbers)
        n = len(self.files)
        return [next(j % n for j in range(i, i + n) if self.example(j % n) is not None) for i in numbers]


# ---------------------------------------------------------------- Probability, layers, composition


def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) of every element, in nats (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1)


def reparameterize(mu, logvar, noise):
    """A sample of N(mu, exp(logvar)) from standard normal `noise` of the same shape (Kingma & Welling 2013, 2.4)."""
    return mu + (0.5 * logvar).exp() * noise


def choose(logits, noise):  # categories, by their inverse CDF: logits (..., K), N(0, 1) noise (..., T) -> (..., T)
    at = torch.special.ndtr(noise).clamp(1e-6, 1 - 1e-5)[..., None]  # at 0 and 1 rounding would choose
    return (logits.softmax(-1).cumsum(-1)[..., None, :-1] < at).sum(-1)


def beta_at(progress, beta, warmup, last=0.0, fall=(1.0, 2.0)):
    """The KL weight at `progress` in [0, 1]: half cosines from 0 to `beta` over the first `warmup` of the run, and to
    `last` between the shares `fall`."""
    risen = beta if progress >= warmup else beta * 0.5 * (1 - math.cos(math.pi * progress / warmup))
    fallen = min(max((progress - fall[0]) / (fall[1] - fall[0]), 0.0), 1.0)
    return last + (risen - last) * 0.5 * (1 + math.cos(math.pi * fallen))


def learning_rate_at(progress, step, lr):
    """Linear rise over the first 100 steps, and a half cosine down to 5 % over the whole run."""
    return lr * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); GroupNorm before each convolution where `norm` is set."""

    def __init__(self, channels, norm=False, conv=nn.Conv2d, kernel=3):
        super().__init__()
        norm, conv = (nn.GroupNorm if norm else nn.Identity), partial(conv, channels, channels, kernel)
        self.norm1, self.conv1 = norm(8, channels), conv(padding=kernel // 2)
        self.norm2, self.conv2 = norm(8, channels), conv(padding=kernel // 2)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class FlowPrior(nn.Module):
    """p(z | context): N(0, I) through couplings, nets of half a vector that shift and scale the other, in turn (Dinh et
    al. 2017); with a context (..., C) as one more input of each. It starts as N(0, I)."""

    def __init__(self, d, context=0, couplings=6, width=256):
        super().__init__()
        self.halves = given, changed = d // 2, d - d // 2
        layers = (given + context, width), (width, width), (width, 2 * changed)
        nets = ([nn.Linear(*sizes) for sizes in layers] for _ in range(couplings))
        self.nets = nn.ModuleList(nn.Sequential(a, nn.SiLU(), b, nn.SiLU(), c) for a, b, c in nets)
        for parameter in (p for net in self.nets for p in net[-1].parameters()):
            nn.init.zeros_(parameter)

    def coupling(self, net, z, context):
        given, changed = z.split(self.halves, dim=-1)
        shift, log_scale = net(given if context is None else torch.cat([given, context], -1)).float().chunk(2, dim=-1)
        return given, changed, shift, 2 * torch.tanh(log_scale / 2)  # bounded: a step too far does not overflow

    def log_prob(self, z, context=None):
        """log p(z | context) of z (..., D): (...), in nats."""
        log_volume = 0.0
        for net in self.nets:
            given, changed, shift, log_scale = self.coupling(net, z, context)
            z = torch.cat([given, (changed - shift) * (-log_scale).exp()], dim=-1).flip(-1)
            log_volume = log_volume - log_scale.sum(-1)
        return log_volume - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def sample(self, noise, context=None):
        """Standard normal noise (..., D) -> z (..., D) of this density."""
        for net in reversed(self.nets):
            given, changed, shift, log_scale = self.coupling(net, noise.flip(-1), context)
            noise = torch.cat([given, shift + changed * log_scale.exp()], dim=-1)
        return noise


def gather_cells(values, index):
    """values (B, C, H_l, W_l), index (B, N) -> (B, N, C)."""
    flat = values.flatten(2).transpose(1, 2)  # (B, H_l * W_l, C)
    return flat.gather(1, index[:, :, None].expand(-1, -1, flat.shape[2]))


def alpha_masks(layer):
    """Shares of every pixel (B, M + 1, 1, h, w), the background's first, of layers (B, M, channels, h, w).

    The first channel is how near they are, the nearest on top ("over" of Porter & Duff 1984), the last a mask logit.
    """
    logit, near = layer[:, :, -1:], layer[:, :, 0, 0, 0]  # (B, M)
    opacity = F.softplus(logit)  # minus the logarithm of what a mask lets through
    nearer = (near[:, None] > near[:, :, None]) | (near[:, None] == near[:, :, None]).tril(-1)  # (B, M, M): than rows
    in_front = (nearer.to(opacity) @ opacity.flatten(2)).view_as(opacity)
    return torch.cat([(-opacity.sum(1, keepdim=True)).exp(), logit.sigmoid() * (-in_front).exp()], dim=1)


def compose(layer, background, op):
    """Combine layers (B, M, C, h, w), with op "alpha" C + 2, and a background (B, C, h, w) or None -> (B, C, h, w)."""
    drawn = layer[:, :, 1:-1] if op == "alpha" else layer
    every = drawn if background is None else torch.cat([background[:, None], drawn], dim=1)
    if op == "alpha":
        return (alpha_masks(layer) * every).sum(1)
    return {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[op](every, dim=1)


# ---------------------------------------------------------------- Sound, notes

RATE = 16_000  # samples a second, of everything that sounds here
COMPRESSION = 100.0  # magnitudes below 1 / COMPRESSION (-88 dBFS at n_fft 1024) are flattened


def log_compress(magnitude):
    """Magnitudes -> levels log(1 + COMPRESSION m)."""
    return (1 + COMPRESSION * magnitude).log()  # log1p is ten times as slow on a CPU


def log_expand(level):
    """The inverse of `log_compress`; negative levels, which no magnitude has, give 0."""
    return (level.clamp(min=0).exp() - 1) / COMPRESSION


def log_spectral_distance(level, reference, axis=1):
    """Log-spectral distance (Gray & Markel 1976) of levels, two of (B, F, T), in dB: (B,). `axis`: that of F."""
    # Levels have 0.01 added to every magnitude: bins below what can be heard do not decide it.
    return (20 / math.log(10) * (level - reference)).square().mean(axis).sqrt().flatten(1).mean(1)


class Vocoder(nn.Module):
    """torchaudio's Griffin-Lim: spectrogram (B, bins, T), mostly an STFT's -> waveform (B, (T - 1) * n_fft / 4)."""

    outputs = ("waveform",)

    def __init__(self, n_fft, iterations=32, to_stft_magnitude=None):
        super().__init__()
        self.to_stft_magnitude = to_stft_magnitude or nn.Identity()
        self.inverse = GriffinLim(n_fft, iterations, hop_length=n_fft // 4, power=1, rand_init=False)

    def forward(self, spectrogram):
        return self.inverse(self.to_stft_magnitude(spectrogram))


SAMPLES, PITCHES = 4 * RATE, 128  # of a note: NSynth's four seconds; MIDI numbers
FAMILIES = "bass", "brass", "flute", "guitar", "keyboard", "mallet", "organ", "reed", "string", "synth_lead", "vocal"
ARCHIVES = "http://download.magenta.tensorflow.org/datasets/nsynth/nsynth-{split}.jsonwav.tar.gz"
BUILT_IN = "built-in additive synthesiser"
INSTRUMENTS = {"train": range(8), "valid": range(8, 10), "test": range(10, 12)}  # of every built-in family
NOTES_EACH, KEPT = 24, 16_000  # notes of every built-in instrument; of a split that are kept in memory: 2 GB
# Read from `path` or, if None, synthesised; pitch -1: not known; semitones: resampled by; window: of so many of a file.
Note = namedtuple("Note", "name family pitch instrument velocity path semitones window windows",
                  defaults=(None, 0, 0, 1))  # fmt: skip
# Harmonics h of amplitude h^-rolloff, even ones times odd, at h f sqrt(1 + stiffness h^2); attack, decay by 1/e in s;
# vibrato in semitones; breath: noise beside the tone; pluck: where, as a share of a string's length; formants in Hz.
Timbre = namedtuple("Timbre", "pitches rolloff attack decay vibrato breath pluck stiffness odd formants",
                    defaults=(math.inf, 0.0, 0.0, 0.0, 0.0, 1.0, ()))  # fmt: skip
TIMBRES = {
    "bass": Timbre((28, 55), rolloff=1.6, attack=0.008, decay=1.4, stiffness=5e-5, pluck=0.2),
    "brass": Timbre((40, 83), rolloff=0.8, attack=0.06, vibrato=0.05),
    "flute": Timbre((60, 96), rolloff=2.4, attack=0.09, vibrato=0.15, breath=0.02),
    "guitar": Timbre((40, 83), rolloff=1.1, attack=0.004, decay=0.9, stiffness=3e-5, pluck=0.13),
    "keyboard": Timbre((28, 99), rolloff=1.5, attack=0.003, decay=1.2, stiffness=3e-4, odd=0.7),
    "vocal": Timbre((43, 84), rolloff=1.2, attack=0.12, vibrato=0.3, formants=(600, 1100, 2600)),
}


def synthesise(note):
    """One note of a built-in instrument, held for three seconds: (SAMPLES,), the same in every run."""
    timbre, instrument = TIMBRES[note.family], random_generator("instrument", note.instrument)
    own = (value * math.exp(0.25 * torch.randn((), generator=instrument)) for value in timbre[1:7])  # of the instrument
    rolloff, attack, decay, vibrato, breath, pluck = own
    colour = (0.3 * torch.randn(64, generator=instrument)).exp()  # of every harmonic
    generator, t, h = random_generator("note", note.name), torch.arange(SAMPLES) / RATE, torch.arange(1, 65)
    frequency, since = 440 * 2 ** ((note.pitch - 69) / 12), (t - 0.3).clamp(min=0)
    # Vibrato sets in at 0.3 s, from phase 0 and within 0.3 s more, so that neither phase nor frequency jumps.
    wobble = vibrato * math.log(2) / 12 * (since / 0.3).clamp(max=1) * torch.sin(2 * math.pi * 5.5 * since)
    phase = 2 * math.pi * frequency * (t + wobble / (2 * math.pi * 5.5))
    sharp = h * (1 + timbre.stiffness * h**2) ** 0.5
    h, sharp, colour = (v[sharp * frequency < 0.47 * RATE] for v in (h, sharp, colour))
    amplitude = colour * h ** -(rolloff + 0.6 * (1 - note.velocity / 127))  # soft notes are duller
    amplitude[1::2] *= timbre.odd
    if pluck:
        amplitude *= torch.sin(math.pi * h * pluck).abs()
    for formant in timbre.formants:
        amplitude *= 1 + 3 * torch.exp(-(((h * frequency - formant) / 250) ** 2))
    start = torch.rand(len(h), generator=generator)[:, None] * 2 * math.pi
    fall = torch.exp(-t / decay * (1 + 0.15 * (h[:, None] - 1)))  # high harmonics die first
    tone = (amplitude[:, None] * fall * torch.sin(sharp[:, None] * phase + start)).sum(0)
    tone = tone / tone.abs().max() + breath * torch.randn(SAMPLES, generator=generator)
    envelope = (t / attack).clamp(max=1) * torch.exp(-(t - 3).clamp(min=0) / 0.08)
    return 0.6 * note.velocity / 127 * envelope * tone


def built_in_notes(split, families):
    """The notes of the built-in instruments: pitches spread over their family's range, three velocities."""
    notes = []
    for family, k, i in itertools.product(families, INSTRUMENTS[split], range(NOTES_EACH)):
        low, high = TIMBRES[family].pitches
        pitch = low + round((high - low) * (i + 0.5 * (k % 2)) / (NOTES_EACH - 0.5))
        velocity, instrument = (50, 75, 100)[(i + k) % 3], f"{family}_built-in_{k:03}"
        notes.append(Note(f"{instrument}-{pitch:03}-{velocity:03}", family, pitch, instrument, velocity))
    return notes


@contextlib.contextmanager
def fetching(what, root):
    """click.ClickException where `what` cannot be fetched, or unpacked: no network, full disk, wrong checksum."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
        raise click.ClickException(f"{what} could not be fetched into {root}: {error}") from error


def nsynth_notes(root, split, families, download):
    """The notes of an official NSynth folder: examples.json, audio/*.wav or .flac; click exceptions without any."""
    folder, url = root / f"nsynth-{split}", ARCHIVES.format(split=split)
    listing, archive = folder / "examples.json", root / Path(url).name
    if download and (not folder.is_dir() or archive.exists()):
        with fetching(url, root):
            archive.exists() or write_atomically(archive, lambda path: download_url(url, root, path.name))
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as packed:
                packed.extractall(root, filter="data")  # nothing outside its folder
                stream.seek(sys.maxsize)  # to the end, where its checksum stands
            archive.unlink()
    files = {path.stem: path for path in sorted((folder / "audio").glob("*")) if path.suffix in (".flac", ".wav")}
    keys = "instrument_family_str", "pitch", "instrument_str", "velocity"  # of the rest, half the memory, none is used
    used = partial(json.loads, object_hook=lambda about: [about[k] for k in keys] if "pitch" in about else about)
    try:
        notes = [Note(name, *about, files.get(name)) for name, about in sorted(used(listing.read_text()).items())]
        notes = [note for note in notes if note.family in families and 0 <= note.pitch < PITCHES]
    except Exception as error:  # of many kinds
        raise click.UsageError(f"{listing}: missing, damaged, or not NSynth's ({error})") from error
    there = [note for note in notes if note.path]
    if len(there) < len(notes):
        click.echo(f"{folder.name}: {len(notes) - len(there)} of the {len(notes)} notes it lists are missing")
    if not there:
        raise click.UsageError(f"{folder}: no note of {', '.join(families)} that it lists is in audio/")
    return there


def pitch_of(name):
    """The MIDI number in a file's name without suffix: of "guitar-060-100", as NSynth has it, of a word "C4"; or -1."""
    numbers = {int(number) for number in re.findall(r"(?:^|[-_ ])(\d{3})-\d{3}$", name)}
    words = re.findall(r"(?<![^\W_])([A-G])([#b]?)(\d)(?![^\W_])", name)
    semitones = {"#": 1, "b": -1, "": 0} | {note: "C_D_EF_G_A_B".index(note) for note in "CDEFGAB"}
    numbers = numbers or {12 * (int(octave) + 1) + semitones[note] + semitones[sign] for note, sign, octave in words}
    return numbers.pop() if len(numbers) == 1 and max(numbers) < PITCHES else -1


def own_notes(root, windows):
    """{split: notes} of any folder of sounds: the first SAMPLES of each, or all of it, as `windows`."""
    # Families are folders; so are instruments, but at the top, or where there is but one folder, they are files.
    splits = split_files(root, SOUNDS, KEPT)
    for split, paths in splits.items():
        notes, folders = [], {path.rpartition("/")[0] for path in paths} - {""}
        for path in paths:
            folder = path.rpartition("/")[0]
            instrument = folder if folder and len(folders) > 1 else path
            note = Note(path, folder or root.resolve().name, pitch_of(Path(path).stem), instrument, 0, root / path)
            with contextlib.suppress(RuntimeError, OSError, ValueError):  # it is named when it is read
                about = soundfile.info(note.path) if windows else None
                if about and about.frames * about.channels <= LONGEST:
                    note = note._replace(windows=max(1, int(about.duration / (SAMPLES / RATE) + 0.75)))
            notes += [note._replace(window=k) for k in range(note.windows)]
        if len(notes) > KEPT:
            click.echo(f"{root}: {KEPT:,} of {len(notes):,} windows of 4 s are used for {split}")
        splits[split] = notes[:KEPT]
    return splits


def read_note(note):
    """All windows of a note's file, one channel at RATE, transposed: (SAMPLES,) of 16 bits each, or None if silent."""
    samples, rate = read_sound(note.path) if note.path else (synthesise(note).numpy()[:, None], RATE)  # (n, channels)
    waveform = resample_sound(samples.mean(1), rate, RATE)[: note.windows * SAMPLES]
    waveform = resample_sound(waveform, 2 ** (note.semitones / 12), 1)
    windows = fit(waveform, note.windows * SAMPLES).reshape(-1, SAMPLES)
    bits = torch.from_numpy((windows.clip(-1, 1) * 32767).round()).short()
    heard = bits.float().square().mean(1).sqrt() > 1e-3 * bits.abs().max()  # not 60 dB below the loudest, nor all 0
    return [window if loud else None for window, loud in zip(bits, heard, strict=True)]


class NoteSplit(Reader):
    """Notes of `families`, read when they are asked for; those of KEPT files stay in memory, 16 bits a sample."""

    def __init__(self, notes, families, split):
        self.notes = notes = [note for note in notes if note.family in families]
        self.instrument = torch.from_numpy(np.unique([note.instrument for note in notes], return_inverse=True)[1])
        self.family = torch.tensor([families.index(note.family) for note in notes])
        self.pitch = torch.tensor([note.pitch for note in notes])
        super().__init__([n._replace(window=0) if n.window else n for n in notes], read_note, KEPT, split)

    def example(self, i):
        windows = super().example(i)
        return windows and windows[self.notes[i].window]

    def waveform(self, index):
        """The notes at `index`, a tensor of B numbers, as they sound: (B, SAMPLES)."""
        self.fetch(index.tolist())
        return torch.stack([self.example(i) for i in index.tolist()]).float() / 32767

    def spread(self, most):
        """At most `most` numbers of notes, spread evenly, of those that are not transposed."""
        own = [i for i, note in enumerate(self.notes) if not note.semitones]
        even = torch.linspace(0, len(own) - 1, min(len(own), most)).round().long()
        return torch.tensor(sorted(set(self.usable([own[i] for i in even]))))


def load_notes(options, windows=False):
    """{split: NoteSplit} of --data-root or built-in notes, and their source; completes `options`; click exceptions."""
    root, families, download = (options[name] for name in ("data_root", "families", "download"))
    own, known, source, splits = None, TIMBRES, BUILT_IN, {}
    official = ("examples.json", *(f"nsynth-{split}" for split in SPLITS))
    if root and (download or any((root / name).exists() for name in official)):
        known, source = FAMILIES, f"notes in NSynth's layout, folder {root.name}"
    elif root:
        own, source = own_notes(root, windows), f"own sounds, folder {root.resolve().name}"
        known = sorted({note.family for notes in own.values() for note in notes})
        families = known if windows else families or known
    options["families"] = families = families or list(TIMBRES)
    if not set(families) <= set(known) or len(set(families)) < len(families):
        expected = f"expected some of {', '.join(known)}, each once{'' if root else '; others need --data-root'}"
        raise click.UsageError(f"--families {','.join(families)}: {expected}")
    for split in SPLITS:
        there = own[split] if own else root and nsynth_notes(root, split, families, download)
        splits[split] = NoteSplit(there or built_in_notes(split, families), families, split)
    return splits, source


# ---------------------------------------------------------------- Command line

families_option = click.option("--families", type=lambda names: names.split(",") if isinstance(names, str) else names,
                               metavar="NAME,...", show_default=f"{','.join(TIMBRES)}; your own: all",
                               help="Of instruments: NSynth's, or folders of your own.")  # fmt: skip
POSITIVE, FOLDER = click.FloatRange(0, min_open=True), click.Path(path_type=Path)
RUN_OPTIONS = [
    click.Option(["--data-root"], type=FOLDER, help="Folder of the data set on disk."),
    click.Option(["--download"], is_flag=True, help="Fetch the official data set into --data-root first."),
    click.Option(["--steps"], type=click.IntRange(1), help="Updates; given alone, the clock plays no part."),
    click.Option(["--minutes"], type=POSITIVE, help="Time; with --steps, whichever ends first."),
    click.Option(["--batch"], type=click.IntRange(1), default=32, help="Examples a step in every process."),
    click.Option(["--lr"], type=POSITIVE, default=2e-3, help="Adam's peak learning rate."),
    click.Option(["--beta"], type=click.FloatRange(0), default=1.0, help="Final weight of the KL."),
    click.Option(["--warmup"], type=click.FloatRange(0, 1), default=0.6, help="Share of the run in which beta rises."),
    click.Option(["--seed"], type=click.IntRange(0), default=0, help="Seed of weights, data and noise."),
    click.Option(["--device"], type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto"),
    click.Option(["--precision"], type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: GPU bf16."),
    click.Option(["--eval", "evaluation"], type=click.Choice(["quick", "full"]), default="full", help="quick: a 10th."),
    click.Option(["--out"], type=FOLDER, help="Run folder; by default a new one below runs/."),
    click.Option(["--dry-run"], is_flag=True, help="Print the options that would be used, and stop."),
]  # fmt: skip
RESUMABLE = {"steps", "minutes", "device", "precision", "data_root", "download", "evaluation", "eval_samples"}


def training_command(script, presets, foreign=None):
    """Decorator: a click command of own options, --dataset, --resume, RUN_OPTIONS, but `foreign` ones of a data set."""
    # Precedence: what is typed, config.json of --resume, `presets[--dataset]`, the decorators: what --help shows.

    def fill(context, parameter, value):
        known = context.params | {parameter.name: value}  # of --dataset and --resume
        config = load_config(known["resume"]) if known.get("resume") else None
        if config and config["script"] != script:
            raise click.UsageError(f"--resume: {known['resume']} is a run of {config['script']}.py")
        context.default_map = config["options"] if config else presets[known["dataset"]]
        for option in context.command.params:
            option.hidden = option.name in context.command.foreign.get(known.get("dataset"), ())
        return value

    def decorate(main):
        first, eager = next(iter(presets)), {"is_eager": True, "callback": fill}
        text = sys.modules[main.__module__].__doc__.replace("\n\n", "\n\n\b\n")  # each paragraph as it stands
        command = click.command(context_settings={"show_default": True, "default_map": presets[first]}, help=text)(main)
        dataset = click.Option(["--dataset"], type=click.Choice(list(presets)), default=first, **eager)
        resume = click.Option(["--resume"], type=FOLDER, help="Run folder.", **eager)
        command.params = [dataset, *command.params, *RUN_OPTIONS, resume]
        command.foreign = foreign or {}
        return command

    return decorate


def settle_options(context, options, check=lambda options: None):
    """Complete the options in place, `check` them; click.UsageError where they, or the run resumed, contradict them."""
    source, by_hand = context.get_parameter_source, click.core.ParameterSource.COMMANDLINE
    typed = {p.name: p.opts[0] for p in context.command.params if source(p.name) is by_hand}  # {name: as --name}
    if name := next(iter(typed.keys() & context.command.foreign.get(options["dataset"], ())), None):
        raise click.UsageError(f"{typed[name]} does not belong to --dataset {options['dataset']}")
    for name in (name for name in typed if isinstance(options[name], float) and not math.isfinite(options[name])):
        raise click.UsageError(f"{typed[name]} {options[name]}: expected a finite number")
    if "steps" in typed and "minutes" not in typed:
        options["minutes"] = None  # without the clock a run is the same on every machine, bit for bit
    out, root, download = (options[name] for name in ("out", "data_root", "download"))
    if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0") and not out:
        raise click.UsageError("torchrun --max-restarts: expected --out, a folder that a restarted run goes on with")
    if restarts and (out / "config.json").exists():
        options["resume"], _ = out, typed.pop("out")
    if options["resume"]:
        before = load_config(options["resume"])["options"]
        for name in sorted(typed.keys() - RESUMABLE - {"resume", "dry_run"}):
            if json.loads(json.dumps(options[name], default=str)) != before.get(name):
                raise click.UsageError(f"{typed[name]} {options[name]}: the run to resume has {before.get(name)}")
    elif out and (out.is_file() or any(path.suffix != ".partial" for path in out.glob("[!.]*"))):
        raise click.UsageError(f"--out {out} exists already; name a new folder, or --resume that run")
    if download and (not root or "WORLD_SIZE" in os.environ):
        raise click.UsageError("--download needs --data-root, and a single process")
    if root and not download and not root.exists():
        raise click.UsageError(f"--data-root {root}: no such folder")
    check(options)
    if options["dry_run"]:
        click.echo(json.dumps(options, indent=2, default=str))
        context.exit()


# ---------------------------------------------------------------- Device, processes, run


def random_generator(*key, device="cpu"):
    """A generator seeded by its key, e.g. ("noise", seed, step), so that resumed runs and K processes share samples."""
    return torch.Generator(device=device).manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def start_device(name, seed):
    """The device of --device, under torchrun this process's own, whose group is joined; the weights' seed is set."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    present = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": math.inf}
    name = next(kind for kind in present if present[kind]) if name == "auto" else name
    if number >= present[name]:
        raise click.UsageError(f"--device {name}: process {number} needs its own; this machine has {present[name]}")
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it may hold addresses of the attempt before
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if name == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(seed % 2**63)
    return torch.device(name, number) if name == "cuda" else torch.device(name)


def optimizer_step(loss, terms, optimizer, lr, clip, shared=True):
    """One step down `loss`, gradients, averaged over processes if shared, clipped to a norm; returns numbers to log."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    (group,) = optimizer.param_groups
    if shared and dist.is_initialized():
        total = torch.cat([p.grad.flatten() for p in group["params"]])
        dist.all_reduce(total)  # in one message, not one each
        for p, part in zip(group["params"], total.split([p.numel() for p in group["params"]]), strict=True):
            p.grad.copy_(part.view_as(p) / dist.get_world_size())
    norm = nn.utils.clip_grad_norm_(group["params"], clip)
    values = {name: term.item() for name, term in terms.items()} | {"gradient_norm": norm.item(), "schedule/lr": lr}
    if math.isfinite(sum(values.values())):  # else `Run.log` stops the run
        group["lr"] = lr
        optimizer.step()
    return values


def load_config(folder):
    """The `config.json` of a run folder; raises click.UsageError where there is none, or another program's."""
    kinds = {"script": str, "options": dict, "data": dict, "history": list}
    return load_file(Path(folder) / "config.json", read_json, kinds, click.UsageError)


def load_checkpoint(folder, device, **modules):
    """The `checkpoint.pt` of a run folder, loaded into `modules` too, or click.ClickException where it does not fit."""
    kinds = {"model": dict, "optimizer": dict, "step": int, "elapsed": float, "progress": float}
    path, load = Path(folder) / "checkpoint.pt", partial(torch.load, map_location=device, weights_only=True)
    # torch.load takes flipped bits for weights; testzip finds them, and gives a name, which load_file refuses.
    state = load_file(path, lambda path: zipfile.ZipFile(path).testzip() or load(path), kinds, click.ClickException)
    try:
        for name, module in modules.items():
            module.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise click.ClickException(f"{path} does not fit; config.json names its commit") from fault
    return state


def build_model(kind, options):
    """An untrained model of class `kind`, whose keyword arguments are named as options are; or click.UsageError."""
    try:
        return kind(**{name: options[name] for name in inspect.signature(kind).parameters})
    except (KeyError, ValueError) as error:
        raise click.UsageError(f"these options make no {kind.__name__}: {error}") from error


def load_model(folder, build):
    """The trained model of a run folder; its `config` is config.json, step, last valid scores. Click exceptions."""
    config, curve, last = load_config(folder), Path(folder) / "curve.json", lambda path: read_json(path)[-1]
    model = build(config["options"])
    valid = load_file(curve, last, {}, click.UsageError) if curve.is_file() else {}
    model.config = config | {"step": load_checkpoint(folder, "cpu", model=model)["step"], "valid": valid}
    return model.eval()


def versions():
    """What made a result: versions, commit, hardware."""
    failed, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" describe --always --dirty')
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    about = {"commit": "not a git checkout" if failed else commit, "python": sys.version.split()[0], "device": device}
    return about | {p: version(p) for p in ("torch", "torchvision", "torchaudio", "numpy", "onnx", "onnxruntime")}


class Graph(nn.Module):
    """A function of a model as a module to export; examples of `optional` inputs are defaults in an ONNX file."""

    def __init__(self, outputs, function, *modules, optional=()):
        super().__init__()
        self.outputs, self.function, self.modules_used = outputs, function, nn.ModuleList(modules)
        self.optional = optional

    def forward(self, *inputs):
        return self.function(*inputs)


class Run:
    """A run folder, and the loop that fills it: with Run(...) as run: for step, progress in run.steps(): run.log(...).

    In process 0, which alone has a `folder`, `looks` is set after steps 1, 4, 16, 64, ... and when `due` is: at every
    tenth and the end; then `complete`. `progress`, what schedules go by, is the larger share of steps and minutes and
    never falls: a finished run goes on at its final beta. Checkpoints are written when due, every two minutes, on bad
    input, signals, and loss of a process. click.UsageError where data or processes are others', or the folder in use.
    """

    def __init__(self, options, script, name, data, model, optimizer, device):
        self.options, self.script, self.source = options, script, data["source"]
        self.model, self.optimizer, self.device = model, optimizer, device
        self.folder, self.step, self.elapsed, self.progress, history = None, 0, 0.0, 0.0, []
        self.looks = self.due = self.complete = self.asked = self.stopped = False
        bf16 = options["precision"] == "bf16" or (options["precision"] == "auto" and device.type == "cuda")
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.total, self.own = world * options["batch"], slice(rank * options["batch"], (rank + 1) * options["batch"])
        folder = options["resume"] or options["out"]
        if options["resume"]:
            config = load_config(folder)
            history, seen = config["history"], (config["data"]["source"], config["history"][-1]["processes"])
            if seen != (now := (data["source"], world)):
                raise click.UsageError("--resume: the run saw {} in {} process(es), now {} in {}".format(*seen, *now))
            if (folder / "checkpoint.pt").exists():  # else the run was killed before it wrote the first
                state = load_checkpoint(folder, device, model=model, optimizer=optimizer)
                self.step, self.elapsed, self.progress = state["step"], state["elapsed"], state["progress"]
        if rank > 0:
            return
        words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]  # no machine's paths
        session = {"command": shlex.join(["python", *words]), "processes": world, "versions": versions()}
        config = {"script": script, "data": data, "history": [*history, session]}
        config["options"] = {k: v for k, v in options.items() if k not in ("resume", "out", "dry_run")}
        try:  # the folder, by default the first free one of runs/NAME, runs/NAME-2, ..., is for this run alone
            for k in itertools.count(1):
                self.folder = folder or Path("runs") / (f"{name}-{k}" if k > 1 else name)
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir(parents=True, exist_ok=bool(folder))
                    break
            self.lock = FileLock(self.folder / ".lock", timeout=0)  # the system opens it when the process ends, however
            self.lock.acquire()
            write_json(self.folder / "config.json", config)  # first: what has one can be resumed
            (self.folder / "figures").mkdir(exist_ok=True)
            self.writer = SummaryWriter(self.folder)
        except OSError as error:  # the lock's among them, without a text
            why = error.strerror or "another run is at work there; expected a folder of its own"
            raise click.UsageError(f"--out {folder or 'runs'} cannot be written: {why}") from error
        sizes = f"{sum(p.numel() for p in model.parameters()):,} parameters; batches of {self.total}"
        click.echo(f"data: {self.source}; device: {device}; run folder: {self.folder}\n{sizes}")

    def __enter__(self):
        numbers, stop = (signal.SIGINT, signal.SIGTERM), lambda *_: setattr(self, "asked", True)  # to stop after a step
        self.handlers = {number: signal.signal(number, stop) for number in numbers}
        self.bar = tqdm(bar_format="{desc}", disable=not self.folder or None)
        self.saved = self.said = time.monotonic()
        self.started, self.began = self.saved - self.elapsed, (self.saved, self.step)
        return self

    def __exit__(self, kind, error, _):
        list(itertools.starmap(signal.signal, self.handlers.items()))
        self.bar.close()
        lost = isinstance(error, RuntimeError) and dist.is_initialized()  # what gloo and NCCL raise
        saved = not self.complete and (lost or isinstance(error, click.UsageError))  # or a damaged file was met
        if saved:
            self.save()
        if self.folder:
            self.lock.release()
        if saved or isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)):  # a full disk, too little memory
            text = f"a process is lost; --resume goes on ({error})" if lost else getattr(error, "message", error)
            raise click.ClickException(f"step {self.step}{', saved' * saved}: {text}") from error
        if self.folder and not error:
            self.writer.close()
            done = f"done: {self.folder}/metrics.json and figures; next: python export.py {self.folder}"
            again = f"stopped at step {self.step}; go on with: python {self.script}.py --resume {self.folder}"
            click.echo(done if self.complete else again)

    def settle(self):
        """Share of the run that is done, by steps or minutes, and whether to stop: the same in all processes."""
        self.elapsed = time.monotonic() - self.started
        steps, minutes = (self.options[limit] or math.inf for limit in ("steps", "minutes"))
        self.share, self.stopped = min(1.0, max(self.step / steps, self.elapsed / (60 * minutes))), self.asked
        if dist.is_initialized():
            shared = torch.tensor([self.share, self.stopped], dtype=torch.float64).to(self.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            self.share, self.stopped = shared.tolist()
        self.progress = max(self.progress, self.share)

    def steps(self):
        """(step, progress) of every step that is to be taken, in each of which `log` is to be called once."""
        self.settle()
        while (self.share < 1 or not self.step) and not self.stopped:  # one step however short the time
            yield self.step, self.progress
            if self.due or time.monotonic() - self.saved > 120:  # now that its scores stand in the folder
                self.save()
        self.save()
        list(itertools.starmap(signal.signal, self.handlers.items()))  # as before: Ctrl-C ends an evaluation at once
        if dist.is_initialized():  # the others need not wait for what process 0 does now
            dist.destroy_process_group()
        self.complete = bool(self.folder) and self.share >= 1

    def check_finite(self, values):
        if not math.isfinite(sum(values.values())):
            raise click.ClickException(f"step {self.step} is not finite: {values}; the last checkpoint is kept")

    def log(self, values):
        """Count a step that took `values`; raises click.ClickException, and keeps the checkpoint, where not finite."""
        self.check_finite(values)
        before, now, self.step = int(10 * self.share), time.monotonic(), self.step + 1
        self.settle()
        self.due = bool(self.folder) and (int(10 * self.share) > before or self.share >= 1)
        self.looks = self.due or (bool(self.folder) and self.step.bit_count() == 1 and self.step.bit_length() % 2)
        if self.folder and self.step % 20 == 0:
            for name, value in values.items():
                self.writer.add_scalar(name if "/" in name else f"train/{name}", value, self.step)
        if self.folder and now - self.said > (30 if self.bar.disable else 0.2):
            self.said, (began, first) = now, self.began
            terms = ", ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in values.items())
            about = {"initial": first, "unit": " steps", "postfix": terms}
            text = tqdm.format_meter(self.step, round(self.step / self.share), now - began, **about)
            (tqdm.write if self.bar.disable else self.bar.set_description_str)(text)  # no terminal: plain lines

    def report(self, scores):
        """Scores of the valid split, checked as `log` does: a line, a point of curve.json, TensorBoard."""
        curve, point = self.folder / "curve.json", self.say("valid", scores)
        for name, value in scores.items():
            self.writer.add_scalar(name if "/" in name else f"valid/{name}", value, self.step)
        before = read_json(curve) if curve.is_file() else []
        write_json(curve, [*(earlier for earlier in before if earlier["step"] < self.step), point])

    def say(self, split, scores):
        """A line of scores of a split; returns them, after the steps and minutes of training that they took."""
        self.check_finite(scores)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if "/" not in name)
        tqdm.write(f"step {self.step}, {self.elapsed / 60:.1f} min, {split}: {shown}")
        return {"step": self.step, "minutes": self.elapsed / 60} | scores

    def finish(self, scores, untrained):
        """Scores of the test split, and those before the first step, checked as `log` does: a line, metrics.json."""
        scores = scores | {f"step_0/{name}": score for name, score in untrained.items()}
        write_json(self.folder / "metrics.json", {"split": "test", "data": self.source} | self.say("test", scores))

    def figure(self, name, image):
        """`image`: a PIL picture; figures/<name>.png always holds the newest."""
        write_atomically(self.folder / "figures" / f"{name}.png", lambda path: image.save(path, format="PNG"))
        self.writer.add_image(name, np.asarray(image), self.step, dataformats="HWC")

    def sound(self, name, waveform):
        """`waveform`: (samples,) at RATE, scaled where it is too loud; sounds/<name>.wav always holds the newest."""
        (self.folder / "sounds").mkdir(exist_ok=True)
        quiet = (waveform / waveform.abs().max().clamp(min=1)).cpu().numpy()
        save_sound(self.folder / "sounds" / f"{name.replace('/', '-')}.wav", quiet[None], RATE)  # a family is a folder

    def save(self):
        """All that the loop changes. Random states are no part of it: see `random_generator`."""
        self.saved = time.monotonic()
        if not self.folder:
            return
        state = {name: getattr(self, name) for name in ("step", "elapsed", "progress")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        try:
            write_atomically(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch.save
            text = f"step {self.step}: no checkpoint can be written ({str(error).splitlines()[0]}); the last is kept"
            raise click.ClickException(text) from error
