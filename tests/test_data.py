"""Built-in pictures against geometry worked out another way; folders as users have them."""

import itertools
import json
import math
import os
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import train
from PIL import Image

import common
import train_mvae
from common import random_generator, split_files
from train_mvae import CUBE, CYLINDER, SPHERE, BuiltInClevr, PictureFolder, Pool, Sprites

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sprites():
    return Sprites(32, (2, 4), 0, CPU)


def test_sprites_show_each_object_in_its_colour_on_black(sprites):
    scene = sprites.sample(16, random_generator("test"))
    image, label = sprites.render(scene)
    assert image.shape == (16, 3, 32, 32)
    assert label.shape == (16, 32, 32)
    for b, k in itertools.product(range(16), range(5)):
        inner = torch.ones(32, 32, dtype=torch.bool)
        for shift in itertools.product((-1, 0, 1), repeat=2):  # away from its edges, where colours mix
            inner &= label[b].roll(shift, (0, 1)) == k
        colour = torch.zeros(3) if k == 0 else scene["rgb"][b, k - 1]
        torch.testing.assert_close(image[b, :, inner], colour[:, None].expand(3, int(inner.sum())))


def centre_of_mass(weight):
    """(y, x) of weights (n, H, W), in pixels: (n, 2)."""
    y, x = torch.meshgrid(*[torch.arange(side).float() for side in weight.shape[1:]], indexing="ij")
    total = weight.sum((1, 2))
    return torch.stack([(weight * axis).sum((1, 2)) / total for axis in (y, x)], dim=1)


def test_labels_lie_where_pictures_show_the_objects(sprites, clevr):
    scene = sprites.sample(200, random_generator("labels"))
    scene["present"] = torch.arange(4).expand(200, 4) == 0
    image, label = sprites.render(scene)
    apart = centre_of_mass(image.amax(1)) - centre_of_mass((label == 1).float())
    assert apart.mean(0).abs().max() < 0.03, "of a pixel; labels of every pixel's first quarter are 0.25 away"
    scene = clevr.sample(64, random_generator("labels"))
    scene["present"] = torch.arange(6).expand(64, 6) == 0
    label, fine = clevr.render(scene)[1], BuiltInClevr(256, (3, 6), 0, CPU).render(scene)[1]
    seen = label.flatten(1).any(1)
    apart = (centre_of_mass((fine > 0).float()) + 0.5) / 8 - 0.5 - centre_of_mass((label > 0).float())
    assert apart[seen].mean(0).abs().max() < 0.03


def test_sprites_are_as_many_as_asked_and_apart(sprites):
    scene = sprites.sample(200, random_generator("test"))
    counts = scene["present"].sum(1)
    assert set(counts.tolist()) == {2, 3, 4}
    seen = torch.tensor([len(label.unique()) - 1 for label in sprites.render(scene)[1]])
    assert (seen <= counts).all()
    assert (seen == counts).float().mean() > 0.95  # next to none is hidden
    gaps = (scene["centre"][:, :, None] - scene["centre"][:, None]).norm(dim=-1) + 9 * torch.eye(4)
    assert (gaps.amin((1, 2)) > 0.3).float().mean() > 0.99


