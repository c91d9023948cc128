"""Take pictures, or sounds, apart into slots and put slots of any number of them together, with onnxruntime alone.

    python recompose.py a.png b.png                        # every slot of both, on the background of a.png
    python recompose.py a.png b.png --slots 0,2            # slots 0 and 2 of each
    python recompose.py a.png b.png --slots 0,2 --slots 1  # slots 0 and 2 of a.png, slot 1 of b.png
    python recompose.py a.wav b.wav --slots 0 --slots 1 --out mix.wav  # an instrument of each

Writes the recomposed picture or sound (`--out`) and beside it a figure: inputs, KL maps with the chosen cells marked,
every slot decoded alone, the recomposition. A slot of a sound is heard as a mask on the spectrum of its input, or,
with `--vocoder`, as what it decodes to alone, through Griffin-Lim. The models are folders that `export.py` wrote.
PyTorch is not needed, nor imported: this file and a model folder can be taken elsewhere. The drawing functions serve
the training scripts too.
"""

import contextlib
import io
import json
import struct
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

GRAPHS = ("encoder", "decoder", "composer")  # and for sounds, where it is asked for, "vocoder"
MODELS = Path(__file__).parent / "models"
SHIPPED = {"mvae-image": MODELS / "clevr", "mvae-sound": MODELS / "nsynth-duo"}
SUFFIXES = (".wav", ".flac")  # of sounds; all else is taken for a picture
OTHER_SOUNDS = (".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma")

# ---------------------------------------------------------------- Pictures


def read_picture(path):
    """Any still picture of 8 or 16 bits -> RGB; raises click.UsageError for all else, damaged files included."""
    try:
        with Image.open(path) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise click.UsageError(
                    f"{path}: an animated picture of {picture.n_frames} frames; expected a still one"
                )
            picture.load()
            if picture.mode.startswith("I"):  # 16 bits a pixel, which PIL's own conversion would clip to white
                values = np.asarray(picture, np.float64)
                if values.min() < 0 or values.max() > 65535:
                    raise click.UsageError(f"{path}: a picture of 32 bits a pixel; expected 8 or 16 a channel")
                return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
            if picture.mode == "F":
                raise click.UsageError(f"{path}: a floating-point picture; expected 8 or 16 bits a channel")
            if picture.has_transparency_data:
                white = Image.new("RGBA", picture.size, "white")
                return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise click.UsageError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise click.UsageError(f"{path}: not a picture (PNG, JPEG, ... expected)") from error
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise click.UsageError(f"{path}: damaged or unreadable picture ({error})") from error


def square(picture, crop, where):
    """The square of a picture that a model sees.

    crop "clevr": side 0.6 W, centred horizontally, its centre W/64 below the middle; a picture that is square already
    is taken whole. crop "none": the picture must be square. Raises click.UsageError where no such square exists.
    """
    width, height = picture.size
    if width == height:
        return picture
    if crop != "clevr":
        raise click.UsageError(f"{where}: {width}x{height} pixels; this model takes square pictures")
    left, top, side = 0.2 * width, height / 2 + width / 64 - 0.3 * width, 0.6 * width
    if top < 0 or top + side > height:
        raise click.UsageError(
            f"{where}: {width}x{height} pixels; CLEVR's crop needs a height of at least 0.64 of the width"
        )
    return picture.crop((round(left), round(top), round(left + side), round(top + side)))


def load_picture(path, size, crop):
    """A picture file -> uint8 (size, size, 3), cropped by `square`."""
    picture = square(read_picture(path), crop, path)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------- Sounds


def load_sound(path, rate, samples):
    """A sound file -> its samples (samples,), mixed down to one channel, silence after them.

    Raises click.UsageError where there is none, it is damaged, silent, too long, of another rate, or holds no numbers.
    """
    import soundfile  # here, because pictures do without

    if not path.is_file():
        raise click.UsageError(f"{path}: no such file")
    try:
        waveform, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise click.UsageError(f"{path}: damaged, or no sound (WAV or FLAC expected)") from error
    if found != rate:
        raise click.UsageError(f"{path}: {found} samples a second; this model takes {rate}")
    if len(waveform) > samples:
        raise click.UsageError(f"{path}: {len(waveform) / rate:.2f} s; this model takes up to {samples / rate:g} s")
    waveform = waveform.mean(1)
    if not np.isfinite(waveform).all():
        raise click.UsageError(f"{path}: holds samples that are no numbers")
    if not len(waveform) or np.abs(waveform).max() < 1e-5:
        raise click.UsageError(f"{path}: silent")
    return np.pad(waveform, (0, samples - len(waveform)))


