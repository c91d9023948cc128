"""Notes as recordings have them: a folder in NSynth's layout is roughened, and made-up timbres are added to train on.

    python -m tests.experiments.rough --data-root nsynth --out nsynth_rough
    python train_mvae.py --dataset nsynth-duo --data-root nsynth_rough

nsynth-train: all notes as they are, four times roughened and transposed, and three times as many made up. nsynth-valid
and nsynth-test: all notes roughened once, so that scores of a run on this folder are of roughened notes. Transposed: up
to five semitones, played faster or slower, which makes other instruments of them. Roughened: vibrato, drift and bends;
tremolo, unsteady loudness, other attacks and decays; saturation; smooth filters and a room; noise, hum, thumps,
clicks and drift below hearing; each in some notes alone, and as strong as it comes.
"""

import math
from pathlib import Path

import click
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import FOLDER, RATE, SAMPLES, SPLITS, TIMBRES, NoteSplit, nsynth_notes, random_generator, write_json

TIME = torch.arange(SAMPLES) / RATE
PADDED = 72_000  # samples of transforms: what a room adds at the end does not come back at the start
HZ = torch.arange(PADDED // 2 + 1) * RATE / PADDED
HARMONICS, TABLE = 200, 1024  # of a made-up note; samples of one of its periods
TOGETHER = 32  # notes at a time
FAR = 5  # semitones that notes are transposed at most


class Dice:
    """Random values for n notes, (n, 1) each, that broadcast over samples."""

    def __init__(self, n, generator):
        self.n, self.generator = n, generator

    def uniform(self, low, high):
        return low + (high - low) * torch.rand(self.n, 1, generator=self.generator)

    def scaled(self, low, high):
        """Uniform on a logarithmic scale."""
        return low * (high / low) ** torch.rand(self.n, 1, generator=self.generator)

    def some(self, share):
        """1 for such a share of notes, 0 for others."""
        return (torch.rand(self.n, 1, generator=self.generator) < share).float()

    def normal(self, size):
        return torch.randn(self.n, size, generator=self.generator)

    def curve(self, knots, size):
        """Smooth, of unit variance at its knots: (n, size)."""
        return F.interpolate(self.normal(knots)[:, None], size, mode="linear", align_corners=True)[:, 0]

    def wave(self, low, high):
        """A slow sine of some frequency between, and some phase: (n, SAMPLES)."""
        return torch.sin(2 * math.pi * self.uniform(low, high) * TIME + self.uniform(0, 2 * math.pi))


def normalize(waveform):
    """(n, samples) at a root mean square of one."""
    return waveform / waveform.square().mean(1, keepdim=True).sqrt().clamp(min=1e-8)


def decibels(value):
    return 10 ** (value / 20)


def interpolate(values, place):
    """values (n, S) at places (n, P), or (P,), in [0, S - 1]: (n, P)."""
    low = place.long().clamp(max=values.shape[1] - 2).expand(len(values), -1)
    return torch.lerp(values.gather(1, low), values.gather(1, low + 1), (place - low).float())


def coloured_noise(dice):
    """Noise that falls by 0 to 6 dB an octave: (n, SAMPLES), of root mean square one."""
    spectrum = torch.fft.rfft(dice.normal(SAMPLES), PADDED) * (HZ.clamp(min=40) / 400) ** -dice.uniform(0, 1)
    return normalize(torch.fft.irfft(spectrum, PADDED)[:, :SAMPLES])


def roughen(waveform, semitones, generator):
    """Notes (n, SAMPLES) -> the same as a recording may have them, `semitones` (n,) higher."""
    dice, x = Dice(len(waveform), generator), normalize(waveform)
    onset = (x.abs() > 0.05 * x.abs().amax(1, keepdim=True)).float().argmax(1, keepdim=True) / RATE
    since = (TIME - onset).clamp(min=0)  # of the note as it was: transposed, one that begins late begins elsewhere
    # 1. Pitch, in cents: vibrato that sets in, drift, bends at the start.
    cents = dice.some(0.3) * dice.scaled(3, 40) * dice.wave(4, 7) * (TIME / 0.6).clamp(max=1)
    cents = cents + dice.some(0.4) * dice.scaled(1, 15) * dice.curve(6, SAMPLES)
    cents = cents + dice.some(0.15) * dice.uniform(-80, 80) * torch.exp(-since / 0.06)
    speed = 2 ** (cents.double() / 1200 + semitones[:, None].double() / 12)
    x = interpolate(x, (speed.cumsum(1) - speed[:, :1]).clamp(max=SAMPLES - 1.1))
    # 2. Loudness: tremolo, unsteadiness, decay, in dB; attack.
    louder = dice.some(0.2) * dice.scaled(0.3, 4) * dice.wave(3, 8)
    louder = louder + dice.some(0.4) * dice.scaled(0.3, 3) * dice.curve(24, SAMPLES)
    louder = louder - dice.some(0.25) * dice.scaled(2, 20) * since
    x = x * decibels(louder) * torch.where(dice.some(0.2) > 0, (since / dice.scaled(0.02, 0.4)).clamp(max=1), 1.0)
    # 3. Saturation, a smooth filter over the logarithm of the frequency, and a room.
    drive = dice.scaled(0.3, 2)
    x = torch.where(dice.some(0.15) > 0, torch.tanh(drive * x) / drive, x)
    octave = (torch.log2(HZ.clamp(min=20) / 20) / math.log2(RATE / 40)).clamp(max=1)
    response = decibels(dice.scaled(0.5, 6) * interpolate(dice.curve(10, 512), 511 * octave))
    room = normalize(dice.normal(PADDED // 8) * torch.exp(-TIME[: PADDED // 8] / dice.scaled(0.03, 0.25)))
    room = room / math.sqrt(PADDED // 8) * dice.some(0.4) * decibels(dice.uniform(-30, -12))
    x = torch.fft.irfft(torch.fft.rfft(x, PADDED) * response * (1 + torch.fft.rfft(room, PADDED)), PADDED)
    x = normalize(x[:, :SAMPLES])
    # 4. What is added: noise, hum; a thump and a click at the onset; drift below hearing.
    noise, mains = coloured_noise(dice), dice.uniform(49, 61) * TIME
    x = x + dice.some(0.5) * decibels(dice.uniform(-65, -30)) * noise
    hum = sum(torch.sin(2 * math.pi * k * mains) / k for k in (1, 2, 3))
    x = x + dice.some(0.15) * decibels(dice.uniform(-55, -30)) * hum
    thump = torch.exp(-since / dice.uniform(0.02, 0.08)) * torch.sin(2 * math.pi * dice.uniform(30, 90) * since)
    x = x + dice.some(0.25) * dice.scaled(0.05, 0.8) * thump
    click_noise = torch.exp(-since / dice.scaled(0.001, 0.006)) * noise * (since > 0)
    x = x + dice.some(0.25) * dice.scaled(0.1, 1.0) * click_noise
    return x + dice.some(0.2) * decibels(dice.uniform(-40, -15)) * dice.curve(40, SAMPLES)


def make_up(pitch, generator):
    """Notes (n, SAMPLES) of pitches (n,), each of a timbre of its own, held for three seconds."""
    dice, h = Dice(len(pitch), generator), torch.arange(1, HARMONICS + 1)
    frequency = 440 * 2 ** ((pitch.double()[:, None] - 69) / 12)
    # 1. Levels of harmonics, in dB: a smooth curve, each one's own, a slope, weak even ones, formants.
    level = dice.uniform(1, 8) * interpolate(dice.curve(8, 512), 511 * torch.log2(h) / math.log2(HARMONICS))
    level = level + dice.scaled(0.5, 8) * dice.normal(HARMONICS) - 20 * dice.uniform(0.4, 2.2) * torch.log10(h)
    level = level - dice.some(0.3) * dice.uniform(3, 30) * (h % 2 == 0)
    for _ in range(3):
        apart = torch.log2(h * frequency.float() / dice.scaled(150, 5000)) / dice.uniform(0.2, 0.8)
        level = level + dice.some(0.35) * dice.uniform(4, 20) * torch.exp(-apart.square())
    # 2. Three periods, each duller than the one before, that the note passes through; two strings, one perhaps detuned.
    phase, heard, tables = 2 * math.pi * torch.rand(len(pitch), HARMONICS, generator=generator), h * frequency, []
    for _ in range(3):
        spectrum = torch.zeros(len(pitch), TABLE // 2 + 1, dtype=torch.complex64)
        spectrum[:, 1 : HARMONICS + 1] = torch.polar(decibels(level) * (heard < 0.47 * RATE).float(), phase)
        tables.append(torch.fft.irfft(spectrum, TABLE))
        level = level - 20 * dice.some(0.6) * dice.uniform(0.1, 1.2) * torch.log10(h)
    loudness = tables[1].square().mean(1, keepdim=True).sqrt().clamp(min=1e-9)
    early, late = torch.exp(-TIME / dice.scaled(0.03, 0.5)), 1 - torch.exp(-TIME / dice.scaled(0.3, 4))
    weights, note = (early, (1 - early) * (1 - late), (1 - early) * late), torch.zeros(len(pitch), SAMPLES)
    for detuned, strength in ((0.0, 1.0), (8 * dice.normal(1), dice.some(0.4) * dice.uniform(0.2, 1))):
        turns = frequency * 2 ** (torch.as_tensor(detuned).double() / 1200) * torch.arange(SAMPLES) / RATE
        place = (turns + dice.uniform(0, 1)) % 1 * TABLE
        periods = [interpolate(torch.cat([table, table[:, :1]], dim=1), place) for table in tables]
        note = note + strength * sum(w * period for w, period in zip(weights, periods, strict=True)) / loudness
    # 3. Attack, decay of half of them, breath, release.
    note = note + dice.some(0.4) * decibels(dice.uniform(-45, -18)) * coloured_noise(dice)
    envelope = (TIME / dice.scaled(0.002, 0.3)).clamp(max=1)
    envelope = envelope * torch.where(dice.some(0.5) > 0, torch.exp(-TIME / dice.scaled(0.25, 4)), 1.0)
    return note * envelope * torch.exp(-(TIME - 3).clamp(min=0) / dice.uniform(0.05, 0.3))


def about(note, name, instrument, pitch):
    """What examples.json says of a note, as far as it is read."""
    keys = {"instrument_family_str": note.family, "instrument_str": instrument}
    return {"note_str": name, "pitch": pitch, "velocity": note.velocity, "sample_rate": RATE} | keys


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, required=True, help="NSynth's folders.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--variants", type=click.IntRange(0), default=4, help="Roughened, of every note to train on.")
@click.option("--made", type=click.IntRange(0), default=3, help="Made up, for every note to train on.")
@click.option("--families", default=",".join(TIMBRES), help="Of instruments.")
def main(data_root, out, variants, made, families):
    """Write the notes of --data-root, roughened, and made-up ones, in NSynth's layout."""
    if out.resolve() == data_root.resolve():
        raise click.UsageError(f"--out {out}: expected another folder than --data-root")
    families = families.split(",")
    for split in SPLITS:
        notes = NoteSplit(nsynth_notes(data_root, split, families, False), families, split)
        folder, listed, train = out / f"nsynth-{split}", {}, split == "train"
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        ways = [*map(str, range(variants)), *(f"made{k}" for k in range(made))] if train else ["0"]
        plan = [(i, way) for way in ways for i in range(len(notes.notes))]
        generator = random_generator("rough", split)
        for first in tqdm(range(0, len(plan), TOGETHER), disable=None, desc=split):
            some = plan[first : first + TOGETHER]
            index, new = torch.tensor([i for i, _ in some]), torch.tensor([["made" in way] for _, way in some])
            pitch = notes.pitch[index]
            sound = torch.where(new, make_up(pitch, generator), notes.waveform(index))
            higher = (torch.randint(-FAR, FAR + 1, (len(some),), generator=generator) if train else 0) * ~new[:, 0]
            for (i, way), waveform, own in zip(some, roughen(sound, higher, generator), pitch + higher, strict=True):
                note, name = notes.notes[i], f"{notes.notes[i].name}-{way}"
                soundfile.write(folder / "audio" / f"{name}.flac", 0.9 * waveform / waveform.abs().max(), RATE)
                listed[name] = about(note, name, name if "made" in way else note.instrument, int(own))
        for note in notes.notes if train else ():
            link = folder / "audio" / f"{note.name}{note.path.suffix}"
            if not link.exists():
                link.symlink_to(note.path.resolve())
            listed[note.name] = about(note, note.name, note.instrument, note.pitch)
        write_json(folder / "examples.json", listed)
    counts = ", ".join(f"{len(list((out / f'nsynth-{split}' / 'audio').iterdir()))} {split}" for split in SPLITS)
    click.echo(f"{out}: {counts}")


if __name__ == "__main__":
    main()
