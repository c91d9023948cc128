# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=2.1", "scipy>=1.14", "pillow>=11", "click>=8.2", "soundfile>=0.13", "soxr>=0.5", "onnxruntime>=1.22",
# ]
# ///
"""Take pictures or sounds apart into slots, and put slots of any number of them together; needs no PyTorch.

    python recompose.py a.png b.png --slots 0,2 --slots 1  # slots 0 and 2 of a.png, slot 1 of b.png
    python recompose.py a.png --move 0:0.2,-0.1            # slot 0 further right and up, by shares of the width
    python recompose.py a.wav b.wav --slots 0 --slots 1 --out mix.mp3  # one instrument of each
    python recompose.py a.wav --transpose 1:3 --gain 0:-6

Writes the recomposed picture or sound (`--out`) and beside it a figure: inputs, KL maps with the chosen cells marked,
every slot decoded alone, the recomposition. A slot of a sound is heard as a soft mask on its input's spectrum, at the
input's own rate and in all its channels, or, with `--vocoder`, as what it decodes to, through Griffin-Lim. Models are
folders written by `export.py`. This file and such a folder can be taken elsewhere: `uv run recompose.py ...`.
"""

import io
import json
import os
import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MODELS = Path(__file__).parent / "models"
SHIPPED = {"mvae-image": MODELS / "clevr", "mvae-sound": MODELS / "nsynth-duo"}
WRITTEN = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"),
           ".mp3": ("MP3", "MPEG_LAYER_III")}  # fmt: skip
SUFFIXES = (*WRITTEN, ".opus", ".aif", ".aiff", ".m4a", ".aac", ".wma")  # of sounds; all else is taken for a picture
LONGEST, RATES = 2**26, (4000, 192_000)  # samples of all channels: ten minutes of stereo at 48 kHz, and more; Hz
PATH = click.Path(path_type=Path)
EMPTY = 4.0  # nats: a slot of less holds nothing

# ---------------------------------------------------------------- Files


