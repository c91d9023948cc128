"""Ten minutes of two instruments, stereo at 44.1 kHz, taken apart by recompose.py: what is gained, held, and spent.

    python -m tests.experiments.long                     # built-in notes
    python -m tests.experiments.long --data-root nsynth --rhythm free

Each instrument plays its test notes one after another, in a place of its own between left and right; two notes that
sound together are never in unison or octaves apart. With --rhythm grid all notes begin together, every four seconds;
with free they last 1.5 to 4 s, each instrument on its own. Prints the SI-SDR gained over the whole file, the share of
four seconds in which each slot is nearer to its own instrument, time as a multiple of real time, and peak memory.
"""

import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import soundfile
import soxr
import torch

import train_mvae
from common import FOLDER, RATE, SAMPLES, random_generator
from tests.experiments.judges import si_sdr

ROOT, CD = Path(train_mvae.__file__).parent, 44_100  # Hz
PANS = (0.3, 0.75)  # where the instruments stand, 0 left, 1 right


def play(split, instruments, seconds, rhythm, generator):
    """Two instruments' notes, at RATE: (2, samples); click.UsageError where all their notes are octaves apart."""
    out, sounding = torch.zeros(2, int(seconds * RATE) + SAMPLES), [(0.0, None), (0.0, None)]  # until when, which pitch
    while min(end for end, _ in sounding) < seconds:
        k = min(range(2), key=lambda k: sounding[k][0])
        start, (until, other) = sounding[k][0], sounding[1 - k]
        notes = torch.nonzero(split.instrument == instruments[k])[:, 0]
        clash = (split.pitch[notes] - (other or 0)) % 12 == 0
        notes = notes[~clash] if other is not None and until > start else notes
        if not len(notes):
            raise click.UsageError(f"instrument {instruments[k]}: all its notes are octaves apart from the other's")
        note = notes[torch.randint(len(notes), (), generator=generator)]
        length = 4.0 if rhythm == "grid" else 1.5 + 2.5 * torch.rand((), generator=generator).item()
        waveform = split.waveform(note[None])[0, : int(length * RATE)]
        waveform = waveform / waveform.square().mean().sqrt().clamp(min=1e-4)
        waveform[-800:] *= torch.linspace(1, 0, 800)
        first = int(start * RATE)
        out[k, first : first + len(waveform)] += waveform
        sounding[k] = (start + length, int(split.pitch[note]))
    return out[:, : int(seconds * RATE)]


def to_stereo(stems):
    """Stems (2, samples) at RATE -> float32 (2, samples', 2) at CD, panned with equal power, their sum within 0.9."""
    wide = [soxr.resample(stem.numpy(), RATE, CD) for stem in stems]
    pans = [np.array([np.cos(pan * np.pi / 2), np.sin(pan * np.pi / 2)]) for pan in PANS]
    stereo = np.stack([stem[:, None] * pan for stem, pan in zip(wide, pans, strict=True)])
    return (0.9 * stereo / np.abs(stereo.sum(0)).max()).astype(np.float32)


def recompose_slot(mix, slot, out, arguments):
    """Run recompose.py on a file -> the written sound (samples, channels), seconds, peak memory of it in MB."""
    command = [sys.executable, ROOT / "recompose.py", mix, "--slots", str(slot), "--out", out, *arguments]
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:  # not by getrusage, which counts what the parent had when it forked
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            peak = max(peak, *(int(kilobytes) / 1024 for kilobytes in found), 0)
            time.sleep(0.1)
    return soundfile.read(out, dtype="float32")[0], time.perf_counter() - began, peak


def score(parts, stems):
    """Slots and stems, (2, samples, channels) each -> dB gained of every stem, and shares of 4 s with its own slot.

    Slots are given to stems once, for the whole file.
    """
    n = min(parts.shape[1], stems.shape[1]) // (4 * CD) * 4 * CD
    flat = [torch.from_numpy(v[:, :n].copy()).double().flatten(1) for v in (parts, stems)]
    ratio = si_sdr(flat[0][:, None], flat[1][None])  # (slots, stems)
    swapped = bool(ratio[0, 1] + ratio[1, 0] > ratio[0, 0] + ratio[1, 1])
    own = [ratio[1, 0], ratio[0, 1]] if swapped else [ratio[0, 0], ratio[1, 1]]
    gained = torch.stack(own) - si_sdr(flat[1].sum(0)[None], flat[1])
    chunks = [v.unflatten(1, (-1, 8 * CD)) for v in flat]  # (2, chunks, 4 s of both channels)
    near = si_sdr(chunks[0][:, None], chunks[1][None])  # (slots, stems, chunks)
    straight = near[0, 0] + near[1, 1] > near[0, 1] + near[1, 0]
    return gained.tolist(), (straight != swapped).double().mean().item()


@click.command(context_settings={"show_default": True})
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, built-in notes.")
@click.option("--model", type=FOLDER, help="Folder written by export.py; without, the shipped one.")
@click.option("--rhythm", type=click.Choice(["grid", "free"]), default="grid", help="When notes begin.")
@click.option("--seconds", type=click.IntRange(8), default=600, help="Length of a file.")
@click.option("--files", type=click.IntRange(1), default=5, help="Pairs of instruments of different families.")
def main(data_root, model, rhythm, seconds, files):
    """Print what is gained and spent on long files of two instruments."""
    options = train_mvae.main.make_context("", ["--dataset", "nsynth-duo"]).params
    data = train_mvae.load_data(options | {"data_root": data_root}, torch.device("cpu"))
    split, generator = data.notes["test"], random_generator("long", rhythm)
    family = {int(i): int(f) for i, f in zip(split.instrument, split.family, strict=True)}
    pairs = [pair for pair in itertools.combinations(sorted(family), 2) if family[pair[0]] != family[pair[1]]]
    chosen = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:files].tolist()]
    click.echo(f"{files} files of {seconds} s, rhythm {rhythm}; test notes of {data.source}\n")
    click.echo("| instruments | SI-SDR gained, dB | held | x real time | peak MB |\n|-|-|-|-|-|")
    names = {int(i): note.instrument for i, note in zip(split.instrument, split.notes, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        for pair in chosen:
            stems, mix = to_stereo(play(split, pair, seconds, rhythm, generator)), Path(folder) / "mix.wav"
            soundfile.write(mix, stems.sum(0), CD, subtype="PCM_16")
            arguments = ["--model", model] if model else []
            slots = [recompose_slot(mix, k, Path(folder) / f"slot{k}.wav", arguments) for k in range(2)]
            gained, held = score(np.stack([slot[0] for slot in slots]), stems)
            cells = [" and ".join(names[i] for i in pair), " and ".join(f"{g:.1f}" for g in gained), f"{held:.1%}"]
            cells += [f"{slots[0][1] / seconds:.2f}", f"{slots[0][2]:.0f}"]
            click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
