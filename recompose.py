# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=2.1", "scipy>=1.14", "pillow>=11", "click>=8.2", "soundfile>=0.13", "soxr>=0.5", "onnxruntime>=1.22"]
# ///
"""Take pictures or sounds apart into slots, and put slots of any number of them together; needs no PyTorch.

    python recompose.py a.png b.png --slots 0,2 --slots 1  # slots 0 and 2 of a.png, slot 1 of b.png
    python recompose.py a.png --move 0:0.2,-0.1            # slot 0 further right and up, by shares of the width
    python recompose.py a.png --slots 0,2 --complete       # and a new scene around them
    python recompose.py --sample 4                         # four new scenes; of sounds: --out new.wav
    python recompose.py a.wav b.wav --slots 0 --slots 1 --transpose 1.1:3 --out mix.mp3  # one instrument of each

Writes the recomposed picture or sound (`--out`) and beside it a figure: inputs, KL maps with the chosen cells marked,
every slot alone, the result. A slot of a sound is a soft mask on its spectrum, or, by `--vocoder`, what it decodes to.
"""

import hashlib
import io
import json
import os
import re
import struct
import sys
from collections import namedtuple
from importlib import import_module
from itertools import accumulate, pairwise, product
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

MODELS = Path(__file__).parent / "models"
SHIPPED = {"mvae-image": MODELS / "clevr", "mvae-sound": MODELS / "nsynth-duo"}
WRITTEN = (".wav", ".flac", ".ogg", ".mp3")  # sounds
SOUNDS = (*WRITTEN, ".oga", ".opus", ".aif", ".aiff", ".aifc", ".caf", ".m4a", ".aac", ".wma", ".mp4")  # else pictures
LONGEST = 2**26  # samples of all channels: ten minutes of stereo at 48 kHz, and more; or pixels
PATH, FILE = click.Path(path_type=Path), click.Path(exists=True, dir_okay=False, path_type=Path)
EMPTY = {"mvae-image": 4.0, "mvae-sound": 14.0}  # nats: a slot of less holds nothing; docs/mvae-audio.md

# ---------------------------------------------------------------- Files


