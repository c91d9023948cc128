"""Multi-Entity VAE (Nash et al. 2017): the top-N cells of a posterior map become slots, each decoded alone.

    python train_mvae.py --dataset sprites
    python train_mvae.py --dataset clevr --N 4 --op sum --data-root CLEVR_v1.0
    python train_mvae.py --dataset nsynth-duo --data-root nsynth        # or four notes: --voices 2 4 --N 4
    python train_mvae.py --dataset pictures --data-root my_pictures     # or sounds, two at once: --dataset sounds --mix

Pictures, or mixtures of notes, fall apart into entities without labels. Without --data-root, CLEVR-like scenes are ray
cast below, and notes synthesised. Results: docs/mvae.md, docs/mvae-audio.md, docs/prior.md."""

import copy
import itertools
import math
from collections import namedtuple
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.datasets import CLEVRClassification
from torchvision.ops import MLP
from tqdm import trange

from common import (  # isort: skip
    COMPRESSION, OPS, POSITIVE, RATE, SAMPLES, SPLITS, FlowPrior, Graph, Reader, ResBlock, Run, Vocoder, alpha_masks,
    beta_at, build_model, choose, compose, families_option, fetching, gather_cells, gaussian_kl, learning_rate_at,
    load_file, load_model, load_notes, log_compress, log_expand, log_spectral_distance, optimizer_step,
    random_generator, read_json, reparameterize, settle_options, split_files, start_device, training_command,
)  # fmt: skip
from recompose import (  # isort: skip
    EMPTY, LOWEST, Tile, band_levels, contact_sheet, heat_map, inverse_stft, kl_tile, load_picture, soft_masks,
    spectrum_tile, square, stft, to_uint8, unexplained,
)  # fmt: skip