def write_atomically(path, write):
    """Call write(temporary path) and rename, so that a file is written whole or not at all; passes on errors."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_picture(path):
    """Any still picture of 8 or 16 bits -> RGB, upright; raises click.UsageError for others, and for damaged files."""
    try:
        with Image.open(path) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise click.UsageError(f"{path}: animated, {picture.n_frames} frames; expected a still picture")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode[0] in "IF":  # 16 bits a pixel, which PIL's own conversion would clip to white, or deeper
                values = np.asarray(picture, np.float64)
                if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise click.UsageError(f"{path}: 32 bits a pixel; expected 8 or 16 bits a channel")
                return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
            if picture.has_transparency_data:
                white = Image.new("RGBA", picture.size, "white")
                return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        fault = "no such file" if isinstance(error, FileNotFoundError) else "damaged, or no picture or sound"
        raise click.UsageError(f"{path}: {fault}; HEIC and such: magick {path.name} {path.stem}.png") from error


def square(picture, crop, where):
    """The square of a picture that a model sees; one that is square already is taken whole.

    crop "clevr": side 0.6 W, centred horizontally, its centre W/64 below the middle; "centre": the largest in the
    middle; "fit": all of it, between bars of its mean colour. Raises click.UsageError where there is no such square.
    """
    width, height = picture.size
    if width == height:
        return picture
    if crop == "centre":
        return ImageOps.fit(picture, (min(width, height),) * 2)
    if crop == "fit":
        mean = picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        return ImageOps.pad(picture, (max(width, height),) * 2, color=mean)
    left, top, side = 0.2 * width, height / 2 + width / 64 - 0.3 * width, 0.6 * width
    if crop != "clevr" or top < 0 or top + side > height:
        reason = "CLEVR's crop needs a height of at least 0.64 W" if crop == "clevr" else "this model takes squares"
        raise click.UsageError(f"{where}: {width}x{height} pixels; {reason}; recompose.py --crop takes others")
    return picture.crop((round(left), round(top), round(left + side), round(top + side)))


def load_picture(path, size, crop):
    """A picture file -> uint8 (size, size, 3), cropped by `square`."""
    picture = square(read_picture(path), crop, path)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def read_sound(path):
    """A sound file -> its samples, float32 (n, channels), and their rate in Hz.

    Raises click.UsageError where it is missing, damaged, cut off, empty, silent, too long, or not finite.
    """
    import soundfile  # here, because pictures do without

    try:
        with Path(path).open("rb") as raw, soundfile.SoundFile(raw) as file:
            rate, length, channels = file.samplerate, file.frames, file.channels
            if length * channels > LONGEST or not RATES[0] <= rate <= RATES[1]:
                found = f"{length / rate:.0f} s of {channels} channels at {rate} Hz"
                most = f"at most ten minutes of stereo, {RATES[0]} to {RATES[1]} Hz, are read"
                raise click.UsageError(f"{path}: {found}; {most}: ffmpeg -i {path.name} -t 600 -ac 2 -ar 44100 a.wav")
            samples = file.read(dtype="float32", always_2d=True)
            cut_off = "(should be" in file.extra_info or len(samples) < length - rate / 10  # its header says so
    except (RuntimeError, OSError) as error:  # soundfile's own among them
        fault = "no such file" if isinstance(error, FileNotFoundError) else "damaged, or not a sound that is read"
        raise click.UsageError(f"{path}: {fault}; others: ffmpeg -i {path.name} {path.stem}.wav") from error
    silent = np.abs(samples.mean(1)).max(initial=0) < 1e-5
    bad = "samples must be finite; some are NaN or infinite" if not np.isfinite(samples).all() else ""
    fault = f"cut off after {len(samples) / rate:.2f} s" if cut_off else bad or ("silent" if len(samples) else "empty")
    if cut_off or bad or silent:
        raise click.UsageError(f"{path}: {fault}; expected a whole sound")
    return samples, rate


def resample_sound(samples, rate, wanted):
    """Samples (n, ...) at `rate` Hz -> at `wanted` Hz."""
    import soxr

    return samples if rate == wanted else soxr.resample(samples, rate, wanted)


def save_sound(path, samples, rate):
    """Write samples (n, channels), 16 bits each; what exceeds full scale is made softer. Raises OSError, and

    click.ClickException where that kind of file has no such rate or channels.
    """
    import soundfile

    peak, encoded, (kind, subtype) = np.abs(samples).max(), io.BytesIO(), WRITTEN[path.suffix.lower()]
    if peak > 1.006:  # 0.05 dB: less would be said as 0.0 dB
        click.echo(f"{path}: made {20 * np.log10(peak):.1f} dB softer, to fit into full scale")
    try:  # in memory: soundfile's own errors of writing have many kinds
        with soundfile.SoundFile(encoded, "w", rate, samples.shape[1], subtype, format=kind) as file:
            for i in range(0, len(samples), rate):  # libvorbis crashes on minutes at once
                file.write(samples[i : i + rate] / max(peak, 1))
    except (RuntimeError, ValueError) as error:
        about = f"{samples.shape[1]} channels at {rate} Hz"
        raise click.ClickException(f"{path}: {kind} does not hold {about}; write a .wav file") from error
    write_atomically(path, lambda temporary: temporary.write_bytes(encoded.getbuffer()))


# ---------------------------------------------------------------- Spectra


def stft(waveform, n_fft, hop):
    """(..., samples), zero-padded to whole hops -> complex (..., F, T); frames are centred, the ends reflected."""
    rest = [(0, 0)] * (waveform.ndim - 1)
    whole = np.pad(waveform, [*rest, (0, -waveform.shape[-1] % hop)])
    whole = np.pad(whole, [*rest, (n_fft // 2, n_fft // 2)], mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(whole, n_fft, axis=-1)[..., ::hop, :]
    return np.fft.rfft(frames * np.hanning(n_fft + 1)[:-1]).swapaxes(-1, -2)


def inverse_stft(spectrum, n_fft, hop, samples):
    """Complex (..., F, T) -> (..., samples): the sound of the nearest STFT, in least squares (Griffin & Lim 1984)."""
    window, total = np.hanning(n_fft + 1)[:-1], (spectrum.shape[-1] - 1) * hop + n_fft
    waveform, squares = np.zeros((*spectrum.shape[:-2], total)), np.zeros(total)
    for t in range(spectrum.shape[-1]):
        waveform[..., t * hop : t * hop + n_fft] += window * np.fft.irfft(spectrum[..., t])
        squares[t * hop : t * hop + n_fft] += window**2
    return (waveform / np.maximum(squares, 1e-8))[..., n_fft // 2 :][..., :samples]


def soft_masks(magnitude):
    """Magnitudes of slots (N, F, T) -> the share of each in their power; they sum to one (Wiener 1949)."""
    power = magnitude.astype(np.float64) ** 2 + 1e-12
    return power / power.sum(0)


def extend(masks, bins, frames):
    """Masks (N, F, T) for a spectrum of other bins, beyond which the highest octave's mean goes on, and frames."""
    above = masks[:, masks.shape[1] // 2 :].mean(1, keepdims=True).repeat(max(0, bins - masks.shape[1]), 1)
    masks = np.concatenate([masks, above], axis=1)[:, :bins, :frames]
    return np.pad(masks, ((0, 0), (0, 0), (0, frames - masks.shape[2])), mode="edge")


def levels(magnitude):
    """log(1 + 3 m) of STFT magnitudes (F, T) in units of their root mean square: as alike as they sound."""
    return np.log1p(magnitude * (3 / max(np.sqrt(np.square(magnitude).mean()), 1e-9)))


# ---------------------------------------------------------------- Long sounds: windows, and what goes on through them

FADE = 0.02  # s in which a window goes over into the next
APART, PROMINENCE = 0.3, 0.1  # s between onsets; of their peaks in the spectral flux, in levels
STAY = 10.0  # what it counts, in squared spreads, that a slot stays where it was


def split_at_onsets(waveform, rate, longest):
    """Times in s at which windows of (samples,) hardly longer than `longest` begin, and the end of the last.

    They begin at peaks of the spectral flux (Masri 1996), where something begins to sound, or evenly between these.
    """
    from scipy.signal import find_peaks

    duration, longest, hop, minute = len(waveform) / rate, longest + FADE, rate // 100, 60 * rate
    cuts, flux = [0.0], [np.zeros(1)]
    for start in range(0, len(waveform) - 4 * hop, minute) if duration > longest else ():  # spectra are large
        level = levels(np.abs(stft(waveform[start : start + minute + 2 * hop], 4 * hop, hop)))
        flux.append(np.maximum(level[:, 2:6002] - level[:, :-2][:, :6000], 0).mean(0))
    peaks = find_peaks(np.concatenate(flux), distance=round(100 * APART), prominence=PROMINENCE)[0]
    for stop in [*(peak / 100 for peak in peaks if APART < peak / 100 < duration - APART), duration]:
        cuts += np.linspace(cuts[-1], stop, int(np.ceil((stop - cuts[-1]) / longest)) + 1)[1:].tolist()
    return cuts


def follow(mu, cell, kl):
    """Which slot of every window goes on with which instrument: mu (W, N, D), cell (W, N, 2), kl (W, N) -> (W, N).

    Clusters that take one slot of every window (constrained k-means, Wagstaff et al. 2001), by distances in units of
    each latent's spread within clusters, less STAY where the cell is the one of a window before; by falling KL.
    """
    from scipy.optimize import linear_sum_assignment

    present, order, best = (kl > EMPTY) + 1e-3, np.zeros(kl.shape, int), np.inf
    for start in np.unique(np.linspace(0, len(mu) - 1, 10).astype(int)):
        centre, spread, found = mu[start], mu.var((0, 1)) + 1e-6, np.zeros_like(order)
        for _ in range(20):
            distance, before = (np.square(mu[:, None] - centre[:, None]) / spread).sum(-1), cell[0] + np.inf
            for w, own in enumerate(distance * present[:, None]):  # (clusters, N)
                stays = (cell[w] == before[:, None]).all(-1)
                found[w] = linear_sum_assignment(own - STAY * stays)[1]
                before = cell[w, found[w]]
            own, weight = (np.take_along_axis(values, found[..., None], 1) for values in (mu, present[..., None]))
            centre = (weight * own).sum(0) / weight.sum(0)
            spread = ((weight * np.square(own - centre)).sum((0, 1)) + 2 * mu.var((0, 1)) + 1e-6) / (weight.sum() + 2)
        if np.log(spread).sum() < best:
            best, order = np.log(spread).sum(), found
    return order[:, np.argsort(-np.take_along_axis(kl, order, 1).sum(0), kind="stable")]


# ---------------------------------------------------------------- Drawing

HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])  # inferno
TILE, GAP, LINE, FRAME = 128, 10, 18, 4  # sides and distances in pixels
ACCENT, INK, PAPER = (230, 81, 0), (40, 40, 40), (255, 255, 255)
LOWEST = 32.7  # Hz: the C1 at which the models' logarithmic frequency axis begins