def hann(n_fft):
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft, dtype=np.float64)


def stft(waveform, n_fft, hop):
    """(samples,), lengthened to whole hops -> complex (F, T); frames stand in the middle of their samples."""
    longer = np.pad(waveform, (0, -len(waveform) % hop))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(longer, n_fft // 2, mode="reflect"), n_fft)[::hop]
    return np.fft.rfft(frames * hann(n_fft)).T


def inverse_stft(spectrum, n_fft, hop, samples):
    """The sound of which `spectrum` (F, T) is the STFT, or comes nearest in squares: (samples,)."""
    window, frames = hann(n_fft), spectrum.shape[1]
    summed, weight = np.zeros((frames - 1) * hop + n_fft), np.zeros((frames - 1) * hop + n_fft)
    for t, frame in enumerate(np.fft.irfft(spectrum.T) * window):
        summed[t * hop : t * hop + n_fft] += frame
        weight[t * hop : t * hop + n_fft] += window**2
    return (summed / np.maximum(weight, 1e-8))[n_fft // 2 :][:samples]


def soft_masks(magnitude):
    """Magnitudes of slots (N, F, T) -> the share of each in their power; they sum to one (Wiener 1949)."""
    power = magnitude.astype(np.float64) ** 2 + 1e-12
    return power / power.sum(0)


# ---------------------------------------------------------------- Drawing

HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])  # inferno
TILE, GAP, LINE = 128, 10, 18
ACCENT, INK, PAPER = (230, 81, 0), (40, 40, 40), (255, 255, 255)


def to_uint8(picture):
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3); values outside are clipped."""
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def heat_map(values, top=None):
    """(H, W) -> uint8 (H, W, 3), from 0 (black) to `top` or the largest value (light yellow)."""
    place = np.clip(values / max(float(values.max()) if top is None else top, 1e-9), 0, 1) * (len(HEAT) - 1)
    channels = [np.interp(place, np.arange(len(HEAT)), HEAT[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def enlarge(picture):
    """uint8 (H, W, 3) -> a PIL tile; pixels stay visible as squares."""
    return Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST)


def kl_tile(kl_map, cell, chosen):
    """The KL map with the slots' numbers at their cells: kl_map (H_l, W_l), cell (N, 2) in [-1, 1], chosen: indices."""
    tile = enlarge(heat_map(kl_map))
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(10)
    for k, (y, x) in enumerate((cell + 1) / 2 * TILE):
        box = (x - 7, y - 7, x + 7, y + 7)
        draw.ellipse(box, fill=ACCENT if k in chosen else INK, outline=PAPER)
        draw.text((x, y), str(k), fill=PAPER, font=font, anchor="mm")
    return tile


def shorten(text, font, width):
    """The text, or as much of its end as fits into so many pixels, after an ellipsis."""
    short = text
    while font.getlength(short) > width:
        short = f"…{short.lstrip('…')[1:]}"
    return short


