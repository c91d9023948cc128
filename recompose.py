# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.1", "pillow>=11", "click>=8.2", "soundfile>=0.13", "onnxruntime>=1.22"]
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
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

GRAPHS = ("encoder", "decoder", "composer")  # and for sounds, where it is asked for, "vocoder"
MODELS = Path(__file__).parent / "models"
SHIPPED = {"mvae-image": MODELS / "clevr", "mvae-sound": MODELS / "nsynth-duo"}
SUFFIXES = (".wav", ".flac")  # of sounds; all else is taken for a picture
PATH = click.Path(path_type=Path)
EMPTY = 4.0  # nats: slots of less, unless asked for, have no column in the figure

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

    Raises click.UsageError where it is missing, damaged, empty, silent, or holds samples that are not finite.
    """
    import soundfile  # here, because pictures do without

    if not Path(path).is_file():
        raise click.UsageError(f"{path}: no such file")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise click.UsageError(f"{path}: damaged or not a sound (WAV or FLAC expected)") from error
    mixed = samples.mean(1)
    if not np.isfinite(mixed).all():
        raise click.UsageError(f"{path}: samples must be finite; some are NaN or infinite")
    if np.abs(mixed).max(initial=0) < 1e-5:
        raise click.UsageError(f"{path}: {'silent' if len(mixed) else 'empty'}")
    return samples, rate


def load_sound(path, rate, samples):
    """A sound file -> (samples,), one channel, zero-padded; click.UsageError if longer, or of another sample rate."""
    waveform, found = read_sound(path)
    if found != rate:
        raise click.UsageError(f"{path}: sampled at {found} Hz; this model takes {rate} Hz")
    if len(waveform) > samples:
        raise click.UsageError(f"{path}: {len(waveform) / rate:.2f} s; this model takes up to {samples / rate:g} s")
    return np.pad(waveform.mean(1), (0, samples - len(waveform)))


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


# ---------------------------------------------------------------- Drawing

HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])  # inferno
TILE, GAP, LINE = 128, 10, 18
ACCENT, INK, PAPER = (230, 81, 0), (40, 40, 40), (255, 255, 255)
LOWEST = 32.7  # Hz: the C1 at which the models' logarithmic frequency axis begins
FINE = 4  # rings and numbers are drawn so many times larger, then reduced, for smooth edges
SEGMENTS = np.array(
    [(40, 40, 40), (230, 81, 0), (30, 136, 229), (67, 160, 71), (253, 216, 53), (142, 36, 170), (0, 172, 193),
     (244, 143, 177), (121, 85, 72), (158, 157, 36), (236, 239, 241)], dtype=np.uint8
)  # fmt: skip


class Tile(NamedTuple):
    image: object  # uint8 (H, W, 3), or a PIL picture
    caption: str = ""
    framed: bool = False


def to_uint8(picture):
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3); values outside are clipped."""
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def segment_map(segments):
    """Numbers of components (H, W), 0 the background -> uint8 (H, W, 3)."""
    return SEGMENTS[segments % len(SEGMENTS)]


