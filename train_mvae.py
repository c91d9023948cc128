"""Multi-Entity VAE (Nash et al. 2017): the top-N cells of a posterior map become slots, each decoded alone.

    python train_mvae.py --dataset sprites                        # 10 minutes; ARI-FG 0.96
    python train_mvae.py --dataset clevr --data-root CLEVR_v1.0   # 20 minutes; ARI-FG 0.98 (docs/mvae.md)
    python train_mvae.py --dataset clevr --N 4 --op sum
    python train_mvae.py --dataset nsynth-duo --data-root nsynth  # 15 minutes; SI-SDR gained 20 dB (docs/mvae-audio.md)
    torchrun --nproc-per-node=2 train_mvae.py --dataset clevr

Without --data-root, CLEVR-like scenes are drawn by a ray caster below, and notes are synthesised. A run folder holds
checkpoint.pt, metrics.json, figures, sounds and TensorBoard curves; `python export.py RUN_DIR` makes its graphs for
recompose.py.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn

from common import (
    FOLDER,
    OPS,
    POSITIVE,
    BroadcastDecoder,
    ColumnShuffle,
    FiniteRange,
    PresetCommand,
    ResBlock,
    Spectrogram,
    alpha_masks,
    autocast,
    beta_at,
    column_conv,
    compose,
    descend,
    earlier_curve,
    gather_cells,
    gaussian_kl,
    gaussian_log_likelihood,
    griffin_lim,
    learning_rate_at,
    log_compress,
    log_expand,
    log_spectral_distance,
    pick_device,
    plotted,
    position_grid,
    random_generator,
    reparameterize,
    select_cells,
    settle_run,
    start_distributed,
    start_run,
    train,
    write_json,
)
from recompose import contact_sheet, heat_map, kl_tile, load_picture, square, to_uint8
from train_vae_audio import SAMPLES, SPLITS, Families, load_notes, stft, train_classifier

# ---------------------------------------------------------------- Data: built-in sprites


def uniform(low, high, shape, generator):
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def place_apart(n, count, extent, clearance, generator):
    """Random points of [-extent, extent]^2, one after the other, each `clearance` from those before: (n, count, 2).

    clearance (n, count, count): least distance of every pair. Where 40 tries find no free place, the freest is taken.
    """
    tries = uniform(-extent, extent, (n, count, 40, 2), generator)
    chosen = tries[:, :1, 0]  # (n, 1, 2)
    for k in range(1, count):
        gap = (tries[:, k, :, None] - chosen[:, None]).norm(dim=-1) - clearance[:, None, k, :k]  # (n, 40, k)
        freest = gap.amin(-1)
        first_free = (freest > 0).float() - 1e-4 * torch.arange(40, device=freest.device)
        pick = torch.where((freest > 0).any(1), first_free.argmax(1), freest.argmax(1))
        chosen = torch.cat([chosen, tries[torch.arange(n), k, pick][:, None]], dim=1)
    return chosen


def hsv_to_rgb(hue, saturation, value):
    """Each (...) in [0, 1] -> (..., 3)."""
    k = (torch.tensor([5.0, 3.0, 1.0], device=hue.device) + 6 * hue[..., None]) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))


class Sprites:
    """Coloured shapes on black, drawn in batches on the device: ellipses, squares and triangles, or real dSprites.

    Radii are 0.22 to 0.38 and centres at least 0.3 apart, in half picture widths: sprites overlap, none is hidden.
    A scene is a dict of tensors (n, K, ...); the later objects lie in front.
    """

    crop = "none"

    def __init__(self, size, objects, seed, device, data_root=None):
        self.size, self.objects, self.seed, self.device = size, objects, seed, device
        self.source, self.library = "built-in sprites", None
        if data_root:
            files = sorted(data_root.glob("dsprites*.npz"))
            if not files:
                raise click.UsageError(
                    f"--data-root {data_root}: no dsprites*.npz there; leave it out for built-in shapes"
                )
            if size not in (32, 64):
                raise click.UsageError(f"--size {size}: dSprites are 64 pixels wide; expected 32 or 64")
            try:
                with np.load(files[0]) as archive:
                    self.library = torch.from_numpy(archive["imgs"])  # (737280, 64, 64) uint8
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise click.UsageError(f"{files[0]}: damaged, or without the array 'imgs' of dSprites") from error
            self.source = f"dSprites shapes ({files[0].name})"

    def draw(self, n, generator, lots=1):
        """n scenes; with `lots` > 1 of so many times the objects, each lot a scene of its own and all of them one."""
        low, high = self.objects
        k = lots * high
        count = torch.randint(low, high + 1, (n, lots), generator=generator, device=self.device)
        scene = {
            "present": (torch.arange(high, device=self.device) < count[..., None]).flatten(1),  # (n, K)
            "rgb": hsv_to_rgb(*(uniform(least, 1, (n, k), generator) for least in (0.0, 0.5, 0.6))),
        }
        if self.library is not None:
            shape = torch.randint(len(self.library), (n, k), generator=generator, device=self.device)
            return scene | {"shape": shape}
        return scene | {
            "shape": torch.randint(3, (n, k), generator=generator, device=self.device),
            "centre": place_apart(n, k, 0.75, torch.full((n, k, k), 0.3, device=self.device), generator),
            "radius": uniform(0.22, 0.38, (n, k), generator),
            "angle": uniform(0, 2 * math.pi, (n, k), generator),
        }

    def outlines(self, scene, side):
        """The pixels of every object: (n, K, side, side) bool."""
        if self.library is not None:
            images = self.library[scene["shape"].cpu()].to(self.device).bool()
            return images[..., :: 64 // side, :: 64 // side] & scene["present"][..., None, None]
        offset = position_grid(side, side).to(self.device) - scene["centre"][..., None, None]  # (n, K, 2, side, side)
        y, x = (offset / scene["radius"][..., None, None, None]).unbind(2)
        cos, sin = (f(scene["angle"])[..., None, None] for f in (torch.cos, torch.sin))
        u, v = cos * x + sin * y, cos * y - sin * x
        ellipse = u.square() + (v / 0.75).square() < 1
        box = torch.maximum(u.abs(), v.abs()) < 0.8
        triangle = (v > -0.6) & (v + 3**0.5 * u.abs() < 1.1)
        shape = scene["shape"][..., None, None]
        chosen = torch.where(shape == 0, ellipse, torch.where(shape == 1, box, triangle))
        return chosen & scene["present"][..., None, None]

    def render(self, scene):
        """scene -> image (n, 3, size, size) in [0, 1], label (n, size, size): 0 background, k = object k - 1.

        Drawn at twice the size and averaged, so that edges are smooth.
        """
        side = 2 * self.size
        outlines = self.outlines(scene, min(side, 64) if self.library is not None else side)
        label = torch.zeros_like(outlines[:, 0], dtype=torch.long)
        for k in range(outlines.shape[1]):
            label = torch.where(outlines[:, k], k + 1, label)
        palette = F.pad(scene["rgb"], (0, 0, 1, 0))  # (n, K + 1, 3), black first
        image = palette[torch.arange(len(label), device=self.device)[:, None, None], label].permute(0, 3, 1, 2)
        fine = label.shape[-1] // self.size
        return F.avg_pool2d(image, fine), label[:, ::fine, ::fine]

    def batch(self, step, first, last, total):
        """Pictures `first` to `last` of the `total` of a step: (last - first, 3, size, size) in [0, 1]."""
        scene = self.draw(total, random_generator("sprites", self.seed, step, device=self.device))
        return self.render({name: value[first:last] for name, value in scene.items()})[0]

    def held_out(self, n):
        """n scenes no training step draws: (images, labels)."""
        return self.render(self.draw(n, random_generator("held-out sprites", device=self.device)))

    def pairs(self, n):
        """n scenes of two lots of objects, the first half of them and the second."""
        return self.draw(n, random_generator("sprite pairs", device=self.device), lots=2)


# ---------------------------------------------------------------- Data: CLEVR, drawn here
# The world of Johnson et al. (2017): camera, lamps and sizes were fitted to scenes rendered with CLEVR's own assets.

SPHERE, CYLINDER, CUBE = range(3)
RADII = (0.35, 0.7)
CUBE_HALF = 0.95  # half the edge of a cube, in radii
COLOURS = (
    (87, 87, 87), (173, 35, 35), (42, 75, 215), (29, 105, 20),  # gray, red, blue, green
    (129, 74, 25), (129, 38, 192), (41, 208, 208), (255, 238, 51),  # brown, purple, cyan, yellow
)  # fmt: skip
CAMERA, CAMERA_JITTER = (7.45, -6.50, 5.38), 0.5  # it looks at the origin
FOCAL = 35 / 32  # in picture widths
LAMPS, LAMP_JITTER = ((6.45, -2.91, 4.26), (-4.67, -4.01, 3.01), (-1.17, 2.65, 5.82)), 1.0  # key, fill, back
POWER = ((5.5, 5.15, 4.6), (0.95, 1.03, 1.25), (2.2, 2.2, 2.2))  # of every lamp, RGB
AMBIENT = 0.118
LAMP_WIDTH = 1.2
BLOCK = 64  # scenes drawn, or files read, at a time


def camera_frame(camera):
    """Rows right, up, forward of a camera at (n, 3) that looks at the origin: (n, 3, 3)."""
    forward = F.normalize(-camera, dim=-1)
    vertical = torch.tensor([0.0, 0.0, 1.0], device=camera.device).expand_as(forward)
    right = F.normalize(torch.linalg.cross(forward, vertical), dim=-1)
    return torch.stack([right, torch.linalg.cross(right, forward), forward], dim=1)


def crop_rays(side, device):
    """Rays through the pixels of CLEVR's crop (0.6 W wide, W/64 below the middle), camera frame: (side^2, 3)."""
    y, x = 0.3 * position_grid(side, side).to(device)
    return torch.stack([x / FOCAL, -(y + 1 / 64) / FOCAL, torch.ones_like(x)], dim=-1).flatten(0, 1)


def turn(vector, angle):
    """vector (..., 3) as seen from a frame turned by `angle` about the vertical."""
    x, y, z = vector.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1)


def hit_distance(shape, half, origin, ray):
    """How far along a ray an object around the origin is hit, infinity where it is not: (P, W).

    half (P, 1): radius or half edge, half height too; origin (P, 1, 3) and ray (P, W, 3) in the object's frame.
    """
    if shape == CUBE:  # slabs
        inverse = 1 / torch.where(ray.abs() < 1e-6, 1e-6, ray)
        a, b = (-half[..., None] - origin) * inverse, (half[..., None] - origin) * inverse
        near, far = torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)
    else:
        axes = 3 if shape == SPHERE else 2
        o, d = origin[..., :axes], ray[..., :axes]
        a, b, c = d.square().sum(-1), (o * d).sum(-1), o.square().sum(-1) - half.square()
        root = (b.square() - a * c).clamp(min=0).sqrt()
        near, far = (-b - root) / a, (-b + root) / a  # equal where the ray passes by
        if shape == CYLINDER:
            top, bottom = (half - origin[..., 2]) / ray[..., 2], (-half - origin[..., 2]) / ray[..., 2]
            near, far = torch.maximum(near, top.minimum(bottom)), torch.minimum(far, top.maximum(bottom))
    return torch.where(near < far, near, torch.inf)


def eighth_power(x):
    """x^8 by squaring, which is several times faster than `pow`."""
    return x.square().square().square()