def test_processes_share_one_global_batch(sprites):
    whole = sprites.batch(7, slice(0, 8), 8)
    halves = [sprites.batch(7, own, 8) for own in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(sprites.batch(8, slice(0, 8), 8), whole)


def test_dsprites_shapes_come_from_the_archive(tmp_path):
    shapes = np.zeros((5, 64, 64), np.uint8)
    for i in range(5):
        shapes[i, 10 * i : 10 * i + 8, 20:40] = 1
    np.savez_compressed(tmp_path / "dsprites_ndarray.npz", metadata=np.array({}, dtype=object), imgs=shapes)
    data = Sprites(32, (1, 1), 0, CPU, tmp_path)
    scene = data.sample(10, random_generator("test"))
    image, label = data.render(scene)
    for b in range(10):
        expected = torch.from_numpy(shapes[scene["shape"][b, 0], ::2, ::2]).long()
        assert torch.equal(label[b], expected)
        assert torch.equal(image[b].amax(0) > 0, expected > 0)
    with pytest.raises(click.UsageError, match="expected dsprites"):
        Sprites(32, (1, 1), 0, CPU, tmp_path / "elsewhere")
    (tmp_path / "dsprites_ndarray.npz").write_text("half a file")
    with pytest.raises(click.UsageError, match="damaged"):
        Sprites(32, (1, 1), 0, CPU, tmp_path)


# ---------------------------------------------------------------- The ray caster


@pytest.fixture(scope="module")
def clevr():
    return BuiltInClevr(32, (3, 6), 0, CPU)


def scene_of(shape, half, xy=(0.3, -0.8), angle=0.7):
    """One object under the mean camera."""
    return {
        "present": torch.tensor([[True]]),
        "shape": torch.tensor([[shape]]),
        "half": torch.tensor([[half]]),
        "xy": torch.tensor([[xy]]),
        "angle": torch.tensor([[angle]]),
        "rgb": torch.tensor([[[0.8, 0.1, 0.1]]]),
        "metal": torch.tensor([[False]]),
        "camera": torch.tensor([train_mvae.CAMERA]),
        "lamps": torch.tensor([train_mvae.LAMPS]),
    }


def inside(shape, half, point):
    """Whether points (..., 3) of the object's frame lie in it."""
    if shape == SPHERE:
        return point.norm(dim=-1) < half
    if shape == CYLINDER:
        return (point[..., :2].norm(dim=-1) < half) & (point[..., 2].abs() < half)
    return point.abs().amax(-1) < half


@pytest.mark.parametrize("shape", [SPHERE, CYLINDER, CUBE])
@pytest.mark.parametrize("half", [0.35, 0.7])
def test_outlines_are_those_of_marching_along_the_rays(clevr, shape, half):
    scene = scene_of(shape, half)
    _, label = clevr.render(scene)
    camera = scene["camera"][0]
    forward = -camera / camera.norm()
    right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0]))
    right = right / right.norm()
    up = torch.linalg.cross(right, forward)
    v, u = 0.3 * train_mvae.position_grid(32, 32)
    ray = forward + (u[..., None] * right - (v[..., None] + 1 / 64) * up) * 32 / 35
    t = torch.linspace(6, 16, 4001)[:, None, None, None]
    point = camera + t * ray - torch.tensor([*scene["xy"][0, 0], half])
    c, s = math.cos(0.7), math.sin(0.7)
    x, y, z = point.unbind(-1)
    turned = torch.stack([c * x + s * y, c * y - s * x, z], dim=-1)
    marched = inside(shape, half, turned).any(0)
    assert marched.sum() >= 10
    assert (marched != (label[0] == 1)).sum() <= 1  # a grazing ray may fall between two marching steps


def test_the_nearer_object_hides_the_farther(clevr):
    near, far = scene_of(SPHERE, 0.7, xy=(1.0, -0.9)), scene_of(SPHERE, 0.7, xy=(-0.4, 0.4))
    alone = [clevr.render(s)[1][0] > 0 for s in (near, far)]
    shared = {name: far[name] for name in ("camera", "lamps")}
    both = {name: torch.cat([far[name], near[name]], dim=1) for name in far if name not in shared} | shared
    _, label = clevr.render(both)
    overlap = alone[0] & alone[1]
    assert overlap.sum() >= 10
    assert (label[0][overlap] == 2).all()
    assert torch.equal(label[0] > 0, alone[0] | alone[1])


def test_a_lamp_casts_a_shadow_and_only_near_the_object(clevr):
    scene = scene_of(SPHERE, 0.7)
    lit, label = clevr.render(scene)
    empty, _ = clevr.render(scene | {"present": torch.tensor([[False]])})
    darker = (empty - lit)[0].mean(0) * (label[0] == 0)
    assert darker.max() > 0.05
    assert darker[:4].abs().max() < 0.02


