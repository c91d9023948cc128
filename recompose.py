# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=2.1", "scipy>=1.14", "pillow>=11", "click>=8.2", "soundfile>=0.13", "soxr>=0.5", "onnxruntime>=1.22",
# ]
# ///
"""Take pictures or sounds apart into slots, and put slots of any number of them together; needs no PyTorch.

    python recompose.py a.png b.png                        # every slot of both, on the background of a.png
    python recompose.py a.png b.png --slots 0,2            # slots 0 and 2 of each
    python recompose.py a.png b.png --slots 0,2 --slots 1  # slots 0 and 2 of a.png, slot 1 of b.png
    python recompose.py a.wav b.wav --slots 0 --slots 1 --out mix.wav  # one instrument of each

Writes the recomposed picture or sound (`--out`) and beside it a figure: inputs, KL maps with the chosen cells marked,
every slot that is not empty decoded alone, the recomposition. A slot of a sound is heard as a soft mask on its input's
spectrum, or, with `--vocoder`, as what it decodes to, through Griffin-Lim. Models are folders written by `export.py`.
This file and such a folder can be taken elsewhere: `uv run recompose.py ...` installs what it needs.
"""

import io
import json
import os
import struct
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

GRAPHS = ("encoder", "decoder", "composer")  # and for sounds, where it is asked for, "vocoder"
MODELS = Path(__file__).parent / "models"
SHIPPED = {"mvae-image": MODELS / "clevr", "mvae-sound": MODELS / "nsynth-duo"}
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".m4a", ".aac", ".wma")  # of sounds
KINDS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"),
         ".mp3": ("MP3", "MPEG_LAYER_III")}  # fmt: skip  # that are written
LONGEST, RATES = 2**26, (4000, 192_000)  # samples of all channels, ten minutes of stereo at 48 kHz and more; Hz
PATH = click.Path(path_type=Path)
EMPTY = 4.0  # nats: a slot of less holds nothing
LOUDNESS = 1 / 1024  # root mean square that models of sounds bring all to

# ---------------------------------------------------------------- Files


def write_atomically(path, write):
    """Call write(temporary path) and rename, so that a file is written whole or not at all; passes on errors."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, content):
    text = json.dumps(content, indent=2, default=str, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


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


def read_picture(path):
    """Any still picture of 8 or 16 bits -> RGB, upright; raises click.UsageError for others, and for damaged files."""
    if path.suffix.lower() in (".heic", ".heif"):
        raise click.UsageError(f"{path}: HEIC is not read; PNG, JPEG, ... are: magick {path.name} {path.stem}.png")
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
    except FileNotFoundError as error:
        raise click.UsageError(f"{path}: no such file") from error
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise click.UsageError(f"{path}: damaged, or no picture (PNG, JPEG, ...) nor WAV or FLAC sound") from error


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


def read_mask(path, size, crop):
    """A mask of 8 bits a pixel -> the object's number in every pixel, 0 for the background: uint8 (size, size)."""
    try:
        with Image.open(path) as mask:
            mask.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise click.UsageError(f"{path}: damaged or unreadable mask ({error})") from error
    if mask.mode not in ("L", "P"):
        raise click.UsageError(f"{path}: expected a mask of 8 bits a pixel, numbers of objects, not {mask.mode}")
    return np.asarray(square(mask, crop, path).resize((size, size), Image.Resampling.NEAREST))