def heat_map(values, top=None):
    """(H, W) -> uint8 (H, W, 3), from 0 (black) to `top` or the largest value (light yellow)."""
    place = np.clip(values / max(float(values.max()) if top is None else top, 1e-9), 0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(place, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def enlarge(picture):
    """uint8 (H, W, 3) -> a PIL tile, TILE high and as wide in proportion; its pixels stay visible as squares."""
    height, width = picture.shape[:2]
    return Image.fromarray(picture).resize((round(TILE * width / height), TILE), Image.Resampling.NEAREST)


def annotate(tile, ramp, top, unit, x=("", ""), y=("", "")):
    """A PIL tile with labels at the ends of its axes and a colour bar: ramp (n, 3), colours from 0 to `top`."""
    font = ImageFont.load_default(10)
    most = f"{top:.0f} {unit}".strip() if top >= 10 else f"{top:.2g} {unit}".strip()
    left = round(max(map(font.getlength, y))) + 5 * any(y)
    right, bottom = left + tile.width, tile.height
    sheet = Image.new("RGB", (right + round(font.getlength(most)) + 17, bottom + 14 * any(x)), PAPER)
    sheet.paste(tile, (left, 0))
    sheet.paste(Image.fromarray(ramp[::-1, None]).resize((6, bottom)), (right + 6, 0))  # (n, 1, 3)
    draw = ImageDraw.Draw(sheet)
    for place, text, anchor in (
        ((right + 15, bottom), "0", "ls"), ((right + 15, 1), most, "lt"),
        ((left, bottom + 2), x[0], "la"), ((right, bottom + 2), x[1], "ra"),
        ((left - 3, bottom), y[0], "rs"), ((left - 3, 1), y[1], "rt"),
    ):  # fmt: skip
        draw.text(place, text, fill=INK, font=font, anchor=anchor)
    return sheet


def fit(values):
    """(H, W) -> float32 (TILE, TILE); cells that grow stay visible as squares, cells that shrink are averaged."""
    return np.asarray(Image.fromarray(np.asarray(values, np.float32)).resize((TILE, TILE), Image.Resampling.BOX))


def heat_tile(values, top=None, unit="", x=("", ""), y=("", "")):
    """(H, W), row 0 on top -> a PIL tile, 0 to `top` or the maximum; ends of axes: x (left, right), y (bottom, top)."""
    top = float(values.max()) if top is None else top
    ramp = heat_map(np.linspace(0, 1, TILE)[None], 1)[0]
    return annotate(Image.fromarray(heat_map(fit(values), top)), ramp, top, unit, x, y)


def kl_tile(picture, kl_map, cell, chosen):
    """The KL map over the greyed picture it is of, rings and numbers at the slots' cells, a colour bar in nats.

    picture uint8 (H, W, 3), kl_map (H_l, W_l), cell (N, 2) as (y, x) in [-1, 1], chosen: indices of slots.
    """
    top, grey = float(kl_map.max()), 0.6 * fit(np.asarray(picture).mean(2))
    share = fit(kl_map) / max(top, 1e-9)

    def blend(share, grey):  # low KL lets the picture show through; from half of the highest on all is heat
        opaque = np.clip(2 * share, 0, 1)[..., None]
        return (opaque * heat_map(share, 1) + (1 - opaque) * grey[..., None]).astype(np.uint8)

    size, r, font = FINE * TILE, FINE * 6, ImageFont.load_default(FINE * 11)
    tile = Image.fromarray(blend(share, grey)).resize((size, size), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(tile)
    for k, (y, x) in enumerate((np.asarray(cell) + 1) / 2 * size):
        halo, colour = (ACCENT, ACCENT) if k in chosen else (INK, PAPER)
        draw.circle((x, y), r + 2, outline=halo, width=9)
        draw.circle((x, y), r, outline=colour, width=5)
        right, above = x + 3 * r < size, y > 3 * r  # the number's place, where there is room for it
        place = (x + (r if right else -r) * 0.8, y - (r if above else -r) * 0.6)
        anchor = ("l" if right else "r") + ("s" if above else "t")
        draw.text(place, str(k), fill=PAPER, font=font, anchor=anchor, stroke_width=FINE, stroke_fill=halo)
    return annotate(tile.reduce(FINE), blend(np.linspace(0, 1, TILE), np.full(TILE, 60)), top, "nats")


def spectrum_levels(magnitude, top, rate):
    """STFT magnitudes (F, T) -> (TILE, T): dB of the 60 below `top`, rows in equal steps of pitch, highest first."""
    frequency = np.geomspace(rate / 2, LOWEST, TILE)
    bins = (frequency / (rate / 2) * (len(magnitude) - 1)).round().astype(int)
    return np.maximum(60 + 20 * np.log10(np.maximum(magnitude[bins] / max(top, 1e-20), 1e-9)), 0)


def spectrum_tile(magnitude, top, seconds, rate):
    """STFT magnitudes (F, T) of so many seconds at `rate` Hz -> a PIL tile of their dB, 60 dB being `top`."""
    axes = {"x": ("0", f"{seconds:g} s"), "y": (f"{LOWEST:.0f} Hz", f"{rate / 2000:g} kHz")}
    return heat_tile(spectrum_levels(magnitude, top, rate), 60, "dB", **axes)


def shorten(text, font, width):
    """The text, or as much of its end as fits into so many pixels, after an ellipsis."""
    while font.getlength(text) > width:
        text = f"…{text.lstrip('…')[1:]}"
    return text


def contact_sheet(rows, title="", labels=()):
    """Rows of Tiles, in columns -> one PIL picture, `title` above them, one of `labels` to the left of each row.

    A caption is cut to its tile's width, but for the last of a row, which widens no column either.
    """
    font, large = ImageFont.load_default(12), ImageFont.load_default(15)
    rows = [[t._replace(image=enlarge(t.image)) if isinstance(t.image, np.ndarray) else t for t in row] for row in rows]
    labels = [shorten(label, font, TILE) for label in labels]
    left = [GAP + (round(max(map(font.getlength, labels))) + GAP if any(labels) else 0)]
    for c in range(max(map(len, rows)) - 1):
        left.append(left[c] + GAP + max(row[c].image.width for row in rows if len(row) > c + 1))
    top, heights = [GAP + (24 if title else 0)], [max(tile.image.height for tile in row) for row in rows]
    for height in heights:
        top.append(top[-1] + LINE + GAP + height)
    ends = [left[len(row) - 1] + max(row[-1].image.width, font.getlength(row[-1].caption)) for row in rows]
    sheet = Image.new("RGB", (round(max(*ends, GAP + large.getlength(title))) + GAP, top[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP - 2), title, fill=INK, font=large)
    for label, y, height in zip(labels, top, heights, strict=False):
        draw.text((GAP, y + LINE + min(height, TILE) / 2), label, fill=INK, font=font, anchor="lm")
    for row, y in zip(rows, top, strict=False):
        for x, (tile, caption, framed) in zip(left, row, strict=False):
            caption = caption if tile is row[-1].image else shorten(caption, font, tile.width)
            draw.text((x, y + 1), caption, fill=ACCENT if framed else INK, font=font)
            if framed:
                box = (x - 4, y + LINE - 4, x + tile.width + 3, y + LINE + tile.height + 3)
                draw.rectangle(box, outline=ACCENT, width=3)
            sheet.paste(tile, (x, y + LINE))
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


def chosen_slots(lists, n_inputs, n_slots):
    """The slots of every input, checked against the model: -> one list of numbers an input."""
    if len(lists) > 1 and len(lists) != n_inputs:
        raise click.UsageError(f"--slots is given {len(lists)} times for {n_inputs} inputs; give it once, or once each")
    lists = lists or [list(range(n_slots))]
    if max(map(max, lists)) >= n_slots:
        raise click.UsageError(f"--slots: this model has slots 0 to {n_slots - 1}")
    return lists if len(lists) == n_inputs else lists * n_inputs


def figure_of(rows, result, inputs):
    """Per input (tile, KL tile, tiles of its slots, their KL in nats, the chosen ones) -> the figure, a PIL picture."""
    shown = [k for k in range(len(rows[0][3])) if any(k in chosen or nats[k] >= EMPTY for *_, nats, chosen in rows)]
    sheet = []
    for tile, kl, slots, nats, chosen in rows:
        alone = [Tile(slots[k], f"slot {k}: {nats[k]:.0f} nats", k in chosen) for k in shown]
        sheet.append([Tile(tile, "input"), Tile(kl, "KL map"), *alone])
    sheet.append([Tile(result, "of the framed slots", True)])
    names = [path.name for path in inputs]
    return contact_sheet(sheet, "Inputs taken apart; the framed slots put together", [*names, "recomposition"])


def recompose_pictures(model, inputs, slots, crop=None):
    """Picture files -> the recomposition, the figure that explains it (both PIL), and how many slots it has."""
    chosen = chosen_slots(list(slots), len(inputs), model.n_slots)
    pictures = np.stack([load_picture(path, model.about["size"], crop or model.about["crop"]) for path in inputs])
    encoded = model.run("encoder", image=pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    layer = model.run("decoder", z=encoded["mu"], cell=encoded["cell"])["layer"]  # (B, N, ...); z = mu: repeatable
    background = encoded["background"][:, None] if "background" in encoded else [None] * len(inputs)  # (B, 1, ...)
    taken = np.concatenate([layer[b, numbers] for b, numbers in enumerate(chosen)])[None]  # (1, M, ...)
    result = to_uint8(finite(model.compose(taken, background[0])[0], "the recomposition"))
    rows = []
    for b, numbers in enumerate(chosen):
        behind = None if background[b] is None else background[b].repeat(model.n_slots, 0)  # (N, ...)
        alone = [to_uint8(picture) for picture in model.compose(layer[b][:, None], behind)]
        kl = kl_tile(pictures[b], encoded["kl_map"][b], encoded["cell"][b], numbers)
        rows.append((pictures[b], kl, alone, encoded["kl"][b], numbers))
    return Image.fromarray(result), figure_of(rows, result, inputs), taken.shape[1]


def recompose_sounds(model, inputs, slots, vocoder):
    """Sound files -> the recomposition (samples,), the figure that explains it, and how many slots it has.

    The soft masks of the chosen slots on their inputs' spectra are added up, with the inputs' phases and loudness; with
    `vocoder` the slots are combined by the model's operator and Griffin-Lim finds phases, as loud as the former.
    """
    about, chosen = model.about, chosen_slots(list(slots), len(inputs), model.n_slots)
    sizes, rate = (about["n_fft"], about["hop"]), about["sample_rate"]
    waveforms = np.stack([load_sound(path, rate, about["samples"]) for path in inputs])
    encoded = model.run("encoder", waveform=waveforms.astype(np.float32))
    layer = model.run("decoder", z=encoded["mu"], cell=encoded["cell"])["layer"]  # (B, N, ...)
    total, rows, shown = 0, [], (about["samples"] / rate, rate)
    for b, numbers in enumerate(chosen):
        alone = np.concatenate([model.compose(layer[b : b + 1, k : k + 1]) for k in range(model.n_slots)])  # (N, F, T)
        spectrum = stft(waveforms[b], *sizes)
        total = total + (soft_masks(alone) * spectrum)[numbers].sum(0)
        loudest, upside_down = np.abs(spectrum).max(), encoded["cell"][b] * np.array([-1, 1], np.float32)
        level = spectrum_levels(np.abs(spectrum), loudest, rate)
        kl = kl_tile(heat_map(level, 60), encoded["kl_map"][b][::-1], upside_down, numbers)
        tiles = [spectrum_tile(magnitude, alone.max(), *shown) for magnitude in alone]
        rows.append((spectrum_tile(np.abs(spectrum), loudest, *shown), kl, tiles, encoded["kl"][b], numbers))
    result = inverse_stft(total, *sizes, about["samples"])
    if vocoder:
        # The encoder hears all inputs equally loud; layers, logarithms of magnitudes, get their levels back.
        loudness = np.log(np.sqrt(np.square(waveforms).mean(1)))
        level = (loudness - loudness.max() if about["compose"] == "data" else 0 * loudness).astype(np.float32)
        taken = np.concatenate([layer[b, numbers] + level[b] for b, numbers in enumerate(chosen)])[None]  # (1, M, ...)
        decoded = model.vocode(model.compose(taken))[0].astype(np.float64)
        result = decoded * np.sqrt(np.square(result).mean() / max(np.square(decoded).mean(), 1e-20))
    magnitude = np.abs(stft(finite(result, "the recomposition"), *sizes))
    tile = spectrum_tile(magnitude, magnitude.max(), *shown)
    return result, figure_of(rows, tile, inputs), sum(map(len, chosen))


def save(path, write):
    """`write_atomically`; raises click.ClickException where the file cannot be written."""
    try:
        write_atomically(path, write)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from error


def save_sound(path, waveform, rate):
    """Write 16 bits a sample; a sound beyond full scale is made softer, and the command line says so."""
    import soundfile

    peak = np.abs(waveform).max()
    if peak > 1.006:  # 0.05 dB: less would be said as 0.0 dB
        click.echo(f"{path}: made {20 * np.log10(peak):.1f} dB softer, to fit into full scale")
    encoded = io.BytesIO()  # soundfile's own errors of writing have many kinds
    soundfile.write(encoded, waveform / max(peak, 1), rate, format=path.suffix[1:].upper(), subtype="PCM_16")
    save(path, lambda p: p.write_bytes(encoded.getvalue()))


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"), context_settings={"show_default": True})
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=PATH)
@click.option("--slots", multiple=True, type=SLOTS, metavar="K,K", show_default="all",
              help="Slots to keep: once for every input, or once each, in the inputs' order.")  # fmt: skip
@click.option("--model", "folder", type=PATH, show_default="the shipped model", help="Folder written by export.py.")
@click.option("--crop", type=click.Choice(["clevr", "centre", "fit"]), show_default="the model's", help="Of pictures.")
@click.option("--vocoder", is_flag=True, help="Sounds: what slots decode to, through Griffin-Lim, instead of masks.")
@click.option("--out", type=PATH, show_default="recomposed.png or .wav",
              help="The picture or sound to write; the figure is written beside it, as NAME_figure.png.")  # fmt: skip
def main(inputs, slots, folder, crop, vocoder, out):
    # 1. Check the arguments, and read the model.
    sounds = {path.suffix.lower() in SUFFIXES for path in inputs}
    if len(sounds) > 1:
        raise click.UsageError("pictures and sounds cannot be recomposed together")
    kind, suffixes = ("mvae-sound", SUFFIXES) if True in sounds else ("mvae-image", (".png",))
    out = out or Path(f"recomposed{suffixes[0]}")
    if out.suffix.lower() not in suffixes:
        raise click.UsageError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    if (vocoder and kind != "mvae-sound") or (crop and kind != "mvae-image"):
        raise click.UsageError("--vocoder is for sounds, --crop for pictures")
    beside = out.with_name(f"{out.stem}_figure.png")
    for path in (out, beside):
        if path.is_dir():
            raise click.UsageError(f"--out: {path} is a folder")
        if not path.parent.is_dir():
            raise click.UsageError(f"--out: {path} is in a folder that does not exist")
        if path.resolve() in [other.resolve() for other in inputs]:
            raise click.UsageError(f"--out: {path} would overwrite an input")
    model = Model(folder or SHIPPED[kind], kind, GRAPHS + ("vocoder",) * vocoder)

    # 2. Take the inputs apart, put the chosen slots together, write the result and the figure that explains it.
    if kind == "mvae-sound":
        result, figure, n = recompose_sounds(model, inputs, slots, vocoder)
        save_sound(out, result, model.about["sample_rate"])
    else:
        result, figure, n = recompose_pictures(model, inputs, slots, crop)
        save(out, lambda p: result.save(p, format="PNG"))
    save(beside, lambda p: figure.save(p, format="PNG"))
    count = f"{n} slot{'s' * (n > 1)} of {len(inputs)} input{'s' * (len(inputs) > 1)}"
    click.echo(f"{out}: {count}; {beside} explains it")


if __name__ == "__main__":
    main()