class Tile(NamedTuple):
    image: object  # uint8 (H, W, 3), to be drawn TILE high, or a PIL picture, to be drawn as it is
    caption: str = ""
    framed: bool = False
    pale: bool = False  # mixed with white: of a slot that holds nothing


def to_uint8(picture):
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3); values outside are clipped."""
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def heat_map(values, top=None):
    """(H, W) -> uint8 (H, W, 3), from 0 (black) to `top` or the largest value (light yellow)."""
    place = np.clip(values / max(float(values.max()) if top is None else top, 1e-9), 0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(place, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def with_scales(picture, top, unit, x=("", ""), y=("", "")):
    """A heat map uint8 (H, W, 3) -> a PIL tile of it, made square, with a colour bar that runs from 0 to `top`.

    What its axes run from and to stands beside them: x (left, right), y (bottom, top).
    """
    font, most = ImageFont.load_default(10), f"{top:.3g} {unit}"
    left = round(max(map(font.getlength, y))) + 5 * any(y)
    right = left + TILE
    tile = Image.new("RGB", (right + 17 + round(font.getlength(most)), TILE + 14 * any(x)), PAPER)
    tile.paste(Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.BOX), (left, 0))
    tile.paste(Image.fromarray(heat_map(np.linspace(1, 0, TILE)[:, None])).resize((6, TILE)), (right + 6, 0))
    draw = ImageDraw.Draw(tile)
    for place, text, anchor in (
        ((right + 15, TILE), "0", "ls"), ((right + 15, 1), most, "lt"),
        ((left, TILE + 2), x[0], "la"), ((right, TILE + 2), x[1], "ra"),
        ((left - 3, TILE), y[0], "rs"), ((left - 3, 1), y[1], "rt"),
    ):  # fmt: skip
        draw.text(place, text, INK, font, anchor)
    return tile


def kl_tile(picture, kl_map, cell, chosen=None):
    """The KL map over the greyed picture it is of, rings and numbers at the slots' cells, a colour bar in nats.

    picture uint8 (H, W, 3), kl_map (H_l, W_l), cell (N, 2) as (y, x) in [-1, 1], chosen: numbers of slots, or all.
    """
    side, top = 4 * TILE, float(kl_map.max())  # drawn large, as `with_scales` makes it smaller: smooth rings
    opaque = 255 * np.clip(2 * kl_map / max(top, 1e-9), 0, 1)  # from half of the highest on all is heat
    heat = Image.fromarray(np.dstack([heat_map(kl_map), opaque]).astype(np.uint8))
    heat = heat.resize((side, side), Image.Resampling.NEAREST)
    tile = Image.fromarray((0.6 * picture.mean(2)).astype(np.uint8)).convert("RGB").resize((side, side))
    tile.paste(heat, mask=heat)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(44)
    for k in reversed(range(len(cell))):  # the first, those of highest KL, on top
        (y, x), marked = (cell[k] + 1) / 2 * side, chosen is None or k in chosen
        draw.circle((x, y), 26, outline=ACCENT if marked else PAPER, width=7)
        place = min(x + 20, side - 48), max(y - 14, 36)  # above, to the right, but within the picture
        draw.text(place, str(k), PAPER, font, "ls", stroke_width=4, stroke_fill=ACCENT if marked else INK)
    return with_scales(np.asarray(tile), top, "nats")


def spectrum_levels(magnitude, top, rate):
    """STFT magnitudes (F, T) -> (TILE, T): dB of the 60 below `top`, rows in equal steps of pitch, highest first."""
    frequency = np.geomspace(rate / 2, LOWEST, TILE)
    bins = (frequency / (rate / 2) * (len(magnitude) - 1)).round().astype(int)
    return np.maximum(60 + 20 * np.log10(np.maximum(magnitude[bins] / max(top, 1e-20), 1e-9)), 0)


def spectrum_tile(magnitude, top, seconds, rate):
    """STFT magnitudes (F, T) of so many seconds at `rate` Hz -> a PIL tile of their dB, 60 dB being `top`."""
    heat, pitch = heat_map(spectrum_levels(magnitude, top, rate), 60), (f"{LOWEST:.0f} Hz", f"{rate / 2000:g} kHz")
    return with_scales(heat, 60, "dB", ("0", f"{seconds:g} s"), pitch)


def panel(tile):
    """A Tile -> a PIL picture: its caption above its image, a frame around this, and the gaps to the next panels."""
    image, font = tile.image, ImageFont.load_default(12)
    if isinstance(image, np.ndarray):
        size = (round(TILE * image.shape[1] / image.shape[0]), TILE)
        image = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)  # pixels stay visible as squares
    image = image.convert("RGB")
    if tile.pale:
        image = Image.blend(image, Image.new("RGB", image.size, PAPER), 0.7)
    colour = ACCENT if tile.framed else PAPER
    framed = ImageOps.expand(ImageOps.expand(image, 1, PAPER), FRAME - 1, colour)
    right = max(GAP - 2 * FRAME, round(font.getlength(tile.caption)) - image.width)
    sheet = ImageOps.expand(framed, (0, LINE - FRAME, right, GAP - FRAME), PAPER)
    ImageDraw.Draw(sheet).text((FRAME, 1), tile.caption, ACCENT if tile.framed else INK, font)
    return sheet


def contact_sheet(rows, title="", labels=()):
    """Rows of Tiles, in columns -> one PIL picture, `title` above them, one of `labels` to the left of each row.

    The last tile of a row widens no column.
    """
    rows = [[panel(tile) for tile in row] for row in rows]
    font, large = ImageFont.load_default(12), ImageFont.load_default(15)
    left = [GAP - FRAME + (round(max(map(font.getlength, labels))) + GAP if labels else 0)]
    for c in range(max(map(len, rows)) - 1):
        left.append(left[c] + max(row[c].width for row in rows if row[c + 1 :]))
    top = [GAP + 24 * bool(title)]
    for row in rows:
        top.append(top[-1] + max(picture.height for picture in row))
    width = max(left[len(row) - 1] + row[-1].width + FRAME for row in rows)
    sheet = Image.new("RGB", (max(width, round(large.getlength(title)) + 2 * GAP), top[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP - 2), title, INK, large)
    for label, above, below in zip(labels, top, top[1:], strict=False):
        draw.text((GAP, (above + below + LINE - GAP) / 2), label, INK, font, "lm")
    for row, y in zip(rows, top, strict=False):
        for picture, x in zip(row, left, strict=False):
            sheet.paste(picture, (x, y))
    return sheet


# ---------------------------------------------------------------- Model


class Model:
    """An exported folder's graphs, in onnxruntime; raises click.UsageError where one is missing, or of another kind."""

    def __init__(self, folder, kind, vocoder=False):
        import onnxruntime  # here, so that `--help` and wrong arguments answer at once

        self.sessions, described, options = {}, [], onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        for name in ("encoder", "decoder", "composer", "vocoder")[: 3 + vocoder]:
            path = Path(folder) / f"{name}.onnx"
            if not path.is_file():
                raise click.UsageError(f"--model {folder}: no {name}.onnx; expected the export of a train_mvae.py run")
            try:
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises a kind of its own for every fault
                raise click.UsageError(f"{path}: not a readable ONNX graph ({str(error).splitlines()[0]})") from error
            self.sessions[name] = session
            described.append(session.get_modelmeta().custom_metadata_map.get("model"))
        try:
            (text,) = set(described)  # the same in every graph
            self.about = json.loads(text)
            self.n_slots, found = self.about["N"], self.about["kind"]
        except (KeyError, TypeError, ValueError) as error:
            raise click.UsageError(f"--model {folder}: its graphs were not written together by export.py") from error
        if found != kind:
            raise click.UsageError(f"--model {folder}: a model of kind {found!r}; expected {kind!r}")

    def run(self, graph, **inputs):
        """Named arrays -> named arrays; raises click.ClickException where an output is not finite."""
        session = self.sessions[graph]
        found = dict(zip((output.name for output in session.get_outputs()), session.run(None, inputs), strict=True))
        if not all(np.isfinite(values).all() for values in found.values()):
            raise click.ClickException(f"{graph}.onnx gives values that are not finite; nothing is written")
        return found

    def encode(self, **inputs):
        """What the encoder says of its inputs, of `n_slots` slots: named arrays."""
        more = {} if self.n_slots == self.about["N"] else {"slots": np.arange(self.n_slots)}
        return self.run("encoder", **inputs, **more)

    def decode(self, z, cell):
        """z (B, M, D), cell (B, M, 2) -> layer (B, M, ...)."""
        return self.run("decoder", z=z, cell=cell)["layer"]

    def compose(self, layer, background=None):
        """layer (B, M, ...), background (B, ...) or None -> image (B, 3, H, W), or spectrogram (B, F, T)."""
        inputs = {"layer": layer} if background is None else {"layer": layer, "background": background}
        return next(iter(self.run("composer", **inputs).values()))