def read_sound(path):
    """A sound file -> its samples, float32 (n, channels), and their rate in Hz.

    Raises click.UsageError where it is missing, damaged, cut off, empty, silent, too long, or holds samples that are
    not finite.
    """
    import soundfile  # here, because pictures do without

    if not Path(path).is_file():
        raise click.UsageError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, length = file.samplerate, file.frames
            if length * file.channels > LONGEST or not RATES[0] <= rate <= RATES[1]:
                about = f"{length / rate:.0f} s of {file.channels} channels at {rate} Hz; expected at most ten minutes of"
                part = f"stereo, {RATES[0]} to {RATES[1]} Hz: ffmpeg -t 600 -i {path.name} -ac 2 -ar 44100 part.wav"
                raise click.UsageError(f"{path}: {about} {part}")
            samples = file.read(dtype="float32", always_2d=True)
            if "(should be" in file.extra_info or len(samples) < length - rate / 10:  # what a header says, and what is
                raise click.UsageError(f"{path}: cut off after {len(samples) / rate:.2f} s; expected a whole file")
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        kinds = f"WAV, FLAC, OGG, Opus, MP3, AIFF; others become one by: ffmpeg -i {path.name} {path.stem}.wav"
        raise click.UsageError(f"{path}: damaged or not a sound ({kinds})") from error
    if not np.isfinite(samples).all():
        raise click.UsageError(f"{path}: samples must be finite; some are NaN or infinite")
    if np.abs(samples.mean(1)).max(initial=0) < 1e-5:
        raise click.UsageError(f"{path}: {'silent' if len(samples) else 'empty'}")
    return samples, rate


def resample_sound(samples, rate, wanted):
    """Samples (n, ...) at `rate` Hz -> at `wanted` Hz."""
    import soxr

    return samples if rate == wanted else soxr.resample(samples, rate, wanted)


# ---------------------------------------------------------------- Spectra


def hann(n_fft):
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft, dtype=np.float64)


