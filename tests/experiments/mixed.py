"""A CLEVR folder to which pictures of the built-in renderer are added: training material of the shipped model.

    python -m tests.experiments.mixed --data-root CLEVR_mini --out CLEVR_mixed

Rendered pictures of 160x120 are soft at 128x128 and have at most six objects; drawn ones are sharp and have up to ten.
"""

from functools import partial
from pathlib import Path

import click
import torch
from PIL import Image

from recompose import write_atomically
from train_mvae import BuiltInClevr

SIZE, FRAME = 192, (320, 240)  # of the crop and of a picture, as in CLEVR's own usual layout
TOGETHER = 32  # drawn at a time


def frame(picture):
    """A picture (SIZE, SIZE, 3) where CLEVR's crop will find it, on black: a PIL picture."""
    whole = Image.new("RGB", FRAME)
    whole.paste(Image.fromarray(picture), ((FRAME[0] - SIZE) // 2, FRAME[1] // 2 + FRAME[0] // 64 - SIZE // 2))
    return whole


@click.command(context_settings={"show_default": True})
@click.option("--data-root", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--scenes", type=click.IntRange(1), default=3200, help="Drawn, a multiple of 32.")
@click.option("--objects", type=click.IntRange(1, 10), nargs=2, default=(3, 10), help="In a drawn scene.")
def main(data_root, out, scenes, objects):
    """Link all that --data-root, a CLEVR folder, has into --out, and draw more pictures for training."""
    if scenes % TOGETHER or not (data_root / "images" / "train").is_dir():
        raise click.UsageError(f"expected a multiple of {TOGETHER} --scenes, and images/train in --data-root")
    for file in sorted(path for path in data_root.resolve().rglob("*") if path.is_file()):
        link = out / file.relative_to(data_root.resolve())
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(file)
    data = BuiltInClevr(SIZE, objects, 0, torch.device("cpu"))
    for first in range(0, scenes, TOGETHER):
        for k, picture in enumerate(data.make(first, first + TOGETHER).permute(0, 2, 3, 1).numpy(), start=first):
            file = out / "images" / "train" / f"CLEVR_builtin_{k:06d}.png"
            write_atomically(file, partial(frame(picture).save, format="PNG"))
    click.echo(f"{out}: {scenes} drawn scenes beside those of {data_root.name}")


if __name__ == "__main__":
    main()