# ---------------------------------------------------------------- Recomposition


def describe(path, what, kl, misfit, usual):
    """Say how many slots of an input, of kl (N,) nats, hold something, and where it is unlike what was learnt."""
    held = int((kl >= EMPTY).sum())
    click.echo(f"{path}: {held} {what}{'s' * (held != 1)}, {len(kl) - held} empty slots")
    if misfit > usual:
        click.echo(f"{path}: unlike the {what}s that this model has learnt; expect nonsense", err=True)


def figure_of(rows, result, inputs, edits):
    """Per input (tile, KL tile, tiles of its slots, their KL in nats, the chosen ones) -> the figure, a PIL picture."""
    sheet = []
    for tile, heat, slots, kl, chosen in rows:
        sheet.append([Tile(tile, "input"), Tile(heat, "KL map")])
        for k, (slot, nats) in enumerate(zip(slots, kl, strict=True)):
            held = f"{nats:.0f} nats" if nats >= EMPTY else "empty"
            sheet[-1].append(Tile(slot, f"slot {k}: {held}", k in chosen, nats < EMPTY))
    changes = [f"{name} {i}.{k} {' '.join(f'{v:+g}' for v in values)}" for name, pairs in edits.items()
               for (i, k), values in pairs.items()]  # fmt: skip
    sheet.append([Tile(result, "; ".join(["of the framed slots", *changes]), True)])
    names = [*(path.name for path in inputs), "recomposition"]
    return contact_sheet(sheet, "Inputs taken apart; the framed slots put together", names)