def stft(waveform, n_fft, hop):
    """(samples,), zero-padded to whole hops -> complex (F, T); frames are centred, the ends reflected."""
    longer = np.pad(waveform, (0, -len(waveform) % hop))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(longer, n_fft // 2, mode="reflect"), n_fft)[::hop]
    return np.fft.rfft(frames * hann(n_fft)).T


def inverse_stft(spectrum, n_fft, hop, samples):
    """Complex (F, T) -> (samples,): the sound whose STFT is nearest in least squares (Griffin and Lim 1984)."""
    window = hann(n_fft)
    summed = np.zeros((2, (spectrum.shape[1] - 1) * hop + n_fft))  # of windowed frames, and of squared windows
    for t, frame in enumerate(np.fft.irfft(spectrum.T)):
        summed[:, t * hop : t * hop + n_fft] += window * np.stack([frame, window])
    return (summed[0] / np.maximum(summed[1], 1e-8))[n_fft // 2 :][:samples]


def soft_masks(magnitude):
    """Magnitudes of slots (N, F, T) -> the share of each in their power; they sum to one (Wiener 1949)."""
    power = magnitude.astype(np.float64) ** 2 + 1e-12
    return power / power.sum(0)


def widen(masks, bins, frames):
    """Masks (N, F, T) for a spectrum of more bins and frames, as far apart: (N, bins, frames).

    Above F the mean of the highest octave goes on, after T the last frame.
    """
    above = masks[:, masks.shape[1] // 2 :].mean(1, keepdims=True).repeat(max(0, bins - masks.shape[1]), 1)
    masks = np.concatenate([masks, above], axis=1)[:, :bins, :frames]
    return np.pad(masks, ((0, 0), (0, 0), (0, frames - masks.shape[2])), mode="edge")


# ---------------------------------------------------------------- Long sounds: windows, and what goes on through them

FADE = 0.02  # s in which a window goes over into the next
APART, PROMINENCE = 0.3, 0.05  # s between onsets; of their peaks in the spectral flux, in levels
STAY = 30.0  # in squared spreads


def find_onsets(waveform, rate):
    """Times in s at which something begins to sound in (samples,): peaks of the spectral flux (Masri 1996)."""
    from scipy.signal import find_peaks

    hop, piece = rate // 100, 10 * rate
    louder, flux = waveform * (LOUDNESS / np.sqrt(np.square(waveform).mean())), []
    for start in range(0, len(waveform) - 4 * hop, piece):
        level = np.log1p(100 * np.abs(stft(louder[start : start + piece + 2 * hop], 4 * hop, hop)))  # (F, T)
        flux.append(np.maximum(level[:, 2:1002] - level[:, :-2][:, :1000], 0).mean(0))
    peaks = find_peaks(np.concatenate(flux), distance=round(100 * APART), prominence=PROMINENCE)[0]
    return peaks / 100


def split_at_onsets(waveform, rate, longest):
    """Times in s at which windows of hardly more than `longest` begin, at onsets or evenly between, and the end."""
    duration, longest = len(waveform) / rate, longest + FADE
    cuts, onsets = [0.0], find_onsets(waveform, rate) if duration > longest else ()
    for stop in [*(t for t in onsets if APART < t < duration - APART), duration]:
        cuts += np.linspace(cuts[-1], stop, int(np.ceil((stop - cuts[-1]) / longest)) + 1)[1:].tolist()
    return cuts


def follow(mu, cell, kl):
    """Which slot of every window goes on with which instrument: mu (W, N, D), cell (W, N, 2), kl (W, N) -> (W, N).

    Clusters that take one slot of every window (constrained k-means, Wagstaff et al. 2001), by distances in units of
    each latent's spread within clusters; a slot in the cell where another was a window before is nearer to its cluster
    by STAY. Clusters are in the order of falling KL.
    """
    from scipy.optimize import linear_sum_assignment

    present, order, best = (kl > EMPTY) + 1e-3, np.zeros(kl.shape, int), np.inf
    for start in np.unique(np.linspace(0, len(mu) - 1, 10).astype(int)):
        centre, spread = mu[start], mu.var((0, 1)) + 1e-6
        for _ in range(20):
            distance = (np.square(mu[:, None] - centre[:, None]) / spread).sum(-1)  # (W, clusters, N)
            found, before = np.zeros_like(order), np.full(cell.shape[1:], np.inf)
            for w, own in enumerate(distance * present[:, None]):
                stays = np.abs(cell[w] - before[:, None]).max(-1) < 1e-3  # (clusters, N)
                found[w] = linear_sum_assignment(own - STAY * stays)[1]
                before = cell[w, found[w]]
            own, weight = (np.take_along_axis(v, found[..., None], 1) for v in (mu, present[..., None]))
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


def finite(values, where):
    """The values; raises click.ClickException where one is NaN or infinite, so that no such result is written."""
    if not np.isfinite(values).all():
        raise click.ClickException(f"{where} gives values that are not finite; nothing is written")
    return values


class Model:
    """An exported folder's graphs, in onnxruntime; raises click.UsageError where one is missing, or of another kind."""

    def __init__(self, folder, kind, graphs=GRAPHS):
        import onnxruntime  # here, so that `--help` and wrong arguments answer at once

        self.sessions, described = {}, []
        for name in graphs:
            path = Path(folder) / f"{name}.onnx"
            if not path.is_file():
                raise click.UsageError(f"--model {folder}: no {name}.onnx; expected the export of a train_mvae.py run")
            try:
                self.sessions[name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises a kind of its own for every fault
                raise click.UsageError(f"{path}: not a readable ONNX graph ({str(error).splitlines()[0]})") from error
            described.append(self.sessions[name].get_modelmeta().custom_metadata_map.get("model"))
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
        values = [finite(value, f"{graph}.onnx") for value in session.run(None, inputs)]
        return {output.name: value for output, value in zip(session.get_outputs(), values, strict=True)}

    def encode(self, n_slots, **inputs):
        """What the encoder says of its inputs, of n_slots slots: named arrays."""
        return self.run("encoder", **inputs | ({} if n_slots == self.n_slots else {"slots": np.arange(n_slots)}))

    def decode(self, z, cell):
        """z (B, M, D), cell (B, M, 2) -> layer (B, M, ...)."""
        return self.run("decoder", z=z, cell=cell)["layer"]

    def compose(self, layer, background=None):
        """layer (B, M, ...), background (B, ...) or None -> image (B, 3, H, W), or spectrogram (B, F, T)."""
        inputs = {"layer": layer} if background is None else {"layer": layer, "background": background}
        return next(iter(self.run("composer", **inputs).values()))

    def vocode(self, spectrogram):
        """Magnitudes (B, F, T) -> waveform (B, samples)."""
        return self.run("vocoder", spectrogram=spectrogram)["waveform"][:, : self.about["samples"]]


# ---------------------------------------------------------------- Command line


class Parsed(click.ParamType):
    """What `parse` makes of an option's text, or of its value in config.json; ValueErrors say what was `expected`."""

    name = "text"

    def __init__(self, expected, parse):
        self.expected, self.parse = expected, parse

    def convert(self, value, param, ctx):
        try:
            return self.parse(value)
        except (ValueError, TypeError):
            self.fail(f"{value!r}: expected {self.expected}", param, ctx)


def parse_slots(text):
    """ "0,2" -> [0, 2]; raises ValueError for all but different numbers from 0 on."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError
    return numbers


SLOTS = Parsed("different slot numbers, from 0 on, such as 0,2", parse_slots)


def parse_edit(text, n=0):
    """ "0:0.2,-1" -> ((0, 0), (0.2, -1.0)), input, slot and n numbers; "1.0:3" is of slot 0 of input 1; ValueErrors."""
    address, *numbers = text.replace(":", ",").split(",")
    *source, slot = map(int, address.split("."))
    numbers = tuple(map(float, numbers))
    if len(source) > 1 or min(*source, slot, 0) < 0 or len(numbers) != n or not np.isfinite(numbers).all():
        raise ValueError
    return (source[0] if source else 0, slot), numbers


def edit_option(name, metavar, text, example):
    """A click option that changes one slot, K of the first input or I.K of input I; it may be given many times."""
    expected = Parsed(f"{metavar}, such as {example}", partial(parse_edit, n=example.count(",") + example.count(":")))
    return click.option(f"--{name}", type=expected, multiple=True, metavar=metavar, help=text)


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
            raise click.UsageError(f"--{name} {i}.{k}: no such slot of input {i} is kept; inputs count from 0")
    return lists


def figure_of(rows, result, inputs, edits):
    """Per input (tile, KL tile, tiles of its slots, their KL in nats, the chosen ones) -> the figure, a PIL picture."""
    sheet = []
    for tile, kl, slots, nats, chosen in rows:
        names = [f"slot {k}: {f'{held:.0f} nats' if held >= EMPTY else 'empty'}" for k, held in enumerate(nats)]
        own = [Tile(slot, name, k in chosen) for k, (slot, name) in enumerate(zip(slots, names, strict=True))]
        sheet.append([Tile(tile, "input"), Tile(kl, "KL map"), *own])
    changes = [f"{name} {i}.{k} {numbers}" for name, pairs in edits.items() for (i, k), numbers in pairs.items()]
    sheet.append([Tile(result, "; ".join(["of the framed slots", *changes]), True)])
    names = [path.name for path in inputs]
    return contact_sheet(sheet, "Inputs taken apart; the framed slots put together", [*names, "recomposition"])


def report(path, kl, misfit, typical, what):
    """Say how many of an input's slots, of `kl` nats (N,), hold something, and whether the model knows such inputs."""
    held = int((kl >= EMPTY).sum())
    click.echo(f"{path}: {held} {what}{'s' * (held != 1)}, {len(kl) - held} empty slots")
    if typical and misfit > typical:
        click.echo(f"{path}: unlike what the model has learnt (misfit {misfit:.2g}, usual are up to {typical:.2g}); "
                   "expect nonsense", err=True)  # fmt: skip


def recompose_pictures(model, inputs, slots, n_slots, edits, crop=None):
    """Picture files -> the recomposition, the figure that explains it (both PIL), and how many slots it has."""
    chosen = chosen_slots(slots, len(inputs), n_slots, edits)
    pictures = np.stack([load_picture(path, model.about["size"], crop or model.about["crop"]) for path in inputs])
    image = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255
    encoded = model.encode(n_slots, image=image)
    layer, cell = model.decode(encoded["mu"], encoded["cell"]), encoded["cell"].copy()  # (B, N, ...); z = mu
    for (i, k), (right, down) in edits["move"].items():
        cell[i, k] += 2 * np.array([down, right], np.float32)
    edited = model.decode(encoded["mu"], cell) if edits["move"] else layer.copy()
    for i, k in edits["front"]:
        edited[i, k, 0] += 10  # how near it is: all others are at most 2
    background = encoded["background"][:, None] if "background" in encoded else [None] * len(inputs)  # (B, 1, ...)
    taken = np.concatenate([edited[b, numbers] for b, numbers in enumerate(chosen)])[None]  # (1, M, ...)
    result = to_uint8(finite(model.compose(taken, background[0])[0], "the recomposition"))
    rows = []
    for b, (path, numbers) in enumerate(zip(inputs, chosen, strict=True)):
        behind = None if background[b] is None else background[b].repeat(n_slots, 0)  # (N, ...)
        alone = [to_uint8(picture) for picture in model.compose(layer[b][:, None], behind)]
        whole = model.compose(layer[b : b + 1], background[b])[0]
        report(path, encoded["kl"][b], np.square(whole - image[b]).mean(), model.about.get("misfit"), "object")
        kl = kl_tile(pictures[b], encoded["kl_map"][b], encoded["cell"][b], numbers)
        rows.append((pictures[b], kl, alone, encoded["kl"][b], numbers))
    return Image.fromarray(result), figure_of(rows, result, inputs, edits), taken.shape[1]


def hear(model, samples, n_slots):
    """Samples (n,) at the model's rate -> times in s at which windows begin and end, and what the encoder says of each.

    Slots are in the order of `follow`.
    """
    rate, longest = model.about["sample_rate"], model.about["samples"]
    cuts, parts = split_at_onsets(samples, rate, longest / rate), []
    pieces = [samples[round(a * rate) : round(b * rate)][:longest] for a, b in pairwise(cuts)]
    for i in range(0, len(pieces), 8):
        batch = np.stack([np.pad(piece, (0, longest - len(piece))) for piece in pieces[i : i + 8]])
        parts.append(model.encode(n_slots, waveform=batch.astype(np.float32)))
    heard = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = follow(heard["mu"], heard["cell"], heard["kl"]) if len(pieces) > 1 else np.arange(n_slots)[None]
    for name in ("mu", "cell", "kl"):
        values = heard[name]
        heard[name] = np.take_along_axis(values, order.reshape(order.shape + (1,) * (values.ndim - 2)), 1)
    return cuts, heard


def recompose_sounds(model, inputs, slots, n_slots, edits, vocoder):
    """Sound files -> the recomposition (samples, channels), its rate, the figure, and how many slots it has.

    The soft masks of the chosen slots on their inputs' spectra are added up, with the inputs' phases and loudness; with
    `vocoder`, or transposed, a slot is what it decodes to through Griffin-Lim, as loud as its mask. The rate is the
    first input's.
    """
    chosen, parts, rows, rate = chosen_slots(slots, len(inputs), n_slots, edits), [], [], None
    for b, (path, numbers) in enumerate(zip(inputs, chosen, strict=True)):
        samples, found = read_sound(path)
        rate = rate or found
        own = {name: {k: values for (i, k), (values,) in pairs.items() if i == b} for name, pairs in edits.items()}
        whole = resample_sound(samples, found, rate)
        parts.append(recompose_sound(model, whole, rate, numbers, n_slots, own, vocoder, path, rows))
    channels = max(part.shape[1] for part in parts)
    if {part.shape[1] for part in parts} - {1, channels}:
        raise click.UsageError("inputs differ in their channels; expected one, or as many: ffmpeg -i a.wav -ac 2 b.wav")
    result = np.zeros((max(map(len, parts)), channels), np.float32)
    for part in parts:
        result[: len(part)] += part
    finite(result, "the recomposition")
    about = model.about
    heard = resample_sound(result.mean(1), rate, about["sample_rate"])
    step = max(1, len(heard) // about["samples"])
    magnitude = np.abs(stft(heard, about["n_fft"], step * about["hop"]))
    tile = spectrum_tile(magnitude, magnitude.max(), len(heard) / about["sample_rate"], about["sample_rate"])
    return result, rate, figure_of(rows, tile, inputs, edits), sum(map(len, chosen))


def recompose_sound(model, samples, rate, numbers, n_slots, edits, vocoder, path, rows):
    """The slots `numbers` of samples (n, channels) at `rate` Hz, put together; `rows` gets what a figure shows."""
    about, own = model.about, model.about["sample_rate"]
    hop, longest = round(about["hop"] * rate / own), round(about["samples"] * rate / own)
    cuts, heard = hear(model, resample_sound(samples.mean(1), rate, own), n_slots)
    result, gain, moved = np.zeros_like(samples), np.ones(n_slots), heard["cell"].copy()
    for k, decibels in edits["gain"].items():
        gain[k] = 10 ** (decibels / 20)
    for k, semitones in edits["transpose"].items():
        moved[:, k, 0] += 2 * semitones / 12 / np.log2(own / 2 / LOWEST)
    anew = [k for k in numbers if vocoder or k in edits["transpose"]]
    masked, shown, misfit = [k for k in numbers if k not in anew], [], []
    for w, (start, stop) in enumerate(pairwise(cuts)):
        first, last = round(start * rate), min(round((stop + FADE) * rate), len(samples))
        piece = np.pad(samples[first:last], ((0, max(0, longest - last + first)), (0, 0)))
        spectrum = np.stack([stft(channel, 4 * hop, hop) for channel in piece.T])  # (channels, F, T)
        layer = model.decode(heard["mu"][w : w + 1], heard["cell"][w : w + 1])[0]
        alone = model.compose(layer[:, None])  # (N, F, T)
        masks = gain[:, None, None] * widen(soft_masks(alone), *spectrum.shape[1:])
        part = invert(masks[masked].sum(0) * spectrum, hop, last - first)
        for k in anew:
            sung = model.compose(model.decode(heard["mu"][w : w + 1, k : k + 1], moved[w : w + 1, k : k + 1]))
            waveform = resample_sound(model.vocode(sung)[0], own, rate)[: last - first, None]
            loud = np.square(invert(masks[k] * spectrum, hop, last - first)).mean(0)
            part[: len(waveform)] += waveform * np.sqrt(loud / max(np.square(waveform).mean(), 1e-20))
        ramp = np.minimum((np.arange(last - first) + 0.5) / (FADE * rate), 1)
        rise, fall = (1.0 if w == 0 else ramp), (1.0 if stop == cuts[-1] else ramp[::-1])
        result[first:last] += (rise * fall * np.ones(last - first))[:, None] * part
        heard_here = np.abs(spectrum.mean(0))[:alone.shape[1], :alone.shape[2]]
        misfit.append(level_distance(model.compose(layer[None])[0], heard_here))
        frames = np.arange(0, max(1, round((stop - start) * own / about["hop"])), max(1, len(cuts) // 3))
        shown.append(np.concatenate([heard_here[None], alone])[:, :, frames])  # (1 + N, F, few frames)
    mixture, *alone = np.concatenate(shown, axis=2)  # (F, T) each
    figures = len(samples) / rate, own
    level = heat_map(spectrum_levels(mixture, mixture.max(), own), 60)
    if len(cuts) == 2:
        kl = kl_tile(level, heard["kl_map"][0][::-1], heard["cell"][0] * np.array([-1, 1], np.float32), numbers)
    else:
        kl = heat_tile(heard["kl_map"][:, ::-1, 0].T, unit="nats", x=("0", f"{figures[0]:.0f} s"))
    tiles = [spectrum_tile(one, max(map(np.max, alone)), *figures) for one in alone]
    rows.append((spectrum_tile(mixture, mixture.max(), *figures), kl, tiles, heard["kl"].mean(0), numbers))
    report(path, heard["kl"].mean(0), float(np.median(misfit)), about.get("misfit"), "instrument")
    return result


def level_distance(magnitude, reference):
    """Mean square difference of log(1 + 100 m) of STFT magnitudes, two of (F, T), brought to one loudness."""
    level = [np.log1p(100 * m * (LOUDNESS / max(np.sqrt(np.square(m).mean()), 1e-12))) for m in (magnitude, reference)]
    return np.square(level[0] - level[1]).mean()


def invert(spectra, hop, samples):
    """Complex (channels, F, T) -> (samples, channels)."""
    return np.stack([inverse_stft(spectrum, 4 * hop, hop, samples) for spectrum in spectra], axis=1)


def save(path, write):
    """`write_atomically`; raises click.ClickException where the file cannot be written."""
    try:
        write_atomically(path, write)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from error


def save_sound(path, samples, rate):
    """Write samples (n, channels), 16 bits each; a sound beyond full scale is made softer, which is said.

    Raises click.ClickException where the file cannot be written, or its kind has no such rate or number of channels.
    """
    import soundfile

    peak = np.abs(samples).max()
    if peak > 1.006:  # 0.05 dB: less would be said as 0.0 dB
        click.echo(f"{path}: made {20 * np.log10(peak):.1f} dB softer, to fit into full scale")
    samples, encoded = samples / max(peak, 1), io.BytesIO()  # soundfile's own errors of writing have many kinds
    kind, subtype = KINDS[path.suffix.lower()]
    try:
        with soundfile.SoundFile(encoded, "w", rate, samples.shape[1], subtype, format=kind) as file:
            for i in range(0, len(samples), rate):  # libvorbis crashes on minutes at once
                file.write(samples[i : i + rate])
    except (soundfile.LibsndfileError, ValueError) as error:
        about = f"{samples.shape[1]} channels at {rate} Hz"
        raise click.ClickException(f"{path}: {kind} cannot hold {about}; expected a name that ends in .wav") from error
    save(path, lambda p: p.write_bytes(encoded.getbuffer()))


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"), context_settings={"show_default": True})
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=PATH)
@click.option("--slots", multiple=True, type=SLOTS, metavar="K,K", show_default="all",
              help="Slots to keep: once for every input, or once each, in the inputs' order.")  # fmt: skip
@click.option("--n-slots", type=click.IntRange(1, 12), show_default="the model's", help="Slots of every input.")
@edit_option("move", "[I.]K:X,Y", "Pictures: move slot K (of input I), in widths right and down.", "0:0.2,-0.1")
@edit_option("front", "[I.]K", "Pictures: bring slot K before all others.", "0")
@edit_option("transpose", "[I.]K:SEMITONES", "Sounds: decode slot K at another pitch.", "0:-3")
@edit_option("gain", "[I.]K:DB", "Sounds: make slot K louder.", "0:-6")
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
    kind, suffixes = ("mvae-sound", [*KINDS]) if True in sounds else ("mvae-image", [".png"])
    out = out or Path(f"recomposed{suffixes[0]}")
    if out.suffix.lower() not in suffixes:
        raise click.UsageError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    edits = {name: dict(pairs) for name, pairs in edits.items()}
    foreign = {"mvae-sound": {"crop": crop, "move": edits["move"], "front": edits["front"]},
               "mvae-image": {"vocoder": vocoder, "transpose": edits["transpose"], "gain": edits["gain"]}}  # fmt: skip
    for name in (name for name, given in foreign[kind].items() if given):
        raise click.UsageError(f"--{name} is for {'pictures' if kind == 'mvae-sound' else 'sounds'}")
    beside = out.with_name(f"{out.stem}_figure.png")
    for path in (out, beside):
        if path.is_dir():
            raise click.UsageError(f"--out: {path} is a folder")
        if not path.parent.is_dir():
            raise click.UsageError(f"--out: {path} is in a folder that does not exist")
        if path.resolve() in [other.resolve() for other in inputs]:
            raise click.UsageError(f"--out: {path} would overwrite an input")
    model = Model(folder or SHIPPED[kind], kind, GRAPHS + ("vocoder",) * bool(vocoder or edits["transpose"]))
    n_slots = n_slots or model.n_slots

    # 2. Take the inputs apart, put the chosen slots together, write the result and the figure that explains it.
    if kind == "mvae-sound":
        result, rate, figure, n = recompose_sounds(model, inputs, slots, n_slots, edits, vocoder)
        save_sound(out, result, rate)
    else:
        result, figure, n = recompose_pictures(model, inputs, slots, n_slots, edits, crop)
        save(out, lambda p: result.save(p, format="PNG"))
    save(beside, lambda p: figure.save(p, format="PNG"))
    count = f"{n} slot{'s' * (n > 1)} of {len(inputs)} input{'s' * (len(inputs) > 1)}"
    click.echo(f"{out}: {count}; {beside} explains it")


if __name__ == "__main__":
    main()
