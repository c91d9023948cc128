"""Take pictures apart into slots and put slots of any number of them together, with onnxruntime alone.

    python recompose.py a.png b.png                        # every slot of both, on the background of a.png
    python recompose.py a.png b.png --slots 0,2            # slots 0 and 2 of each
    python recompose.py a.png b.png --slots 0,2 --slots 1  # slots 0 and 2 of a.png, slot 1 of b.png

Writes the recomposed picture (`--out`) and beside it a figure: inputs, KL maps with the chosen cells marked, every
slot decoded alone, the recomposition. The models are folders that `export.py` wrote. PyTorch is not needed, nor
imported: this file and a model folder can be taken elsewhere. The drawing functions serve the training scripts too.
"""

import contextlib
import json
import struct
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

GRAPHS = ("encoder", "decoder", "composer")
SHIPPED_MODEL = Path(__file__).parent / "models" / "clevr"

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


# ---------------------------------------------------------------- Drawing

HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])  # inferno
TILE, GAP, LINE = 128, 10, 18
ACCENT, INK, PAPER = (230, 81, 0), (40, 40, 40), (255, 255, 255)


def to_uint8(picture):
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3); values outside are clipped."""
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def heat_map(values):
    """(H, W) -> uint8 (H, W, 3), from 0 (black) to the largest value (light yellow)."""
    place = np.clip(values / max(float(values.max()), 1e-9), 0, 1) * (len(HEAT) - 1)
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

    def __init__(self, folder):
        import onnxruntime  # here, so that `--help` and bad arguments answer at once

        self.sessions, described = {}, []
        for name in GRAPHS:
            path = Path(folder) / f"{name}.onnx"
            if not path.is_file():
                raise click.UsageError(f"--model {folder}: no {name}.onnx; expected the export of a train_mvae.py run")
            try:
                self.sessions[name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises a kind of its own for every fault
                raise click.UsageError(f"{path}: not a readable ONNX graph ({str(error).splitlines()[0]})") from error
            described.append(self.sessions[name].get_modelmeta().custom_metadata_map.get("model"))
        if None in described or len(set(described)) > 1:
            raise click.UsageError(f"--model {folder}: its graphs were not written together by export.py")
        try:
            info = json.loads(described[0])
            self.kind, self.size, self.crop, self.n_slots = (info[name] for name in ("kind", "size", "crop", "N"))
        except (KeyError, TypeError, ValueError) as error:
            raise click.UsageError(f"--model {folder}: its graphs were not written by export.py") from error
        if self.kind != "mvae-image":
            raise click.UsageError(f"--model {folder}: a model of kind {self.kind!r}; expected 'mvae-image'")

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

    def compose(self, layer, background):
        """layer (B, M, ...), background (B, ...) or None -> image (B, 3, H, W)."""
        inputs = {"layer": layer} if background is None else {"layer": layer, "background": background}
        return self.run("composer", **inputs)["image"]


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


def explain(model, pictures, names, encoded, layer, chosen, result):
    """The figure: a row an input with its KL map and every slot alone, and the recomposition below."""
    rows = []
    for b, name in enumerate(names):
        background = encoded["background"][b : b + 1] if "background" in encoded else None
        row = [
            (pictures[b], name, False),
            (kl_tile(encoded["kl_map"][b], encoded["cell"][b], chosen[b]), "KL map", False),
        ]
        for k in range(model.n_slots):
            alone = model.compose(layer[b : b + 1, k : k + 1], background)[0]
            row.append((to_uint8(alone), f"slot {k}: {encoded['kl'][b, k]:.0f} nats", k in chosen[b]))
        rows.append(row)
    return contact_sheet([*rows, [(to_uint8(result), "recomposition of the framed slots", True)]])


def check_output(path, inputs):
    """Raise click.UsageError where `path` cannot be written or is an input, before any work is done."""
    if path.is_dir() or not path.parent.is_dir():
        raise click.UsageError(
            f"--out: {path} {'is a folder' if path.is_dir() else 'is in a folder that does not exist'}"
        )
    if path.resolve() in [other.resolve() for other in inputs]:
        raise click.UsageError(f"--out: {path} would overwrite an input")


def save(picture, path):
    """Write a PNG whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        picture.save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from error


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
    default=SHIPPED_MODEL,
    show_default="models/clevr",
    help="Folder that export.py wrote.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="recomposed.png",
    help="The picture to write; the figure is written beside it, as NAME_figure.png.",
)
def main(inputs, slots, folder, out):
    """Recompose pictures from the slots of INPUT...

    \b
    python recompose.py a.png b.png --slots 0,2
    python recompose.py a.png b.png --slots 0,2 --slots 1 --out mixed.png
    """
    if out.suffix.lower() != ".png":
        raise click.UsageError(f"--out {out}: expected a name that ends in .png")
    beside = out.with_name(f"{out.stem}_figure.png")
    for path in (out, beside):
        check_output(path, inputs)

    # 1. Read the model and the inputs.
    model = Model(folder)
    chosen = chosen_slots(slots, len(inputs), model.n_slots)
    pictures = np.stack([load_picture(path, model.size, model.crop) for path in inputs])

    # 2. Take every input apart; z = mu, so that the same input always gives the same result.
    encoded = model.encode(pictures)
    layer = model.decode(encoded["mu"], encoded["cell"])

    # 3. Put the chosen slots together on the first input's background.
    taken = np.concatenate([layer[b, numbers] for b, numbers in enumerate(chosen)])[None]  # (1, M, ...)
    background = encoded["background"][:1] if "background" in encoded else None
    result = model.compose(taken, background)[0]

    # 4. Write the picture, and the figure that explains it.
    figure = explain(model, pictures, [path.name for path in inputs], encoded, layer, chosen, result)
    save(Image.fromarray(to_uint8(result)), out)
    save(figure, beside)
    click.echo(f"{out}: {taken.shape[1]} slots of {len(inputs)} pictures; {beside} explains it")


if __name__ == "__main__":
    main()