def test_scenes_repeat_by_seed_and_keep_clevrs_distances(clevr):
    a, b = (clevr.sample(50, random_generator("scenes")) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert set(a["present"].sum(1).tolist()) == {3, 4, 5, 6}
    radius = torch.where(a["shape"] == CUBE, a["half"] / train_mvae.CUBE_HALF, a["half"])
    gaps = (a["xy"][:, :, None] - a["xy"][:, None]).norm(dim=-1) - radius[:, :, None] - radius[:, None]
    gaps = gaps + 9 * torch.eye(6)
    assert (gaps.amin((1, 2)) > 0.249).float().mean() > 0.9


# Mean colours and pixels of every label, of the renderer as it was fitted to pictures made of CLEVR's own assets, so a
# faster or shorter one has to draw the same.
GOLDEN_COLOURS = [
    (0.47719, 0.44747, 0.45344), (0.45695, 0.43459, 0.45439), (0.44138, 0.43323, 0.43186), (0.42622, 0.41257, 0.44084)
]  # fmt: skip
GOLDEN_LABELS = [
    (807, 15, 62, 98, 12, 30, 0), (798, 135, 6, 62, 0, 23, 0), (799, 104, 14, 12, 20, 14, 61),
    (740, 143, 30, 24, 0, 18, 69)
]  # fmt: skip


def test_the_world_is_the_one_that_was_fitted_to_clevrs_pictures(clevr):
    image, label = clevr.render(clevr.sample(4, random_generator("golden")))
    assert image.min() >= 0 and image.max() <= 1 and image.isfinite().all()
    torch.testing.assert_close(image.mean((2, 3)), torch.tensor(GOLDEN_COLOURS), atol=1e-3, rtol=0)
    counted = torch.stack([torch.bincount(one.flatten(), minlength=7) for one in label])
    assert (counted - torch.tensor(GOLDEN_LABELS)).abs().max() <= 1


def test_two_scenes_fit_into_one():
    twice = BuiltInClevr(32, (6, 12), 0, torch.device("cpu"))
    both = twice.sample(50, random_generator("pairs"))
    assert both["present"].shape == (50, 12)
    assert set(both["present"].sum(1).tolist()) <= set(range(6, 13))
    near = both["half"][:, :, None] + both["half"][:, None]
    touching = (both["xy"][:, :, None] - both["xy"][:, None]).norm(dim=-1) < near
    at_hand = both["present"][:, :, None] & both["present"][:, None] & ~torch.eye(12, dtype=torch.bool)
    assert (touching & at_hand).any((1, 2)).float().mean() < 0.2


# ---------------------------------------------------------------- Pools, splits, folders


class Numbers(Pool):
    """Picture k has the value k everywhere."""

    def __init__(self, length):
        super().__init__(4, (1, 1), 0, CPU, length)
        self.calls = []

    def make(self, first, last):
        self.calls.append((first, last))
        return torch.arange(first, last, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)


def test_a_pool_makes_every_picture_once_and_epochs_are_complete():
    pool = Numbers(150)
    epochs = [[], [], []]
    for step in range(45):  # 45 batches of 10 are three epochs of 150
        epochs[step // 15] += (pool.batch(step, slice(0, 10), 10)[:, 0, 0, 0] * 255).round().int().tolist()
    assert sorted(pool.calls) == [(0, 64), (64, 128), (128, 150)]
    assert all(sorted(e) == list(range(150)) for e in epochs)
    assert epochs[1] != epochs[0] and epochs[1] != epochs[2]
    halves = [pool.batch(20, slice(a, a + 5), 10) for a in (0, 5)]
    assert torch.equal(torch.cat(halves), pool.batch(20, slice(0, 10), 10))


@pytest.mark.parametrize("kind", [Sprites, BuiltInClevr])
def test_built_in_splits_share_no_scene_and_do_not_depend_on_the_seed(kind):
    data, other = kind(16, (2, 3), 0, CPU), kind(16, (2, 3), 1, CPU)
    splits = [data.scenes("valid", 6)[0], data.scenes("test", 6)[0], data.batch(0, slice(0, 64), 64)]
    pictures = [image.numpy().tobytes() for image in (torch.cat(splits) * 255).round()]
    assert len(set(pictures)) == 6 + 6 + 64
    assert torch.equal(splits[1], other.scenes("test", 6)[0])
    assert torch.equal(splits[1][:2], data.scenes("test", 2)[0])
    assert not torch.equal(splits[2], other.batch(0, slice(0, 64), 64))


def test_the_last_tenth_of_the_training_files_at_most_320_are_valid(monkeypatch, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
    monkeypatch.setattr(train_mvae, "load_picture", lambda *_: np.zeros((16, 16, 3), np.uint8))
    for i in range(5):
        (tmp_path / "images" / "val" / f"{i}.png").touch()
    for n, kept in ((3, 2), (30, 27), (3300, 2980)):
        names = [f"train/{i:04}.png" for i in range(n)]
        for name in names:
            (tmp_path / "images" / name).touch()
        data = PictureFolder(tmp_path, 16, (2, 3), 0, CPU)
        assert data.length == kept and data.files["train"] == names[:kept] and data.files["valid"] == names[kept:]
        assert data.files["test"] == [f"val/{i}.png" for i in range(5)]


def write_clevr(root, masks=True, sizes=((480, 320), (320, 240)), train=0):
    """A folder in CLEVR's layout: the picture's crop is white, all else black; scene i has i + 2 objects, at most 5.

    train: so many training pictures, of which those beyond `sizes` are the last one again.
    """
    for split in ("train", "val"):
        images = root / "images" / split
        images.mkdir(parents=True)
        scenes = []
        for i, (width, height) in enumerate(sizes):
            picture = np.zeros((height, width, 4), np.uint8)
            top, side = round(height / 2 + width / 64 - 0.3 * width), round(0.6 * width)
            picture[top : top + side, round(0.2 * width) : round(0.2 * width) + side] = 255
            name = f"CLEVR_{split}_{i:06d}.png"
            Image.fromarray(picture).save(images / name)
            scenes.append({"image_filename": name, "objects": [{}] * min(i + 2, 5)})
            if masks:
                (root / "masks" / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture[..., 0] // 255 * min(i + 1, 4)).save(root / "masks" / split / name)
        for i in range(len(sizes), train if split == "train" else 0):
            os.link(images / name, images / f"CLEVR_{split}_{i:06d}.png")
        (root / "scenes").mkdir(exist_ok=True)
        (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    return root


def test_the_official_folder_is_cropped_by_the_rule_and_filtered_by_objects(tmp_path):
    root = write_clevr(tmp_path / "CLEVR_v1.0", sizes=((480, 320), (320, 240), (320, 240)))
    data = PictureFolder(tmp_path, 16, (2, 3), 0, CPU)  # found below the folder named
    assert torch.equal(data.batch(0, slice(0, 2), 2), torch.ones(2, 3, 16, 16))
    images, labels = data.scenes("test", 320)
    assert len(images) == 2
    assert [int(x) for x in labels.flatten(1).float().mean(1)] == [1, 2]
    assert len(PictureFolder(root, 16, (3, 6), 0, CPU).files["test"]) == 2


def test_the_folder_of_clevrs_pictures_is_known_as_such(tmp_path):
    root = write_clevr(tmp_path / "CLEVR_v1.0")
    data = PictureFolder(root / "images", 16, (2, 3), 0, CPU)
    assert data.source == "CLEVR folder CLEVR_v1.0" and data.crop == "clevr"


def test_masks_are_numbers_not_colours(tmp_path):
    data = PictureFolder(write_clevr(tmp_path), 16, (2, 3), 0, CPU)
    path = tmp_path / "masks" / "val" / "CLEVR_val_000001.png"
    numbers = Image.open(path)
    palette = numbers.convert("P")
    palette.putdata(list(numbers.get_flattened_data()))
    palette.putpalette([0, 0, 0, 255, 0, 0, 9, 9, 9] * 10)
    palette.save(path)
    assert data.scenes("test", 2)[1][1].unique().tolist() == [2]
    numbers.convert("RGB").save(path)
    with pytest.raises(click.UsageError, match="8 bits a pixel"):
        data.scenes("test", 2)


def test_wrong_folders_say_what_was_looked_for(tmp_path):
    with pytest.raises(click.UsageError, match=r"0 files \.png, \.jpg, .* none for train"):
        PictureFolder(tmp_path, 16, (2, 3), 0, CPU)
    root = write_clevr(tmp_path / "data")
    with pytest.raises(click.UsageError, match="no PNG of a scene"):
        PictureFolder(root, 16, (9, 10), 0, CPU)
    (root / "scenes" / "CLEVR_val_scenes.json").write_text("{half a fi")
    with pytest.raises(click.UsageError, match="damaged"):
        PictureFolder(root, 16, (2, 3), 0, CPU)


# ---------------------------------------------------------------- One's own pictures


def write_pictures(root, n=40):
    """Pictures of all kinds and sizes, picture k in a grey of its own, in nested folders: {relative path: k}."""
    generator, paths = np.random.default_rng(0), {}
    for k in range(n):
        path = Path(("", "cats", "holiday/2020")[k % 3]) / f"picture {k}.{('png', 'jpg', 'JPEG', 'webp')[k % 4]}"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", tuple(generator.integers(20, 90, 2).tolist()), (6 * k,) * 3).save(root / path)
        paths[path.as_posix()] = k
    return paths


def greys(images):
    """What pictures images (n, 3, size, size) in [0, 1] of `write_pictures` are: their numbers."""
    return (images.mean((1, 2, 3)) * 255 / 6).round().int().tolist()


def test_any_folder_of_pictures_is_split_by_names_and_read_when_it_is_needed(tmp_path, monkeypatch):
    paths = write_pictures(tmp_path)
    monkeypatch.setattr(train_mvae, "CACHE", 5 * 3 * 16**2)
    data = PictureFolder(tmp_path, 16, (3, 6), 0, CPU)
    assert sorted(itertools.chain(*data.files.values())) == sorted(paths) and data.crop == "centre"
    order = [paths[path] for path in data.files["train"]]
    epochs = [greys(data.batch(step, slice(None), data.length)) for step in range(2)]
    assert epochs[0] == order and sorted(epochs[1]) == sorted(order) != epochs[1]
    assert len(data.readers["train"].kept) < data.length, "few stay in memory"
    images, labels = data.scenes("test", 100)
    assert greys(images) == [paths[path] for path in data.files["test"]] and not labels.any()
    assert data.source == f"own pictures, folder {tmp_path.name}"


def test_a_file_never_changes_sides_and_few_of_many_are_kept(tmp_path, capsys):
    for k in range(1000):
        (tmp_path / f"{k}.png").touch()
    few = split_files(tmp_path, (".png",), 1000)
    assert [round(len(few[split]) / 100) for split in common.SPLITS] == [8, 1, 1]
    for k in range(1000):
        (tmp_path / f"more {k}.PNG").touch()
    many = split_files(tmp_path, (".png",), 2000)
    assert all([path for path in many[split] if "more" not in path] == few[split] for split in common.SPLITS)
    capped = split_files(tmp_path, (".png",), 100)
    assert all(capped[split] == many[split][:100] for split in common.SPLITS)
    assert "300 of 2,000 files are used" in capsys.readouterr().out


def test_a_folder_of_few_files_says_how_many_there_are(tmp_path):
    write_pictures(tmp_path, 2)
    with pytest.raises(click.UsageError, match=r"2 files .* none for .* about 30 are mostly enough"):
        PictureFolder(tmp_path, 16, (3, 6), 0, CPU)


def test_what_cannot_be_read_is_named_once_and_left_out(tmp_path, capsys):
    paths, bad = write_pictures(tmp_path), {}
    files = split_files(tmp_path, train_mvae.PICTURES, 100)
    for split, suffix in (("train", ".jpg"), ("valid", ".png"), ("test", "")):
        bad[split] = next(path for path in files[split] if path.endswith(suffix))
        whole = (tmp_path / bad[split]).read_bytes()
        damaged = {"train": whole[: len(whole) // 2], "valid": b"no picture", "test": b""}[split]
        (tmp_path / bad[split]).write_bytes(damaged)
    data, numbers = PictureFolder(tmp_path, 16, (3, 6), 0, CPU), [paths[path] for path in files["train"]]
    k = files["train"].index(bad["train"])
    for _ in range(2):
        assert greys(data.batch(0, slice(None), data.length)) == [*numbers[:k], (numbers * 2)[k + 1], *numbers[k + 1 :]]
        for split in ("valid", "test"):
            whole = [paths[path] for path in files[split] if path != bad[split]]
            assert greys(data.scenes(split, 2)[0]) == whole[:2]
    said = capsys.readouterr().out
    for split, path in bad.items():
        assert said.count(f"left out of {split}, 1 so far: {tmp_path / path}: damaged") == 1
    for path in files["valid"]:
        (tmp_path / path).write_bytes(b"")
    with pytest.raises(click.UsageError, match=r"none of the \d+ examples for valid can be used"):
        PictureFolder(tmp_path, 16, (3, 6), 0, CPU)


def test_masks_of_ones_own_pictures_lie_at_the_same_paths(tmp_path):
    write_pictures(tmp_path)
    data = PictureFolder(tmp_path, 16, (3, 6), 0, CPU)
    for path in data.files["test"]:
        mask = (tmp_path / "masks" / path).with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        numbers = np.repeat([[0, 2, 5]], 8, axis=0).repeat(7, axis=1)  # 21 pixels wide: the middle is between two
        Image.fromarray(numbers.astype(np.uint8)).save(mask)
    again = PictureFolder(tmp_path, 16, (3, 6), 0, CPU)
    assert again.files == data.files, "masks are no pictures"
    assert again.scenes("test", 9)[1].unique().tolist() in ([0, 2, 5], [2, 5], [0, 2], [2])
    assert not again.scenes("valid", 9)[1].any()


def test_a_run_on_ones_own_pictures_needs_a_folder_and_keeps_its_name(tmp_path):
    write_pictures(tmp_path / "mine")
    args = ["--dataset", "pictures", "--size", 32, "--cells", 8, "--channels", 8, "--batch", 4, "--steps", 2]
    args += ["--device", "cpu"]
    train(*args, "--data-root", tmp_path / "mine", "--out", tmp_path / "run")
    config, model = json.loads((tmp_path / "run" / "config.json").read_text()), train_mvae.load(tmp_path / "run")
    assert config["data"] == {"name": "pictures", "source": "own pictures, folder mine", "crop": "centre"}
    assert model.n_slots == 6 and train_mvae.describe(model)["crop"] == "centre"
    assert "ari_fg" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
    result = CliRunner().invoke(train_mvae.main, list(map(str, args)))
    assert result.exit_code == 2 and "expected --data-root, a folder of your own" in result.output


def test_a_damaged_curve_ends_in_one_clear_line(tmp_path):
    options = train_mvae.main.make_context("", ["--dataset", "sprites", "--size", "16", "--cells", "4"]).params
    about = {"script": "train_mvae", "options": options, "data": {}, "history": []}
    (tmp_path / "config.json").write_text(json.dumps(about, default=str))
    (tmp_path / "curve.json").write_text("[")
    with pytest.raises(click.UsageError, match=r"curve\.json: missing, damaged"):
        train_mvae.load(tmp_path)