def position_grid(height, width):  # the (y, x) of the middle of every cell of a grid: (2, height, width)
    axes = [(2 * torch.arange(n) + 1) / n - 1 for n in (height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


# ---------------------------------------------------------------- Data: pools of pictures, and built-in sprites

CHUNK, POOL, SCENES = 64, 10_000, 320  # rendered, or read, at a time; for training; to judge by, as in the literature


class Pool:
    """Pictures and labelled scenes, read by a subclass, or rendered, chunks and splits by generators of their own."""

    def __init__(self, size, objects, seed, device, length=None):
        self.size, self.objects, self.seed, self.device, self.length = size, objects, seed, device, length or POOL
        self.chunks = {}  # of pictures that have been rendered

    def batch(self, step, own, total):
        """The slice `own` of the `total` pictures of a step: (own, 3, size, size) in [0, 1]."""
        position = step * total + torch.arange(total)[own]
        epoch, index = position // self.length, position % self.length
        for e in epoch[epoch > 0].unique().tolist():  # the first epoch goes straight, so that chunks fill one by one
            order = torch.randperm(self.length, generator=random_generator("order", self.seed, e))
            index = torch.where(epoch == e, order[index], index)
        return self.pictures(index).to(self.device, non_blocking=True).float() / 255

    def pictures(self, index):  # of any numbers (n,): uint8 (n, 3, size, size)
        for chunk in set((index // CHUNK).tolist()) - self.chunks.keys():  # each is rendered once, when it is needed
            self.chunks[chunk] = self.make(chunk * CHUNK, min((chunk + 1) * CHUNK, self.length)).cpu().contiguous()
        return torch.stack([self.chunks[i // CHUNK][i % CHUNK] for i in index.tolist()])

    def make(self, first, last):
        scene = self.sample(last - first, random_generator(self.name, self.seed, first, device=self.device))
        return (self.render(scene)[0] * 255).round().to(torch.uint8)

    def scenes(self, split, n):
        """The first n scenes of a split that no training step sees: images, labels."""
        generator = random_generator(self.name, split, device=self.device)
        parts = [self.render(self.sample(CHUNK, generator)) for _ in range(0, n, CHUNK)]
        return tuple(torch.cat(part)[:n] for part in zip(*parts, strict=True))

    def place_apart(self, n, count, extent, clearance, generator):
        """Random points of [-extent, extent]^2, pairs `clearance` (n, count, count) apart, or nearly: (n, count, 2)."""
        tries = 2 * extent * torch.rand(n, count, 40, 2, generator=generator, device=self.device) - extent
        chosen = tries[:, :1, 0]  # (n, 1, 2)
        for k in range(1, count):  # of 40 tries the first free place is taken, or the freest
            distance = (tries[:, k, :, None] - chosen[:, None]).norm(dim=-1)  # (n, 40, k)
            gap = (distance - clearance[:, None, k, :k]).amin(-1)
            pick = torch.where(gap > 0, 100.0 - torch.arange(40, device=gap.device), gap).argmax(1)
            chosen = torch.cat([chosen, tries[torch.arange(n), k, pick][:, None]], dim=1)
        return chosen


class Sprites(Pool):
    """Coloured ellipses, squares and triangles on black, or real dSprites; scenes are dicts of tensors (n, K, ...)."""

    name, crop = "sprites", "none"

    def __init__(self, size, objects, seed, device, data_root=None):
        super().__init__(size, objects, seed, device)
        self.source, self.library = "built-in sprites", None
        if data_root:
            file = min(data_root.glob("dsprites*.npz"), default=None)
            if not file or size not in (32, 64):
                raise click.UsageError(f"--data-root {data_root}: expected dsprites*.npz there, and --size 32 or 64")
            shapes = load_file(file, lambda path: np.load(path)["imgs"], {}, click.UsageError)  # metadata is a pickle
            self.source, self.library = f"dSprites shapes ({file.name})", torch.from_numpy(shapes)  # uint8

    def sample(self, n, generator):
        rand, randint = (partial(f, generator=generator, device=self.device) for f in (torch.rand, torch.randint))
        low, k = self.objects
        scene = {"present": torch.arange(k, device=self.device) < randint(low, k + 1, (n, 1))}
        hue, saturation, value = (least + (1 - least) * rand(n, k, 1) for least in (0.0, 0.5, 0.6))
        phase = (torch.tensor([5.0, 3.0, 1.0], device=self.device) + 6 * hue) % 6  # (n, K, 3), HSV to RGB
        scene["rgb"] = value * (1 - saturation * torch.minimum(phase, 4 - phase).clamp(0, 1))
        scene["shape"] = randint(3 if self.library is None else len(self.library), (n, k))
        if self.library is None:
            scene["centre"] = self.place_apart(n, k, 0.75, torch.full((n, k, k), 0.3, device=self.device), generator)
            scene["radius"], scene["angle"] = 0.22 + 0.16 * rand(n, k), 2 * math.pi * rand(n, k)
        return scene

    def label(self, scene, side):
        """k where object k - 1 is seen, the last on top, and 0 where none is: (n, side, side)."""
        if self.library is None:
            offset = position_grid(side, side).to(self.device) - scene["centre"][..., None, None]  # (n, K, 2, ...)
            point = (offset / scene["radius"][..., None, None, None]).flip(2).movedim(2, -1)  # (x, y), as `turn` has it
            u, v = turn(point, scene["angle"][..., None, None]).unbind(-1)
            ellipse, box = u.square() + (v / 0.75).square() < 1, torch.maximum(u.abs(), v.abs()) < 0.8
            triangle, shape = (v > -0.6) & (v + 3**0.5 * u.abs() < 1.1), scene["shape"][..., None, None]
            inside = torch.where(shape == 0, ellipse, torch.where(shape == 1, box, triangle))  # (n, K, side, side)
        else:
            inside = self.library[scene["shape"].cpu()].to(self.device).bool()[..., :: 64 // side, :: 64 // side]
        number = torch.arange(1, inside.shape[1] + 1, device=self.device) * scene["present"]  # (n, K)
        return (inside * number[..., None, None]).amax(1)

    def render(self, scene):
        """scene -> image (n, 3, size, size) in [0, 1], label (n, size, size): 0 background, k = object k - 1."""
        fine = self.label(scene, 2 * self.size if self.library is None else min(2 * self.size, 64))
        palette = F.pad(scene["rgb"], (0, 0, 1, 0))  # (n, K + 1, 3), black first
        image = palette[torch.arange(len(fine), device=self.device)[:, None, None], fine].permute(0, 3, 1, 2)
        return F.avg_pool2d(image, fine.shape[-1] // self.size), self.label(scene, self.size)  # in the middle of pixels


# ---------------------------------------------------------------- Data: CLEVR, drawn here
# The world of Johnson et al. (2017): camera, lamps and sizes were fitted to scenes rendered with CLEVR's own assets.

SPHERE, CYLINDER, CUBE = range(3)
RADII, CUBE_HALF = (0.35, 0.7), 0.95  # half the edge of a cube, in radii
COLOURS = ((87, 87, 87), (173, 35, 35), (42, 75, 215), (29, 105, 20),  # gray, red, blue, green,
           (129, 74, 25), (129, 38, 192), (41, 208, 208), (255, 238, 51))  # fmt: skip  # brown, purple, cyan, yellow
CAMERA, CAMERA_JITTER, FOCAL = (7.45, -6.50, 5.38), 0.5, 35 / 32  # looks at the origin; focal length in picture widths
LAMPS, LAMP_JITTER = ((6.45, -2.91, 4.26), (-4.67, -4.01, 3.01), (-1.17, 2.65, 5.82)), 1.0  # key, fill, back
POWER, AMBIENT, LAMP_WIDTH = ((5.5, 5.15, 4.6), (0.95, 1.03, 1.25), (2.2, 2.2, 2.2)), 0.118, 1.2  # RGB of every lamp


def crop_rays(side, camera):
    """Rays through the pixels of CLEVR's crop (0.6 W wide, W/64 below the middle): camera (n, 3) -> (n, side^2, 3)."""
    y, x = 0.3 * position_grid(side, side).to(camera.device)
    rays = torch.stack([x / FOCAL, -(y + 1 / 64) / FOCAL, torch.ones_like(x)], dim=-1).flatten(0, 1)
    forward = F.normalize(-camera, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, forward.new_tensor([[0.0, 0.0, 1.0]])), dim=-1)
    return rays @ torch.stack([right, torch.linalg.cross(right, forward), forward], dim=1)


def turn(vector, angle):
    """vector (..., 2) or (..., 3) as seen from a frame turned by `angle`, about the vertical."""
    x, y, *z = vector.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x + sin * y, cos * y - sin * x, *z], dim=-1)


def hit_distance(shape, half, origin, ray):
    """How far along ray (P, W, 3) from origin (P, 1, 3) an object of size half (P, 1) is hit, or infinity: (P, W)."""
    if shape == CUBE:  # slabs
        inverse = 1 / torch.where(ray.abs() < 1e-6, 1e-6, ray)
        a, b = (-half[..., None] - origin) * inverse, (half[..., None] - origin) * inverse
        near, far = torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)
    else:
        o, d = (vector[..., : 3 if shape == SPHERE else 2] for vector in (origin, ray))
        a, b, c = d.square().sum(-1), (o * d).sum(-1), o.square().sum(-1) - half.square()
        root = (b.square() - a * c).clamp(min=0).sqrt()
        near, far = (-b - root) / a, (-b + root) / a  # equal where the ray passes by
        if shape == CYLINDER:
            top, bottom = (half - origin[..., 2]) / ray[..., 2], (-half - origin[..., 2]) / ray[..., 2]
            near, far = torch.maximum(near, top.minimum(bottom)), torch.minimum(far, top.maximum(bottom))
    return torch.where(near < far, near, torch.inf)


class BuiltInClevr(Pool):
    """CLEVR-like scenes by a ray caster; dicts of objects (n, K, ...), camera (n, 3) and lamps (n, 3, 3)."""

    name, crop, source = "clevr", "clevr", "built-in CLEVR-like renderer"

    def sample(self, n, generator):
        rand, randint = (partial(f, generator=generator, device=self.device) for f in (torch.rand, torch.randint))
        low, k = self.objects
        radii, colours, camera, lamps = (torch.tensor(v, device=self.device) for v in (RADII, COLOURS, CAMERA, LAMPS))
        radius, shape = radii[randint(2, (n, k))], randint(3, (n, k))
        scene = {"shape": shape, "half": torch.where(shape == CUBE, CUBE_HALF * radius, radius)}
        scene["rgb"] = colours[randint(len(COLOURS), (n, k))] / 255
        scene["present"] = torch.arange(k, device=self.device) < randint(low, k + 1, (n, 1))
        scene["camera"] = camera + CAMERA_JITTER * (2 * rand(n, 3) - 1)
        scene["lamps"] = lamps + LAMP_JITTER * (2 * rand(n, 3, 3) - 1)
        scene["xy"] = self.place_apart(n, k, 3.0, radius[:, :, None] + radius[:, None] + 0.25, generator)
        scene["angle"], scene["metal"] = 2 * math.pi * rand(n, k), rand(n, k) < 0.5
        return scene

    def render(self, scene):
        side, small, camera = 2 * self.size, self.size // 2, scene["camera"][:, None]  # small: the ground is smooth
        centre = torch.cat([scene["xy"], scene["half"][..., None]], dim=-1)  # (n, K, 3)
        few, rays = (crop_rays(n, scene["camera"]) for n in (small, side))  # to the ground, to objects
        ground = self.shade_ground(camera - camera[..., 2:] / few[..., 2:] * few, centre, scene).mT  # (n, 3, small^2)
        light = F.interpolate(ground.unflatten(2, (small, -1)), size=side, mode="bilinear").flatten(2).mT.contiguous()
        depth, label = self.nearest(scene, centre, rays)  # (n, side^2) each
        i, pixel = torch.nonzero(label, as_tuple=True)
        point = scene["camera"][i] + depth[i, pixel, None] * rays[i, pixel]
        light[i, pixel] = self.shade_objects(point, rays[i, pixel], i, label[i, pixel] - 1, centre, scene)
        image = light.clamp(0, 1).pow(1 / 2.2).transpose(1, 2).unflatten(2, (side, side))
        label = self.nearest(scene, centre, crop_rays(self.size, scene["camera"]))[1]  # in the middle of pixels
        return F.avg_pool2d(image, 2), label.unflatten(1, (self.size, self.size))

    def nearest(self, scene, centre, rays):
        """Depth and label of the first object that every one of rays (n, W, 3) meets: (n, W) each; label 0: none."""
        depth = torch.full(rays.shape[:2], torch.inf, device=self.device)
        label = torch.zeros_like(depth, dtype=torch.long)
        for k, shape in itertools.product(range(scene["shape"].shape[1]), (SPHERE, CYLINDER, CUBE)):
            i = torch.nonzero((scene["shape"][:, k] == shape) & scene["present"][:, k])[:, 0]
            angle, half = scene["angle"][i, k, None], scene["half"][i, k, None]
            origin = turn((scene["camera"][i] - centre[i, k])[:, None], angle)
            hit = hit_distance(shape, half, origin, turn(rays[i], angle))  # (P, W)
            label[i], depth[i] = torch.where(hit < depth[i], k + 1, label[i]), torch.minimum(depth[i], hit)
        return depth, label

    def shade_ground(self, point, centre, scene):
        """Light from the ground at point (n, P, 3), shadowed as if by spheres around objects' centres: (n, P, 3)."""
        radius = torch.where(scene["present"], scene["half"], 0.0)[..., None]
        to_object = centre[:, :, None] - point[:, None]  # (n, K, P, 3)
        squared = to_object.square().sum(-1)
        hidden = radius.square() * to_object[..., 2] / squared**1.5  # share of the sky, cosine-weighted
        light = AMBIENT * (1 - 0.9 * hidden.clamp(0, 1)).prod(1)[..., None]  # (n, P, 1)
        for lamp, power in zip(scene["lamps"].unbind(1), torch.tensor(POWER, device=self.device), strict=True):
            distance = (to_lamp := lamp[:, None] - point).norm(dim=-1)  # (n, P), of (n, P, 3)
            along = torch.einsum("nkpc,npc->nkp", to_object, to_lamp / distance[..., None])
            past = (squared - along.square()).clamp(min=0).sqrt() - radius  # of the ray, past the surface
            penumbra = (LAMP_WIDTH * along / distance[:, None]).clamp(min=1e-3)
            seen = (0.5 + 0.5 * past / penumbra).clamp(0, 1)
            seen = torch.where(along > 0, seen.square() * (3 - 2 * seen), 1.0).prod(1)  # (n, P)
            light = light + (seen * to_lamp[..., 2] / distance**3)[..., None] * power  # cosine over squared distance
        return light

    def shade_objects(self, point, ray, i, k, centre, scene):
        """Light from object k of scene i towards the camera, at `point` (P, 3) along `ray` (P, 3): (P, 3)."""
        shape, rgb, angle = scene["shape"][i, k, None], scene["rgb"][i, k], scene["angle"][i, k]
        q = turn(point - centre[i, k], angle) / scene["half"][i, k, None]
        cube = q.pow(17)  # of the largest coordinate alone, but near an edge, which is slightly rounded
        cylinder = torch.cat([q[:, :2] * q[:, :2].norm(dim=-1, keepdim=True).pow(16), cube[:, 2:]], dim=-1)
        normal = torch.where(shape == SPHERE, q, torch.where(shape == CYLINDER, cylinder, cube))
        normal = turn(F.normalize(normal, dim=-1), -angle)
        mirrored = F.normalize(ray - 2 * (ray * normal).sum(-1, keepdim=True) * normal, dim=-1)
        to_lamp, power = scene["lamps"][i] - point[:, None], torch.tensor(POWER, device=self.device)
        squared = to_lamp.square().sum(-1)  # (P, 3 lamps)
        to_lamp = to_lamp / squared.sqrt()[..., None]
        lambert = (0.2 + 0.8 * (normal[:, None] * to_lamp).sum(-1)).clamp(min=0) / squared  # wide lamps reach round
        ambient = AMBIENT * (1.25 + 0.75 * normal[:, 2]) * (0.5 + 0.5 * (point[:, 2] / RADII[0]).clamp(0, 1))
        diffuse, gloss = ambient[:, None] + 0.9 * lambert @ power, (mirrored[:, None] * to_lamp).sum(-1).clamp(min=0)
        rubber = rgb * diffuse + 0.05 * (gloss.pow(8) / squared) @ power
        far = point[:, 2:] / (-mirrored[:, 2:]).clamp(min=1e-2)  # a mirror shows the dark room, or the ground so far
        to_lamp = scene["lamps"][i] - (point + far * mirrored)[:, None]  # away, lit but where the object stands
        ground = AMBIENT + (to_lamp[..., 2] / to_lamp.norm(dim=-1) ** 3) @ power
        room = 0.055 + torch.sigmoid(-8 * mirrored[:, 2:]) * (1.15 * ground * far / (far + 0.2) - 0.055)
        shine = (5.4 * gloss.pow(26) + 0.5 * gloss.pow(7)) / squared @ power
        metal = rgb * (room + 0.12 * diffuse) + (0.06 + 0.94 * rgb) * shine
        return torch.where(scene["metal"][i, k, None], metal, rubber)


# ---------------------------------------------------------------- Data: pictures on disk, sounds, and two notes at once

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif", ".heic")
LISTED, CACHE = 200_000, 2e9  # pictures of a split that are used; bytes of them that stay in memory
SOUND_SETS = ("nsynth-duo", "sounds")  # data sets
SOUND_FFT, HOP = 4096, 1024  # notes last, and what tells two of them apart are narrow harmonics
FRAMES, SPAN = 32, 2  # times that a model sees a sound at, and STFT frames averaged in each
LOUDNESS, HEARD = 1 / 1024, 1 / 16  # root mean squares: inside, for log(1 + 100 m) to span 40 dB, and of exports
MAX_GAIN_DB, MIXTURES = 6.0, 500  # how much louder one note may be than another; that a finished run is judged by


class PictureFolder(Pool):
    """Pictures on disk, of any size: of CLEVR's official folder, if asked for, or any; or click.UsageError for none."""

    def __init__(self, root, size, objects, seed, device, clevr=True):
        ends = ("", "CLEVR_v1.0", "clevr/CLEVR_v1.0", *[".."] * (root.name == "images")) if clevr else ()
        places = map(root.joinpath, ends)
        found = next((p for p in places if all((p / "images" / s).is_dir() for s in ("train", "val"))), None)
        self.root, self.folder, self.crop = (found, found / "images", "clevr") if found else (root, root, "centre")
        self.source = f"{'CLEVR' if found else 'own pictures,'} folder {self.root.resolve().name}"
        self.files = self.clevr_splits(*objects) if found else split_files(root, PICTURES, LISTED, ("masks",))
        super().__init__(size, objects, seed, device, len(self.files["train"]))
        about = (lambda file: load_picture(self.folder / file, size, self.crop)), int(CACHE) // (3 * size**2)
        self.readers = {split: Reader(files, *about, split) for split, files in self.files.items()}

    def clevr_splits(self, low, high):
        """{split: paths relative to images/} of scenes of so many objects, as scenes/*.json says; `test` is val."""
        found = {}
        for split in ("train", "val"):
            files, path = sorted((self.folder / split).glob("*.png")), self.root / f"scenes/CLEVR_{split}_scenes.json"
            listed = load_file(path, read_json, {"scenes": list}, click.UsageError)["scenes"] if path.is_file() else []
            counts = {scene["image_filename"]: len(scene["objects"]) for scene in listed}
            found[split] = [f"{split}/{png.name}" for png in files if low <= counts.get(png.name, low) <= high]
            if len(found[split]) < 1 + (split == "train"):  # valid takes one
                raise click.UsageError(f"{self.folder}/{split}: no PNG of a scene with {low} to {high} objects")
        train, kept = found["train"], -min(320, max(1, len(found["train"]) // 10))
        return {"train": train[:kept], "valid": train[kept:], "test": found["val"]}  # the last tenth, at most 320

    def pictures(self, index, split="train"):
        pictures = [self.readers[split].example(i) for i in self.readers[split].usable(index.tolist())]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def scenes(self, split, n):
        """The first n pictures of a split that can be read: images, labels, of one without masks/PATH.png 0."""
        files, reader, labels = self.files[split], self.readers[split], []
        reader.fetch(range(min(n, len(files))))
        numbers = list(itertools.islice((i for i in range(len(files)) if reader.example(i) is not None), n))
        images = self.pictures(torch.tensor(numbers), split).to(self.device).float() / 255
        for path in (self.root / "masks" / Path(files[i]).with_suffix(".png") for i in numbers):
            mask = Image.new("P", (self.size, self.size))  # of whose mode no numbers are blended
            if path.is_file():
                mask = load_file(path, lambda path: Image.open(path).copy(), {}, click.UsageError)
            if mask.mode not in ("L", "P"):
                raise click.UsageError(f"{path}: expected 8 bits a pixel, the number of the object, not {mask.mode}")
            labels.append(np.array(square(mask.convert("P"), self.crop, path).resize((self.size, self.size))))
        return images, torch.from_numpy(np.stack(labels)).long().to(self.device)


def root_mean_square(waveform):  # (..., samples) -> (..., 1)
    return waveform.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)


class SoundLevels(nn.Module):
    """Waveforms (B, SAMPLES) of any loudness -> levels (B, FRAMES, bands, 1) of logarithmic bands, log(1 + 100 m)."""

    def __init__(self, bands):
        super().__init__()
        self.magnitude = torchaudio.transforms.Spectrogram(SOUND_FFT, hop_length=HOP, power=1)
        step = math.log2(RATE / 2 / LOWEST) / bands  # octaves
        middle = LOWEST * 2 ** (step * torch.arange(bands, dtype=torch.float64)[:, None])  # (bands, 1), in Hz
        triangles = torch.stack([middle, (middle * (2**step - 1)).clamp(min=RATE / SOUND_FFT)]).float()
        self.register_buffer("triangles", triangles, persistent=False)

    def bank(self):
        """Triangles at equal steps of pitch, at least two bins wide: (bands, F). No buffer: exports would store it."""
        frequency, (middle, width) = torch.arange(SOUND_FFT // 2 + 1) * (RATE / SOUND_FFT), self.triangles
        bank = (1 - (frequency.to(middle) - middle).abs() / width).clamp(min=0)
        return bank / bank.sum(1, keepdim=True)

    def forward(self, waveform):
        return self.as_loud(waveform * (LOUDNESS / root_mean_square(waveform)))

    def as_loud(self, waveform):  # levels (B, FRAMES, bands, 1) of waveforms (B, SAMPLES) as loud as they are
        magnitude = self.magnitude(F.pad(waveform, (0, -waveform.shape[1] % HOP)))  # (B, F, FRAMES * SPAN)
        return log_compress(self.bank() @ F.avg_pool1d(magnitude, SPAN)).transpose(1, 2)[..., None]

    def to_stft_magnitude(self, level):
        """Levels (B, FRAMES, bands, 1) -> STFT magnitudes (B, F, T), interpolated between bands and times."""
        bands, bank = log_expand(level[..., 0].transpose(1, 2)), self.bank()  # (B, bands, FRAMES), (bands, F)
        return (bank / bank.sum(0).clamp(min=1e-9)).T @ F.interpolate(bands, scale_factor=float(SPAN), mode="linear")


class Mixtures:
    """Mixtures of notes of different instruments, or, of --dataset sounds without --mix, sounds as they are."""

    def __init__(self, options, device):
        self.notes, self.source = load_notes(options, windows=options["dataset"] == "sounds")
        self.fewest, self.parts = options["voices"] if options["dataset"] == "nsynth-duo" or options["mix"] else (1, 1)
        self.seed, self.device, self.levels = options["seed"], device, SoundLevels(options["size"]).to(device)
        for split in SPLITS:
            self.sample(split, 1, random_generator("any"))

    def sample(self, split, n, generator, own=slice(None)):
        """The slice `own` of n mixtures: numbers of their notes, their decibels, -inf for none; or click.UsageError."""
        notes, drawn, decibels = self.notes[split], [], None
        a, b = torch.triu_indices(self.parts, self.parts, 1)  # all pairs of a mixture's notes; of single sounds none
        for _ in range(100):
            some = torch.randint(len(notes.notes), (8 * n, self.parts), generator=generator)
            pitch, instrument = notes.pitch[some], notes.instrument[some]
            compatible = self.compatible(pitch[:, a], pitch[:, b]) & (instrument[:, a] != instrument[:, b])
            drawn += some[compatible.all(1)].tolist()
            if len(drawn) < n:
                continue
            if decibels is None:
                gain = MAX_GAIN_DB * (torch.rand(n, max(1, self.parts - 1), generator=generator) - 0.5)
                count = torch.randint(self.fewest, self.parts + 1, (n, 1), generator=generator)
                decibels = torch.cat([gain, -gain.mean(1, keepdim=True)], dim=1)[:, : self.parts]
                decibels = decibels.masked_fill(torch.arange(self.parts) >= count, -math.inf)
            notes.fetch(itertools.chain(*drawn[:n][own]))
            chosen = [next((one for one in drawn[i::n] if notes.usable(one) == one), None) for i in range(n)[own]]
            if None not in chosen:
                return torch.tensor(chosen), decibels[own]
        raise click.UsageError(f"{split}: too few of {len(notes.notes)} notes are of different instruments or pitches")

    def compatible(self, pitch, other):  # may sound together: in unison or octaves apart notes share all harmonics
        return ((pitch - other) % 12 != 0) | (pitch < 0) | (other < 0)

    def stems(self, split, pair, decibels):  # waveforms (n, parts, SAMPLES), whose sum has LOUDNESS
        waveform = self.notes[split].waveform(pair.flatten()).unflatten(0, pair.shape)
        waveform = waveform / root_mean_square(waveform) * 10 ** (decibels[..., None] / 20)
        return LOUDNESS * waveform / root_mean_square(waveform.sum(1, keepdim=True))

    def batch(self, step, own, total):
        """Levels of the slice `own` of the `total` mixtures of a step: (own, FRAMES, bands, 1)."""
        chosen = self.sample("train", total, random_generator("mixtures", self.seed, step), own)
        return self.levels(self.stems("train", *chosen).sum(1).to(self.device))

    def mixtures(self, split, n):
        """Stems (n, parts, SAMPLES) of the first n of the mixtures that all runs share; each unmixed sound is one."""
        if self.parts == 1:
            return self.stems(split, single := self.notes[split].spread(n)[:, None], torch.zeros(len(single), 1))
        return self.stems(split, *self.sample(split, max(n, MIXTURES), random_generator("held out"), slice(n)))


def load_data(options, device):
    """The data set of the options; raises click.UsageError where its folder is not what was expected."""
    dataset, root, about = options["dataset"], options["data_root"], [options[k] for k in ("size", "objects", "seed")]
    if dataset == "clevr" and options["download"]:
        with fetching("CLEVR v1.0", root):
            CLEVRClassification(root, download=True)
    if dataset in ("sprites", *SOUND_SETS):
        return Sprites(*about, device, root) if dataset == "sprites" else Mixtures(options, device)
    return PictureFolder(root, *about, device, dataset == "clevr") if root else BuiltInClevr(*about, device)


# ---------------------------------------------------------------- Model

UPSCALE, UPSCALE_SOUND = 4, 2  # how much coarser than the data feature maps are, before sub-pixel convolution
SMALLEST_CANVAS, LARGEST_CANVAS = 0.15, 0.8  # half the side of a slot's canvas, in half picture widths
SHADE_EXTENT, DARKEST = 2, 0.7  # how many times as wide a slot may shade the background, and by what logarithm
CANVAS, CLOSER = 16, 16  # sides of a slot's canvas, doubled for pictures above 64 pixels, and of its closer look
SHIFT = 0.3  # half picture widths a slot may stand beside its cell: corners are easier to find than objects' middles
TAKEN, NEIGHBOUR_WEIGHT = 0.65, 1e-3  # cells nearer a slot, in halves of its canvas, yield; so much KL counts beside it
BACKGROUND_GRID, BACKGROUND_D = 8, 8  # latents move a smooth picture of 8 x 8 knots: light and shade, but no objects
MOST_SLOTS, OCTAVES = 12, 7  # that an exported encoder can be asked for; of Fourier features of a frequency
NEUTRAL, SHARPNESS = 10.0, 2.0  # what masks, or the maximum, pass over; masks' logits by what the decoder says
VISIBLE, SMALLEST = 0.05, 1 / 512  # a slot owns pixels it changes by more; least share of a scored object
TRIES, FIT_TRIES, FIT_STEPS = 32, 8, 5_000  # of a prior: draws each slot is chosen from; in its fit; updates of that
BLUR = 0.01  # half picture widths of uniform noise upon where slots stand: without it no density has a bound
LOGVAR_START = -4.0  # posteriors start narrow: the ranking by KL means something before the latents carry anything

# N slots by falling kl (B, N), their cells' own; mu, logvar (B, N, D) add `detail`, or are encoded `again`; cell (B, N,
# 2) is (y, x); kl_map (B, H_l, W_l), background (B, C, h, w) or None, light (B, L): its z; kl_all (B,): the ELBO's KL.
Encoding = namedtuple("Encoding", "mu logvar cell kl kl_map background light kl_all")
Separation = namedtuple("Separation", "level mean encoding layer alone parts")


class BroadcastDecoder(nn.Module):
    """Spatial-broadcast decoder (Watters et al. 2019) of sounds: z (M, D), cell (M, 2) -> layer (M, C, size, 1)."""

    def __init__(self, d, channels, parts, size):
        super().__init__()
        self.register_buffer("grid", position_grid(size // UPSCALE_SOUND, 1), persistent=False)
        self.from_latent = nn.Linear(d, 2 * channels)
        self.from_offset, self.from_place = (nn.Conv2d(2 + 4 * OCTAVES, channels, 1) for _ in range(2))
        self.body = nn.Sequential(*[ResBlock(channels, conv=column_conv) for _ in range(2)], nn.SiLU())
        self.out = column_conv(channels, parts * UPSCALE_SOUND, 3, padding=1)

    def forward(self, z, cell):
        told = []  # by its offset every band draws a timbre the same at any pitch; by its place it may do otherwise
        for at in (self.grid - cell[..., None, None], self.grid[None]):
            waves = [f(math.pi * 2**k * at) for k in range(OCTAVES) for f in (torch.sin, torch.cos)]
            told.append(torch.cat([at, *waves], dim=1))  # (M or 1, 2 + 4 * OCTAVES, size / 2, 1)
        scale, shift = self.from_latent(z)[:, :, None, None].chunk(2, dim=1)  # FiLM (Perez et al. 2018)
        h = (1 + scale) * self.from_offset(told[0]) + shift + self.from_place(told[1])
        return self.out(self.body(h)).unflatten(1, (-1, UPSCALE_SOUND)).transpose(2, 3).flatten(2, 3)  # of sub-pixels


def resample(source, scale, offset, side):
    """source (M, C, S, S) at scale (M,) * (y, x) + offset (M, 2), in halves of a side: -> (M, C, side, side)."""
    n, axis = source.shape[-1], position_grid(side, 1)[0, :, 0].to(offset)
    index = ((scale[:, None, None] * axis + offset[..., None] + 1) * n - 1) / 2  # (M, 2, side), into the source
    width = (scale * n / side).clamp(min=1)[:, None, None, None]
    near = (index[..., None] - torch.arange(n, device=source.device)).abs()  # (M, 2, side, S)
    y, x = ((1 - near / width).clamp(min=0) / width).to(source.dtype)[:, :, None].unbind(1)  # (M, 1, side, S) each
    return y @ source @ x.mT  # a spatial transformer (Jaderberg et al. 2015), without aliasing


class CanvasDecoder(nn.Module):
    """z (M, D), place (M, 2) -> layer (M, C, side, side): a canvas that is drawn at any size, around the slot's place.
    The first `d_cell` latents set its size, so that near and far objects have one resolution. Channels: nearness if
    `masked`, log shade of what is behind if `shaded`, colours or features (else `outside`), mask logit if `masked`."""

    def __init__(self, d, d_cell, channels, parts, side, fine, outside, masked, shaded):
        super().__init__()
        self.d_cell, self.side, self.masked = d_cell, side, masked
        self.start, self.extent = nn.Linear(d, 2 * channels * (CANVAS // 4) ** 2), nn.Linear(d_cell, 1)
        first, second = (nn.Conv2d(c, 4 * channels, 3, padding=1) for c in (2 * channels, channels))
        self.coarse = nn.Sequential(nn.SiLU(), first, nn.PixelShuffle(2), nn.SiLU())
        out, norm = nn.Conv2d(channels, (parts + masked) * fine**2, 3, padding=1), ResBlock(channels, norm=True)
        self.body = nn.Sequential(second, nn.PixelShuffle(2), norm, nn.SiLU(), out, nn.PixelShuffle(fine))
        self.shade = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.PixelShuffle(2)) if shaded else None
        self.mean = nn.Parameter(torch.zeros(parts + masked, CANVAS * fine, CANVAS * fine))
        r2, shade_r2 = (position_grid(n, n).square().sum(0) for n in (CANVAS * fine, CANVAS))
        self.register_buffer("window", torch.exp(-((0.9 * r2) ** 8)), persistent=False)
        self.register_buffer("shade_window", torch.exp(-((1.2 * shade_r2) ** 2)), persistent=False)
        beyond = torch.tensor([0.0] * (masked + shaded) + [outside] * parts + [-NEUTRAL] * masked)
        self.register_buffer("beyond", beyond[:, None, None], persistent=False)

    def start_at(self, colour):
        """Slots as blobs of one colour (C,), in the middle of canvases of middling size."""
        out, fine = self.body[-2], self.body[-1].upscale_factor ** 2
        out.weight.copy_(0.3 * out.weight[::fine].repeat_interleave(fine, dim=0))  # ICNR (Aitken et al. 2017)
        for parameter in (out.bias, *self.extent.parameters()):
            parameter.zero_()
        self.mean[: len(colour)] = colour[:, None, None]
        if self.masked:
            self.mean[-1] = (2 - 6 * position_grid(*self.mean.shape[1:]).square().sum(0)) / SHARPNESS
        if self.shade:
            self.shade[0].weight.mul_(0.1)
            self.shade[0].bias.fill_(-3.0)

    def half(self, z):  # half the side of the canvas, in half picture widths: (..., D) -> (...)
        share = self.extent(z[..., : self.d_cell])[..., 0].to(self.window.dtype).sigmoid()
        return SMALLEST_CANVAS * (LARGEST_CANVAS / SMALLEST_CANVAS) ** share

    def forward(self, z, place):
        half, h = self.half(z), self.coarse(self.start(z).unflatten(1, (-1, CANVAS // 4, CANVAS // 4)))
        canvas = self.body(h).to(place.dtype) + self.mean  # (M, parts + masked, S, S)
        if self.masked:
            colours, logit = canvas.split([len(canvas[0]) - 1, 1], dim=1)
            canvas = torch.cat([bleed(colours, (SHARPNESS * logit).sigmoid()), SHARPNESS * logit], dim=1)
        scale, offset = 1 / half, -place / half[:, None]
        layer = resample(self.window * (canvas - self.beyond[-len(canvas[0]) :]), scale, offset, self.side)
        if self.shade:
            shade = -DARKEST * self.shade(h).to(place.dtype).sigmoid() * self.shade_window
            layer = torch.cat([resample(shade, scale / SHADE_EXTENT, offset / SHADE_EXTENT, self.side), layer], dim=1)
        if self.masked:  # on a ground that is seen from above, what ends lower in the picture is nearer
            near = (place[:, 0] + half)[:, None, None, None].expand(-1, 1, *layer.shape[2:])
            layer = torch.cat([near, layer], dim=1)
        return layer + self.beyond


def bleed(colours, mask):
    """Colours (M, C, S, S) that, from where the mask (M, 1, S, S) ends, go on as they are a pixel further inside."""
    smooth = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)  # else edges grow wide: docs/mvae-log.md
    mask = -F.max_pool2d(-mask, 3, stride=1, padding=1)
    weight, own = mask.square() + 1e-3, mask.square().square()
    around = smooth(smooth(torch.cat([weight * colours, weight], dim=1)))
    return own * colours + (1 - own) * around[:, :-1] / around[:, -1:]


class CloserLook(nn.Module):
    """Cut-outs (M, C, 16, 16), mu of cells (M, d_cell) -> mu, logvar (M, d) of what cells are too coarse for."""

    def __init__(self, d, d_cell, channels):
        super().__init__()
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.SiLU(), ResBlock(channels, norm=True), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(channels, channels, 4, 2, padding=1), nn.SiLU(), nn.Flatten())
        self.head = MLP(channels * (CLOSER // 4) ** 2 + d_cell, [128, 2 * d], activation_layer=nn.SiLU)

    def forward(self, cut, mu):
        mu, logvar = self.head(torch.cat([self.trunk(4 * cut), mu], dim=1)).to(mu.dtype).chunk(2, dim=1)
        return mu, logvar + LOGVAR_START


def column_conv(channels_in, channels_out, kernel, stride=1, padding=0):  # of maps one cell wide, as spectra are
    return nn.Conv2d(channels_in, channels_out, (kernel, 1), (stride, 1), (padding, 0))


class Encoder(nn.Module):
    """Data (B, C, H, W) -> mu, logvar (B, D, H_l, W_l), place (B, 2, H_l, W_l) of slots, features (B, channels)."""

    def __init__(self, shape, grid, d, channels, sound):
        super().__init__()
        conv, kernel = (column_conv, grid[0] // 8 | 1) if sound else (nn.Conv2d, 3)  # an octave: harmonics stand apart
        layers = [conv(shape[0] + 2 * sound, channels, 6, stride=2, padding=2)]  # 5 would look half a pixel beside
        for _ in range(int(math.log2(shape[1] // grid[0])) - 1):
            layers += [nn.SiLU(), conv(channels, channels, 4, stride=2, padding=1)]
        layers += [ResBlock(channels, norm=True, conv=conv, kernel=kernel) for _ in range(3)]
        self.trunk, self.head = nn.Sequential(*layers, nn.SiLU()), nn.Conv2d(channels, 2 * d, 1)
        self.shift = None if sound else nn.Conv2d(channels, 2, 1)
        for parameter in () if sound else self.shift.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("middles", position_grid(*grid), persistent=False)
        # Only of sounds is it told positions: of pictures flat ground may outrank objects then (docs/mvae-log.md).
        self.register_buffer("grid", position_grid(*shape[1:]) if sound else None, persistent=False)

    def forward(self, x):
        h = self.trunk(x if self.grid is None else torch.cat([x, self.grid.expand(x.shape[0], -1, -1, -1)], dim=1))
        mu, logvar = self.head(h).to(self.middles.dtype).chunk(2, dim=1)
        place = self.middles.expand(x.shape[0], -1, -1, -1)
        if self.shift is not None:
            place = place + SHIFT * self.shift(h).to(place.dtype).tanh()
        return mu, logvar + LOGVAR_START, place, h.to(place.dtype).mean((2, 3))


class Background(nn.Module):
    """Learned, shaded by latents ("light"): features (B, F), noise (B, BACKGROUND_D) or None -> light, KL (B,)."""

    def __init__(self, shape, features):
        super().__init__()
        self.picture, self.shape = nn.Parameter(torch.zeros(shape)), shape
        self.posterior = nn.Linear(features, 2 * BACKGROUND_D)
        self.shade = nn.Linear(BACKGROUND_D, shape[0] * BACKGROUND_GRID**2, bias=False)
        nn.init.normal_(self.shade.weight, std=0.03)
        up = F.interpolate(torch.eye(BACKGROUND_GRID)[None], size=shape[1], mode="linear")[0].T.contiguous()
        self.register_buffer("up", up, persistent=False)  # (h, BACKGROUND_GRID)

    def forward(self, features, noise):
        mu, logvar = self.posterior(features).to(features.dtype).chunk(2, dim=1)  # the KL in full precision
        logvar = logvar + LOGVAR_START
        return mu if noise is None else reparameterize(mu, logvar, noise), gaussian_kl(mu, logvar).sum(1)

    def paint(self, light):  # (B, BACKGROUND_D) -> picture (B, C, h, w)
        knots = self.shade(light).unflatten(1, (self.shape[0], BACKGROUND_GRID, BACKGROUND_GRID))
        return self.picture + self.up @ knots @ self.up.mT


ORDERS = ("independent", "autoregressive", "set")
Scene = namedtuple("Scene", "light count slots")  # (B, L); how many slots there are (B,); cells, z (B, N, E = 2 + D)


class SlotPrior(nn.Module):
    """A density of Scenes: the number of slots, light, and slots one by one, each given those before: "autoregressive",
    by falling KL; "set", in any order (Uria et al. 2014), so as to go on from any; "independent", given none.
    A transformer points at a slot so far, or at none (Vinyals et al. 2015); a flow starts from what that suggests. Of
    TRIES drawn so, a rating by what they are to those so far chooses one (SNIS, Lawson et al. 2019)."""

    def __init__(self, order, e, n_slots, light, cells=0, width=96, key=16, pair=48):
        super().__init__()
        self.order, self.n_slots, self.cells, self.ways = order, n_slots, cells, 1 + (cells > 0)  # sounds: up, down
        self.sizes, wholes = [key, e, width], light + n_slots + 1
        self.noise_shape, self.conditional = (1 + n_slots * TRIES, max(e, light) + 2), float(order != "independent")
        self.light = FlowPrior(light, n_slots + 1, couplings=4, width=64) if light else None
        ends = (1, n_slots + 1), (width, 1)  # light is drawn given the number: one flow of all light joins its modes
        self.count, self.rating = (MLP(n, [width, m], activation_layer=nn.SiLU) for n, m in ends)
        for net in (self.count, self.rating):
            nn.init.zeros_(net[-2].weight)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, F.silu, batch_first=True, norm_first=True)
        self.whole, self.token, self.query = nn.Linear(wholes, width), nn.Linear(e, width), nn.Linear(width, key)
        self.pair, self.pairs = MLP(2 * e + 2 + min(e, 2), [pair] * 3, activation_layer=nn.SiLU), nn.Linear(pair, width)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.suggest, self.flow = nn.Linear(width + e, self.ways * sum(self.sizes)), FlowPrior(e, width, 4, width)
        self.register_buffer("numbers", self.conditional * torch.eye(n_slots + 1), persistent=False)  # light's context
        self.register_buffer("later", torch.ones(n_slots, n_slots, dtype=torch.bool).triu(1), persistent=False)

    def known(self, slots):  # what others are told of them: of sounds, drawn to half a cell, the middles of cells
        y = (slots[..., :1] + self.cells / 2).floor() + (1 - self.cells) / 2
        return torch.cat([y, slots[..., 1:]], dim=-1) if self.cells else slots

    def tokens(self, slots, before, at=slice(None)):
        """Slots (B, K, T, E) `at` K places, and what they are to those before these, of (B, N, E): (B, K, T, width)."""
        one, other = torch.broadcast_tensors((slots := self.known(slots))[..., None, :], before[:, None, None])
        away, far = (one - other)[..., :2], (one - other)[..., :2].norm(dim=-1, keepdim=True)  # of their cells
        pair = self.pair(torch.cat([one, other, 3 * away, 3 * far, (-8 * far.square()).exp()], dim=-1))
        return self.token(slots) + self.pairs(F.silu(pair.masked_fill(self.later[at, None, :, None], -1e4).amax(3)))

    def suggestions(self, light, count, slots):
        """-> before (B, N, E), h (B, N, width), log q (B, N), and of slots to point at: logits, means, contexts."""
        whole = torch.cat([light, F.one_hot(count, self.n_slots + 1).to(light)], dim=1)
        before = F.pad(self.conditional * self.known(slots[:, :-1]), (0, 0, 1, 0))  # (B, N, E), zeros for the first
        token = F.pad(self.tokens(slots[:, :, None], before)[:, :-1, 0], (0, 0, 1, 0))
        h = self.body(self.conditional * (token + self.whole(whole)[:, None]), self.later, is_causal=True)
        suggested = self.suggest(torch.cat([h, before], dim=2)).unflatten(2, (self.ways, -1)).flatten(1, 2)
        key, mean, context = suggested.split(self.sizes, dim=2)  # (B, W, ...) for every slot, W = N * ways
        logits = (self.query(h) @ key.mT).masked_fill(self.later.repeat_interleave(self.ways, 1), -1e4)  # (B, N, W)
        mean, context = mean[:, None], F.silu(h[:, :, None] + context[:, None])  # (B, 1, W, E), (B, N, W, width)
        each = logits.log_softmax(2) + self.flow.log_prob(slots[:, :, None] - mean, context)  # (B, N, W)
        return before, h, each.amax(2) - each.log_softmax(2).amax(2), logits, mean, context  # logsumexp can underflow

    def propose(self, noise, logits, mean, context):  # (B, K, T, E + 2), (B, K, W), (B, 1, W, E) ...: (B, K, T, E)
        one, mean = choose(logits, noise[..., -1])[..., None], mean.expand(-1, logits.shape[1], -1, -1)  # (B, K, T, 1)
        mean, context = (v.gather(2, one.expand(-1, -1, -1, v.shape[3])) for v in (mean, context))
        return mean + self.flow.sample(noise[..., : mean.shape[3]], context)

    def log_prob(self, scene, generator, tries=TRIES):
        """log p of Scenes, (B,), in nats: a mean over what `generator` draws, orders and tries, is a lower bound."""
        light, count, slots = scene
        there, total = torch.arange(self.n_slots) < count[:, None], self.count(self.numbers[:1, :1]).log_softmax(1)[0]
        total = total[count] + (self.light.log_prob(light, self.numbers[count]) if self.light else 0.0)
        if self.order != "autoregressive":
            order = (torch.rand(there.shape, generator=generator) - 1.0 * there).argsort(1)
            slots, total = slots.gather(1, order[..., None].expand_as(slots)), total + torch.lgamma(count + 1.0)
        before, h, log_q, *suggested = self.suggestions(light, count, slots)
        with torch.no_grad():
            noise = torch.randn(*there.shape, tries - 1, slots.shape[2] + 2, generator=generator)
            tried = torch.cat([slots[:, :, None], self.propose(noise, *suggested)], dim=2)  # (B, N, T, E)
        rated = self.rating(F.silu(h[:, :, None] + self.tokens(tried, before)))[..., 0].log_softmax(2)  # (B, N, T)
        return total + torch.where(there, log_q + rated[..., 0] + math.log(tries), 0.0).sum(1)

    def sample(self, noise, kept, light, slots):
        """Noise (B, *noise_shape) of N(0, I) -> Scene: of slots (B, N, E) `kept` (B,), and if any, light (B, L)."""
        few = torch.arange(m := self.n_slots + 1) < kept[:, None]  # (B, M): slots that are kept, and counts too low
        slots, light = torch.where(few[:, :-1, None], slots, 0.0), torch.where(few[:, :1], light, 0.0)
        lights, counts = light.repeat(m, 1), (torch.arange(m)[:, None] + 0 * kept).flatten()
        log_p = self.suggestions(lights, counts, slots.repeat(m, 1, 1))[2].unflatten(0, (m, -1))  # (M, B, N)
        log_p = log_p.where(few[:, :-1], 0.0).sum(2).T  # of what is kept, by count: (B, M)
        if self.light:
            seen = self.light.log_prob(lights, self.numbers[counts]).unflatten(0, (m, -1)).T
            log_p = log_p + seen.where(few[:, :1], 0.0)
        count = choose((self.count(self.numbers[:1, :1]) + log_p).masked_fill(few, -1e30), noise[:, 0, -1:])[:, 0]
        if self.light:
            drawn = self.light.sample(noise[:, 0, : light.shape[1]], self.numbers[count])
            light = torch.where(few[:, :1], light, drawn)
        for k, draws in enumerate(noise[:, 1:].split(TRIES, dim=1)):  # (B, T, E + 2)
            at, (before, h, _, logits, mean, context) = slice(k, k + 1), self.suggestions(light, count, slots)
            tried = self.propose(draws[:, None], logits[:, k, None], mean, context[:, k, None])  # (B, 1, T, E)
            rated = self.rating(F.silu(h[:, at, None] + self.tokens(tried, before, at)))[..., 0]  # (B, 1, T)
            one = choose(rated, draws[:, None, 0, -2:-1])[..., None]  # (B, 1, 1, 1)
            drawn = tried.gather(2, one.expand(-1, -1, -1, slots.shape[2]))[:, :, 0]  # (B, 1, E)
            slots = torch.cat([slots[:, :k], torch.where(few[:, at, None], slots[:, at], drawn), slots[:, k + 1 :]], 1)
        return Scene(light, count, slots)


class MVAE(nn.Module):
    """Multi-Entity VAE: posterior map -> top-N cells by KL -> slots -> layers -> composition (Nash et al. 2017).
    compose_at "feature": slots' feature maps are combined and decoded on. `detail` of a slot's `d` latents come from a
    closer look. For sounds data are levels (B, FRAMES, size, 1), colours times, and layers logarithms of magnitudes."""

    def __init__(self, *, size, cells, n_slots, d, detail, channels, op, compose_at, dataset, prior):
        super().__init__()
        self.size, self.n_slots, self.d, self.detail = size, n_slots, d, detail
        self.sound, at_data, masked, d_cell = dataset in SOUND_SETS, compose_at == "data", op == "alpha", d - detail
        self.op, self.compose_at, self.kind = op, compose_at, "mvae-sound" if self.sound else "mvae-image"
        shape, grid = ((FRAMES, size, 1), (cells, 1)) if self.sound else ((3, size, size), (cells, cells))
        side, parts = (size, shape[0]) if at_data else (size // UPSCALE, channels)
        self.encoder = Encoder(shape, grid, d_cell, channels, self.sound)
        outside = {"max": -NEUTRAL, "min": NEUTRAL}.get(op, 0.0)
        canvas = d, d_cell, channels, parts, side, 1 + (size > 64), outside, masked, masked and at_data
        self.slot_decoder = BroadcastDecoder(d, channels, parts, size) if self.sound else CanvasDecoder(*canvas)
        self.closer, self.to_image = CloserLook(detail, d_cell, channels) if detail else None, nn.Identity()
        if not at_data:
            out = nn.Conv2d(channels, shape[0] * UPSCALE**2, 3, padding=1)
            self.to_image = nn.Sequential(ResBlock(channels), nn.SiLU(), out, nn.PixelShuffle(UPSCALE))
        self.background = None if self.sound else Background((parts, side, side), channels)
        self.noise_sizes = [n_slots * d, 0 if self.sound else BACKGROUND_D]
        self.most_slots = min(max(MOST_SLOTS, n_slots), math.prod(grid))
        self.unit, self.blur = (cells / 2, 0.5) if self.sound else (1.0, BLUR)  # of Scenes' places, of sounds in cells
        self.prior = SlotPrior(prior, 2 + d, n_slots, self.noise_sizes[1], cells * self.sound)  # last: as if without

    @torch.no_grad()
    def start_at_mean(self, mean):
        """The background as the data's mean (C, H, W), slots in its colour: others are masked out at once for good."""
        colour = mean.mean((1, 2))
        if self.compose_at == "feature":
            self.to_image[2].bias.copy_(colour.repeat_interleave(UPSCALE**2))
        elif self.sound:  # so that layers, once combined, are the mean; times without sound have no logarithm
            share = log_expand(colour) / (self.n_slots if self.op == "sum" else 1)
            self.slot_decoder.out.weight.mul_(0.3)
            self.slot_decoder.out.bias.copy_(share.clamp(min=1e-4).log().repeat_interleave(UPSCALE_SOUND))
        else:  # with "sum" layers are what a slot adds to it
            self.background.picture.copy_(mean)
            self.slot_decoder.start_at(0 * colour if self.op == "sum" else colour)

    def encode(self, image, noise=None, slots=None, detailed=True, again=True):
        """image (B, C, H, W) -> Encoding of N slots, or choices `slots` (n,) < most_slots; `again`: not in training."""
        mu, logvar, place, features = self.encoder(image)
        kl_map = gaussian_kl(mu, logvar).sum(1)  # (B, H_l, W_l)
        light, kl_all = (features[:, :0], 0.0) if self.sound else self.background(features, noise)
        kl_all = kl_all + kl_map.sum((1, 2))
        half = None if self.sound else self.slot_decoder.half(mu.flatten(2).transpose(1, 2))  # (B, H_l * W_l)
        kl, n = kl_map.flatten(1), self.n_slots if slots is None else self.most_slots
        index = kl.topk(n).indices if self.sound else self.select(kl, place, half, n)
        index = index if slots is None else index.gather(1, slots.expand(index.shape[0], -1))  # (B, n)
        index = index.gather(1, kl.gather(1, index).argsort(dim=1, descending=True))
        mu, logvar, place = (gather_cells(values, index) for values in (mu, logvar, place))
        if self.closer is not None:
            image = (image - image.mean((2, 3), keepdim=True))[:, None].expand(-1, index.shape[1], -1, -1, -1)
            cut = resample(image.flatten(0, 1), half.gather(1, index).flatten(), place.flatten(0, 1), CLOSER)
            detail = [values.unflatten(0, index.shape) for values in self.closer(cut, mu.flatten(0, 1))]
            kl_all = kl_all + detailed * gaussian_kl(*detail).sum((1, 2))
            mu, logvar = (torch.cat(pair, dim=2) for pair in zip((mu, logvar), detail, strict=True))
        if self.sound and again:  # what each slot's soft mask leaves, alone (docs/mvae-log.md): (B n, FRAMES, ...)
            masked = log_compress((2 * self.decode(mu, place)).softmax(1) * log_expand(image)[:, None]).flatten(0, 1)
            found = (gather_cells(values, index.flatten()[:, None]) for values in self.encoder(masked)[:2])
            mu, logvar = (values[:, 0].unflatten(0, index.shape) for values in found)
        background = None if self.sound else self.background.paint(light)
        return Encoding(mu, logvar, place, kl.gather(1, index), kl_map, background, light, kl_all)

    @torch.no_grad()
    def select(self, kl, place, half, n):
        """Greedy non-maximum suppression of pictures' cells, kl (B, H_l * W_l): index (B, n) in the order of choice."""
        width, place, middles, chosen = 2 / place.shape[2], place.flatten(2), self.encoder.middles.flatten(1), []
        score = kl * torch.exp(-(place - middles).square().sum(1) / SHIFT**2)  # else all may shift to one end
        for _ in range(n):  # the best; cells within its canvas, or whose slots are, count less, neighbours next to none
            index = score.argmax(1, keepdim=True)  # (B, 1)
            chosen.append(index)
            here, size = gather_cells(place[..., None], index).transpose(1, 2), half.gather(1, index)  # (B, 2, 1)
            apart, beside = place - here, middles - middles.T[index].transpose(1, 2)  # (B, 2, H_l * W_l)
            away = torch.minimum(apart.norm(dim=1), (middles - here).norm(dim=1))
            score = score * torch.sigmoid(8 * (away / size - TAKEN))
            near = torch.minimum(apart.abs().amax(1), beside.abs().amax(1) - width / 2) < width
            score = torch.where(near, NEIGHBOUR_WEIGHT * score, score).scatter(1, index, -1.0)
        return torch.cat(chosen, dim=1)

    def responsibilities(self, layer, background):
        """How much every component owns every pixel: (B, N, C, h, w) -> (B, N + 1, H, W), the background first."""
        if self.op == "alpha":
            return F.interpolate(alpha_masks(layer)[:, :, 0], size=self.size, mode="bilinear")
        beyond = self.slot_decoder.beyond.expand(len(layer), 1, -1, *layer.shape[3:])  # of a slot without a shape
        neutral = self.compose(beyond, background)  # whose mean absolute change by a slot is compared with VISIBLE
        change = (self.alone(layer, background) - neutral[:, None]).abs().mean(2)  # (B, N, H, W)
        return F.pad(change, (0, 0, 0, 0, 1, 0), value=VISIBLE)

    def alone(self, layer, background=None):
        """Every slot composed alone with the background: layer (B, N, C, h, w) -> (B, N, C, H, W)."""
        return torch.stack([self.compose(layer[:, k : k + 1], background) for k in range(layer.shape[1])], dim=1)

    def decode(self, z, cell):  # (B, N, D), (B, N, 2) -> layer (B, N, C, h, w), every slot on its own
        return self.slot_decoder(z.flatten(0, 1), cell.flatten(0, 1)).to(cell.dtype).unflatten(0, z.shape[:2])

    def compose(self, layer, background=None):
        """layer (B, M, C, h, w) of any M slots, background (B, C, h, w) -> image (B, C, H, W), levels of a sound."""
        if self.op == "alpha" and self.compose_at == "data":
            near, shade, drawn = layer.split([1, 1, layer.shape[2] - 2], dim=2)
            layer, background = torch.cat([near, drawn], dim=2), background * shade.sum(1).exp()
        if self.sound:
            return log_compress(compose(layer.clamp(max=8).exp(), background, self.op))  # none is as loud as exp(8)
        return self.to_image(compose(layer, background, self.op)).to(layer.dtype)

    def scene(self, encoding, generator):
        """Encoding -> Scene: a sample of the posteriors of slots that hold something, a little beside their cells."""
        there = encoding.kl >= EMPTY[self.kind]  # (B, N)
        z = reparameterize(encoding.mu, encoding.logvar, torch.randn(encoding.mu.shape, generator=generator))
        cell = self.unit * encoding.cell + self.blur * (2 * torch.rand(encoding.cell.shape, generator=generator) - 1)
        return Scene(encoding.light, there.sum(1), torch.cat([cell, z], dim=2) * there[..., None])

    def slots(self, scene):
        """Scene -> z (B, N, D), cell (B, N, 2), of sounds the nearest; background (B, C, h, w) or None."""
        cell, z = scene.slots.split([2, self.d], dim=2)
        if self.sound:
            middles = self.encoder.middles[:, :, 0].T  # (cells, 2)
            return z, middles[(cell[..., :1] / self.unit - middles[:, 0]).abs().argmin(2)], None
        return z, cell, self.background.paint(scene.light)

    def forward(self, image, noise, detailed=True):
        """image (B, C, H, W), noise (B, sum of noise_sizes) -> Encoding, image (B, C, H, W), haze (B,): see HAZE."""
        of_slots, of_background = noise.split(self.noise_sizes, dim=1)
        encoding = self.encode(image, of_background, detailed=detailed, again=False)
        z = reparameterize(encoding.mu, encoding.logvar, of_slots.unflatten(1, (self.n_slots, self.d)))
        z = z if detailed else F.pad(z[..., : self.d - self.detail], (0, self.detail))  # no closer look
        layer, haze = self.decode(z, encoding.cell), torch.zeros_like(encoding.kl_all)
        mean = self.compose(layer, encoding.background)
        if self.op == "alpha":
            behind = alpha_masks(layer)[:, 0]  # (B, 1, h, w)
            haze = (behind * (1 - behind)).sum((1, 2, 3))
            if self.compose_at == "data" and not detailed:
                shaded = encoding.background * layer[:, :, 1:2].sum(1).exp()
                haze = haze + SEEN_THROUGH * (behind * (mean - shaded)).abs().mean(1).sum((1, 2))
        return encoding, mean, haze


# ---------------------------------------------------------------- Objective, evaluation

HAZE = 2.0  # nats a pixel, times m (1 - m) of the background's mask m, and before slots look closer SEEN_THROUGH times
SEEN_THROUGH = 10.0  # HAZE times m |change of the background|: faint masks, strong colours draw the same, later halos
DETAILED = 0.2  # share of a run from which on slots look closer: parted, they do not share an object's details
FALL = (0.35, 0.65)  # between these shares of a run the weight of the KL falls: slots have parted, and learn shapes
CLIP = 2000.0  # of the gradient's norm; most steps are clipped: a strange scene weighs no more than a common one


def gaussian_log_likelihood(x, mean, sigma):  # summed over all but the first axis: (B, ...) -> (B,), in nats
    return torch.distributions.Normal(mean, sigma).log_prob(x).flatten(1).sum(1)


def objective(image, mean, encoding, haze, beta, sigma):
    """Negative ELBO in nats, slots' places given, its KL, of all cells, times beta, plus that of haze (B,); terms."""
    reconstruction, kl = -gaussian_log_likelihood(image, mean, sigma).mean(), encoding.kl_all.mean()
    terms = {"loss/reconstruction": reconstruction, "loss/kl": kl, "loss/negative_elbo": reconstruction + kl}
    return reconstruction + beta * kl + HAZE * haze.mean(), terms | {"loss/haze": haze.mean()}


@torch.no_grad()
def posteriors(model, data, n, seed):
    """Encoding of n training examples, light sampled; kl_map and background, large and unused, are placeholders."""
    parts, n = [], n - n % min(n, getattr(data, "length", n))  # whole epochs of a Pool: each example as often
    for k in trange(math.ceil(n / CHUNK), desc="posteriors", disable=None):
        noise = torch.randn(CHUNK, model.noise_sizes[1], generator=random_generator("light", seed, k))
        encoding = model.encode(data.batch(k, slice(0, CHUNK), CHUNK), noise.to(data.device))
        parts.append(encoding._replace(kl_map=encoding.kl, background=encoding.kl))
    return Encoding(*(torch.cat(values)[:n].cpu() for values in zip(*parts, strict=True)))


def fit_prior(prior, model, encoding, steps, seed, batch=64, lr=2e-3):
    """Fit a prior to posteriors of a frozen model (Ghosh et al. 2020); returns the last batch's -log p in nats."""
    optimizer = torch.optim.Adam(prior.parameters(), fused=True)
    for step in trange(steps, desc="prior", disable=None):
        generator = random_generator("prior", seed, step)
        some = torch.randint(len(encoding.kl), (batch,), generator=generator)
        scene = model.scene(Encoding(*(values[some] for values in encoding)), generator)
        loss = -prior.log_prob(scene, generator, FIT_TRIES).mean()
        optimizer_step(loss, {"loss": loss}, optimizer, learning_rate_at(step / steps, step, lr), 50.0, shared=False)
    return loss.item()


def adjusted_rand_index(predicted, true):
    """Adjusted Rand index (Hubert & Arabie 1985) of two labellings of the same P points: (P,), (P,) -> float."""
    table = F.one_hot(true.cpu()).double().T @ F.one_hot(predicted.cpu()).double()
    together, rows, columns, every = ((n * (n - 1) / 2).sum() for n in (table, table.sum(1), table.sum(0), table.sum()))
    expected, highest = rows * columns / every, (rows + columns) / 2
    return 1.0 if highest == expected else float((together - expected) / (highest - expected))


def averages(scores):
    """Dicts of numbers -> means, each over those that have it; of "unexplained" the 95 % quantile too: describe."""
    columns = {n: [score[n] for score in scores if n in score] for n in dict.fromkeys(itertools.chain(*scores))}
    most = {"unexplained_95": float(np.quantile(columns["unexplained"], 0.95))} if "unexplained" in columns else {}
    return {name: float(np.mean(column)) for name, column in columns.items()} | most


@torch.no_grad()
def reconstruct(model, image):
    """image (B, C, H, W) -> Encoding, layer (B, N, C, h, w), image (B, C, H, W), all of z = mu."""
    encoding = model.encode(image)
    layer = model.decode(encoding.mu, encoding.cell)
    return encoding, layer, model.compose(layer, encoding.background)


def evaluate_pictures(model, data, split, n, sigma):
    """Scores on n scenes, z = mu: MSE, of the mean picture too; with masks ARI-FG, where an object is of SMALLEST."""
    (images, labels), scores = data.scenes(split, n), []
    for i, image in enumerate(images.split(1)):
        encoding, layer, mean = reconstruct(model, image)
        score = {"mse": (mean - image).square().mean(), "mse_baseline": (images.mean(0) - image).square().mean()}
        score |= {"kl": encoding.kl_all, "log_likelihood": gaussian_log_likelihood(image, mean, sigma)}
        score["unexplained"] = unexplained(mean, image)
        scores.append({name: value.item() for name, value in score.items()})
        if (labels[i].flatten().bincount()[1:] >= SMALLEST * labels[i].numel()).any():
            segment, objects = model.responsibilities(layer, encoding.background)[0].argmax(0), labels[i] > 0
            scores[-1] = {"ari_fg": adjusted_rand_index(segment[objects], labels[i][objects])} | scores[-1]
    return averages(scores) | {"scenes": len(images)}


def separate(model, levels, mixture):
    """Mixtures (B, samples) -> levels, these rebuilt, Encoding; of slots layers, levels alone, masked mixtures."""
    encoding, layer, mean = reconstruct(model, level := levels(mixture))
    alone = model.alone(layer)
    magnitude = levels.to_stft_magnitude(alone.flatten(0, 1)).unflatten(0, alone.shape[:2]).cpu().numpy()
    spectrum = stft(mixture.cpu().numpy(), SOUND_FFT, HOP)
    masked = np.stack([soft_masks(slots, np.abs(one)) * one for slots, one in zip(magnitude, spectrum, strict=True)])
    parts = torch.from_numpy(inverse_stft(masked, SOUND_FFT, HOP, SAMPLES)).to(mixture)
    return Separation(level, mean, encoding, layer, alone, parts)


def assign(parts, stems):
    """Parts (B, N, samples), stems (B, S, samples) -> each stem's part, one to one, and dB of SI-SDR gained: (B, S)."""
    stem, heard = stems[:, :, None], torch.cat([parts, stems.sum(1, keepdim=True)], dim=1)[:, None]  # the mixture last
    scale = (heard * stem).sum(-1, keepdim=True) / stem.square().sum(-1, keepdim=True).clamp(min=1e-20)
    signal, distortion = (v.square().sum(-1).clamp(min=1e-20) for v in (scale * stem, heard - scale * stem))
    ratio = 10 * torch.log10(signal / distortion)  # (B, S, N + 1), as by Le Roux et al. 2019
    gained, silent = ratio[:, :, :-1] - ratio[:, :, -1:], (stems == 0).all(2)
    best = [linear_sum_assignment(one.cpu(), maximize=True)[1] for one in gained.masked_fill(silent[..., None], 0.0)]
    part = torch.from_numpy(np.stack(best)).to(ratio.device)
    return part, gained.gather(2, part[..., None])[..., 0].masked_fill(silent, math.nan)


def evaluate_sounds(model, data, split, n, sigma):
    """Scores on n mixtures of a split's notes, z = mu; where stems are known, of slots under the best permutation."""
    scores, gained = [], []
    for stems in data.mixtures(split, n).to(data.device).split(CHUNK):
        level, mean, encoding, *_, parts = separate(model, data.levels, mixture := stems.sum(1))
        heard = data.levels.to_stft_magnitude(mean).cpu().numpy(), np.abs(stft(mixture.cpu().numpy(), SOUND_FFT, HOP))
        score = {"mse": (mean - level).square().mean((1, 2, 3)), "lsd": log_spectral_distance(mean, level, axis=2)}
        score |= {"kl": encoding.kl_all, "log_likelihood": gaussian_log_likelihood(level, mean, sigma)}
        score["unexplained"] = torch.tensor([unexplained(*map(band_levels, pair)) for pair in zip(*heard, strict=True)])
        if data.parts > 1:
            gain = assign(parts, stems)[1]
            holding, sounding = (encoding.kl >= EMPTY["mvae-sound"]).sum(1), (~gain.isnan()).sum(1)
            score |= {"si_sdr_gained": gain.nanmean(1), "slot_count_error": (holding - sounding).abs()}
            gained += gain[~gain.isnan()].tolist()
        scores += [{name: value[b].item() for name, value in score.items()} for b in range(len(stems))]
    median = {"si_sdr_gained_median": float(np.median(gained))} if gained else {}
    return averages(scores) | median | {"mixtures": len(scores)}


# ---------------------------------------------------------------- Figures, sounds, graphs

SEGMENTS = np.uint8([(40, 40, 40), (230, 81, 0), (30, 136, 229), (67, 160, 71), (253, 216, 53), (142, 36, 170),
                     (0, 172, 193), (244, 143, 177), (121, 85, 72), (158, 157, 36), (236, 239, 241)])  # fmt: skip


@torch.no_grad()
def show_pictures(model, data, run, n=6):
    """Scenes, reconstructions, KL maps with the chosen cells, segments, and every slot decoded alone, a row a scene."""
    encoding, layer, mean = reconstruct(model, images := data.scenes("valid", n)[0])
    alone = model.alone(layer, encoding.background)
    segments, rows = model.responsibilities(layer, encoding.background).argmax(1) % len(SEGMENTS), []
    numpy = [v.cpu().numpy() for v in (images, mean, alone, segments, encoding.kl_map, encoding.cell, encoding.kl)]
    for image, mean, alone, segment, kl_map, cell, kl in zip(*numpy, strict=True):
        tiles = to_uint8(image), to_uint8(mean), kl_tile(to_uint8(image), kl_map, cell), SEGMENTS[segment]
        row = list(map(Tile, tiles, ("scene", "reconstruction", "KL map", "segments")))
        rows.append(row + [Tile(to_uint8(one), f"slot {k}: {kl[k]:.0f} nats") for k, one in enumerate(alone)])
    run.figure("decomposition", contact_sheet(rows, f"Scenes of {data.source} taken apart; every slot decoded alone"))


def show_sounds(model, data, run, n=5, heard=2):
    """Mixtures, KL maps, reconstructions, slots decoded alone, a row a mixture; some, and masked slots, as sounds."""
    mixture, rows = data.mixtures("valid", n).sum(1).to(data.device), []
    level, mean, encoding, _, alone, parts = separate(model, data.levels, mixture)
    for b, spectra in enumerate(torch.cat([level[:, None], mean[:, None], alone], dim=1)):
        magnitude = data.levels.to_stft_magnitude(spectra).cpu().numpy()
        tiles = [spectrum_tile(one, magnitude[0].max(), SAMPLES / RATE, RATE) for one in magnitude]
        heat, kl_map, cell = (v[b].cpu().numpy() for v in (level[..., 0].mT, encoding.kl_map, encoding.cell))
        tiles.insert(1, kl_tile(heat_map(heat[::-1]), kl_map[::-1], cell * [-1, 1]))  # low frequencies at the bottom
        slots = (f"slot {k}: {kl:.0f} nats" for k, kl in enumerate(encoding.kl[b]))
        rows.append(list(map(Tile, tiles, (f"mixture {b}", "KL map", "reconstruction", *slots))))
    run.figure("separation", contact_sheet(rows, "Sounds taken apart; every slot decoded alone"))
    for b, whole in enumerate(mixture[:heard]):
        for name, sound in {"": whole, **{f"-slot{k}-masked": part for k, part in enumerate(parts[b])}}.items():
            run.sound(f"mixture{b}{name}", sound / (2 * whole.abs().max()))


def graphs(model):
    """{graph: (module, example inputs)}, as the contract says; pictures hold blobs, so that cells differ in KL."""
    generator, sound, prior = random_generator("graphs"), model.sound, model.prior
    z, cell = torch.randn(2, 3, model.d, generator=generator), 2 * torch.rand(2, 3, 2, generator=generator) - 1
    image = F.interpolate(torch.rand(2, 3, 8, 8, generator=generator), size=model.size, mode="bilinear")
    waveform = torch.sin(torch.rand(2, SAMPLES, generator=generator).cumsum(1) / 8)  # a tone that wanders
    levels, inputs = (SoundLevels(model.size), {"waveform": waveform}) if sound else (nn.Identity(), {"image": image})
    names = "mu", "logvar", "cell", "kl", "kl_map", *(("gain",) if sound else ("background", "light"))

    def encode(data, slots=None):
        *of_cells, background, light, _ = model.encode(levels(data), slots=slots)
        return *of_cells, *((root_mean_square(data)[:, 0] / HEARD,) if sound else (background, light))

    def sample(noise, kept, given, light=None):
        given = torch.cat([model.unit * given[..., :2], given[..., 2:]], dim=2)  # a cell as an encoder gives it
        scene = prior.sample(noise, kept, noise[:, 0, :0] if light is None else light, given)
        z, cell, background = model.slots(scene)
        return z, cell, scene.count.float(), *(() if sound else (background,))

    join = (lambda layer: HEARD / LOUDNESS * levels.to_stft_magnitude(model.compose(layer))) if sound else model.compose
    layer = {"layer": model.decode(z, cell)} | ({} if sound else {"background": encode(image)[-2].contiguous()})
    inputs["slots"], noise = torch.arange(model.n_slots), torch.randn(2, *prior.noise_shape, generator=generator)
    made = {"encoder": (Graph(names, encode, model, levels, optional=("slots",)), inputs)}
    if prior.count[-2].weight.any():  # else it is not fitted
        feed = {"noise": noise, "kept": torch.arange(2), "given": noise[:, : model.n_slots, : 2 + model.d].contiguous()}
        feed |= {} if sound else {"light": noise[:, 0, :BACKGROUND_D].contiguous()}
        made["prior"] = Graph(("z", "cell", "count", "background")[: 4 - sound], sample, prior, model.background), feed
    made["decoder"] = (Graph(("layer",), model.decode, model.slot_decoder), {"z": z, "cell": cell})
    made["composer"] = (Graph(("spectrogram" if sound else "image",), join, model.to_image, levels), layer)
    if sound:
        made["vocoder"] = (Vocoder(SOUND_FFT), {"spectrogram": levels.magnitude(waveform)[:, :, :32].contiguous()})
    return made


def describe(model):
    """Beside options and graphs, for model.json; inputs that leave more than `unlike` unexplained get a warning."""
    about, valid = {"kind": model.kind, "empty": EMPTY[model.kind]}, model.config["valid"]
    about |= {"unlike": 3 * valid["unexplained_95"]} if "unexplained_95" in valid else {}
    if not model.sound:
        return about | {"crop": model.config["data"]["crop"], "scaling": "colours / 255"}
    sizes = {"sample_rate": RATE, "samples": SAMPLES, "n_fft": SOUND_FFT, "hop": HOP, "frames": SPAN * FRAMES}
    return about | sizes | {"scaling": f"root mean square {LOUDNESS:g}, log(1 + {COMPRESSION:g} magnitude), inside"}


# ---------------------------------------------------------------- Command line

SCRIPT = Path(__file__).stem
PRESETS = {"sprites": {"objects": (3, 4), "batch": 16, "beta": 4.0, "warmup": 0.2, "minutes": 20.0},
           "clevr": {"n_slots": 6, "sigma": 0.05, "batch": 16, "beta": 4.0, "warmup": 0.2, "minutes": 30.0},
           "nsynth-duo": {"size": 384, "cells": 96, "n_slots": 2, "d": 24, "detail": 0, "channels": 64, "op": "sum",
                          "sigma": 0.15, "beta": 12.0, "last_beta": 12.0, "minutes": 20.0}}  # fmt: skip
PRESETS |= (OWN := {"pictures": PRESETS["clevr"], "sounds": PRESETS["nsynth-duo"]})
FOREIGN = {"sprites": ("families", "download", "mix", "voices"), "clevr": ("families", "mix", "voices"),
           "pictures": ("families", "download", "mix", "voices", "objects"), "nsynth-duo": ("objects", "detail", "mix"),
           "sounds": ("objects", "detail", "families", "download")}  # fmt: skip
build = partial(build_model, MVAE)  # options -> an untrained model
load = partial(load_model, build=build)  # a run folder -> its trained model


def check_options(options):  # or click.UsageError, for those that do not go together
    size, cells, n, dataset, (low, high) = (options[k] for k in ("size", "cells", "n_slots", "dataset", "voices"))
    sound, mixed = dataset in SOUND_SETS, options["mix"] or dataset == "nsynth-duo"
    fits = size % UPSCALE == 0 and size / cells in (2, 4, 8, 16, 32)
    rules = {
        "--objects: expected the fewest first": options["objects"][0] <= options["objects"][1],
        f"--detail {options['detail']}: expected less than --D, {options['d']}": options["detail"] < options["d"],
        f"--size {size} --cells {cells}: expected a multiple of {UPSCALE}, and 2, 4, 8, 16 or 32 times the cells": fits,
        f"--N {n}: expected at most {cells ** (2 - sound)}, the cells": n <= cells ** (2 - sound),
        f"--voices: expected the fewest first, and at most --N, {n}: a slot for each": not mixed or low <= high <= n,
        "--voices is for --mix": mixed or high == 2,
        f"--dataset {dataset}: expected --data-root, a folder of your own": options["data_root"] or dataset not in OWN,
        "--op alpha and --compose feature are for pictures":
            not sound or (options["op"] != "alpha" and options["compose_at"] == "data")
    }  # fmt: skip
    if broken := next((rule for rule, kept in rules.items() if not kept), None):
        raise click.UsageError(broken)


@training_command(SCRIPT, PRESETS, FOREIGN)
@click.option("--size", type=click.IntRange(16), default=64, help="Height and width of pictures; bands of sounds.")
@click.option("--objects", type=click.IntRange(1, 10), nargs=2, default=(3, 6), help="In a scene: fewest, and most.")
@families_option
@click.option("--mix", is_flag=True, help="Two sounds at once, of different folders or files.")
@click.option("--voices", type=click.IntRange(2, 10), nargs=2, default=(2, 2), help="Notes at once: fewest, and most.")
@click.option("--N", "n_slots", type=click.IntRange(1), default=4, help="Slots.")
@click.option("--D", "d", type=click.IntRange(1), default=20, help="Latents of a slot.")
@click.option("--detail", type=click.IntRange(0), default=10, help="Those of them that come from a closer look.")
@click.option("--channels", type=click.IntRange(8), default=48, help="Width of all layers, a multiple of 8.")
@click.option("--cells", type=click.IntRange(2), default=16, help="Height and width of the posterior map.")
@click.option("--op", type=click.Choice(OPS), default="alpha", help="How layers are combined.")
@click.option("--compose", "compose_at", type=click.Choice(["data", "feature"]), default="data", help="Where they are.")
@click.option("--last-beta", type=click.FloatRange(0), default=0.5, help="What --beta falls to once slots have parted.")
@click.option("--prior", type=click.Choice(ORDERS), default="set", help="Slots drawn alone, by KL, or in any order.")
@click.option("--sigma", type=POSITIVE, default=0.1, help="Likelihood's standard deviation.")
@click.pass_context
def main(context, **options):
    # 1. Options, device, data.
    settle_options(context, options, check_options)
    device = start_device(options["device"], options["seed"])
    data, sigma = load_data(options, device), options["sigma"]

    # 2. The model, which starts from the mean of the data.
    model = build(options)
    score, show, n = ((evaluate_pictures, show_pictures, SCENES), (evaluate_sounds, show_sounds, MIXTURES))[model.sound]
    n_test, n_valid = (n, n // 5) if options["evaluation"] == "full" else (n // 10, n // 10)
    model.start_at_mean(data.batch(0, slice(0, 256), 256).mean(0).cpu())
    start = copy.deepcopy(model := model.to(device, memory_format=torch.channels_last))  # before --resume loads weights
    optimizer = torch.optim.Adam((p for n, p in model.named_parameters() if "prior" not in n), betas=(0.9, 0.99))
    about = {"name": options["dataset"], "source": data.source, "crop": getattr(data, "crop", None)}
    name = "mvae-{dataset}-{op}-N{n_slots}-seed{seed}".format(**options)

    # 3. Training; figures and scores of the valid split at every tenth; then scores of the test split, and the prior.
    with Run(options, SCRIPT, name, about, model, optimizer, device) as run:
        if run.folder and run.step == 0:
            run.report(score(model, data, "valid", n_valid, sigma))
        for step, progress in run.steps():
            image, generator = data.batch(step, run.own, run.total), random_generator("noise", options["seed"], step)
            noise = torch.randn(run.total, sum(model.noise_sizes), generator=generator)[run.own].to(device)
            beta = beta_at(progress, options["beta"], options["warmup"], options["last_beta"], FALL)
            with run.autocast():
                encoding, mean, haze = model(image, noise, progress >= DETAILED)
            loss, terms = objective(image, mean, encoding, haze, beta, sigma)
            lr = learning_rate_at(progress, step, options["lr"])
            model.prior = start.prior  # once a run goes on: its old one was fitted to the encoder before this step
            run.log(optimizer_step(loss, terms, optimizer, lr, CLIP) | {"schedule/beta": beta})
            if run.looks:
                show(model, data, run)
            if run.due:
                run.report(score(model, data, "valid", n_valid, sigma))
        if run.complete:
            run.finish(*(score(one, data, "test", n_test, sigma) for one in (model, start)))
            click.echo("fitting the prior to what the encoder finds")
            encoding = posteriors(model, data, min(POOL, run.step * run.total), seed := options["seed"])
            model.prior = copy.deepcopy(start.prior).cpu()  # anew, also where a run was resumed
            run.check_finite({"prior": fit_prior(model.prior, model, encoding, min(FIT_STEPS, run.step), seed)})
            run.save()


if __name__ == "__main__":
    main()