def write_atomically(path, write):
    """Call write(temporary path) and rename, so that a file is written whole or not at all; passes on errors."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_picture(path, size, crop):
    """Any still picture of 8 or 16 bits -> upright, cropped, uint8 (size, size, 3); click.UsageError for all others."""
    try:
        Image.open(path).verify()  # a PNG's checksums, which decoding passes over
        with Image.open(path) as picture:
            if np.prod(picture.size) > LONGEST or (picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1):
                raise click.UsageError(f"{path}: animated, or of over {LONGEST:,} pixels; expected a still picture")
            ImageOps.exif_transpose(picture, in_place=True)  # which loads it first
            if picture.mode[0] in "IF":  # 16 bits a pixel, which PIL's own conversion would clip to white, or deeper
                values = np.asarray(picture, np.float32)
                if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise click.UsageError(f"{path}: 32 bits a pixel; expected 8 or 16 bits a channel")
                picture = Image.fromarray((values / 257).round().astype(np.uint8))
            elif picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            picture = picture.convert("RGB")
    except (OSError, RuntimeError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as e:
        raise click.UsageError(f"{path}: damaged, or no picture that is read; try magick {path.name} a.png") from e
    return np.asarray(square(picture, crop, path).resize((size, size), Image.BILINEAR))


def square(picture, crop, where):
    """The square of a picture that a model sees; all of one that is square. click.UsageError where there is none."""
    # Of "clevr" the side is 0.6 W, the centre W/64 below the middle; "centre": the largest; "fit": all, in mean colour.
    width, height = picture.size
    if width == height:
        return picture
    if crop == "centre":
        return ImageOps.fit(picture, (min(width, height),) * 2, Image.NEAREST)  # of whole pixels
    if crop == "fit":
        picture.thumbnail((4096, 4096))  # a line of 100,000 pixels would fill a square of as many
        return ImageOps.pad(picture, (max(picture.size),) * 2, color=picture.reduce(picture.size).getpixel((0, 0)))
    left, top, side = 0.2 * width, height / 2 + width / 64 - 0.3 * width, 0.6 * width
    if crop != "clevr" or top + side > height:
        expected = "a square, or for CLEVR's crop a height of at least 0.64 W; recompose.py --crop takes others"
        raise click.UsageError(f"{where}: {width}x{height} pixels; expected {expected}")
    return picture.crop((round(left), round(top), round(left + side), round(top + side)))


def read_sound(path):
    """A sound file -> float32 (n, channels), rate in Hz; raises click.UsageError for all but whole, finite sounds."""
    soundfile = import_module("soundfile")  # here, because pictures do without
    try:
        with path.open("rb") as raw, soundfile.SoundFile(raw) as file:
            rate, length, channels = file.samplerate, file.frames, file.channels
            if length * channels > LONGEST or channels > 16 or not 4000 <= rate <= 192_000:
                expected = f"ten minutes of stereo, 4 to 192 kHz: ffmpeg -i {path.name} -t 600 -ac 2 -ar 44100 a.wav"
                raise click.UsageError(f"{path}: {length} x {channels} samples, {rate} Hz; expected at most {expected}")
            samples, log = file.read(dtype="float32", always_2d=True), file.extra_info
            cut_off = re.search(r"(data|SSND) *: (?!4294967295 )\d+ \(sh", log) or len(samples) < length - rate / 10
            if file.format == "OGG":  # has no such header, but its last page is marked as the last (RFC 3533)
                content = path.read_bytes()
                page = content[content.rfind(b"OggS", 0, -23) :]  # a whole header, of 27 bytes and its segments' sizes
                cut_off = not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])
    except (RuntimeError, OSError, ValueError) as error:  # soundfile's own among them
        raise click.UsageError(f"{path}: damaged, or no sound that is read; try ffmpeg -i {path.name} a.wav") from error
    faults = {
        f"cut off after {len(samples) / rate:.2f} s": cut_off,
        "samples must be finite; some are NaN or infinite": not np.isfinite(samples).all(),
        "silent" if len(samples) else "empty": np.abs(samples.mean(1)).max(initial=0) < 1e-5,
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise click.UsageError(f"{path}: {fault}; expected a whole sound")
    return samples, rate


def fit(waveform, n):
    """(..., samples) -> (..., n), cut off or zero-padded."""
    return np.pad(waveform[..., :n], [(0, 0)] * (waveform.ndim - 1) + [(0, max(0, n - waveform.shape[-1]))])


def resample_sound(waveform, rate, wanted):
    """(..., samples) at `rate` Hz -> (..., n) at `wanted` Hz, n = samples * wanted / rate, rounded up."""
    n = int(-(-waveform.shape[-1] * wanted // rate))
    return waveform if rate == wanted else fit(import_module("soxr").resample(waveform.T, rate, wanted).T, n)


def save_sound(path, waveform, rate):
    """Write (channels, n), softer where beyond full scale; raises OSError, click.ClickException where none holds it."""
    peak, kind, encoded = np.abs(waveform).max(), path.suffix[1:].upper(), io.BytesIO()
    if peak > 1.006:  # 0.05 dB: less would be said as 0.0 dB
        click.echo(f"{path}: made {20 * np.log10(peak):.1f} dB softer, to fit into full scale")
    try:  # in memory: soundfile's own errors of writing have many kinds
        with import_module("soundfile").SoundFile(encoded, "w", rate, len(waveform), format=kind) as file:
            for i in range(0, waveform.shape[1], rate):  # libvorbis crashes on minutes at once
                file.write(waveform[:, i : i + rate].T / max(peak, 1))
    except (RuntimeError, ValueError) as error:
        about = f"no {kind} file has {len(waveform)} channels at {rate} Hz; write a .wav file"
        raise click.ClickException(f"{path}: {about}") from error
    write_atomically(path, lambda temporary: temporary.write_bytes(encoded.getbuffer()))


# ---------------------------------------------------------------- Spectra, and windows of long sounds

FADE, APART, PROMINENCE = 0.02, 0.3, 0.3  # s of a fade between windows; s between onsets; levels that a peak stands out
COMPARED, WIDTH, STAY = 128, 0.25, 1.0  # windows compared with; of a density's kernel; nats for a cell that stays


def stft(waveform, n_fft, hop):
    """(..., samples), zero-padded to whole hops -> complex (..., F, T); frames are centred, the ends reflected."""
    whole = fit(waveform, -(-waveform.shape[-1] // hop) * hop)
    whole = np.pad(whole, [*[(0, 0)] * (waveform.ndim - 1), (n_fft // 2, n_fft // 2)], mode="reflect")
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


def soft_masks(magnitude, mixture, wanted=None):
    """Magnitudes of slots (N, F, T), of their mixture (F, T) -> shares of the power (N, *wanted) (Wiener 1949)."""
    power = magnitude.astype(np.float64) ** 2 + 1e-12
    # Slots are smooth: each gets a gain for every bin first, by one step of NMF (Itakura-Saito, Févotte et al. 2009).
    share, excess = power / power.sum(0), mixture**2 / power.sum(0) + 1e-12
    heard = mixture.any(0) + 1e-12  # frames of zero-padding say nothing
    power *= (heard * share * excess).mean(2, keepdims=True) / (heard * share).mean(2, keepdims=True)
    (n, known), (bins, frames) = mixture.shape, wanted or mixture.shape  # beyond, the highest octave's mean goes on
    masks = np.pad(power / power.sum(0), ((0, 0), (0, max(0, bins - n)), (0, 0)), "mean", stat_length=(n + 1) // 2)
    return masks[:, :bins, np.arange(frames).clip(max=known - 1)]


def band_levels(magnitude):
    """STFT magnitudes (F, T) -> (bands, T): log(1 + 3 m) of bands of equal steps of pitch, m as loud as all at once."""
    edges = np.unique(np.geomspace(len(magnitude) / 256, len(magnitude) - 1, 49).astype(int))
    bands = np.add.reduceat(magnitude, edges) / np.diff([*edges, len(magnitude)])[:, None]
    return np.log1p(bands * (3 / max(np.sqrt(np.square(bands).mean()), 1e-9)))


def unexplained(found, true):
    """The share of the variance of `true` that `found` leaves, of arrays of one shape."""
    return ((found - true) ** 2).mean() / max(true.var(), 1e-9)


def split_at_onsets(waveform, rate, longest):
    """Times in s at which windows of (samples,) begin, at onsets (Masri 1996), or every `longest` s; and the end."""
    duration, longest, hop, minute = len(waveform) / rate, longest + FADE, rate // 100, 60 * rate
    if duration <= longest:
        return [0.0, duration]
    cuts, flux = [0.0], [np.zeros(1)]
    for start in range(0, len(waveform) - 4 * hop, minute):  # spectra are large
        level = band_levels(np.abs(stft(waveform[start : start + minute + 2 * hop], 4 * hop, hop)))
        flux.append(np.maximum(level[:, 2:] - level[:, :-2], 0).mean(0)[:6000])
    find_peaks = import_module("scipy.signal").find_peaks  # here, because it takes a second
    onsets = find_peaks(np.concatenate(flux), distance=round(100 * APART), prominence=PROMINENCE)[0] / 100
    for stop in [*onsets[(onsets > APART) & (onsets < duration - APART)], duration]:
        cuts += np.linspace(cuts[-1], stop, int(np.ceil((stop - cuts[-1]) / longest)) + 1)[1:].tolist()
    return cuts


def follow(mu, cell, kl):
    """Which slot of every window goes on with which instrument: mu (W, N, D), cell (W, N, 2), kl (W, N) -> (W, N)."""
    # Clusters of a slot of every window, in order of KL, in which the density of each slot's latents among those of the
    # other windows is highest (Parzen 1962); it gains STAY where its cell is the one of the window before.
    (windows, n), order, before, tried = kl.shape, [], cell[0] + np.inf, []
    some = np.unique(np.linspace(0, windows - 1, COMPARED).astype(int))  # not all, which may be thousands
    scaled = mu / np.sqrt(WIDTH * mu.shape[2] * (mu.var((0, 1)) + 1e-9))
    squared, inner = np.square(scaled).sum(2), np.tensordot(scaled, scaled[some], (2, 2))  # (W, N, windows `some`, N)
    near = np.exp(2 * inner - squared[:, :, None, None] - squared[some])
    near[some, :, np.arange(len(some))] = 0  # a window says nothing of itself

    def place(w, placed, among=slice(None), stays=0.0):  # the slots (N,) of window w by clusters, and how well they fit
        density = np.take_along_axis(near[w][:, among], placed[None, among], 2).mean(1).T  # (clusters, slots)
        affinity = np.log(density + 0.01) * ((kl[w] > EMPTY["mvae-sound"]) + 1e-3)
        chosen = import_module("scipy.optimize").linear_sum_assignment(affinity + STAY * stays, maximize=True)[1]
        return chosen, affinity[np.arange(n), chosen].sum()

    for start in np.unique(np.linspace(0, len(some) - 1, 10).astype(int)):
        placed, fits = np.tile(np.arange(n), (len(some), 1)), np.zeros(len(some))
        for sweep, (i, w) in product(range(10), enumerate(some)):  # the first compares with window `start` alone
            placed[i], fits[i] = place(w, placed, slice(None) if sweep else slice(start, start + 1))
        tried.append((fits.sum(), placed))
    for w in range(windows):
        order.append(place(w, max(tried, key=lambda pair: pair[0])[1], stays=(cell[w] == before[:, None]).all(-1))[0])
        before = cell[w, order[-1]]
    return np.array(order)[:, np.argsort(-np.take_along_axis(kl, np.array(order), 1).sum(0), kind="stable")]


# ---------------------------------------------------------------- Drawing

HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])  # inferno
TILE, GAP, LINE, FRAME = 128, 10, 18, 4  # sides and distances in pixels
ACCENT, INK, PAPER = (230, 81, 0), (40, 40, 40), (255, 255, 255)
LOWEST = 32.7  # Hz: the C1 at which the models' logarithmic frequency axis begins
# Its image is uint8 (H, W, 3), to be drawn TILE high, or a PIL picture, as it is; pale are slots that hold nothing.
Tile = namedtuple("Tile", "image caption framed pale", defaults=("", False, False))


def to_uint8(picture):
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3); values outside are clipped."""
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def heat_map(values, top=None):
    """(H, W) -> uint8 (H, W, 3), from 0 (black) to `top` or the largest value (light yellow)."""
    place = np.clip(values / max(float(values.max()) if top is None else top, 1e-9), 0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(place, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def with_scales(picture, top, unit, x=("", ""), y=("", "")):
    """A heat map (H, W, 3) -> a square PIL tile, with a bar from 0 to `top`, and what x and y run from and to."""
    font, most = ImageFont.load_default(10), f"{top:.3g} {unit}"
    left = round(max(map(font.getlength, y))) + 5 * any(y)
    right = left + TILE
    tile = Image.new("RGB", (right + 17 + round(font.getlength(most)), TILE + 14 * any(x)), PAPER)
    tile.paste(Image.fromarray(picture).resize((TILE, TILE), Image.BOX), (left, 0))
    tile.paste(Image.fromarray(heat_map(np.linspace(1, 0, TILE)[:, None])).resize((6, TILE)), (right + 6, 0))
    texts, anchors = ("0", most, *x, *y), ("ls", "lt", "la", "ra", "rs", "rt")
    places = (right + 15, TILE), (right + 15, 1), (left, TILE + 2), (right, TILE + 2), (left - 3, TILE), (left - 3, 1)
    for text, anchor, place in zip(texts, anchors, places, strict=True):
        ImageDraw.Draw(tile).text(place, text, INK, font, anchor)
    return tile


def kl_tile(picture, kl_map, cell, chosen=None):
    """KL map (H_l, W_l) over its picture (H, W, 3), slots' numbers at cells (N, 2), the `chosen` (or all) in colour."""
    side, top = 3 * TILE, float(kl_map.max())  # drawn large, as `with_scales` makes it smaller: smooth rings
    opaque = 255 * np.clip(2 * kl_map / max(top, 1e-9), 0, 1)  # from half of the highest on all is heat
    heat = Image.fromarray(np.dstack([heat_map(kl_map), opaque]).astype(np.uint8)).resize((side, side), Image.NEAREST)
    tile = Image.fromarray((0.6 * picture.mean(2)).astype(np.uint8)).convert("RGB").resize((side, side))
    tile.paste(heat, mask=heat)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(33)
    for k in reversed(range(len(cell))):  # the first, those of highest KL, on top
        (y, x), marked = (cell[k] + 1) / 2 * side, chosen is None or k in chosen
        draw.circle((x, y), 20, outline=ACCENT if marked else PAPER, width=5)
        place = min(x + 15, side - 36), max(y - 10, 27)  # above, to the right, but within the picture
        draw.text(place, str(k), PAPER, font, "ls", stroke_width=3, stroke_fill=ACCENT if marked else INK)
    return with_scales(np.asarray(tile), top, "nats")


def spectrum_levels(magnitude, top, rate):
    """STFT magnitudes (F, T) -> (TILE, T): dB of the 60 below `top`, rows in equal steps of pitch, highest first."""
    bins = (np.geomspace(rate / 2, LOWEST, TILE) / (rate / 2) * (len(magnitude) - 1)).round().astype(int)
    return np.maximum(60 + 20 * np.log10(np.maximum(magnitude[bins] / max(top, 1e-20), 1e-9)), 0)


def spectrum_tile(magnitude, top, seconds, rate):
    """STFT magnitudes (F, T) of so many seconds at `rate` Hz -> a PIL tile of their dB, 60 dB being `top`."""
    heat, pitch = heat_map(spectrum_levels(magnitude, top, rate), 60), (f"{LOWEST:.0f} Hz", f"{rate / 2000:g} kHz")
    return with_scales(heat, 60, "dB", ("0", f"{seconds:.3g} s"), pitch)


def contact_sheet(rows, title="", labels=()):
    """Rows of Tiles -> a PIL picture, `title` above, `labels` to the left; the last tile of a row widens no column."""
    font, large = ImageFont.load_default(12), ImageFont.load_default(15)
    panels = [[] for _ in rows]  # of every tile: caption above image, a frame around this, the gaps to the next panels
    for y, (image, caption, framed, pale) in ((y, tile) for y, row in enumerate(rows) for tile in row):
        if isinstance(image, np.ndarray):  # whose pixels stay visible as squares
            image = Image.fromarray(image).resize((round(TILE * image.shape[1] / len(image)), TILE), Image.NEAREST)
        image = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, PAPER), 0.7 * pale)
        right = max(GAP - 2 * FRAME, round(font.getlength(caption)) - image.width)
        image = ImageOps.expand(ImageOps.expand(image, 1, PAPER), FRAME - 1, ACCENT if framed else PAPER)
        panels[y].append(ImageOps.expand(image, (0, LINE - FRAME, right, GAP - FRAME), PAPER))
        ImageDraw.Draw(panels[y][-1]).text((FRAME, 1), caption, ACCENT if framed else INK, font)
    start = GAP - FRAME + (round(max(map(font.getlength, labels))) + GAP if labels else 0)
    widths = [max(row[c].width for row in panels if row[c + 1 :]) for c in range(max(map(len, panels)) - 1)]
    left = [*accumulate(widths, initial=start)]
    top = [*accumulate((max(one.height for one in row) for row in panels), initial=GAP + 24 * bool(title))]
    width = max(left[len(row) - 1] + row[-1].width + FRAME for row in panels)
    sheet = Image.new("RGB", (max(width, round(large.getlength(title)) + 2 * GAP), top[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP - 2), title, INK, large)
    for label, row, (y, below) in zip([*labels, *[""] * len(rows)], panels, pairwise(top), strict=False):
        draw.text((GAP, (y + below + LINE - GAP) / 2), label, INK, font, "lm")
        for panel, x in zip(row, left, strict=False):
            sheet.paste(panel, (x, y))
    return sheet


# ---------------------------------------------------------------- Model and recomposition

FORMS = ("[I.]K", "[I.]K:X", "[I.]K:X,Y")  # of edits, by how many numbers they take
EDITS = {"move": "moved by {:+g} {:+g}", "front": "in front", "transpose": "{:+g} semitones", "gain": "{:+g} dB"}


class Model:
    """An exported folder's graphs, in onnxruntime; raises click.UsageError where one is missing, or of another kind."""

    def __init__(self, folder, kind, n_slots=None, others=()):
        onnxruntime = import_module("onnxruntime")  # here, so that `--help` and wrong arguments answer at once
        self.sessions, options, sums = {}, onnxruntime.SessionOptions(), folder / "SHA256SUMS"
        options.log_severity_level = 3  # errors alone
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # others take longer
        for name in ("encoder", "decoder", "composer", *others):
            path = folder / f"{name}.onnx"
            try:
                if sums.exists() and hashlib.sha256(path.read_bytes()).hexdigest() not in sums.read_text():
                    raise ValueError("with a flipped bit it would draw something else, unnoticed")
                self.sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises a kind of its own for every fault
                raise click.UsageError(f"{path}: missing, damaged, or no graph of a train_mvae.py run") from error
        try:
            (text,) = {one.get_modelmeta().custom_metadata_map.get("model") for one in self.sessions.values()}
            self.about = json.loads(text)
            n = {kind: self.about["N"]}[self.about["kind"]]
        except (KeyError, TypeError, ValueError) as error:
            expected = f"graphs of kind {kind!r}, written together by export.py (to --sample sounds: --out a.wav)"
            raise click.UsageError(f"--model {folder}: expected {expected}") from error
        self.n_slots = n_slots or n
        self.slots = {} if self.n_slots == n else {"slots": np.arange(n_slots)}

    def run(self, graph, **inputs):
        """Named arrays -> named arrays; raises click.ClickException where it fails, or an output is not finite."""
        try:
            values = self.sessions[graph].run(None, inputs)
        except Exception as error:  # as above: too few cells for so many slots, too little memory
            raise click.ClickException(f"{graph}.onnx fails: {str(error).splitlines()[0]}") from error
        if not all(np.isfinite(value).all() for value in values):
            raise click.ClickException(f"{graph}.onnx gives values that are not finite; nothing is written")
        return dict(zip((output.name for output in self.sessions[graph].get_outputs()), values, strict=True))

    def imagine(self, generator, given=(), light=None):
        """The prior's layer (1, M, ...), background; the first slots, of a scene of this light, are those `given`."""
        inputs = {one.name: np.zeros((1, *one.shape[1:]), np.float32) for one in self.sessions["prior"].get_inputs()}
        kept, most = len(given), inputs["given"].shape[1]
        if light is not None and not 0 < kept <= most:
            raise click.UsageError(f"--complete: {kept} slots are kept that hold something; expected 1 to {most}")
        inputs |= {"noise": generator.standard_normal(inputs["noise"].shape, np.float32), "kept": np.array([kept])}
        inputs["given"] = np.concatenate([*given, inputs["given"][0, kept:]])[None]  # (1, N, 2 + D): cells, latents
        made = self.run("prior", **inputs | ({} if light is None else {"light": light}))
        layer = self.run("decoder", z=made["z"], cell=made["cell"])["layer"]  # of all: a graph that is given none fails
        return layer[:, : int(made["count"][0])], made.get("background")

    def compose(self, layer, background=None):
        """layer (B, M, ...), one background (1, ...) or None -> image (B, 3, H, W), or spectrogram (B, F, T)."""
        behind = {} if background is None else {"background": background.repeat(len(layer), 0)}
        return next(iter(self.run("composer", layer=layer, **behind).values()))


def explain(model, rows, result, what, more=""):
    """Say what inputs hold, and draw the figure; rows: path, tile, KL tile, slots' tiles and KL, slots kept, misfit."""
    sheet, caption, least = [], [f"of the framed slots{more}"], EMPTY[model.about["kind"]]
    for i, (path, tile, heat, slots, kl, kept, misfit) in enumerate(rows):
        held, empty = (int(some.sum()) for some in (kl >= least, kl < least))
        click.echo(f"{path}: {held} {what}{'s' * (held != 1)}, {empty} empty slot{'s' * (empty != 1)}")
        if misfit > model.about.get("unlike", np.inf):
            click.echo(f"{path}: unlike the {what}s that this model has learnt; expect nonsense", err=True)
        sheet.append([Tile(tile, "input"), Tile(heat, "KL map")])
        for k, (slot, nats) in enumerate(zip(slots, kl, strict=True)):
            holds = f"{nats:.0f} nats" if nats >= least else "empty"
            sheet[-1].append(Tile(slot, f"slot {k}: {holds}", k in kept, nats < least))
        for k, (name, numbers) in ((k, edit) for k, edits in kept.items() for edit in edits.items()):
            caption.append(f"slot {f'{i}.{k}' if len(rows) > 1 else k} {EDITS[name].format(*numbers)}")
    sheet.append([Tile(result, "; ".join(caption), True)])
    labels = [*(row[0].name for row in rows), "recomposition"]
    return contact_sheet(sheet, "Inputs taken apart; the framed slots put together", labels)


def sample(model, n, seed):
    """n new pictures beside one another, in PIL, or sounds one after the other (1, samples); their rate; the figure."""
    results, sheet, rate = [], [], model.about.get("sample_rate")  # of sounds alone
    for i in range(n):
        layer, background = model.imagine(np.random.default_rng((seed, i)))
        drawn = np.concatenate([model.compose(layer, background), model.compose(layer[0][:, None], background)])
        scale = (drawn[0].max(), model.about["samples"] / rate, rate) if rate else ()
        tiles = [spectrum_tile(one, *scale) if rate else to_uint8(one) for one in drawn]
        results.append(model.run("vocoder", spectrogram=drawn[:1])["waveform"] if rate else tiles[0])
        sheet.append(list(map(Tile, tiles, ["sample", *(f"slot {k}" for k in range(layer.shape[1]))])))
    result, figure = np.concatenate(results, axis=1), contact_sheet(sheet, "Samples of the prior, and slots alone")
    return result if rate else Image.fromarray(result), rate, figure


def recompose_pictures(model, inputs, kept, crop=None, generator=None):
    """Picture files, the slots kept of each, {slot: {edit: numbers}} -> the recomposition and the figure, in PIL."""
    rows, parts, backgrounds, given = [], [], [], []  # by `generator`, of NumPy, the prior completes the scene
    for path, slots in zip(inputs, kept, strict=True):
        picture = load_picture(path, model.about["size"], crop or model.about["crop"])
        image = picture.transpose(2, 0, 1)[None].astype(np.float32) / 255
        said = model.run("encoder", image=image, **model.slots)
        z, cell, background = said["mu"], said["cell"], said.get("background")
        layer = model.run("decoder", z=z, cell=cell)["layer"]  # (1, N, ...)
        alone = [to_uint8(one) for one in model.compose(layer[0][:, None], background)]
        heat, shown = kl_tile(picture, said["kl_map"][0], cell[0], slots), model.compose(layer, background)
        rows.append((path, picture, heat, alone, said["kl"][0], slots, unexplained(shown, image)))
        backgrounds.append((background, said.get("light")))
        for k, edits in slots.items():
            moved = cell[:, [k]] + 2 * np.float32(edits.get("move", (0, 0))[::-1])  # from x, y in widths
            if said["kl"][0, k] >= EMPTY["mvae-image"]:  # else it holds nothing
                given.append(np.concatenate([moved[0], z[0, [k]]], axis=1))
            parts.append(model.run("decoder", z=z[:, [k]], cell=moved)["layer"] if "move" in edits else layer[:, [k]])
            parts[-1][:, :, 0] += 10 * ("front" in edits)  # how near it is: others are at most 2
    if generator:
        parts.append(model.imagine(generator, given, backgrounds[0][1])[0][:, len(given) :])
    result = to_uint8(model.compose(np.concatenate(parts, axis=1), backgrounds[0][0])[0])
    return Image.fromarray(result), explain(model, rows, result, "object", ", completed" if generator else "")


def recompose_sounds(model, inputs, kept, vocoder=False):
    """Sound files, slots as above -> the recomposition (channels, n), its rate, both the first input's, the figure."""
    own, length, n_fft, hop = (model.about[name] for name in ("sample_rate", "samples", "n_fft", "hop"))
    rows, mix, form = [], None, None
    for path, slots in zip(inputs, kept, strict=True):  # one after the other: ten minutes take 200 MB
        samples, found = read_sound(path)
        rate, channels = form = form or (found, samples.shape[1])
        samples = samples if samples.shape[1] == channels else samples.mean(1, keepdims=True).repeat(channels, 1)
        part = recompose_sound(model, path, resample_sound(samples.T, found, rate), rate, slots, vocoder, rows)
        mix = part if mix is None else sum(fit(one, max(part.shape[1], mix.shape[1])) for one in (part, mix))
    heard = resample_sound(mix.mean(0), rate, own)
    magnitude = np.abs(stft(heard, n_fft, hop * max(1, len(heard) // length)))
    return mix, rate, explain(model, rows, spectrum_tile(magnitude, magnitude.max(), mix.shape[1] / rate, own), "note")


def recompose_sound(model, path, samples, rate, kept, vocoder, rows):
    """The slots `kept` of samples (channels, n) at `rate` Hz, put together; `rows` gets what the figure shows."""
    # 1. Take every window apart, at the model's own rate; its slots go on with those of the windows before.
    own, length, n_fft, frame = (model.about[name] for name in ("sample_rate", "samples", "n_fft", "hop"))
    mono = resample_sound(samples.mean(0), rate, own)
    cuts = split_at_onsets(mono, own, length / own)
    pieces = [mono[round(a * own) : round(b * own)] for a, b in pairwise(cuts)]
    said = [model.run("encoder", waveform=fit(piece, length)[None], **model.slots) for piece in pieces]
    mu, cell, kl, kl_map = (np.concatenate([one[name] for one in said]) for name in ("mu", "cell", "kl", "kl_map"))
    order = follow(mu, cell, kl) if len(mu) > 1 else np.arange(kl.shape[1])[None]
    mu, cell, kl = (values[np.arange(len(order))[:, None], order] for values in (mu, cell, kl))

    # 2. Put its slots together, at the sound's own rate: soft masks on its spectrum, or what they decode to, as loud.
    hop, longest = round(frame * rate / own), round(length * rate / own)
    result, seen, misfit = np.zeros_like(samples), [], []
    for w, (start, stop) in enumerate(pairwise(cuts)):
        first, last = round(start * rate), min(round((stop + FADE) * rate), samples.shape[1])
        n, layer = last - first, model.run("decoder", z=mu[[w]], cell=cell[[w]])["layer"]
        spectrum = stft(fit(samples[:, first:last], min(n + 2 * hop, max(n, longest))), 4 * hop, hop)
        alone, mixture = model.compose(layer[0][:, None]), np.abs(stft(fit(pieces[w], length), n_fft, frame))
        masks = soft_masks(alone, mixture, spectrum.shape[1:])
        ramp = np.minimum((np.arange(n) + 0.5) / (FADE * rate), 1)
        fade = (ramp if w else 1) * (ramp[::-1] if stop < cuts[-1] else 1)
        for k, edits in kept.items():
            part = inverse_stft(masks[k] * spectrum, 4 * hop, hop, n)  # (channels, n)
            if vocoder or "transpose" in edits:
                higher = edits.get("transpose", [0])[0] / 6 / np.log2(own / 2 / LOWEST)  # from -1 to 1: all octaves
                moved = cell[[w], [[k]]] + np.float32([higher, 0])
                decoded = model.compose(model.run("decoder", z=mu[[w], [[k]]], cell=moved)["layer"])
                sung = resample_sound(model.run("vocoder", spectrogram=decoded)["waveform"], own, rate)
                sung = ramp * fit(sung, n)  # for Griffin-Lim begins with a click: its mirrored signal has no phases
                part = sung * np.sqrt(np.square(part).mean(1, keepdims=True) / max(np.square(sung).mean(), 1e-20))
            result[:, first:last] += 10 ** (edits.get("gain", [0])[0] / 20) * fade * part
        whole = max(1, round((stop - start) * own / frame))  # frames that are not zero-padded
        misfit.append(unexplained(*(band_levels(one[:, :whole]) for one in (model.compose(layer)[0], mixture))))
        seen.append(np.stack([mixture, *alone])[:, :, : whole : max(1, len(pieces) // 2)].copy())  # else all stay

    # 3. Show the sound, and its slots as they decode.
    magnitude, *slots = np.concatenate(seen, axis=2)
    tops, seconds = [magnitude.max(), *[np.max(slots)] * len(slots)], samples.shape[1] / rate
    tile, *slots = (spectrum_tile(*pair, seconds, own) for pair in zip([magnitude, *slots], tops, strict=True))
    if len(pieces) == 1:
        level = heat_map(spectrum_levels(magnitude, tops[0], own), 60)  # whose lowest pitch is at the bottom
        heat = kl_tile(level, kl_map[0, ::-1], cell[0] * np.float32([-1, 1]), kept)
    else:  # windows beside one another
        columns = kl_map[:, ::-1, 0].T.repeat([one.shape[2] for one in seen], axis=1)
        heat = with_scales(heat_map(columns), columns.max(), "nats", ("0", f"{seconds:.3g} s"))
    rows.append((path, tile, heat, slots, kl.mean(0), kept, np.median(misfit)))
    return result


# ---------------------------------------------------------------- Command line


def kept_slots(slots, edits, n_inputs, n_slots):
    """Options -> {slot: {edit: numbers}} of every input; raises click.UsageError where they do not fit."""
    if len(slots) > 1 and len(slots) != n_inputs:
        raise click.UsageError(f"--slots is given {len(slots)} times for {n_inputs} inputs; give it once, or once each")
    every = [str(k) for k in range(n_slots)]
    lists = [text.split(",") for text in slots] or [every]
    if numbers := next((some for some in lists if len(set(some) & set(every)) < len(some)), None):
        expected = f"different slots, from 0 to {n_slots - 1} (--n-slots asks for more), such as 0,2"
        raise click.UsageError(f"--slots {','.join(numbers)}: expected {expected}")
    kept = [{int(k): {} for k in numbers} for numbers in lists * (n_inputs // len(lists))]
    for name, text in ((name, text) for name, given in edits.items() for text in given):
        n = EDITS[name].count("{")
        found = re.fullmatch(r"(?:(\d+)\.)?(\d+)" + r"[:,]([-+]?\d*\.?\d+)" * n, text)
        i, k, *numbers = map(float, found.groups("0")) if found else (0, -1)
        if i >= n_inputs or k not in kept[int(i)] or max(map(abs, numbers), default=0) > 100:
            expected = f"{FORMS[n]}, K being a slot of input I (of 0, if left out) that is kept, and numbers within 100"
            raise click.UsageError(f"--{name} {text}: expected {expected}")
        kept[int(i)][k][name] = numbers
    return kept


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"), context_settings={"show_default": True})
@click.argument("inputs", nargs=-1, metavar="INPUT...", type=FILE)
@click.option("--slots", multiple=True, metavar="K,K", help="Slots to keep, if not all: once, or once for each input.")
@click.option("--n-slots", type=click.IntRange(1, 12), show_default="the model's", help="Slots to find in every input.")
@click.option("--move", multiple=True, metavar=FORMS[2], help="Pictures: move slot K (of input I) by X, Y widths.")
@click.option("--front", multiple=True, metavar=FORMS[0], help="Pictures: bring slot K before all others.")
@click.option("--transpose", multiple=True, metavar=FORMS[1], help="Sounds: raise slot K, decoded anew, X semitones.")
@click.option("--gain", multiple=True, metavar=FORMS[1], help="Sounds: make slot K louder by X dB.")
@click.option("--model", "folder", type=PATH, show_default="the shipped model", help="Folder written by export.py.")
@click.option("--crop", type=click.Choice(["clevr", "centre", "fit"]), help="Pictures: a crop other than the model's.")
@click.option("--vocoder", is_flag=True, help="Sounds: what slots decode to, through Griffin-Lim, instead of masks.")
@click.option("--complete", is_flag=True, help="Pictures: let the prior fill the scene around the slots that are kept.")
@click.option("--sample", "n", type=click.IntRange(1), help="Without INPUT: so many new scenes, or sounds, of a prior.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of what the prior draws.")
@click.option("--out", type=PATH, help="File to write, if not recomposed.png or .wav; NAME_figure.png explains it.")
def main(inputs, slots, n_slots, folder, crop, vocoder, complete, n, seed, out, **edits):
    # 1. Check the arguments, and read the model.
    if bool(inputs) == bool(n) or (n and any((slots, n_slots, crop, vocoder, complete, *edits.values()))):
        raise click.UsageError("expected pictures or sounds, INPUT..., or --sample with --model, --seed, --out alone")
    sound, *mixed = {path.suffix.lower() in SOUNDS for path in inputs or [out or Path()]}
    if mixed:
        raise click.UsageError("pictures and sounds cannot be recomposed together")
    kind, suffixes = ("mvae-sound", WRITTEN) if sound else ("mvae-image", (".png",))
    out = out or Path(f"recomposed{suffixes[0]}")
    if out.suffix.lower() not in suffixes:
        raise click.UsageError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    given = edits | {"crop": crop, "vocoder": vocoder, "complete": complete}
    for name in filter(given.get, ("crop", "move", "front", "complete") if sound else ("vocoder", "transpose", "gain")):
        raise click.UsageError(f"--{name} is for {'pictures' if sound else 'sounds'}")
    beside = out.with_name(f"{out.stem}_figure.png")
    for path in (out, beside):
        if path.is_dir() or not path.parent.is_dir() or (path.exists() and any(map(path.samefile, inputs))):
            raise click.UsageError(f"--out: {path} is a folder, would overwrite an input, or its folder does not exist")
    others = ("vocoder",) * bool(vocoder or edits["transpose"] or (n and sound)) + ("prior",) * bool(n or complete)
    model = Model(folder or SHIPPED[kind], kind, n_slots, others)
    if edits["front"] and model.about["op"] != "alpha":
        raise click.UsageError(f"--front: layers of this model, combined by {model.about['op']}, have no order")
    kept = [] if n else kept_slots(slots, edits, len(inputs), model.n_slots)

    # 2. Take the inputs apart, put the kept slots together, write the result and the figure that explains it.
    try:
        if n:
            result, rate, figure = sample(model, n, seed)
        elif sound:
            result, rate, figure = recompose_sounds(model, inputs, kept, vocoder)
        else:
            result, figure = recompose_pictures(model, inputs, kept, crop, complete and np.random.default_rng(seed))
        if (np.abs(result).max() if sound else np.ptp(result)) < 1e-5:
            raise click.ClickException("the slots that are kept hold nothing; nothing is written")
        if sound:
            save_sound(out, result, rate)
        else:
            write_atomically(out, lambda temporary: result.save(temporary, format="PNG"))
        write_atomically(beside, lambda temporary: figure.save(temporary, format="PNG", compress_level=1))
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error.strerror}") from error
    what = f"{n} samples" if n else f"{sum(map(len, kept))} of {model.n_slots * len(inputs)} slots"
    click.echo(f"{out}: {what}; {beside} explains it")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # files' names may be no UTF-8
    main()
