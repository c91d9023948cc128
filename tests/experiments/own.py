"""Folders of pictures and sounds as a person may have them, to train on; and how well a run found what is there.

    python -m tests.experiments.own make my_pictures               # 2,000 JPEGs, masks apart in my_pictures-masks
    python train_mvae.py --dataset pictures --data-root my_pictures --minutes 15
    python -m tests.experiments.own score runs/mvae-pictures-alpha-N6-seed0
    python -m tests.experiments.own make-sounds my_sounds --data-root nsynth  # MP3s of notes, 44.1 kHz, 3 to 28 s
    python train_mvae.py --dataset sounds --data-root my_sounds --mix --steps 3000

Two to five ellipses, boxes and triangles, coloured and shaded, on a grained ground under uneven light: 200 x 150
pixels, in three nested folders; one JPEG is cut off, and a text file is called .png. Nothing says where objects are.
"""

from pathlib import Path

import click
import numpy as np
import soundfile
import soxr
import torch
from PIL import Image

import train_mvae
from common import FOLDER, RATE, load_notes
from recompose import square
from tests.experiments.slots import load_run, load_start, segmentation_scores
from train_mvae import averages, evaluate_pictures, reconstruct

WIDTH, HEIGHT, FINE = 200, 150, 3
FOLDERS = ("holiday", "holiday/garden", "work/desk/top")


def outline(kind, y, x, radius, angle):
    """Pixels of a shape around (0, 0): y, x (H, W) -> (H, W) bool."""
    u, v = (np.cos(angle) * x + np.sin(angle) * y) / radius, (np.cos(angle) * y - np.sin(angle) * x) / radius
    return (
        u**2 + (v / 0.75) ** 2 < 1,
        np.maximum(abs(u), abs(v)) < 0.8,
        (v > -0.6) & (v + 3**0.5 * abs(u) < 1.1),
    )[kind]


def draw(rng):
    """One picture uint8 (HEIGHT, WIDTH, 3), and its objects' numbers uint8 (HEIGHT, WIDTH), 0 the ground."""
    y, x = np.mgrid[: FINE * HEIGHT, : FINE * WIDTH] / FINE
    grain = np.kron(rng.normal(0, 0.04, (HEIGHT // 2, WIDTH // 2)), np.ones((2 * FINE, 2 * FINE)))
    light = 1 + rng.uniform(-0.15, 0.15) * (x / WIDTH - 0.5) + rng.uniform(-0.15, 0.15) * (y / HEIGHT - 0.5)
    image = np.array([0.62, 0.55, 0.45]) * (light + grain)[..., None]
    label, places = np.zeros(image.shape[:2], np.uint8), []
    for k in range(1, rng.integers(3, 7)):
        radius, tries = rng.uniform(14, 24), rng.uniform((20, 40), (HEIGHT - 20, WIDTH - 40), (40, 2))
        gap = [min((np.hypot(*(one - other)) - radius - r for other, r in places), default=1) for one in tries]
        places.append((tries[int(np.argmax(np.array(gap) > 0)) if max(gap) > 0 else int(np.argmax(gap))], radius))
        inside = outline(rng.integers(3), y - places[-1][0][0], x - places[-1][0][1], radius, rng.uniform(0, 6.3))
        colour = np.roll([rng.uniform(0.6, 1), rng.uniform(0.05, 0.3), rng.uniform(0, 0.6)], rng.integers(3))
        shade = 1 + 0.25 * ((places[-1][0][0] - y) + (places[-1][0][1] - x)) / (2 * radius) + 0.5 * grain
        image[inside], label[inside] = (colour * shade[..., None])[inside], k
    image = image.reshape(HEIGHT, FINE, WIDTH, FINE, 3).mean((1, 3))
    return (image.clip(0, 1) * 255).round().astype(np.uint8), label[1::FINE, 1::FINE]


@click.group()
def main():
    """A folder of one's own pictures, made, and runs on it scored."""


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--pictures", type=click.IntRange(30), default=2000, show_default=True)
def make(folder, pictures):
    """Write the pictures into FOLDER, and what is where into FOLDER-masks."""
    rng, masks = np.random.default_rng(0), folder.with_name(f"{folder.name}-masks")
    for i in range(pictures):
        place = Path(FOLDERS[i % len(FOLDERS)]) / f"picture {i:04}"
        image, label = draw(rng)
        for root, array, suffix in ((folder, image, ".jpg"), (masks, label, ".png")):
            path = (root / place).with_suffix(suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path, quality=90)
    path = folder / FOLDERS[1] / "cut off.jpg"
    path.write_bytes((folder / FOLDERS[0] / "picture 0000.jpg").read_bytes()[:2000])
    (folder / FOLDERS[2] / "notes.png").write_text("milk, bread, a paintbrush\n")
    click.echo(f"{folder}: {pictures} pictures and two files that are none; {masks}: what is where")


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, built-in notes.")
def make_sounds(folder, data_root):
    """Write every instrument's notes into a folder of its own below FOLDER: MP3s of one to seven notes, some of 3 s."""
    options = train_mvae.main.make_context("", ["--dataset", "nsynth-duo"]).params
    splits, _ = load_notes(options | {"data_root": data_root})
    rng, files = np.random.default_rng(0), 0
    for split in splits.values():
        for instrument in split.instrument.unique().tolist():
            notes = torch.nonzero(split.instrument == instrument)[:, 0]
            place = folder / split.notes[int(notes[0])].instrument
            place.mkdir(parents=True, exist_ok=True)
            while len(notes):
                some, notes = notes.split([n := min(len(notes), int(rng.integers(1, 8))), len(notes) - n])
                waveform = split.waveform(some).flatten().numpy()[: 3 * RATE if n == 1 else None]
                path, files = place / f"take {files:03}.mp3", files + 1
                soundfile.write(path, soxr.resample(waveform, RATE, 44_100), 44_100, format="MP3")
    click.echo(f"{folder}: {files} files of {len(list(folder.iterdir()))} instruments")


@main.command()
@click.argument("run_dir", type=FOLDER)
@torch.no_grad()
def score(run_dir):
    """Score RUN_DIR, a run on such a folder, by the masks that were kept from it."""
    model, data = load_run(run_dir)
    masks = data.root.with_name(f"{data.root.name}-masks")
    images = data.scenes("test", train_mvae.SCENES)[0]
    files = [file for file in data.files["test"] if (masks / file).with_suffix(".png").is_file()][: len(images)]
    labels = [Image.open((masks / file).with_suffix(".png")).convert("P") for file in files]
    labels = [square(mask, data.crop, masks).resize((model.size, model.size)) for mask in labels]
    click.echo(f"{len(labels)} test pictures of {data.source}\n\n| score | trained | step 0 |\n|-|-|-|")
    columns = []
    for one in (model, load_start(model, data)):
        scores = []
        for image, label in zip(images, labels, strict=True):
            label = torch.tensor(np.array(label)).long()
            encoding, layer, _ = reconstruct(one, image[None])
            scores.append(segmentation_scores(one.responsibilities(layer, encoding.background)[0], label))
        mse = evaluate_pictures(one, data, "test", len(images), model.config["options"]["sigma"])
        columns.append(averages(scores) | {name: mse[name] for name in ("mse", "mse_baseline")})
    for name, value in columns[0].items():
        click.echo(f"| {name} | {value:.4g} | {columns[1][name]:.4g} |")


if __name__ == "__main__":
    main()