def contact_sheet(rows):
    """Rows of (tile, caption, framed) -> one PIL picture; a tile is a PIL picture or uint8 (H, W, 3).

    A caption is cut to its tile's width, but for the last of a row.
    """
    width = max(map(len, rows)) * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (TILE + LINE + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for r, row in enumerate(rows):
        for c, (tile, caption, framed) in enumerate(row):
            x, y = GAP + c * (TILE + GAP), GAP + r * (TILE + LINE + GAP)
            caption = caption if c == len(row) - 1 else shorten(caption, font, TILE)
            draw.text((x, y + 1), caption, fill=ACCENT if framed else INK, font=font)
            if framed:
                draw.rectangle((x - 3, y + LINE - 3, x + TILE + 2, y + LINE + TILE + 2), outline=ACCENT, width=3)
            sheet.paste(tile if isinstance(tile, Image.Image) else enlarge(tile), (x, y + LINE))
    return sheet


# ---------------------------------------------------------------- Model


class Model:
    """The exported graphs of one folder, run by onnxruntime; arrays in, dicts of named arrays out."""

    def __init__(self, folder, kind, graphs=GRAPHS):
        """Raises click.UsageError where `folder` holds no whole export of a model of that kind."""
        import onnxruntime  # here, so that `--help` and bad arguments answer at once

        self.sessions, described = {}, []
        for name in graphs:
            path = Path(folder) / f"{name}.onnx"
            if not path.is_file():
                what = "sounds" if kind == "mvae-sound" else "pictures"
                raise click.UsageError(
                    f"--model {folder}: no {name}.onnx; expected the export of a train_mvae.py run on {what}"
                )
            try:
                self.sessions[name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises a kind of its own for every fault
                raise click.UsageError(f"{path}: not a readable ONNX graph ({str(error).splitlines()[0]})") from error
            described.append(self.sessions[name].get_modelmeta().custom_metadata_map.get("model"))
        if None in described or len(set(described)) > 1:
            raise click.UsageError(f"--model {folder}: its graphs were not written together by export.py")
        try:
            self.about = json.loads(described[0])
            self.n_slots, found = self.about["N"], self.about["kind"]
            needed = ("sample_rate", "samples", "n_fft", "hop") if kind == "mvae-sound" else ("size", "crop")
            if found == kind and not all(name in self.about for name in needed):
                raise KeyError
        except (KeyError, TypeError, ValueError) as error:
            raise click.UsageError(f"--model {folder}: its graphs were not written by export.py") from error
        if found != kind:
            raise click.UsageError(f"--model {folder}: a model of kind {found!r}; expected {kind!r}")

    def run(self, graph, **inputs):
        session = self.sessions[graph]
        values = session.run(None, inputs)
        return {output.name: value for output, value in zip(session.get_outputs(), values, strict=True)}

    def encode(self, pictures):
        """uint8 (B, H, W, 3) -> the encoder's outputs."""
        return self.run("encoder", image=pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255)

    def decode(self, z, cell):
        """z (B, N, D), cell (B, N, 2) -> layer (B, N, ...)."""
        return self.run("decoder", z=z, cell=cell)["layer"]

    def compose(self, layer, background=None):
        """layer (B, M, ...), background (B, ...) or None -> image (B, 3, H, W), or spectrogram (B, F, T)."""
        inputs = {"layer": layer} if background is None else {"layer": layer, "background": background}
        return next(iter(self.run("composer", **inputs).values()))

    def vocode(self, spectrogram):
        """Magnitudes (B, F, T) -> waveform (B, samples)."""
        return self.run("vocoder", spectrogram=spectrogram)["waveform"][:, : self.about["samples"]]


# ---------------------------------------------------------------- Command line


def parse_slots(context, parameter, values):
    """("0,2", "1") -> [[0, 2], [1]]; raises click.BadParameter for what is no list of slot numbers."""
    lists = []
    for value in values:
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is no list of slot numbers such as 0,2") from error
        if min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise click.BadParameter(f"{value!r}: slot numbers start at 0, and each is named once")
        lists.append(numbers)
    return lists


def chosen_slots(lists, n_inputs, n_slots):
    """The slots of every input, checked against the model: -> one list of numbers an input."""
    if len(lists) > 1 and len(lists) != n_inputs:
        raise click.UsageError(f"--slots is given {len(lists)} times for {n_inputs} inputs; give it once, or once each")
    every = [list(range(n_slots))]
    chosen = (lists or every) * (n_inputs if len(lists) <= 1 else 1)
    highest = max(max(numbers) for numbers in chosen)
    if highest >= n_slots:
        raise click.UsageError(f"--slots names slot {highest}; this model has slots 0 to {n_slots - 1}")
    return chosen


def picture_row(model, picture, name, encoded, layer, b, chosen):
    """An input of the figure: the picture, its KL map, every slot alone."""
    background = encoded["background"][b : b + 1] if "background" in encoded else None
    row = [(picture, name, False), (kl_tile(encoded["kl_map"][b], encoded["cell"][b], chosen), "KL map", False)]
    for k in range(model.n_slots):
        alone = model.compose(layer[b : b + 1, k : k + 1], background)[0]
        row.append((to_uint8(alone), f"slot {k}: {encoded['kl'][b, k]:.0f} nats", k in chosen))
    return row


def recompose_pictures(model, inputs, slots):
    """Picture files -> the recomposition, the figure that explains it (both PIL), and how many slots it has."""
    chosen = chosen_slots(slots, len(inputs), model.n_slots)
    pictures = np.stack([load_picture(path, model.about["size"], model.about["crop"]) for path in inputs])
    encoded = model.encode(pictures)  # z = mu below, so that the same input always gives the same result
    layer = model.decode(encoded["mu"], encoded["cell"])
    taken = np.concatenate([layer[b, numbers] for b, numbers in enumerate(chosen)])[None]  # (1, M, ...)
    background = encoded["background"][:1] if "background" in encoded else None
    result = to_uint8(model.compose(taken, background)[0])
    rows = [picture_row(model, pictures[b], path.name, encoded, layer, b, chosen[b]) for b, path in enumerate(inputs)]
    figure = contact_sheet([*rows, [(result, "recomposition of the framed slots", True)]])
    return Image.fromarray(result), figure, taken.shape[1]


def spectrum_tile(magnitude, top):
    """STFT magnitudes (F, T) as a picture: time to the right, frequency upwards in equal steps of pitch, 60 dB."""
    bins = np.geomspace(len(magnitude) / 128, len(magnitude) - 1, TILE).round().astype(int)[::-1]
    decibels = 20 * np.log10(np.maximum(magnitude[bins] / top, 1e-9))
    return heat_map(np.maximum(decibels + 60, 0), 60)


def recompose_sounds(model, inputs, slots, vocoder):
    """Sound files -> the recomposition (samples,), the figure that explains it, and how many slots it has.

    Of every chosen slot its soft mask on its input's spectrum is added up, with the input's phases and loudness; with
    `vocoder` the slots are combined by the model's operator and Griffin-Lim finds phases, as loud as the former.
    """
    about, chosen = model.about, chosen_slots(slots, len(inputs), model.n_slots)
    sizes = about["n_fft"], about["hop"]
    waveforms = np.stack([load_sound(path, about["sample_rate"], about["samples"]) for path in inputs])
    encoded = model.run("encoder", waveform=waveforms.astype(np.float32))
    layer = model.decode(encoded["mu"], encoded["cell"])
    total, rows = 0, []
    for b, path in enumerate(inputs):
        alone = np.concatenate([model.compose(layer[b : b + 1, k : k + 1]) for k in range(model.n_slots)])  # (N, F, T)
        spectrum = stft(waveforms[b], *sizes)
        masked = soft_masks(alone) * spectrum
        total = total + masked[chosen[b]].sum(0)
        top, heard = np.abs(spectrum).max(), alone.max()
        upside_down = encoded["cell"][b] * np.array([-1, 1], np.float32)
        row = [(spectrum_tile(np.abs(spectrum), top), path.name, False)]
        row.append((kl_tile(encoded["kl_map"][b][::-1], upside_down, chosen[b]), "KL map", False))
        for k in range(model.n_slots):
            row.append((spectrum_tile(alone[k], heard), f"slot {k}: {encoded['kl'][b, k]:.0f} nats", k in chosen[b]))
        rows.append(row)
    result = inverse_stft(total, *sizes, about["samples"])
    if vocoder:
        # The encoder hears all inputs equally loud; layers, logarithms of magnitudes, get their levels back.
        loudness = np.log(np.sqrt(np.square(waveforms).mean(1)))
        level = (loudness - loudness.max() if about["compose"] == "data" else 0 * loudness).astype(np.float32)
        taken = np.concatenate([layer[b, numbers] + level[b] for b, numbers in enumerate(chosen)])[None]  # (1, M, ...)
        decoded = model.vocode(model.compose(taken))[0].astype(np.float64)
        result = decoded * np.sqrt(np.square(result).mean() / max(np.square(decoded).mean(), 1e-20))
    magnitude = np.abs(stft(result, *sizes))
    tile = spectrum_tile(magnitude, magnitude.max())
    figure = contact_sheet([*rows, [(tile, "recomposition of the framed slots", True)]])
    return result, figure, sum(map(len, chosen))


def check_output(path, inputs):
    """Raise click.UsageError where `path` cannot be written or is an input, before any work is done."""
    if path.is_dir() or not path.parent.is_dir():
        raise click.UsageError(
            f"--out: {path} {'is a folder' if path.is_dir() else 'is in a folder that does not exist'}"
        )
    if path.resolve() in [other.resolve() for other in inputs]:
        raise click.UsageError(f"--out: {path} would overwrite an input")


def save(path, write):
    """Call write(temporary path) and rename: a file is written whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from error


def save_sound(path, waveform, rate):
    """16 bits a sample; a sound beyond full scale is made softer, and that is said."""
    import soundfile

    peak = np.abs(waveform).max()
    if peak > 1:
        click.echo(f"{path}: made {20 * np.log10(peak):.1f} dB softer, to fit into full scale")
    encoded = io.BytesIO()  # soundfile's own errors of writing have many kinds
    soundfile.write(encoded, waveform / max(peak, 1), rate, format=path.suffix[1:].upper(), subtype="PCM_16")
    save(path, lambda p: p.write_bytes(encoded.getvalue()))


def kind_of(inputs):
    """What the inputs are, "mvae-image" or "mvae-sound", by their names; raises click.UsageError for both at once."""
    for path in inputs:
        if path.suffix.lower() in OTHER_SOUNDS:
            raise click.UsageError(f"{path}: sounds are read from WAV and FLAC files alone")
    sounds = [path.suffix.lower() in SUFFIXES for path in inputs]
    if any(sounds) and not all(sounds):
        raise click.UsageError(
            f"{inputs[sounds.index(True)]} is a sound and {inputs[sounds.index(False)]} is none; "
            "pictures and sounds cannot be recomposed together"
        )
    return "mvae-sound" if all(sounds) else "mvae-image"


@click.command(context_settings={"show_default": True})
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(path_type=Path))
@click.option(
    "--slots",
    multiple=True,
    callback=parse_slots,
    metavar="K,K",
    show_default="all",
    help="Slots to keep: once for every input, or once each, in the inputs' order.",
)
@click.option(
    "--model",
    "folder",
    type=click.Path(path_type=Path),
    show_default="models/clevr, for sounds models/nsynth-duo",
    help="Folder that export.py wrote.",
)
@click.option("--vocoder", is_flag=True, help="Sounds: what slots decode to, through Griffin-Lim, instead of masks.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="recomposed.png or .wav",
    help="The picture or sound to write; the figure is written beside it, as NAME_figure.png.",
)
def main(inputs, slots, folder, vocoder, out):
    """Recompose pictures, or sounds, from the slots of INPUT...

    \b
    python recompose.py a.png b.png --slots 0,2
    python recompose.py a.png b.png --slots 0,2 --slots 1 --out mixed.png
    python recompose.py a.wav b.wav --slots 0 --slots 1 --out mix.wav
    """
    # 1. Check the arguments, and read the model.
    kind = kind_of(inputs)
    suffixes = SUFFIXES if kind == "mvae-sound" else (".png",)
    out = out or Path(f"recomposed{suffixes[0]}")
    if out.suffix.lower() not in suffixes:
        raise click.UsageError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    if vocoder and kind != "mvae-sound":
        raise click.UsageError("--vocoder is for sounds")
    beside = out.with_name(f"{out.stem}_figure.png")
    for path in (out, beside):
        check_output(path, inputs)
    model = Model(folder or SHIPPED[kind], kind, GRAPHS + ("vocoder",) * vocoder)

    # 2. Take the inputs apart, put the chosen slots together, write the result and the figure that explains it.
    if kind == "mvae-sound":
        result, figure, n = recompose_sounds(model, inputs, slots, vocoder)
        save_sound(out, result, model.about["sample_rate"])
    else:
        result, figure, n = recompose_pictures(model, inputs, slots)
        save(out, lambda p: result.save(p, format="PNG"))
    save(beside, lambda p: figure.save(p, format="PNG"))
    click.echo(f"{out}: {n} slots of {len(inputs)} inputs; {beside} explains it")


if __name__ == "__main__":
    main()