def surface_normal(point, shape, half, angle):
    """Normal at a point of an object's surface, its edges slightly rounded: point (P, 3), the rest (P,) -> (P, 3)."""
    q = turn(point, angle) / half[:, None]
    cube = q * eighth_power(q).square()  # of the largest coordinate alone, but near an edge
    rim = eighth_power(q[:, :2].norm(dim=-1, keepdim=True)).square()
    cylinder = torch.cat([q[:, :2] * rim, cube[:, 2:]], dim=-1)
    normal = torch.where(shape[:, None] == SPHERE, q, torch.where(shape[:, None] == CYLINDER, cylinder, cube))
    return turn(F.normalize(normal, dim=-1), -angle)


class ClevrRenderer:
    """A vectorised ray caster for CLEVR-like scenes: spheres, cylinders, cubes; rubber or metal; soft lamps.

    A scene is a dict of tensors: of objects (n, K, ...), and `camera` (n, 3) and `lamps` (n, 3, 3).
    """

    def __init__(self, size, objects, device):
        self.size, self.objects, self.device = size, objects, device

    def draw(self, n, generator, lots=1):
        """n scenes; with `lots` > 1 of so many times the objects, each lot a scene of its own and all of them one."""
        low, high = self.objects
        k, device = lots * high, self.device
        radius = torch.tensor(RADII, device=device)[torch.randint(2, (n, k), generator=generator, device=device)]
        shape = torch.randint(3, (n, k), generator=generator, device=device)
        colour = torch.randint(len(COLOURS), (n, k), generator=generator, device=device)
        count = torch.randint(low, high + 1, (n, lots), generator=generator, device=device)
        clearance = radius[:, :, None] + radius[:, None] + 0.25  # CLEVR's rule
        camera = torch.tensor(CAMERA, device=device) + uniform(-CAMERA_JITTER, CAMERA_JITTER, (n, 3), generator)
        lamps = torch.tensor(LAMPS, device=device) + uniform(-LAMP_JITTER, LAMP_JITTER, (n, 3, 3), generator)
        return {
            "present": (torch.arange(high, device=device) < count[..., None]).flatten(1),  # (n, K)
            "shape": shape,
            "half": torch.where(shape == CUBE, CUBE_HALF * radius, radius),
            "xy": place_apart(n, k, 3.0, clearance, generator),
            "angle": uniform(0, 2 * math.pi, (n, k), generator),
            "rgb": torch.tensor(COLOURS, device=device)[colour] / 255,
            "metal": torch.rand((n, k), generator=generator, device=device) < 0.5,
            "camera": camera,
            "lamps": lamps,
        }

    @torch.no_grad()
    def render(self, scene):
        """scene -> image (n, 3, size, size) in [0, 1], label (n, size, size): 0 background, k = object k - 1.

        Objects are drawn at twice the size, the ground, which is smooth, at half of it.
        """
        side = 2 * self.size
        frame = camera_frame(scene["camera"])
        centre = torch.cat([scene["xy"], scene["half"][..., None]], dim=-1)  # (n, K, 3)
        depth, label = self.nearest(scene, frame, centre, side)  # (n, side^2) each

        rays = crop_rays(self.size // 2, self.device) @ frame  # (n, size^2 / 4, 3), world frame
        distance = scene["camera"][:, None, 2:] / -rays[..., 2:]
        ground = self.shade_ground(scene["camera"][:, None] + distance * rays, centre, scene)
        ground = ground.transpose(1, 2).unflatten(2, (self.size // 2, self.size // 2))  # (n, 3, size / 2, size / 2)
        light = F.interpolate(ground, scale_factor=4, mode="bilinear").flatten(2).transpose(1, 2).contiguous()

        i, pixel = torch.nonzero(label, as_tuple=True)
        ray = torch.einsum("pj,pjk->pk", crop_rays(side, self.device)[pixel], frame[i])
        point = scene["camera"][i] + depth[i, pixel, None] * ray
        light[i, pixel] = self.shade_objects(point, F.normalize(ray, dim=-1), i, label[i, pixel] - 1, centre, scene)

        image = light.clamp(0, 1).pow(1 / 2.2).transpose(1, 2).unflatten(2, (side, side))
        return F.avg_pool2d(image, 2), label.unflatten(1, (side, side))[:, ::2, ::2]

    def nearest(self, scene, frame, centre, side):
        """Depth and label of the first object every ray meets: (n, side^2) each; label 0 where none is met.

        An object is tested only against the pixels of a window around it, all objects of one kind at a time.
        """
        n, outside = len(centre), side * side  # pixel `outside` takes what falls off the picture
        seen = torch.einsum("nij,nkj->nki", frame, centre - scene["camera"][:, None])  # camera frame
        scale = FOCAL / 0.3 * side / 2 / seen[..., 2]  # pixels a unit of length
        x = seen[..., 0] * scale + side / 2
        y = -seen[..., 1] * scale + side / 2 * (1 - 1 / 64 / 0.3)
        bounding = torch.tensor([1.0, 2**0.5, 3**0.5], device=self.device)[scene["shape"]] * scene["half"]
        reach = 1.1 * bounding * scale

        depth = torch.full((n, outside + 1), torch.inf, device=self.device)
        label = torch.zeros((n, outside + 1), dtype=torch.long, device=self.device)
        rays, found = crop_rays(side, self.device), []
        small = scene["half"] < sum(RADII) / 2
        for shape in (SPHERE, CYLINDER, CUBE):
            for kind in ((scene["shape"] == shape) & small, (scene["shape"] == shape) & ~small):
                i, k = torch.nonzero(kind & scene["present"], as_tuple=True)
                if len(i) == 0:
                    continue
                span = torch.arange(-int(reach[i, k].max()) - 1, int(reach[i, k].max()) + 2, device=self.device)
                rows, columns = y[i, k].long()[:, None] + span, x[i, k].long()[:, None] + span  # (P, w) each
                inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
                pixel = torch.where(inside, rows[:, :, None] * side + columns[:, None], outside).flatten(1)  # (P, w^2)
                angle = scene["angle"][i, k][:, None]
                origin = turn((scene["camera"][i] - centre[i, k])[:, None], angle)
                ray = turn(rays[pixel.clamp(max=outside - 1)] @ frame[i], angle)
                hit = hit_distance(shape, scene["half"][i, k][:, None], origin, ray)
                flat = i[:, None] * (outside + 1) + pixel
                depth.view(-1).scatter_reduce_(0, flat.flatten(), hit.flatten(), "amin")
                found.append((flat, hit, (k[:, None] + 1).expand_as(flat)))
        for flat, hit, number in found:
            first = (hit < torch.inf) & (hit == depth.view(-1)[flat])
            label.view(-1)[flat[first]] = number[first]
        return depth[:, :-1], label[:, :-1]

    def shade_ground(self, point, centre, scene):
        """Light from the ground: ambient light, less what objects hide, and three lamps past the objects' shadows.

        Shadows and occlusion take an object for the sphere around its centre. point (n, P, 3) -> (n, P, 3).
        """
        radius = torch.where(scene["present"], scene["half"], 0.0)
        to_object = centre[:, :, None] - point[:, None]  # (n, K, P, 3)
        squared = to_object.square().sum(-1)
        hidden = radius.square()[..., None] * to_object[..., 2] / squared**1.5  # share of the sky, cosine-weighted
        light = AMBIENT * (1 - 0.9 * hidden.clamp(0, 1)).prod(1)[..., None]  # (n, P, 1)
        for lamp, power in enumerate(POWER):
            to_lamp = scene["lamps"][:, None, lamp] - point  # (n, P, 3)
            distance = to_lamp.norm(dim=-1)
            along = torch.einsum("nkpc,npc->nkp", to_object, to_lamp / distance[..., None])
            past = (squared - along.square()).clamp(min=0).sqrt() - radius[..., None]  # of the ray, past the surface
            penumbra = LAMP_WIDTH * along / distance[:, None]
            seen = (0.5 + 0.5 * past / penumbra.clamp(min=1e-3)).clamp(0, 1)
            seen = torch.where(along > 0, seen.square() * (3 - 2 * seen), 1.0).prod(1)  # (n, P)
            falling = seen * to_lamp[..., 2] / distance**3  # cosine over squared distance
            light = light + falling[..., None] * torch.tensor(power, device=self.device)
        return light

    def shade_objects(self, point, ray, i, k, centre, scene):
        """Light from object k of scene i towards the camera, at `point` (P, 3) along unit `ray` (P, 3): (P, 3)."""
        rgb, power = scene["rgb"][i, k], torch.tensor(POWER, device=self.device)
        normal = surface_normal(point - centre[i, k], scene["shape"][i, k], scene["half"][i, k], scene["angle"][i, k])
        mirrored = ray - 2 * (ray * normal).sum(-1, keepdim=True) * normal
        to_lamp = scene["lamps"][i] - point[:, None]  # (P, 3 lamps, 3)
        squared = to_lamp.square().sum(-1)
        to_lamp = to_lamp / squared.sqrt()[..., None]

        lambert = (0.2 + 0.8 * (normal[:, None] * to_lamp).sum(-1)).clamp(min=0) / squared  # wide lamps reach round
        ambient = AMBIENT * (1.25 + 0.75 * normal[:, 2]) * (0.5 + 0.5 * (point[:, 2] / RADII[0]).clamp(0, 1))
        diffuse = ambient[:, None] + 0.9 * lambert @ power
        gloss = (mirrored[:, None] * to_lamp).sum(-1).clamp(min=0)
        rubber = rgb * diffuse + 0.05 * (eighth_power(gloss) / squared) @ power

        to_ground = point[:, 2] / (-mirrored[:, 2]).clamp(min=1e-2)  # a mirror shows the lit ground, or the dark room
        room = torch.where(mirrored[:, 2] < 0, 0.18 * torch.exp(-to_ground / 2), 0.04)
        metal = (
            rgb * (room[:, None] + 0.25 * diffuse)
            + (0.15 + 0.85 * rgb) * 6 * (eighth_power(gloss).square() / squared) @ power
        )
        return torch.where(scene["metal"][i, k, None], metal, rubber)


class Pool:
    """Pictures kept as uint8 in memory, each made (drawn, or read from disk) once, the first time it is needed."""

    def __init__(self, length, size, seed, device, make):
        """make(first, last) -> uint8 (last - first, 3, size, size)."""
        self.images = torch.empty((length, 3, size, size), dtype=torch.uint8)
        self.ready = [False] * math.ceil(length / BLOCK)
        self.seed, self.device, self.make = seed, device, make

    def fetch(self, indices):
        """indices (n,) -> (n, 3, size, size) in [0, 1] on the device."""
        for block in {int(i) // BLOCK for i in indices}:
            if not self.ready[block]:
                first, last = block * BLOCK, min((block + 1) * BLOCK, len(self.images))
                self.images[first:last] = self.make(first, last)
                self.ready[block] = True
        return self.images[indices].to(self.device, non_blocking=True).float() / 255

    def batch(self, step, first, last, total):
        """Pictures `first` to `last` of the `total` of a step; every epoch passes over all in an order of its own."""
        position = step * total + torch.arange(first, last)
        epoch = position // len(self.images)
        indices = position % len(self.images)
        for e in epoch.unique().tolist():
            order = self.order(e)
            indices = torch.where(epoch == e, order[indices], indices)
        return self.fetch(indices)

    def order(self, epoch):
        """The first epoch goes straight, so that blocks fill one by one; the others are shuffled."""
        if epoch == 0:
            return torch.arange(len(self.images))
        return torch.randperm(len(self.images), generator=random_generator("order", self.seed, epoch))


class BuiltInClevr(Pool):
    """CLEVR-like scenes of the renderer above: a pool of 10,000 to train on, and held-out ones with exact masks."""

    crop = "clevr"
    source = "built-in CLEVR-like renderer"

    def __init__(self, size, objects, seed, device):
        self.renderer = ClevrRenderer(size, objects, device)
        super().__init__(10_000, size, seed, device, self.draw_block)

    def draw_block(self, first, last):
        generator = random_generator("clevr", self.seed, first, device=self.device)
        image, _ = self.renderer.render(self.renderer.draw(last - first, generator))
        return (image * 255).round().to(torch.uint8)

    def held_out(self, n):
        generator = random_generator("held-out clevr", device=self.device)
        parts = [self.renderer.render(self.renderer.draw(min(BLOCK, n - i), generator)) for i in range(0, n, BLOCK)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def pairs(self, n):
        """n scenes of two lots of objects, the first half of them and the second, under one camera and lamps."""
        return self.renderer.draw(n, random_generator("clevr pairs", device=self.device), lots=2)

    def render(self, scene):
        return self.renderer.render(scene)


class ClevrFolder(Pool):
    """The official CLEVR_v1.0 folder: images/{train,val}/*.png, scenes/*.json, and masks/{train,val}/*.png if there.

    Only scenes whose number of objects is in `objects` are used, as far as scenes/*.json tells it.
    """

    crop = "clevr"

    def __init__(self, root, size, objects, seed, device):
        self.root, self.size, self.objects = self.find(root), size, objects
        self.source = f"CLEVR folder {self.root.resolve().name}"
        self.val = self.files("val")
        train = self.files("train")
        super().__init__(len(train), size, seed, device, lambda first, last: self.read(train[first:last]))

    @staticmethod
    def find(root):
        for folder in (root, root / "CLEVR_v1.0", root / "clevr" / "CLEVR_v1.0"):
            if (folder / "images" / "train").is_dir() and (folder / "images" / "val").is_dir():
                return folder
        raise click.UsageError(
            f"--data-root {root}: found no images/train and images/val there, nor in CLEVR_v1.0 below"
        )

    def files(self, split):
        files = sorted((self.root / "images" / split).glob("*.png"))
        annotation = self.root / "scenes" / f"CLEVR_{split}_scenes.json"
        low, high = self.objects
        if annotation.is_file():
            try:
                counts = {s["image_filename"]: len(s["objects"]) for s in json.loads(annotation.read_text())["scenes"]}
            except (ValueError, KeyError, TypeError) as error:
                raise click.UsageError(f"{annotation} is damaged or is no CLEVR scene file") from error
            files = [f for f in files if low <= counts.get(f.name, low) <= high]
        if not files:
            raise click.UsageError(f"{self.root}/images/{split}: no PNG of a scene with {low} to {high} objects")
        return files

    def read(self, files):
        with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
            images = list(pool.map(lambda f: load_picture(f, self.size, self.crop), files))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def held_out(self, n):
        """The first n validation scenes: images, and labels or None where there are no masks."""
        files = self.val[:n]
        images = self.read(files).to(self.device).float() / 255
        masks = [self.root / "masks" / "val" / f.name for f in files]
        missing = [m for m in masks if not m.is_file()]
        if missing:
            click.echo(f"{missing[0]} is not there: no scores of segmentation, which need a mask for every picture")
            return images, None
        return images, torch.from_numpy(np.stack([self.read_mask(m) for m in masks])).long().to(self.device)

    def read_mask(self, path):
        """A mask -> the object's number in every pixel, 0 for the background: (size, size)."""
        try:
            with Image.open(path) as mask:
                mask.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise click.UsageError(f"{path}: damaged or unreadable mask ({error})") from error
        if mask.mode not in ("L", "P"):
            raise click.UsageError(
                f"{path}: expected a mask of 8 bits a pixel that number the objects, not {mask.mode}"
            )
        return np.asarray(square(mask, self.crop, path).resize((self.size, self.size), Image.Resampling.NEAREST))


def fetch_clevr(data_root):
    """Download and unpack CLEVR v1.0 (18 GB) through torchvision, unless it is there."""
    from torchvision.datasets import CLEVRClassification

    if dist.is_initialized():
        raise click.UsageError("--download: fetch the data in a single process first, then start several")
    try:
        CLEVRClassification(data_root, download=True)
    except (OSError, RuntimeError) as error:  # no network, full disk, wrong checksum
        raise click.ClickException(f"CLEVR v1.0 could not be fetched into {data_root}: {error}") from error


# ---------------------------------------------------------------- Data: two notes at once

SOUND_FFT = 4096  # samples of a frame: notes last, and what tells two of them apart are narrow harmonics
FRAMES = 32  # times that a model sees a sound at
LOUDNESS = 1 / 1024  # root mean square every sound is brought to, for log(1 + 100 m) to span its upper 40 dB
INTERVALS = {"any": range(1, 12), "musical": (3, 4, 5, 7, 8, 9)}  # semitones between two notes, less whole octaves


class Samples:
    """For the cache of `train_vae_audio.Notes`, which keeps spectrograms: notes as they sound, one bin of samples."""

    representation, n_fft, bins = "samples", 0, 1

    def frames(self, samples):
        return samples

    def __call__(self, waveform):
        return waveform[None]


def root_mean_square(waveform):
    """(..., samples) -> (..., 1)."""
    return waveform.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)


def whole_hops(waveform):
    """(..., samples) -> the same, and silence to a whole number of hops: of SAMPLES the STFT has 2 FRAMES frames."""
    return F.pad(waveform, (0, -waveform.shape[-1] % (SOUND_FFT // 4)))


class SoundLevels(nn.Module):
    """Waveforms -> what a model of sounds sees, levels of `bands` logarithmic bands: (B, FRAMES, bands, 1).

    Every sound is brought to LOUDNESS; the STFT's frames are averaged in FRAMES spans of time.
    """

    def __init__(self, bands):
        super().__init__()
        self.spectrogram = Spectrogram("log", SOUND_FFT, bands)
        self.span = math.ceil((math.ceil(SAMPLES / self.spectrogram.hop) + 1) / FRAMES)

    def forward(self, waveform):
        """(B, SAMPLES) -> levels (B, FRAMES, bands, 1)."""
        heard = whole_hops(waveform * (LOUDNESS / root_mean_square(waveform)))
        return self.of_magnitude(self.spectrogram.magnitude(heard))

    def of_magnitude(self, magnitude):
        """STFT magnitudes (B, F, T) -> levels (B, FRAMES, bands, 1)."""
        bands = self.spectrogram.bank @ magnitude
        spans = bands.unflatten(2, (FRAMES, self.span))  # (B, bands, FRAMES, span)
        return log_compress(spans.mean(3)).transpose(1, 2)[..., None]

    def stft_of(self, level):
        """Levels (B, FRAMES, bands, 1) -> STFT magnitudes (B, F, T), interpolated between bands and times."""
        bands = log_expand(level[..., 0].transpose(1, 2))  # (B, bands, FRAMES)
        return self.spectrogram.stft_of(F.interpolate(bands, scale_factor=float(self.span), mode="linear"))


class NoteDuos:
    """Mixtures of two notes of different instruments, made when they are asked for; their stems are the truth.

    Both notes have one loudness, but for up to `max_gain_db` that one is louder. Notes in unison, or whole octaves
    apart, share all harmonics and are not mixed.
    """

    crop = None

    def __init__(self, options, device):
        self.notes = load_notes(options | {"transpose": 0}, Samples())
        self.source, self.seed, self.device = self.notes.source, options["seed"], device
        self.levels = SoundLevels(options["size"]).to(device)
        self.apart = torch.tensor(INTERVALS[options["intervals"]])
        self.max_gain_db, self.instrument = options["max_gain_db"], {}
        for split in SPLITS:
            names = [note.instrument for note in getattr(self.notes, split).notes]
            number = {name: k for k, name in enumerate(sorted(set(names)))}
            self.instrument[split] = torch.tensor([number[name] for name in names])
            self.draw(split, 1, random_generator("any"))

    def draw(self, split, n, generator):
        """Notes and relative levels of n mixtures: indices (n, 2), decibels (n, 2)."""
        pitch, instrument = getattr(self.notes, split).pitch, self.instrument[split]
        chosen = torch.zeros(0, 2, dtype=torch.long)
        for _ in range(100):
            pair = torch.randint(len(pitch), (8 * n, 2), generator=generator)
            interval = pitch[pair].diff(dim=1)[:, 0].abs() % 12
            may = torch.isin(interval, self.apart) & (instrument[pair].diff(dim=1)[:, 0] != 0)
            chosen = torch.cat([chosen, pair[may]])[:n]
            if len(chosen) == n:
                gain = self.max_gain_db / 2 * (2 * torch.rand(n, 1, generator=generator) - 1)
                return chosen, torch.cat([gain, -gain], dim=1)
        raise click.UsageError(f"{split}: there are hardly two notes of different instruments and pitches to be mixed")

    def stems(self, split, pair, decibels):
        """Waveforms (n, 2, SAMPLES), whose sum has LOUDNESS, and what root mean square the notes had (n, 2)."""
        waveform = getattr(self.notes, split).batch(pair.flatten())[0][:, 0].unflatten(0, pair.shape)
        before = root_mean_square(waveform)
        waveform = waveform / before * 10 ** (decibels[..., None] / 20)
        return LOUDNESS * waveform / root_mean_square(waveform.sum(1, keepdim=True)), before[..., 0]

    def batch(self, step, first, last, total):
        """Levels of the mixtures [first, last) of `total` at `step`."""
        pair, decibels = self.draw("train", total, random_generator("mixtures", self.seed, step))
        stems, _ = self.stems("train", pair[first:last], decibels[first:last])
        return self.levels(stems.sum(1).to(self.device))

    def held_out(self, split, n):
        """The first n of the MIXTURES that all runs share: stems (n, 2, SAMPLES), loudness before, families (n, 2)."""
        drawn = self.draw(split, max(n, MIXTURES), random_generator("held out"))
        pair, decibels = (values[:n] for values in drawn)
        return *self.stems(split, pair, decibels), getattr(self.notes, split).family[pair]


def load_data(options, device):
    """The data set of the options; raises click.UsageError where its folder is not what was expected."""
    dataset, data_root = options["dataset"], options["data_root"]
    if options["download"] and (dataset == "sprites" or not data_root):
        raise click.UsageError(
            "--download fetches CLEVR v1.0 (18 GB) for --dataset clevr, NSynth (over 20 GB) for nsynth-duo; "
            "it needs --data-root"
        )
    if options["download"] and dataset == "clevr":
        fetch_clevr(data_root)
    if data_root and not options["download"] and not data_root.is_dir():
        raise click.UsageError(f"--data-root {data_root}: no such folder")
    if dataset == "nsynth-duo":
        return NoteDuos(options, device)
    about = (options["size"], options["objects"], options["seed"], device)
    if dataset == "sprites":
        return Sprites(*about, data_root)
    return ClevrFolder(data_root, *about) if data_root else BuiltInClevr(*about)


# ---------------------------------------------------------------- Model

UPSCALE = 4  # slots are decoded at a quarter of the picture's size and unfolded to it by sub-pixel convolution
BACKGROUND_GRID = 8  # the background's latent moves a smooth picture of 8 x 8 knots: light and shade, but no objects
BACKGROUND_D = 8
NOTHING = 10.0  # a mask logit, or a colour, so far below all others that softmax, or the maximum, passes over it
WINDOW = 3  # cells: of neighbours, only the one of highest KL becomes a slot
BESIDE = 1e-3  # what the KL of cells beside a chosen one still counts
VISIBLE = 0.05  # a layer that changes a pixel by less, in mean absolute colour, leaves it to the background
SMALLEST = 1 / 512  # a slot that owns less of the picture holds no object
ANCHOR = 200.0  # nats a half picture width squared, of a slot's distance from the middle of what it draws
UPSCALE_SOUND = 2  # the same, of a spectrum
LOUDEST = 8.0  # logarithm of a magnitude, that no sound of LOUDNESS has
LOGVAR_START = -4.0  # posteriors start narrow: the ranking by KL means something before the latents carry anything


class Encoding(NamedTuple):
    """What the encoder says of B pictures or sounds; the slots stand in order of falling KL."""

    mu: torch.Tensor  # (B, N, D)
    logvar: torch.Tensor  # (B, N, D)
    cell: torch.Tensor  # (B, N, 2): the (y, x) where every slot stands
    kl: torch.Tensor  # (B, N), nats
    kl_map: torch.Tensor  # (B, H_l, W_l), nats
    background: torch.Tensor | None  # (B, C, h, w)
    kl_background: torch.Tensor  # (B,), nats


class Encoder(nn.Module):
    """Picture -> a posterior of D latents in every cell of a map, where its slot would stand, and pooled features.

    A slot stands up to `shift` from the middle of its cell, on either axis: an object's corner is easier to find than
    its middle, and a slot that stood there would need the reach of twice the object (docs/mvae-log.md). Told no
    position, the encoder treats an object the same wherever it is, and flat ground does not outrank objects. It is told
    where the decoder needs to know (`coords` "absolute" or "both").
    """

    def __init__(self, shape, grid, d, channels, shift, told_position, conv, kernel):
        super().__init__()
        self.told_position, self.furthest = told_position, shift
        # Kernels of even size: one of odd size and stride 2 looks half a pixel beside the middle of what it stands for.
        layers = [conv(shape[0] + 2 * told_position, channels, 6, stride=2, padding=2)]
        for _ in range(int(math.log2(shape[1] // grid[0])) - 1):
            layers += [nn.SiLU(), conv(channels, channels, 4, stride=2, padding=1)]
        layers += [ResBlock(channels, norm=True, conv=conv, kernel=kernel) for _ in range(3)]
        self.trunk = nn.Sequential(*layers, nn.SiLU())
        self.head = nn.Conv2d(channels, 2 * d, 1)
        self.register_buffer("middles", position_grid(*grid), persistent=False)
        if shift:
            self.shift = nn.Conv2d(channels, 2, 1)
            nn.init.zeros_(self.shift.weight)
            nn.init.zeros_(self.shift.bias)
        if told_position:
            self.register_buffer("grid", position_grid(*shape[1:]), persistent=False)

    def forward(self, image):
        """image (B, C, H, W) -> mu, logvar (B, D, H_l, W_l), place (B, 2, H_l, W_l), features (B, channels)."""
        if self.told_position:
            image = torch.cat([image, self.grid.expand(image.shape[0], -1, -1, -1)], dim=1)
        h = self.trunk(image)
        mu, logvar = self.head(h).to(self.middles.dtype).chunk(2, dim=1)
        place = self.middles.expand(image.shape[0], -1, -1, -1)
        if self.furthest:
            place = place + self.furthest * self.shift(h).to(place.dtype).tanh()
        return mu, logvar + LOGVAR_START, place, h.to(place.dtype).mean((2, 3))


class Background(nn.Module):
    """What lies behind all slots: a learned picture, and with `d` > 0 latents that shade it smoothly."""

    def __init__(self, shape, features, d):
        super().__init__()
        self.picture = nn.Parameter(torch.zeros(shape))
        self.d, self.shape = d, shape
        if d:
            self.posterior = nn.Linear(features, 2 * d)
            self.shade = nn.Linear(d, shape[0] * BACKGROUND_GRID**2, bias=False)
            nn.init.normal_(self.shade.weight, std=0.03)

    def forward(self, features, noise):
        """features (B, F), noise (B, d) or None for z = mu -> background (B, C, h, w), KL (B,)."""
        picture = self.picture.expand(features.shape[0], -1, -1, -1)
        if not self.d:
            return picture, torch.zeros_like(features[:, 0])
        mu, logvar = self.posterior(features).chunk(2, dim=1)
        logvar = logvar + LOGVAR_START
        z = mu if noise is None else reparameterize(mu, logvar, noise)
        knots = self.shade(z).unflatten(1, (self.shape[0], BACKGROUND_GRID, BACKGROUND_GRID))
        shade = F.interpolate(knots, size=self.shape[1:], mode="bilinear", align_corners=False)
        return picture + shade, gaussian_kl(mu, logvar).sum(1)


def nothing(layer, op):
    """A layer that draws nothing, such as any slot is out of reach of its cell: (B, N, C, h, w) -> (B, 1, C, h, w)."""
    empty = torch.zeros_like(layer[:, :1])
    if op == "alpha":
        empty[:, :, -1] = -NOTHING
    elif op in ("max", "min"):
        empty += NOTHING if op == "min" else -NOTHING
    return empty


class MVAE(nn.Module):
    """Multi-Entity VAE: posterior map -> top-N cells by KL -> slots -> layers -> composition (Nash et al. 2017).

    compose_at "data": every slot is decoded to a picture and these are combined; "feature": the slots' feature maps
    are combined and decoded on together. op "alpha": softmax masks over slots and background. In half picture widths,
    `shift`: how far from its cell's middle a slot may stand; `reach`: how far from there it is drawn, 0 for no bound.
    `explore`: train with one slot more, from the cell of whose place the other slots explain least.

    With a `domain` the data are sounds: levels (B, FRAMES, size, 1) of `size` bands, one cell wide, so that the height
    of a picture is the logarithm of a frequency, and its colours are times. Layers are logarithms of magnitudes;
    `domain` says as what they are combined: "magnitude", "power" (its square), or "log" (levels).
    """

    def __init__(
        self, *, size, cells, n_slots, d, channels, op, compose_at, domain, suppress, coords, background, shift, reach,
        explore,
    ):  # fmt: skip
        super().__init__()
        self.explore, self.domain, self.bands = explore, domain, size
        self.n_slots, self.d, self.op, self.compose_at = n_slots, d, op, compose_at
        self.suppress, self.reach = suppress, reach
        if domain:
            # Kernels of seven cells: those of one note stand octaves apart.
            shape, self.grid_shape, conv, octaves, kernel = (FRAMES, size, 1), (cells, 1), column_conv, 6, 7
            upscale, shuffle, side = (UPSCALE_SOUND, 1), ColumnShuffle(UPSCALE_SOUND), (size // UPSCALE_SOUND, 1)
        else:
            shape, self.grid_shape, conv, octaves, kernel = (3, size, size), (cells, cells), nn.Conv2d, 3, 3
            upscale, shuffle, side = (UPSCALE, UPSCALE), nn.PixelShuffle(UPSCALE), (size // UPSCALE, size // UPSCALE)
        self.patch = (shape[1] // self.grid_shape[0], shape[2] // self.grid_shape[1])  # what a cell has of the data
        self.subpixels = math.prod(upscale)
        parts = shape[0] if compose_at == "data" else channels
        self.encoder = Encoder(shape, self.grid_shape, d, channels, shift, coords != "relative", conv, kernel)
        self.slot_decoder = BroadcastDecoder(d, channels, side, 2, coords, octaves, conv)
        out = (parts + (op == "alpha")) * (self.subpixels if compose_at == "data" else 1)
        self.to_layer = nn.Sequential(nn.SiLU(), conv(channels, out, 3, padding=1))
        if compose_at == "data":
            self.to_layer.append(shuffle)
            self.to_image = nn.Identity()
        else:
            to_colours = conv(channels, shape[0] * self.subpixels, 3, padding=1)
            self.to_image = nn.Sequential(ResBlock(channels, conv=conv), nn.SiLU(), to_colours, shuffle)
        layer_shape = shape[1:] if compose_at == "data" else side
        self.background = None
        if background != "none":
            d_background = BACKGROUND_D if background == "latent" else 0
            self.background = Background((parts, *layer_shape), channels, d_background)
        self.noise_size = (n_slots + explore) * d + (BACKGROUND_D if background == "latent" else 0)
        self.register_buffer("grid", position_grid(*layer_shape), persistent=False)

    @torch.no_grad()
    def start_from(self, mean):
        """Start where the data are: the background as their mean (C, H, W), slots in its mean colour.

        A slot that starts in a wrong colour is masked out at once and never returns.
        """
        colour = mean.mean((1, 2)).repeat_interleave(self.subpixels)
        if self.compose_at == "feature":
            self.to_image[2].bias.copy_(colour)
            return
        convolution = self.to_layer[1]
        convolution.weight.mul_(0.3)
        convolution.bias.zero_()
        if self.background is not None:
            self.background.picture.copy_(mean)
        if self.domain:  # so that layers, once combined, are the mean
            colour = self.magnitude_of_each(colour).clamp(min=1e-4).log()  # times without sound have no logarithm
        elif self.op == "sum":  # with a background, layers are what a slot adds to it
            colour = torch.zeros_like(colour) if self.background is not None else colour / self.n_slots
        convolution.bias[: len(colour)] = colour
        if self.op == "alpha":
            convolution.bias[len(colour) :] = 1.0  # the background's logit is 0

    def magnitude_of_each(self, level):
        """The magnitude of N equal slots that are combined to a level."""
        if self.op == "sum" and self.domain == "log":
            return log_expand(level / self.n_slots)
        parts = {"magnitude": self.n_slots, "power": math.sqrt(self.n_slots)}[self.domain] if self.op == "sum" else 1
        return log_expand(level) / parts

    def encode(self, image, noise=None, explore=False):
        """image (B, C, H, W) -> Encoding; `noise` (B, d) samples the background's latents.

        With `explore` the Encoding has a slot more, its last.
        """
        mu, logvar, place, features = self.encoder(image)
        kl_map = gaussian_kl(mu, logvar).sum(1)  # (B, H_l, W_l)
        background, kl_background = None, torch.zeros_like(kl_map[:, 0, 0])
        if self.background is not None:
            background, kl_background = self.background(features, noise)
        index = self.select(kl_map, mu, place, background, self.n_slots)
        if explore:
            index = torch.cat([index, self.least_explained(image, mu, place, background, index)], dim=1)
        kl = kl_map.flatten(1).gather(1, index)
        slots = (gather_cells(values, index) for values in (mu, logvar, place))
        return Encoding(*slots, kl, kl_map, background, kl_background)

    @torch.no_grad()
    def select(self, kl_map, mu, place, background, n):
        """The n cells that become slots, in falling order of their KL: -> index (B, n) into the flattened map.

        They are those of highest KL, which counts less the farther from its cell a slot would stand. With `suppress`
        "drawn" they are chosen one after the other, and a cell counts as much less as slots chosen before it draw in
        it, or where its own slot would stand; next to nothing when that is beside one of them. The other ways are
        those of `select_cells`.
        """
        score, kl = kl_map, kl_map.flatten(1)
        if self.encoder.furthest:
            # Else slots may settle, all of them, at the end of one common shift (docs/mvae-log.md).
            away = (place - self.encoder.middles).square().sum(1)  # (B, H_l, W_l)
            score = kl_map * torch.exp(-away / self.encoder.furthest**2)
        if self.suppress == "drawn":
            index = self.select_undrawn(score.flatten(1), mu, place, background, n)
        else:
            index = select_cells(score, n, WINDOW if self.suppress == "window" else 1)
        return index.gather(1, kl.gather(1, index).topk(n).indices)

    def select_undrawn(self, score, mu, place, background, n):
        """The n cells of highest score (B, H_l * W_l), of which slots chosen before take what they draw: (B, n)."""
        rows, columns = self.grid_shape
        row, column = ((place.flatten(2) + 1) / 2).unbind(1)
        row, column = (row * rows).long().clamp(0, rows - 1), (column * columns).long().clamp(0, columns - 1)
        stands = row * columns + column  # (B, H_l * W_l): the cell that the slot of a cell stands in
        free, chosen = torch.ones_like(score), []
        for k in range(n):
            index = (score * free).argmax(1, keepdim=True)  # (B, 1)
            chosen.append(index)
            if k + 1 == n:
                break
            drawn = self.drawn(gather_cells(mu, index), gather_cells(place, index), background).flatten(1)
            taken = (torch.arange(score.shape[1], device=score.device) == index).to(score.dtype)
            near = F.max_pool2d(taken.view(-1, 1, rows, columns), WINDOW, stride=1, padding=WINDOW // 2)
            free = torch.minimum(free, 1 - torch.maximum(drawn, drawn.gather(1, stands)))
            beside = (place.flatten(2) - gather_cells(place, index).transpose(1, 2)).abs().amax(1) < 2 / rows
            free = torch.where(beside | (near.flatten(1) > 0), BESIDE * free, free).masked_fill(taken > 0, -1.0)
        return torch.cat(chosen, dim=1)

    @torch.no_grad()
    def least_explained(self, image, mu, place, background, index):
        """The cell, none of index (B, N), around which these slots leave the largest squared error: (B, 1).

        An object that another slot draws over, or that a neighbour outranks, is in no slot, its cells are charged for
        their KL all the same, and so it would stay. Here its cell gets a share of what there is to gain.
        """
        layer = self.decode(gather_cells(mu, index), gather_cells(place, index))
        error = (self.compose(layer, background) - image).square().sum(1, keepdim=True)
        around = F.avg_pool2d(F.avg_pool2d(error, self.patch), 3, stride=1, padding=1)
        return around.flatten(1).scatter(1, index, -1.0).argmax(1, keepdim=True)

    def drawn(self, z, cell, background):
        """How much of every cell one slot draws, alone, 0 to 1: z (B, 1, D), cell (B, 1, 2) -> (B, H_l, W_l)."""
        behind, slot = self.responsibilities(self.decode(z, cell), background).unbind(1)  # (B, H, W) each
        return F.avg_pool2d(slot / (behind + slot), self.patch)

    def responsibilities(self, layer, background):
        """How much every component owns every pixel: (B, N, C, h, w) -> (B, N + 1, H, W), the background first.

        With "alpha" these are the masks; with the other operators the mean absolute change that a slot decoded alone
        makes to the picture of a layer that draws nothing, the background's share being VISIBLE.
        """
        if self.op == "alpha":
            masks = alpha_masks(layer)[:, :, 0]  # (B, N + 1, h, w)
            scale = UPSCALE if self.compose_at == "feature" else 1
            return F.interpolate(masks, scale_factor=scale, mode="bilinear") if scale > 1 else masks
        empty = self.compose(nothing(layer, self.op), background)
        alone = [self.compose(layer[:, k : k + 1], background) for k in range(layer.shape[1])]
        change = torch.stack([(image - empty).abs().mean(1) for image in alone], dim=1)
        return torch.cat([torch.full_like(change[:, :1], VISIBLE), change], dim=1)

    def decode(self, z, cell):
        """z (B, N, D), cell (B, N, 2) -> layer (B, N, C, h, w), every slot on its own."""
        h = self.slot_decoder(z.flatten(0, 1), cell.flatten(0, 1))  # (B * N, channels, h, w)
        layer = self.to_layer(h).to(self.grid.dtype).unflatten(0, z.shape[:2])
        return self.fade(layer, cell) if self.reach else layer

    def fade(self, layer, cell):
        """Beyond `reach` of its cell a slot turns into what its operator passes over: layer -> layer.

        Without this edge a slot may be drawn at any distance from its cell. All slots then settle on one common
        offset, and objects near the border on that side are left without a cell (docs/mvae-log.md).
        """
        squared = (self.grid - cell[..., None, None]).square().sum(2, keepdim=True)  # (B, N, 1, h, w)
        window = torch.exp(-(squared / self.reach**2).square().square())  # 1 - 2e-4 at a third of the reach, 0.37 at it
        if self.op == "alpha":
            return torch.cat([layer[:, :, :-1], window * (layer[:, :, -1:] + NOTHING) - NOTHING], dim=2)
        if self.op == "max":
            return window * (layer + NOTHING) - NOTHING
        if self.op == "min":
            return window * (layer - NOTHING) + NOTHING
        return window * layer

    def compose(self, layer, background=None):
        """layer (B, M, C, h, w) of any M slots, background (B, C, h, w) -> image (B, C, H, W), levels of a sound."""
        if not self.domain or self.compose_at == "feature":
            return self.to_image(compose(layer, background, self.op)).to(self.grid.dtype)
        magnitude = layer.clamp(max=LOUDEST).exp()
        if self.domain == "log":
            return compose(log_compress(magnitude), background, self.op)
        if self.domain == "power":
            return log_compress((compose(magnitude.square(), background, self.op) + 1e-10).sqrt())
        return log_compress(compose(magnitude, background, self.op))

    def forward(self, image, noise):
        """image (B, C, H, W), noise (B, noise_size) -> Encoding, image (B, C, H, W), offset (B,)."""
        slots = self.n_slots + self.explore
        encoding = self.encode(image, noise[:, slots * self.d :], self.explore)
        slot_noise = noise[:, : slots * self.d].unflatten(1, (slots, self.d))
        layer = self.decode(reparameterize(encoding.mu, encoding.logvar, slot_noise), encoding.cell)
        mean = self.compose(layer, encoding.background)
        return (
            encoding,
            mean,
            self.offset(layer, encoding) if self.encoder.furthest else torch.zeros_like(mean[:, 0, 0, 0]),
        )

    def offset(self, layer, encoding):
        """Squared distance of slots from the middle of what they draw, summed: (B,), in half picture widths squared.

        A slot that draws little counts little. Only where slots stand gets a gradient: what they draw does not shrink
        or fade to come nearer.
        """
        with torch.no_grad():
            owned = self.responsibilities(layer, encoding.background)
            share = owned[:, 1:] / owned.sum(1, keepdim=True)  # (B, N, H, W)
            mass = share.sum((2, 3))
            grid = position_grid(*share.shape[2:]).to(share)
            middle = torch.einsum("bnhw,chw->bnc", share, grid) / mass.clamp(min=1e-6)[..., None]
            drawn = mass / (mass + SMALLEST * share[0, 0].numel())
        return (drawn * (middle - encoding.cell).square().sum(2)).sum(1)


# ---------------------------------------------------------------- Objective


def objective(image, mean, encoding, offset, beta, options):
    """Negative ELBO in nats per picture or sound, its KL weighed by beta, plus the price of offsets; and its terms.

    --kl-cells "all" charges every cell, so that cells which are not selected fall to the prior; "selected" charges the
    slots alone. With relative coordinates nothing else ties a slot to the middle of what it draws: a common offset of
    all slots decodes as well, and then places say nothing of which slots hold one object (docs/mvae-log.md).
    """
    reconstruction = -gaussian_log_likelihood(image, mean, options["sigma"]).mean()
    charged = encoding.kl_map.flatten(1) if options["kl_cells"] == "all" else encoding.kl
    kl = (charged.sum(1) + encoding.kl_background).mean()
    terms = {
        "loss/reconstruction": reconstruction,
        "loss/kl": kl,
        "loss/kl_background": encoding.kl_background.mean(),
        "loss/offset": offset.mean(),
    }
    return reconstruction + beta * kl + ANCHOR * offset.mean(), terms


def update(forward, optimizer, image, noise, beta, lr, options):
    """One step of Adam; returns the terms, of this process's share, and the values used."""
    with autocast(image.device, options["precision"]):
        encoding, mean, offset = forward(image, noise)
    values = descend(*objective(image, mean, encoding, offset, beta, options), optimizer, lr, CLIP)
    negative_elbo = values["loss/reconstruction"] + values["loss/kl"]  # the objective weighs the KL by beta besides
    return values | {"loss/negative_elbo": negative_elbo, "schedule/beta": beta, "schedule/lr": lr}


# ---------------------------------------------------------------- Evaluation

HELD_OUT = 320  # scenes scored, as in the literature; and pairs of scenes recomposed
PAIRS = 64


def adjusted_rand_index(predicted, true):
    """Adjusted Rand index (Hubert & Arabie 1985) of two labellings of the same P points: (P,), (P,) -> float."""
    table = torch.bincount(true * (predicted.max() + 1) + predicted).double()
    table = F.pad(table, (0, -len(table) % (int(predicted.max()) + 1))).view(-1, int(predicted.max()) + 1)

    def pairs(counts):
        return (counts * (counts - 1) / 2).sum()

    together, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / pairs(table.sum())
    highest = (rows + columns) / 2
    return 1.0 if highest == expected else float((together - expected) / (highest - expected))


def overlaps(segment, label, n_slots):
    """Pixels every object (row) shares with every slot (column), their sizes, the objects' labels.

    segment (H, W), label (H, W) -> (K, N), (K,), (N,), (K,); objects smaller than SMALLEST are left out.
    """
    values, sizes = label.unique(return_counts=True)
    objects = values[(values > 0) & (sizes >= SMALLEST * label.numel())]
    masks = label.flatten() == objects[:, None]  # (K, P)
    slots = segment.flatten() == torch.arange(1, n_slots + 1, device=segment.device)[:, None]  # (N, P)
    return masks.double() @ slots.double().T, masks.sum(1), slots.sum(1), objects


def match(shared, objects, slots):
    """Objects matched one to one to slots by intersection over union (Hungarian): object rows, slot columns, IoU."""
    iou = (shared / (objects[:, None] + slots - shared).clamp(min=1)).cpu().numpy()
    rows, columns = linear_sum_assignment(-iou)
    return rows, columns, iou


def segmentation_scores(responsibility, label):
    """Scores of one scene: responsibility (N + 1, H, W), label (H, W) -> ARI-FG, mIoU, count error, duplicates.

    ARI-FG compares, on true object pixels, the slot with the largest responsibility. The others use the segments, in
    which the background takes part. A slot holds an object when its segment fills SMALLEST of the picture; slots that
    share most of their segment with one and the same object are duplicates but for one. A scene without an object of
    at least SMALLEST has no scores: {}.
    """
    n_slots = len(responsibility) - 1
    foreground = label > 0
    shared, objects, slots, labels = overlaps(responsibility.argmax(0), label, n_slots)
    if len(labels) == 0:
        return {}
    ari = adjusted_rand_index(responsibility[1:].argmax(0)[foreground], label[foreground])
    rows, columns, iou = match(shared, objects, slots)
    active = slots >= SMALLEST * label.numel()
    most, owner = shared[:, active].max(0)
    claimed = owner[most > 0.5 * slots[active]]
    return {
        "ari_fg": ari,
        "miou": iou[rows, columns].sum() / len(objects),
        "slot_count_error": abs(int(active.sum()) - len(objects)),
        "duplicates": (len(claimed) - len(claimed.unique())) / max(1, int(active.sum())),
    }


def cell_offsets(responsibility, cell):
    """Distances of cells from the middle of what their slots own, in half picture widths: -> (number of active slots,).

    responsibility (B, N + 1, H, W), cell (B, N, 2); slots that own less than SMALLEST of the picture are left out.
    """
    grid = position_grid(*responsibility.shape[2:]).to(cell.device)
    owned = F.one_hot(responsibility.argmax(1), responsibility.shape[1])[..., 1:].permute(0, 3, 1, 2)  # (B, N, H, W)
    area = owned.sum((2, 3))
    middle = torch.einsum("bnhw,chw->bnc", owned.float(), grid) / area.clamp(min=1)[..., None]
    return (middle - cell).norm(dim=-1)[area >= SMALLEST * owned[0, 0].numel()]


def psnr(image, truth, where):
    """Peak signal-to-noise ratio in dB on the pixels `where` (H, W) of pictures (3, H, W)."""
    error = (image.clamp(0, 1) - truth).square()[:, where].mean()
    return float(-10 * torch.log10(error.clamp(min=1e-10)))


def showing(scene, wanted):
    """The scene with only the objects `wanted` (K,) of its (n, K)."""
    return scene | {"present": scene["present"] & wanted}


def slots_of(model, image, label, wanted):
    """Encode, and find for every picture the layers of the slots matched to the objects `wanted` (K,)."""
    encoding = model.encode(image)
    layer = model.decode(encoding.mu, encoding.cell)
    segment = model.responsibilities(layer, encoding.background).argmax(1)
    chosen = []
    for b in range(len(image)):
        shared, objects, slots, labels = overlaps(segment[b], label[b], model.n_slots)
        rows, columns, iou = match(shared, objects, slots)
        taken = wanted[labels[rows] - 1].cpu().numpy() & (iou[rows, columns] > 0)
        chosen.append(layer[b, columns[taken]])
    return encoding, layer, chosen


@torch.no_grad()
def score_recomposition(model, data, n):
    """Half the objects of A and half of B, through slots, against the scene drawn anew; and plain reconstruction of A.

    All are PSNRs on object pixels, so that their differences are the price of recomposing; "shown" are the pixels of
    the new scene that its objects show in their own sources too: what is hidden there no model can know. A and B are
    placed as one scene: their objects do not run into each other when drawn together.
    """
    both = data.pairs(n)
    index = torch.arange(both["present"].shape[1], device=both["present"].device)
    in_a, half = index < len(index) // 2, index % 2 == 0
    truth, true_label = data.render(showing(both, half))
    image, label = data.render(showing(both, in_a))
    image_b, label_b = data.render(showing(both, ~in_a))
    encoding, layer, from_a = slots_of(model, image, label, half)
    _, _, from_b = slots_of(model, image_b, label_b, half)
    plain = model.compose(layer, encoding.background)
    shown = (true_label > 0) & ((true_label == label) | (true_label == label_b))
    scores = {"recomposition_psnr": [], "recomposition_psnr_shown": [], "reconstruction_psnr": []}
    for k in range(n):
        if not shown[k].any() or not (label[k] > 0).any():
            continue
        background = None if encoding.background is None else encoding.background[k : k + 1]
        parts = torch.cat([from_a[k], from_b[k]])[None]  # (1, M, C, h, w)
        parts = parts if parts.shape[1] else nothing(layer[k : k + 1], model.op)
        recomposed = model.compose(parts, background)[0]
        scores["recomposition_psnr"].append(psnr(recomposed, truth[k], true_label[k] > 0))
        scores["recomposition_psnr_shown"].append(psnr(recomposed, truth[k], shown[k]))
        scores["reconstruction_psnr"].append(psnr(plain[k], image[k], label[k] > 0))
    return {name: float(np.mean(values)) for name, values in scores.items() if values}


@torch.no_grad()
def evaluate(model, data, images, labels, sigma):
    """Scores on held-out pictures, z = mu: MSE, likelihood, KL by rank; with labels ARI-FG and its companions."""
    sums, scenes, offsets = {}, [], []
    for i in range(0, len(images), BLOCK):
        image = images[i : i + BLOCK]
        encoding = model.encode(image)
        layer = model.decode(encoding.mu, encoding.cell)
        mean = model.compose(layer, encoding.background)
        score = {
            "mse": (mean - image).square().mean((1, 2, 3)),
            "log_likelihood": gaussian_log_likelihood(image, mean, sigma),
            "kl": encoding.kl_map.sum((1, 2)) + encoding.kl_background,
            "kl_background": encoding.kl_background,
        }
        ranks = min(model.n_slots + 2, encoding.kl_map[0].numel())
        by_rank = encoding.kl_map.flatten(1).gather(1, select_cells(encoding.kl_map, ranks, WINDOW))
        score |= {f"kl_rank/{r + 1}": by_rank[:, r] for r in range(ranks)}
        for name, value in score.items():
            sums[name] = sums.get(name, 0) + value.sum().item()
        if labels is not None:
            owned = model.responsibilities(layer, encoding.background)
            offsets += cell_offsets(owned, encoding.cell).tolist()
            scored = (segmentation_scores(r, t) for r, t in zip(owned, labels[i : i + BLOCK], strict=True))
            scenes += [scores for scores in scored if scores]
    metrics = {name: total / len(images) for name, total in sums.items()}
    if scenes:
        metrics |= {name: float(np.mean([s[name] for s in scenes])) for name in scenes[0]}
        metrics["scenes_scored"] = len(scenes)
    if offsets:
        metrics["cell_offset"] = float(np.mean(offsets))
    if hasattr(data, "pairs"):
        metrics |= score_recomposition(model, data, PAIRS)
    return metrics


# ---------------------------------------------------------------- Evaluation of sounds

MIXTURES = 500  # of held-out notes, that a finished run is judged by
WATCHED = 100  # of notes of the valid split, at every tenth of a run
HEARD = 100  # of the MIXTURES, those whose slots go through Griffin-Lim
AT_ONCE = 4  # mixtures heard at a time: Griffin-Lim takes twice as long where its spectra do not fit into the cache


def stft_of(waveform, n_fft=SOUND_FFT):
    """(..., samples) -> complex (..., F, T), as SoundLevels sees magnitudes."""
    window = torch.hann_window(n_fft, device=waveform.device)
    heard = whole_hops(waveform.flatten(0, -2))
    spectrum = torch.stft(heard, n_fft, n_fft // 4, window=window, return_complex=True)
    return spectrum.unflatten(0, waveform.shape[:-1])


def soft_masks(magnitude):
    """Magnitudes of M sounds (B, M, F, T) -> the share of each in their power, which sum to one (Wiener 1949)."""
    power = magnitude.square() + 1e-12
    return power / power.sum(1, keepdim=True)


def masked(waveform, masks):
    """What masks (B, M, F, T) let through of sounds (B, samples), at the sounds' own phases: (B, M, samples)."""
    n_fft = 2 * (masks.shape[2] - 1)
    spectrum = (stft_of(waveform, n_fft)[:, None] * masks).flatten(0, 1)
    window = torch.hann_window(n_fft, device=waveform.device)
    parts = torch.istft(spectrum, n_fft, n_fft // 4, window=window, length=waveform.shape[1])
    return parts.unflatten(0, masks.shape[:2])


def si_sdr(estimate, target):
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019): (..., samples) twice -> (...)."""
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp(min=1e-20)
    wanted = scale * target
    distortion = (estimate - wanted).square().sum(-1)
    return 10 * torch.log10(wanted.square().sum(-1).clamp(min=1e-20) / distortion.clamp(min=1e-20))


def assign(score):
    """The slots that fit best to the stems, one to one: scores (B, N, S) -> slots (B, S)."""
    best = [linear_sum_assignment(one.T.cpu().numpy(), maximize=True)[1] for one in score]
    return torch.tensor(np.stack(best), device=score.device)


class Separation(NamedTuple):
    """Mixtures taken apart; B mixtures, S stems, each with the slot that fits it best."""

    level: torch.Tensor  # (B, FRAMES, bands, 1) of the mixtures
    mean: torch.Tensor  # (B, FRAMES, bands, 1), their reconstruction
    encoding: Encoding
    layer: torch.Tensor  # (B, S, ...), of the slots of the stems
    alone: torch.Tensor  # (B, S, FRAMES, bands, 1), the slots decoded alone
    parts: torch.Tensor  # (B, S, samples), the slots' soft masks on the mixtures
    gained: torch.Tensor  # (B, S), dB of SI-SDR above that of the mixture itself


def separate(model, levels, stems):
    """Mixtures of stems (B, S, samples), encoded, every slot decoded, its mask applied: -> Separation."""
    mixture = stems.sum(1)
    level = levels(mixture)
    encoding = model.encode(level)
    layer = model.decode(encoding.mu, encoding.cell)
    alone = torch.stack([model.compose(layer[:, k : k + 1]) for k in range(layer.shape[1])], dim=1)
    magnitude = levels.stft_of(alone.flatten(0, 1)).unflatten(0, alone.shape[:2])
    parts = masked(mixture, soft_masks(magnitude))
    ratio = si_sdr(parts[:, :, None], stems[:, None])  # (B, N, S)
    slot = assign(ratio)
    b = torch.arange(len(slot), device=slot.device)[:, None]
    gained = ratio.transpose(1, 2).gather(2, slot[..., None])[..., 0] - si_sdr(mixture[:, None], stems)
    return Separation(level, model.compose(layer), encoding, layer[b, slot], alone[b, slot], parts[b, slot], gained)


def distance(level, reference):
    """`log_spectral_distance` of levels (B, FRAMES, bands, 1), in dB: (B,)."""
    return log_spectral_distance(level[..., 0].transpose(1, 2), reference[..., 0].transpose(1, 2))


@torch.no_grad()
def evaluate_sounds(model, data, split, n, sigma):
    """Scores on n mixtures of a split's notes, z = mu, slots under the best permutation.

    "own_instrument": the share of mixtures in which both slots are nearer, in levels, to their own stem than to the
    other. Recomposed are the slots of neighbours, one of each, against the mixture of their stems.
    """
    stems, _, _ = data.held_out(split, n)
    sums, gained = {}, []
    for i in range(0, n, BLOCK):
        some = stems[i : i + BLOCK].to(data.device)
        found = separate(model, data.levels, some)
        gained.append(found.gained.flatten().cpu())
        own = data.levels.of_magnitude(stft_of(some.flatten(0, 1)).abs()).unflatten(0, (-1, 2))  # as loud as in the sum
        apart = (found.alone[:, :, None] - own[:, None]).square().mean((3, 4, 5))  # (B, slot, stem)
        recomposed = model.compose(torch.stack([found.layer[:, 0], found.layer.roll(1, 0)[:, 1]], dim=1))
        remix = stft_of(some[:, 0] + some.roll(1, 0)[:, 1]).abs()
        score = {
            "mse": (found.mean - found.level).square().mean((1, 2, 3)),
            "log_likelihood": gaussian_log_likelihood(found.level, found.mean, sigma),
            "kl": found.encoding.kl_map.sum((1, 2)),
            "own_instrument": (apart.argmin(2) == torch.arange(2, device=apart.device)).all(1).double(),
            "lsd": distance(found.mean, found.level),
            "lsd_recomposed": distance(recomposed, data.levels.of_magnitude(remix)),
        }
        for name, value in score.items():
            sums[name] = sums.get(name, 0) + value.sum().item()
    gained = torch.cat(gained)
    metrics = {name: total / n for name, total in sums.items()}
    return metrics | {
        "si_sdr_gained": gained.mean().item(),
        "si_sdr_gained_median": gained.median().item(),
        "si_sdr_gained_above_10": (gained > 10).double().mean().item(),
    }


def family_agreement(model, data, n):
    """How often stage 2's classifier hears the family of a stem: in a slot alone, its mask, the mixture, the stem.

    All are brought to the loudness that the note had. A slot alone is heard through Griffin-Lim, of the first HEARD
    mixtures. What is heard in a mixture is held against both stems, and right for both only where they are of one
    family: "ceiling".
    """
    classifier = train_classifier(data.notes)
    stems, loudness, family = data.held_out("test", n)
    right = {}
    for i in range(0, n, AT_ONCE):
        some = stems[i : i + AT_ONCE]
        with torch.no_grad():
            found = separate(model, data.levels, some.to(data.device))
        heard = {
            "masked": found.parts.flatten(0, 1).cpu(),
            "mixture": some.sum(1).repeat_interleave(2, 0),
            "stem": some.flatten(0, 1),
        }
        if i < HEARD:
            heard["slot"] = griffin_lim(data.levels.stft_of(found.alone.flatten(0, 1)).cpu())
        for name, waveform in heard.items():
            louder = waveform * (loudness[i : i + AT_ONCE].reshape(-1, 1) / root_mean_square(waveform))
            found_family = classifier(classifier.features(stft(louder)))
            right.setdefault(name, []).append(found_family == family[i : i + AT_ONCE].flatten())
    alike = (family[:, 0] == family[:, 1]).double().mean().item()
    shares = {f"family_{name}": torch.cat(hits).double().mean().item() for name, hits in right.items()}
    return shares | {"family_mixture_ceiling": (1 + alike) / 2}


# ---------------------------------------------------------------- Figures

SEGMENT_COLOURS = np.array(
    [(40, 40, 40), (230, 81, 0), (30, 136, 229), (67, 160, 71), (253, 216, 53), (142, 36, 170), (0, 172, 193),
     (244, 143, 177), (121, 85, 72), (158, 157, 36), (236, 239, 241)], dtype=np.uint8
)  # fmt: skip


def picture(image):
    return to_uint8(image.cpu().numpy())


@torch.no_grad()
def decomposition_figure(model, images):
    """A row a picture: input, reconstruction, KL map with the chosen cells, segments, every slot decoded alone."""
    encoding = model.encode(images)
    layer = model.decode(encoding.mu, encoding.cell)
    mean = model.compose(layer, encoding.background)
    segments = model.responsibilities(layer, encoding.background).argmax(1).cpu().numpy()
    alone = [model.compose(layer[:, k : k + 1], encoding.background) for k in range(model.n_slots)]
    rows = []
    for b in range(len(images)):
        kl_map = kl_tile(encoding.kl_map[b].cpu().numpy(), encoding.cell[b].cpu().numpy(), range(model.n_slots))
        row = [(picture(images[b]), "input"), (picture(mean[b]), "reconstruction"), (kl_map, "KL map")]
        row.append((SEGMENT_COLOURS[segments[b] % len(SEGMENT_COLOURS)], "segments"))
        row += [(picture(alone[k][b]), f"slot {k}: {encoding.kl[b, k]:.0f} nats") for k in range(model.n_slots)]
        rows.append([(tile, caption, False) for tile, caption in row])
    return contact_sheet(rows)


@torch.no_grad()
def recomposition_figure(model, images):
    """A row a pair of pictures A, B: both, the first two slots of each alone, and those together on A's background."""
    encoding = model.encode(images)
    layer = model.decode(encoding.mu, encoding.cell)
    count = min(2, model.n_slots)
    rows = []
    for a, b in zip(range(0, len(images), 2), range(1, len(images), 2), strict=False):
        background = None if encoding.background is None else encoding.background[a : a + 1]
        parts = torch.cat([layer[a, :count], layer[b, :count]])[None]  # (1, M, C, h, w)
        row = [(picture(images[a]), "A", False), (picture(images[b]), "B", False)]
        for k in range(2 * count):
            name = f"{'A' if k < count else 'B'}, slot {k % count}"
            row.append((picture(model.compose(parts[:, k : k + 1], background)[0]), name, False))
        rows.append([*row, (picture(model.compose(parts, background)[0]), "recomposition", True)])
    return contact_sheet(rows)


@torch.no_grad()
def replaced(model, encoding, b, k, z=None, cell=None):
    """Picture b composed anew, its slot k with other latents z (n, D) or at other places cell (n, 2): (n, 3, H, W)."""
    n = len(z if z is not None else cell)
    every = [values[b : b + 1].repeat(n, 1, 1) for values in (encoding.mu, encoding.cell)]  # (n, N, ...)
    for values, new in zip(every, (z, cell), strict=True):
        if new is not None:
            values[:, k] = new
    background = None if encoding.background is None else encoding.background[b : b + 1].expand(n, -1, -1, -1)
    return model.compose(model.decode(*every), background)


@torch.no_grad()
def traversal_figure(model, images, rows=6, columns=7):
    """One latent of slot 0 at a time through the prior's width, a row each: those of highest KL, the rest as it was."""
    encoding = model.encode(images[:1])
    mu = encoding.mu[0, 0]
    kl = gaussian_kl(mu, encoding.logvar[0, 0])
    values, sheet = torch.linspace(-2.4, 2.4, columns, device=mu.device), []
    for latent in kl.topk(min(rows, model.d)).indices.tolist():
        z = mu.repeat(columns, 1)
        z[:, latent] = values
        drawn = replaced(model, encoding, 0, 0, z=z)
        row = [(picture(images[0]), f"latent {latent}: {kl[latent]:.1f} nats", False)]
        sheet.append(row + [(picture(d), f"{v:+.1f}", False) for d, v in zip(drawn, values.tolist(), strict=True)])
    return contact_sheet(sheet)


@torch.no_grad()
def moved_figure(model, images, columns=7):
    """A row a picture: its slot 0, whose place goes from left to right through the picture, and nothing else."""
    encoding = model.encode(images)
    x, sheet = torch.linspace(-0.75, 0.75, columns, device=images.device), []
    for b in range(len(images)):
        cell = torch.stack([encoding.cell[b, 0, 0].expand(columns), x], dim=1)
        drawn = replaced(model, encoding, b, 0, cell=cell)
        row = [(picture(images[b]), "input", False)]
        sheet.append(row + [(picture(d), f"x = {v:+.2f}", False) for d, v in zip(drawn, x.tolist(), strict=True)])
    return contact_sheet(sheet)


CURVES = {
    "ari_fg": "ARI-FG", "miou": "mIoU", "duplicates": "duplicates", "si_sdr_gained": "SI-SDR gained, mean (dB)",
    "si_sdr_gained_median": "SI-SDR gained, median (dB)",
}  # fmt: skip


def curve_figure(curve):
    """Scores against minutes of training, from the points of curve.json."""
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    minutes = [point["minutes"] for point in curve]
    for name, label in CURVES.items():
        if all(name in point for point in curve):
            axes.plot(minutes, [point[name] for point in curve], marker=".", label=label)
    axes.set(xlabel="minutes of training")
    axes.set_ylim(0, None if "si_sdr_gained" in curve[0] else 1)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="center right")
    return plotted(figure)


# ---------------------------------------------------------------- Figures and sounds of mixtures


def level_tile(level, top=None):
    """Levels (FRAMES, bands, 1) as a picture: time to the right, frequency upwards, black to `top`."""
    return heat_map(level[..., 0].T.flip(0).cpu().numpy(), top)


def mixture_tiles(level, encoding, b):
    """The tiles of a mixture and of its KL map, with the slots' numbers at their cells."""
    kl_map, cell = encoding.kl_map[b].flip(0), encoding.cell[b] * torch.tensor([-1.0, 1.0], device=level.device)
    marked = kl_tile(kl_map.cpu().numpy(), cell.cpu().numpy(), range(len(cell)))
    return [(level_tile(level[b]), f"mixture {b}", False), (marked, "KL map", False)]


@torch.no_grad()
def separation_figure(model, data, rows=5):
    """Mixtures: levels, KL map, reconstruction, and both slots alone, each beside the stem it should be."""
    stems = data.held_out("valid", rows)[0].to(data.device)
    found, sheet = separate(model, data.levels, stems), []
    own = [data.levels.of_magnitude(stft_of(stem).abs()) for stem in stems.unbind(1)]
    for b in range(rows):
        top = found.level[b].max().item()
        row = [
            *mixture_tiles(found.level, found.encoding, b),
            (level_tile(found.mean[b], top), "reconstruction", False),
        ]
        for k in range(2):
            row.append((level_tile(own[k][b], top), f"stem {k}", False))
            row.append((level_tile(found.alone[b, k], top), f"its slot: {found.gained[b, k]:+.1f} dB", True))
        sheet.append(row)
    return contact_sheet(sheet)


@torch.no_grad()
def remix_figure(model, data, rows=4):
    """Two mixtures a row, a slot of each, the two recomposed, and the true mixture of their stems."""
    stems = data.held_out("valid", 2 * rows)[0].to(data.device)
    found, sheet = separate(model, data.levels, stems), []
    layer = torch.stack([found.layer[0::2, 0], found.layer[1::2, 1]], dim=1)
    recomposed = model.compose(layer)
    true = data.levels.of_magnitude(stft_of(stems[0::2, 0] + stems[1::2, 1]).abs())
    for r in range(rows):
        a, b = 2 * r, 2 * r + 1
        tiles = {
            f"mixture {a}": found.level[a], "its slot": found.alone[a, 0], f"mixture {b}": found.level[b],
            "one of its slots": found.alone[b, 1], "recomposed": recomposed[r], "true mixture": true[r],
        }  # fmt: skip
        sheet.append([(level_tile(level), name, name == "recomposed") for name, level in tiles.items()])
    return contact_sheet(sheet)


@torch.no_grad()
def hear(model, data, run, step, mixtures=2):
    """Mixtures and their slots, masked and through Griffin-Lim, as sounds of the run."""
    stems = data.held_out("valid", mixtures)[0].to(data.device)
    found = separate(model, data.levels, stems)
    for b in range(mixtures):
        top = 2 * stems[b].sum(0).abs().max()
        run.sound(f"mixture{b}", stems[b].sum(0) / top, step)
        decoded = griffin_lim(data.levels.stft_of(found.alone[b]).cpu())
        for k in range(2):
            run.sound(f"mixture{b}-slot{k}-masked", found.parts[b, k] / top, step)
            run.sound(f"mixture{b}-slot{k}-griffin-lim", decoded[k] / top.cpu(), step)


# ---------------------------------------------------------------- Command line

PRESETS = {
    "sprites": {"size": 64, "objects": "3-4", "d": 16, "background": "picture", "sigma": 0.1, "beta": 4.0, "batch": 16,
                "minutes": 10.0},
    "clevr": {"size": 64, "objects": "3-6", "n_slots": 6, "background": "latent", "sigma": 0.05, "beta": 4.0,
              "warmup": 0.4, "batch": 16, "minutes": 20.0},
    "nsynth-duo": {"size": 192, "cells": 48, "n_slots": 2, "d": 24, "channels": 64, "op": "sum", "domain": "magnitude",
                   "suppress": "window", "coords": "both", "background": "none", "shift": 0.0, "reach": 0.0,
                   "explore": False, "sigma": 0.15, "beta": 4.0, "minutes": 15.0},
}  # fmt: skip

MODEL_OPTIONS = (
    "size",
    "cells",
    "n_slots",
    "d",
    "channels",
    "op",
    "compose_at",
    "domain",
    "suppress",
    "coords",
    "background",
    "shift",
    "reach",
    "explore",
)
# What a resumed run may change; the rest made its weights.
RESUMABLE = {
    "steps",
    "minutes",
    "device",
    "precision",
    "compile_model",
    "data_root",
    "download",
    "cache",
    "out",
    "resume",
    "dry_run",
}
CLIP = (
    2000.0  # of the gradient's norm; most steps are clipped, so that a strange scene weighs no more than a common one
)


class ObjectCount(click.ParamType):
    """A number of objects or a range of it: "4" -> (4, 4), "3-6" -> (3, 6)."""

    name = "count"

    def convert(self, value, param, ctx):
        try:
            if isinstance(value, str):
                low, _, high = value.partition("-")
                low, high = int(low), int(high or low)
            else:  # a pair, as config.json has it
                low, high = value
        except (ValueError, TypeError):
            self.fail(f"{value!r} is no number or range of numbers such as 3-6", param, ctx)
        if not 1 <= low <= high <= 10:
            self.fail(f"{value!r}: expected 1 to 10 objects, the smaller number first", param, ctx)
        return low, high


def check_options(options):
    """Raise click.UsageError for options that do not go together."""
    size, cells, sound = options["size"], options["cells"], options["dataset"] == "nsynth-duo"
    unit = UPSCALE_SOUND if sound else UPSCALE
    if size % unit or size // cells not in (2, 4, 8, 16, 32) or size % cells:
        raise click.UsageError(
            f"--size {size} --cells {cells}: the size must be a multiple of {unit}, and 2, 4, 8, ... times the cells"
        )
    if options["n_slots"] + options["explore"] > (cells if sound else cells**2):
        raise click.UsageError(
            f"--N {options['n_slots']}: a map of {cells} x {1 if sound else cells} cells has no so many"
        )
    if options["channels"] % 8:
        raise click.UsageError(f"--channels {options['channels']}: expected a multiple of 8")
    if options["op"] in ("alpha", "max", "min") and options["background"] == "none" and not sound:
        raise click.UsageError(f"--op {options['op']} needs a --background to show where no slot draws anything")
    if sound != (options["domain"] is not None):
        raise click.UsageError("--domain is for sounds, --dataset nsynth-duo, and they need one")
    if sound and (options["op"] == "alpha" or options["background"] != "none"):
        raise click.UsageError("--dataset nsynth-duo: sounds have no --background, and hence no --op alpha")
    if sound and (options["suppress"] == "drawn" or options["shift"] or options["reach"]):
        raise click.UsageError(
            "--dataset nsynth-duo: a note is drawn over all frequencies; --suppress drawn, --shift and --reach are for "
            "pictures"
        )
    if sound and options["compose_at"] == "feature" and options["domain"] != "magnitude":
        raise click.UsageError("--compose feature combines feature maps, in no --domain: leave that at magnitude")
    if sound and options["n_slots"] < 2:
        raise click.UsageError("--N 1: two notes need two slots")


def run_name(options):
    return "mvae-{dataset}-{op}-N{n_slots}-seed{seed}".format(**options)


def headline(metrics):
    """The scores a person watches, in one line."""
    names = (
        "mse", "kl", "ari_fg", "miou", "slot_count_error", "duplicates", "cell_offset", "recomposition_psnr",
        "si_sdr_gained", "si_sdr_gained_median", "own_instrument", "lsd", "lsd_recomposed", "family_slot",
        "family_masked", "family_mixture",
    )  # fmt: skip
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)


def report_pictures(model, data, images, labels, run, step, due, sigma):
    """Figures of a run on pictures, and, where they are due, its scores."""
    run.figure("decomposition", decomposition_figure(model, images[:6]), step)
    run.figure("recomposition", recomposition_figure(model, images[:8]), step)
    if not due:
        return None
    run.figure("traversals", traversal_figure(model, images), step)
    run.figure("moved", moved_figure(model, images[:6]), step)
    return evaluate(model, data, images, labels, sigma)


def report_sounds(model, data, run, step, due, sigma):
    """Figures of a run on mixtures, and, where they are due, sounds and scores on notes of the valid split."""
    run.figure("separation", separation_figure(model, data), step)
    run.figure("remix", remix_figure(model, data), step)
    if not due:
        return None
    hear(model, data, run, step)
    return evaluate_sounds(model, data, "valid", WATCHED, sigma)


@click.command(cls=PresetCommand, presets=PRESETS, context_settings={"show_default": True})
@click.option("--dataset", type=click.Choice(list(PRESETS)), default="sprites")
@click.option("--size", type=click.IntRange(16), default=64, help="Height and width of pictures; bands of sounds.")
@click.option("--objects", type=ObjectCount(), default="3-6", help="Objects in a scene: a number or a range.")
@click.option("--families", type=Families(), default="bass,brass,flute,guitar,keyboard,vocal", help="Of instruments.")
@click.option(
    "--intervals",
    type=click.Choice(list(INTERVALS)),
    default="any",
    help="Between two notes: any but unisons and octaves, or consonances.",
)
@click.option("--max-gain-db", type=FiniteRange(0), default=6.0, help="How much louder one note may be.")
@click.option("--cache", type=FOLDER, default="data/spectrograms", help="Folder that keeps notes.")
@click.option("--N", "n_slots", type=click.IntRange(1), default=4, help="Slots.")
@click.option("--D", "d", type=click.IntRange(1), default=12, help="Latents of a slot.")
@click.option("--channels", type=click.IntRange(8), default=32, help="Width of all layers, a multiple of 8.")
@click.option("--cells", type=click.IntRange(2), default=16, help="Height and width of the posterior map.")
@click.option("--op", type=click.Choice(OPS), default="alpha", help="How layers are combined.")
@click.option("--compose", "compose_at", type=click.Choice(["data", "feature"]), default="data", help="Where they are.")
@click.option("--domain", type=click.Choice(["magnitude", "power", "log"]), help="As what sounds are combined.")
@click.option(
    "--background",
    type=click.Choice(["none", "picture", "latent"]),
    default="picture",
    help="Behind the slots: nothing, one learned picture, or that picture shaded by latents.",
)
@click.option("--kl-cells", type=click.Choice(["all", "selected"]), default="all", help="Cells whose KL is charged.")
@click.option(
    "--suppress",
    type=click.Choice(["none", "window", "drawn"]),
    default="drawn",
    help="Cells that cannot become slots: none, neighbours of a higher one, or also those that a chosen slot draws.",
)
@click.option(
    "--coords",
    type=click.Choice(["relative", "absolute", "both"]),
    default="relative",
    help="What the decoder is told: the offset from the slot's cell, the place in the picture, or both.",
)
@click.option("--shift", type=FiniteRange(0), default=0.3, help="How far from its cell's middle a slot may stand.")
@click.option("--reach", type=FiniteRange(0), default=0.6, help="How far from its cell a slot is drawn; 0: no bound.")
@click.option(
    "--explore/--no-explore", default=True, help="Train with a slot more, where the others explain the picture least."
)
@click.option("--sigma", type=POSITIVE, default=0.1, help="Likelihood's standard deviation.")
@click.pass_context
def main(context, **options):
    """Train a Multi-Entity VAE.

    \b
    python train_mvae.py --dataset sprites
    python train_mvae.py --dataset clevr --N 4 --op sum
    python train_mvae.py --dataset clevr --data-root CLEVR_v1.0 --minutes 60
    python train_mvae.py --dataset nsynth-duo --data-root nsynth
    python train_mvae.py --resume runs/mvae-clevr-alpha-N6-seed0 --minutes 90
    """
    # 1. Options.
    script = Path(__file__).stem
    settle_run(context, options, RESUMABLE, script)
    check_options(options)
    if options["dry_run"]:
        click.echo(json.dumps(options, indent=2, default=str))
        return
    device = pick_device(options["device"])
    rank, world = start_distributed(device)

    # 2. Data.
    data, sound = load_data(options, device), options["domain"] is not None
    images, labels = (None, None) if sound else data.held_out(HELD_OUT)

    # 3. Build, initialise from the data, move to the device; go on from the checkpoint where there is one.
    torch.manual_seed(options["seed"])
    model = MVAE(**{name: options[name] for name in MODEL_OPTIONS})
    model.start_from(data.batch(0, 0, 256, 256).mean(0).cpu())
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"], betas=(0.9, 0.99))
    about = {"name": options["dataset"], "source": data.source, "crop": data.crop}
    started = start_run(options, script, run_name(options), about, model, optimizer, device, rank, world)
    run, step, elapsed = started
    curve = earlier_curve(run.folder, step) if options["resume"] and rank == 0 else []
    forward = torch.compile(model) if options["compile_model"] else model

    # 4. Train.
    first, total = rank * options["batch"], world * options["batch"]
    mine = slice(first, first + options["batch"])

    def update_at(step, progress):
        image = data.batch(step, mine.start, mine.stop, total)
        generator = random_generator("noise", options["seed"], step)
        noise = torch.randn(total, model.noise_size, generator=generator)[mine].to(device)
        beta = beta_at(progress, options["beta"], options["beta_from"], options["warmup"])
        lr = learning_rate_at(progress, step, options["lr"])
        return update(forward, optimizer, image, noise, beta, lr, options)

    def report(step, minutes, due):
        if sound:
            metrics = report_sounds(model, data, run, step, due, options["sigma"])
        else:
            metrics = report_pictures(model, data, images, labels, run, step, due, options["sigma"])
        if not due:
            return None
        split = "valid" if sound else "test"
        run.scalars({f"{split}/{name}": value for name, value in metrics.items()}, step)
        run.metrics(metrics | {"split": split, "step": step, "minutes": minutes, "data": data.source})
        curve.append({"step": step, "minutes": minutes, **metrics})
        write_json(run.folder / "curve.json", curve)
        run.figure("curve", curve_figure(curve), step)
        return headline(metrics)

    step, minutes, complete = train(run, model, optimizer, options, device, rank, step, elapsed, update_at, report)
    if dist.is_initialized():  # the others need not wait for what process 0 does now
        dist.destroy_process_group()
    if rank == 0 and complete and sound:
        click.echo("evaluating: some minutes on a CPU")
        metrics = evaluate_sounds(model, data, "test", MIXTURES, options["sigma"])
        metrics |= family_agreement(model, data, MIXTURES)
        about = {"split": "test", "mixtures": MIXTURES, "step": step, "minutes": minutes, "data": data.source}
        run.metrics(metrics | about)
        click.echo(headline(metrics))
    run.close()
    if rank == 0 and complete:
        click.echo(f"done: {run.folder}/metrics.json and {run.folder}/figures; next: python export.py {run.folder}")
    elif rank == 0:
        click.echo(f"stopped at step {step}; go on with: python train_mvae.py --resume {run.folder}")


if __name__ == "__main__":
    main()