def recompose_pictures(model, inputs, chosen, edits, crop=None):
    """Picture files -> the recomposition and the figure, PIL pictures; chosen: the slots of each."""
    pictures = np.stack([load_picture(path, model.about["size"], crop or model.about["crop"]) for path in inputs])
    image = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255
    encoded = model.encode(image=image)
    layer, cell = model.decode(encoded["mu"], encoded["cell"]), encoded["cell"].copy()  # (B, N, ...); z = mu
    for address, (right, down) in edits["move"].items():
        cell[address] += 2 * np.array([down, right], np.float32)
    edited = model.decode(encoded["mu"], cell)
    for address in edits["front"]:
        edited[address][0] += 10  # how near it is: others are at most 2
    background = encoded["background"][:, None] if "background" in encoded else [None] * len(inputs)  # (B, 1, ...)
    parts = np.concatenate([edited[b, numbers] for b, numbers in enumerate(chosen)])[None]  # (1, M, ...)
    result, rows = to_uint8(model.compose(parts, background[0])[0]), []
    for b, (path, kl) in enumerate(zip(inputs, encoded["kl"], strict=True)):
        behind = None if background[b] is None else background[b].repeat(len(kl), 0)  # (N, ...)
        alone = [to_uint8(picture) for picture in model.compose(layer[b][:, None], behind)]
        misfit = np.square(model.compose(layer[b : b + 1], background[b])[0] - image[b]).mean()
        describe(path, "object", kl, misfit, model.about.get("misfit", np.inf))
        heat = kl_tile(pictures[b], encoded["kl_map"][b], encoded["cell"][b], chosen[b])
        rows.append((pictures[b], heat, alone, kl, chosen[b]))
    return Image.fromarray(result), figure_of(rows, result, inputs, edits)


def hear(model, waveform):
    """(n,) at the model's rate -> times in s at which windows begin, and end, the windows, and what the encoder says.

    Slots are in the order of `follow`.
    """
    rate, longest = model.about["sample_rate"], model.about["samples"]
    cuts = split_at_onsets(waveform, rate, longest / rate)
    pieces = [waveform[round(a * rate) : round(b * rate)][:longest] for a, b in pairwise(cuts)]
    pieces = np.stack([np.pad(piece, (0, longest - len(piece))) for piece in pieces]).astype(np.float32)
    parts = [model.encode(waveform=pieces[i : i + 8]) for i in range(0, len(pieces), 8)]
    heard = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if len(pieces) > 1:
        order = follow(heard["mu"], heard["cell"], heard["kl"])
        heard |= {name: heard[name][np.arange(len(pieces))[:, None], order] for name in ("mu", "cell", "kl")}
    return cuts, pieces, heard


def recompose_sounds(model, inputs, chosen, edits, vocoder):
    """Sound files -> the recomposition (samples, channels), its rate, both as of the first, and the figure."""
    parts, rows, own, form = [], [], model.about["sample_rate"], None
    for b, path in enumerate(inputs):
        samples, found = read_sound(path)
        rate, channels = form = form or (found, samples.shape[1])
        if samples.shape[1] != channels:
            samples = samples.mean(1, keepdims=True).repeat(channels, 1)
        changes = {name: {k: numbers for (i, k), numbers in pairs.items() if i == b} for name, pairs in edits.items()}
        samples = resample_sound(samples, found, rate)
        parts.append(recompose_sound(model, path, samples, rate, chosen[b], changes, vocoder, rows))
    longest = max(map(len, parts))
    result = sum(np.pad(part, ((0, longest - len(part)), (0, 0))) for part in parts)
    heard = resample_sound(result.mean(1), rate, own)
    step = model.about["hop"] * max(1, len(heard) // model.about["samples"])
    magnitude = np.abs(stft(heard, model.about["n_fft"], step))
    tile = spectrum_tile(magnitude, magnitude.max(), longest / rate, own)
    return result, rate, figure_of(rows, tile, inputs, edits)


def recompose_sound(model, path, samples, rate, numbers, edits, vocoder, rows):
    """The slots `numbers` of samples (n, channels) at `rate` Hz, put together; `rows` gets what the figure shows.

    Soft masks on the sound's spectrum; with `vocoder`, or transposed, what a slot decodes to, as loud as its mask.
    """
    own, sizes = model.about["sample_rate"], (model.about["n_fft"], model.about["hop"])
    hop, longest = round(sizes[1] * rate / own), round(model.about["samples"] * rate / own)
    (cuts, pieces, heard), result = hear(model, resample_sound(samples.mean(1), rate, own)), np.zeros_like(samples.T)
    gain, moved, seen, misfit = np.ones((model.n_slots, 1, 1)), heard["cell"].copy(), [], []
    for k, (decibels,) in edits["gain"].items():
        gain[k] = 10 ** (decibels / 20)
    for k, (semitones,) in edits["transpose"].items():
        moved[:, k, 0] += semitones / 6 / np.log2(own / 2 / LOWEST)  # from -1 to 1 over all octaves
    for w, (start, stop) in enumerate(pairwise(cuts)):
        first, last = round(start * rate), min(round((stop + FADE) * rate), len(samples))
        n, z, cell = last - first, heard["mu"][w : w + 1], heard["cell"][w : w + 1]
        spectrum = stft(np.pad(samples[first:last].T, ((0, 0), (0, max(0, longest - n)))), 4 * hop, hop)
        layer = model.decode(z, cell)
        alone = model.compose(layer[0][:, None])  # (N, F, T)
        masks, part = gain * extend(soft_masks(alone), *spectrum.shape[1:]), np.zeros((len(spectrum), n))
        for k in numbers:
            slot = inverse_stft(masks[k] * spectrum, 4 * hop, hop, n)  # (channels, n)
            if vocoder or k in edits["transpose"]:
                decoded = model.compose(model.decode(z[:, [k]], moved[w : w + 1, [k]]))
                sung = resample_sound(model.run("vocoder", spectrogram=decoded)["waveform"][0], own, rate)[:n]
                loud = np.sqrt(np.square(slot).mean(1, keepdims=True) / max(np.square(sung).mean(), 1e-20))
                slot = np.pad(loud * sung, ((0, 0), (0, n - len(sung))))
            part += slot
        ramp = np.minimum((np.arange(n) + 0.5) / (FADE * rate), 1)
        result[:, first:last] += part * (ramp if w else 1) * (ramp[::-1] if stop < cuts[-1] else 1)
        mixture = np.abs(stft(pieces[w], *sizes))
        misfit.append(np.square(levels(model.compose(layer)[0]) - levels(mixture)).mean())
        frames = np.arange(0, (stop - start) * own / sizes[1], max(1, len(pieces) // 2)).astype(int)
        seen.append(np.stack([mixture, *alone])[:, :, frames.clip(max=alone.shape[2] - 1)])
    show_sound(rows, np.concatenate(seen, axis=2), len(samples) / rate, own, heard, numbers)
    describe(path, "note", heard["kl"].mean(0), np.median(misfit), model.about.get("misfit", np.inf))
    return result.T


def show_sound(rows, seen, seconds, rate, heard, numbers):
    """Append to `rows` what a figure shows of a sound: seen (1 + N, F, T), magnitudes of it and its slots."""
    tops = [seen[0].max(), *[seen[1:].max()] * (len(seen) - 1)]
    tile, *slots = (spectrum_tile(one, top, seconds, rate) for one, top in zip(seen, tops, strict=True))
    if len(heard["kl_map"]) == 1:
        level = heat_map(spectrum_levels(seen[0], tops[0], rate), 60)
        heat = kl_tile(level, heard["kl_map"][0][::-1], heard["cell"][0] * np.float32([-1, 1]), numbers)
    else:  # a column a window
        kl_map = heard["kl_map"][:, ::-1, 0].T
        heat = with_scales(heat_map(kl_map), kl_map.max(), "nats", ("0", f"{seconds:g} s"))
    rows.append((tile, heat, slots, heard["kl"].mean(0), numbers))


# ---------------------------------------------------------------- Command line


def parse_slots(text):
    """ "0,2" -> [0, 2]; raises click.BadParameter for all but different numbers from 0 on."""
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len({*map(int, numbers)}) < len(numbers):
        raise click.BadParameter(f"{text!r}: expected different slot numbers, from 0 on, such as 0,2")
    return [*map(int, numbers)]


def edit_option(name, n, example, text):
    """An option of many edits ((input, slot), n numbers): "0:0.2,-1" -> ((0, 0), (0.2, -1.0)), "2.1:0,1" of input 2."""

    def parse_edit(value):
        found = re.fullmatch(r"(?:(\d+)\.)?(\d+)" + r"[:,]([-+]?\d*\.?\d+)" * n, value)
        if not found:
            raise click.BadParameter(f"{value!r}: expected a slot K, or I.K of input I, and numbers as in {example}")
        source, slot, *numbers = found.groups()
        return (int(source or 0), int(slot)), tuple(map(float, numbers))

    return click.option(f"--{name}", type=parse_edit, multiple=True, metavar="[I.]K...", help=f"{text}: {example}.")


def chosen_slots(lists, n_inputs, n_slots, edits):
    """The slots of every input, checked against the model and the edits: -> one list of numbers an input."""
    if len(lists) > 1 and len(lists) != n_inputs:
        raise click.UsageError(f"--slots is given {len(lists)} times for {n_inputs} inputs; give it once, or once each")
    lists = list(lists) or [list(range(n_slots))]
    if max(map(max, lists)) >= n_slots:
        raise click.UsageError(f"--slots: there are slots 0 to {n_slots - 1}; --n-slots asks for more")
    lists = lists if len(lists) == n_inputs else lists * n_inputs
    for name, (i, k) in ((name, address) for name, pairs in edits.items() for address in pairs):
        if i >= n_inputs or k not in lists[i]:
            raise click.UsageError(f"--{name} {i}.{k}: input {i} has no such slot among those that are kept")
    return lists


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"), context_settings={"show_default": True})
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=PATH)
@click.option("--slots", multiple=True, type=parse_slots, metavar="K,K", show_default="all",
              help="Slots to keep: once for every input, or once each, in the inputs' order.")  # fmt: skip
@click.option("--n-slots", type=click.IntRange(1, 12), show_default="the model's", help="Slots of every input.")
@edit_option("move", 2, "0:0.2,-0.1", "Pictures: slot K (of input I) so many widths right and down")
@edit_option("front", 0, "0", "Pictures: slot K before all others")
@edit_option("transpose", 1, "0:-3", "Sounds: slot K so many semitones higher, decoded anew")
@edit_option("gain", 1, "0:-6", "Sounds: slot K so many dB louder")
@click.option("--model", "folder", type=PATH, show_default="the shipped model", help="Folder written by export.py.")
@click.option("--crop", type=click.Choice(["clevr", "centre", "fit"]), show_default="the model's", help="Of pictures.")
@click.option("--vocoder", is_flag=True, help="Sounds: what slots decode to, through Griffin-Lim, instead of masks.")
@click.option("--out", type=PATH, show_default="recomposed.png or .wav",
              help="The picture or sound to write; the figure is written beside it, as NAME_figure.png.")  # fmt: skip
def main(inputs, slots, n_slots, folder, crop, vocoder, out, **edits):
    # 1. Check the arguments, and read the model.
    sounds = {path.suffix.lower() in SUFFIXES for path in inputs}
    if len(sounds) > 1:
        raise click.UsageError("pictures and sounds cannot be recomposed together")
    kind, suffixes = ("mvae-sound", [*WRITTEN]) if True in sounds else ("mvae-image", [".png"])
    out = out or Path(f"recomposed{suffixes[0]}")
    if out.suffix.lower() not in suffixes:
        raise click.UsageError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    edits = {name: dict(pairs) for name, pairs in edits.items()}
    of_sounds = {"vocoder": vocoder, "transpose": edits["transpose"], "gain": edits["gain"]}
    of_pictures = {"crop": crop, "move": edits["move"], "front": edits["front"]}
    for name, given in (of_pictures if True in sounds else of_sounds).items():
        if given:
            raise click.UsageError(f"--{name} is for {'pictures' if True in sounds else 'sounds'}")
    beside = out.with_name(f"{out.stem}_figure.png")
    for path in (out, beside):
        if path.is_dir() or not path.parent.is_dir():
            raise click.UsageError(f"--out: {path} is a folder, or in one that does not exist")
        if path.resolve() in [other.resolve() for other in inputs]:
            raise click.UsageError(f"--out: {path} would overwrite an input")
    model = Model(folder or SHIPPED[kind], kind, bool(vocoder or edits["transpose"]))
    model.n_slots = n_slots or model.n_slots
    chosen = chosen_slots(slots, len(inputs), model.n_slots, edits)

    # 2. Take the inputs apart, put the chosen slots together, write the result and the figure that explains it.
    try:
        if kind == "mvae-sound":
            samples, rate, figure = recompose_sounds(model, inputs, chosen, edits, vocoder)
            save_sound(out, samples, rate)
        else:
            picture, figure = recompose_pictures(model, inputs, chosen, edits, crop)
            write_atomically(out, lambda temporary: picture.save(temporary, format="PNG"))
        write_atomically(beside, lambda temporary: figure.save(temporary, format="PNG"))
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error.strerror}") from error
    n = sum(map(len, chosen))
    count = f"{n} slot{'s' * (n > 1)} of {len(inputs)} input{'s' * (len(inputs) > 1)}"
    click.echo(f"{out}: {count}; {beside} explains it")


if __name__ == "__main__":
    main()
