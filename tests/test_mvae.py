"""The model, its objective, its scores, and the training script from start to resume."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, train
from test_data import write_clevr

import train_mvae
from common import OPS, gaussian_log_likelihood, random_generator
from train_mvae import MVAE

SCRIPT = Path(train_mvae.__file__)


def build(**changes):
    options = {
        "size": 32, "cells": 8, "n_slots": 3, "d": 4, "channels": 8, "op": "alpha", "compose_at": "data",
        "domain": None, "suppress": "drawn", "coords": "relative", "background": "latent", "shift": 0.3, "reach": 0.6,
        "explore": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model = MVAE(**options | changes)
    shape = (train_mvae.FRAMES, 32, 1) if model.domain else (3, 32, 32)
    model.start_from(torch.full(shape, 0.3))
    return model


PRICES = {"sigma": 0.1, "kl_cells": "all", "precision": "fp32"}


def pictures(n=2):
    return torch.rand(n, 3, 32, 32, generator=random_generator("pictures"))


def noise_for(model, n=2):
    return torch.randn(n, model.noise_size, generator=random_generator("noise"))


# ---------------------------------------------------------------- Model

COMBINATIONS = [(o, c, "latent") for o in OPS for c in ("data", "feature")]
COMBINATIONS += [(o, c, "none") for o in ("sum", "mean") for c in ("data", "feature")]


@pytest.mark.parametrize(("op", "compose_at", "background"), COMBINATIONS)
def test_every_parameter_gets_a_gradient(op, compose_at, background):
    model = build(op=op, compose_at=compose_at, background=background)
    encoding, mean, offset = model(pictures(4), noise_for(model, 4))
    assert mean.shape == (4, 3, 32, 32)
    assert encoding.mu.shape == encoding.logvar.shape == (4, 4, 4), "three slots and one that explores"
    loss, _ = train_mvae.objective(pictures(4), mean, encoding, offset, 1.0, PRICES)
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@torch.no_grad()
@pytest.mark.parametrize("suppress", ["none", "window", "drawn"])
def test_slots_are_cells_in_falling_order_of_their_kl(suppress):
    model = build(suppress=suppress, shift=0.0)
    encoding = model.encode(pictures())
    assert (encoding.kl[:, :-1] >= encoding.kl[:, 1:]).all()
    torch.testing.assert_close(encoding.kl[:, 0], encoding.kl_map.flatten(1).amax(1))
    row, column = ((encoding.cell + 1) * 4 - 0.5).round().long().unbind(-1)
    torch.testing.assert_close(encoding.kl_map.flatten(1).gather(1, row * 8 + column), encoding.kl)
    assert all(len(set(cells)) == 3 for cells in (row * 8 + column).tolist())


class Painter(MVAE):
    """An MVAE whose slots draw discs of the radius their first latent says, where they stand."""

    def decode(self, z, cell):
        distance = (self.grid - cell[..., None, None]).norm(dim=2, keepdim=True)  # (B, N, 1, h, w)
        logit = 40 * (z[..., :1, None, None] - distance)
        return torch.cat([torch.ones_like(logit).expand(-1, -1, 3, -1, -1), logit], dim=2)


@torch.no_grad()
def test_cells_that_a_chosen_slot_draws_become_no_slots():
    model = build()
    model.__class__ = Painter
    kl_map, place = torch.zeros(1, 8, 8), train_mvae.position_grid(8, 8)[None].clone()
    mu = torch.full((1, 4, 8, 8), 0.1)
    mu[0, 0, 2, 2] = 0.6  # a large disc, which reaches 2.4 cells far
    for k, (row, column) in enumerate([(2, 2), (2, 4), (4, 2), (3, 3), (6, 6), (2, 6), (7, 0)]):
        kl_map[0, row, column] = 20 - k
    place[0, :, 2, 6] = torch.tensor([-0.375, -0.375])  # its slot would stand in the large disc
    place[0, :, 0, 7] = place[0, :, 6, 6] + 0.2  # and this one's beside a small one, where that draws nothing
    kl_map[0, 0, 7] = 13.5
    index = model.select(kl_map, mu, place, None, 3)
    assert index.tolist() == [[2 * 8 + 2, 6 * 8 + 6, 7 * 8 + 0]]
    model.suppress = "window"
    assert model.select(kl_map, mu, place, None, 4).tolist() == [[18, 20, 34, 54]]
    model.suppress = "none"
    assert model.select(kl_map, mu, place, None, 4).tolist() == [[18, 20, 34, 27]]


@torch.no_grad()
@pytest.mark.parametrize("suppress", ["none", "window", "drawn"])
def test_a_cell_far_from_where_its_slot_stands_counts_less(suppress):
    model = build(suppress=suppress, shift=0.3)
    middles = train_mvae.position_grid(8, 8)[None]
    kl_map, mu = torch.zeros(1, 8, 8), torch.zeros(1, 4, 8, 8)
    kl_map[0, 1, 1], kl_map[0, 6, 6], kl_map[0, 1, 6] = 4, 3, 2
    place = middles.clone()
    assert model.select(kl_map, mu, place, None, 2).tolist() == [[9, 54]]
    place[0, 0, 1, 1] += 0.3 * 0.8  # exp(-0.64) of 4 is 2.1, below 3 and above 2
    place[0, 1, 6, 6] -= 0.3  # exp(-1) of 3 is 1.1, below 2
    assert model.select(kl_map, mu, place, None, 2).tolist() == [[9, 14]]


@torch.no_grad()
def test_the_exploring_slot_is_where_the_picture_is_explained_least():
    model = build(explore=True)
    image = pictures()
    encoding = model.encode(image)
    assert torch.equal(model.encode(image, explore=True).cell[:, :3], encoding.cell)
    image = model.compose(model.decode(encoding.mu, encoding.cell), encoding.background)
    image[0, :, 20:24, 8:12] += 0.5  # all of cell (5, 2)
    image[1, :, 4:8, 24:28] -= 0.5  # all of cell (1, 6)
    mu, _, place, _ = model.encoder(pictures())
    taken = torch.zeros(2, 3, dtype=torch.long)
    for k, chosen in enumerate(encoding.cell.unbind(1)):
        taken[:, k] = (place - chosen[:, :, None, None]).norm(dim=1).flatten(1).argmin(1)
    index = model.least_explained(image, mu, place, encoding.background, taken)
    for found, (row, column) in zip(index[:, 0].tolist(), [(5, 2), (1, 6)], strict=True):
        assert max(abs(found // 8 - row), abs(found % 8 - column)) <= 1


@torch.no_grad()
def test_as_many_slots_as_cells_are_all_cells_once():
    for suppress in ("none", "window", "drawn"):
        encoding = build(suppress=suppress, n_slots=64, shift=0.0).encode(pictures(1))
        assert len({tuple(cell) for cell in encoding.cell[0].tolist()}) == 64


@torch.no_grad()
def test_a_slot_stands_at_most_the_shift_from_its_cell_and_is_moved_with_its_content():
    model = build(n_slots=1)
    middle = model.encode(pictures()).cell
    model.encoder.shift.bias.copy_(torch.tensor([100.0, -0.5]))
    moved = model.encode(pictures()).cell - middle
    torch.testing.assert_close(moved, torch.tensor([0.3, 0.3 * math.tanh(-0.5)]).expand(2, 1, 2))


def test_with_absolute_coordinates_encoder_and_decoder_know_the_place():
    model = build(coords="absolute", reach=0)
    z, cell = torch.randn(1, 2, 4), torch.tensor([[[0.0, 0.0], [0.5, 0.5]]])
    assert torch.equal(model.decode(z, cell), model.decode(z, cell.flip(1)))
    flat = model.encoder(torch.full((1, 3, 32, 32), 0.5))[0][0, :, 3:5, 3:5]  # away from the border's padding
    assert flat.std((1, 2)).max() > 1e-3
    assert model.encode(pictures()).mu.shape == (2, 3, 4)


def test_a_slot_is_decoded_the_same_whatever_the_others_are():
    model = build()
    z, cell = torch.randn(1, 3, 4), torch.rand(1, 3, 2)
    together = model.decode(z, cell)
    torch.testing.assert_close(model.decode(z[:, 1:2], cell[:, 1:2])[:, 0], together[:, 1])


@pytest.mark.parametrize("op", OPS)
def test_a_slot_is_drawn_within_reach_of_its_cell(op):
    """Beyond it, composing the slot with the background changes nothing; near the cell the layer is as decoded."""
    model, free = build(op=op, reach=0.4), build(op=op, reach=0)
    z, cell = torch.randn(1, 1, 4), torch.tensor([[[0.25, -0.5]]])
    y, x = train_mvae.position_grid(32, 32)
    distance = ((y - 0.25) ** 2 + (x + 0.5) ** 2).sqrt()
    layer, unbound = model.decode(z, cell), free.decode(z, cell)
    torch.testing.assert_close(layer[..., distance < 0.1], unbound[..., distance < 0.1], atol=1e-3, rtol=1e-3)
    background = torch.rand(1, 3, 32, 32, generator=random_generator("background"))
    image = model.compose(layer, background)
    expected = background / 2 if op == "mean" else background
    torch.testing.assert_close(image[..., distance > 0.7], expected[..., distance > 0.7], atol=2e-4, rtol=0)
    assert (image - expected)[..., distance < 0.3].abs().max() > 0.01


def test_the_model_starts_from_the_mean_picture():
    mean = torch.rand(3, 32, 32, generator=random_generator("mean"))
    model = build(op="sum")
    model.start_from(mean)
    encoding, image, _ = model(pictures(), torch.zeros(2, model.noise_size))
    assert (image - mean).abs().mean() < 0.15
    assert encoding.kl_map.mean() < 20


def test_objective_by_hand():
    model = build()
    image = pictures()
    encoding, mean, offset = model(image, noise_for(model))
    for cells in ("all", "selected"):
        options = {"sigma": 0.2, "kl_cells": cells}
        loss, terms = train_mvae.objective(image, mean, encoding, offset, 2.5, options)
        slots = encoding.kl_map.sum((1, 2)) if cells == "all" else encoding.kl.sum(1)
        kl = slots + encoding.kl_background
        expected = -gaussian_log_likelihood(image, mean, 0.2) + 2.5 * kl
        torch.testing.assert_close(loss, (expected + train_mvae.ANCHOR * offset).mean())
        torch.testing.assert_close(terms["loss/kl"], kl.mean())


@torch.no_grad()
def test_a_replaced_slot_leaves_the_others_as_they_were():
    model = build(suppress="window")
    encoding = model.encode(pictures())
    whole = model.compose(model.decode(encoding.mu, encoding.cell), encoding.background)
    same = train_mvae.replaced(model, encoding, 1, 0, z=encoding.mu[1, :1], cell=encoding.cell[1, :1])
    torch.testing.assert_close(same, whole[1:])
    cell = encoding.cell.clone()
    cell[1, 2] = 0.9
    moved = model.compose(model.decode(encoding.mu, cell), encoding.background)[1]
    both = train_mvae.replaced(model, encoding, 1, 2, cell=torch.full((2, 2), 0.9))
    torch.testing.assert_close(both, moved.expand(2, -1, -1, -1))


def test_the_offset_is_that_of_the_middle_of_what_is_drawn_and_moves_only_places():
    model = build(op="sum", background="none")
    layer = torch.zeros(1, 3, 3, 32, 32, requires_grad=True)
    with torch.no_grad():
        layer[0, 0, :, 8:16, 16:24] = 1.0  # its middle at (-0.25, 0.25)
        layer[0, 1, :, 20:24, 0:4] = 1.0  # its middle at (0.375, -0.875)
    cell = torch.tensor([[[-0.25, 0.25], [0.375, -0.375], [0.5, 0.5]]], requires_grad=True)  # the third draws nothing
    encoding = train_mvae.Encoding(None, None, cell, None, None, None, None)
    offset = model.offset(layer, encoding)
    mass = 16 / 1.05  # one pixel weighs 1 / (1 + VISIBLE)
    assert offset.item() == pytest.approx(0.25 * mass / (mass + 1024 * train_mvae.SMALLEST), rel=1e-4)
    to_cell, to_layer = torch.autograd.grad(offset.sum(), [cell, layer], allow_unused=True)
    assert to_cell[0, 1, 1] > 0 and to_cell.abs().sum() == pytest.approx(to_cell[0, 1, 1].item(), rel=1e-4)
    assert to_layer is None


# ---------------------------------------------------------------- Scores


@pytest.mark.parametrize(("op", "compose_at", "background"), COMBINATIONS)
@torch.no_grad()
def test_pixels_out_of_every_slots_reach_belong_to_the_background(op, compose_at, background):
    model = build(op=op, compose_at=compose_at, background=background, reach=0.4)
    encoding = model.encode(pictures())
    cell = torch.tensor([[[-0.8, -0.8]]]).expand(2, 3, 2)
    layer = 5 * model.decode(torch.randn(2, 3, 4), cell)
    owned = model.responsibilities(layer, encoding.background)
    assert owned.shape == (2, 4, 32, 32)
    assert (owned.argmax(1)[:, 24:, 24:] == 0).all()


def rand_index_by_pairs(a, b):
    """Adjusted Rand index from its definition, over all pairs of points."""
    n = len(a)
    same_a = [a[i] == a[j] for i in range(n) for j in range(i)]
    same_b = [b[i] == b[j] for i in range(n) for j in range(i)]
    together, in_a, in_b = sum(x and y for x, y in zip(same_a, same_b, strict=True)), sum(same_a), sum(same_b)
    expected = in_a * in_b / len(same_a)
    return (together - expected) / ((in_a + in_b) / 2 - expected)


def test_adjusted_rand_index_is_that_of_counting_pairs():
    generator = random_generator("ari")
    for groups in (2, 3, 6):
        a = torch.randint(groups, (40,), generator=generator)
        b = torch.where(torch.rand(40, generator=generator) < 0.6, a, torch.randint(5, (40,), generator=generator))
        assert train_mvae.adjusted_rand_index(a, b) == pytest.approx(rand_index_by_pairs(a.tolist(), b.tolist()))
    assert train_mvae.adjusted_rand_index(a, (a + 3) % 6) == 1.0  # names do not matter
    assert train_mvae.adjusted_rand_index(torch.zeros(9, dtype=torch.long), torch.zeros(9, dtype=torch.long)) == 1.0


def scene_with(segments, label):
    """Scores for hard segments (H, W) with 4 slots: 0 is the background."""
    return train_mvae.segmentation_scores(torch.eye(5)[segments].permute(2, 0, 1), label)


def test_scores_of_perfect_split_merged_and_missing_segments():
    label = torch.zeros(16, 16, dtype=torch.long)
    label[:8, :8], label[10:, 10:] = 1, 2
    renamed = torch.where(label == 1, 3, torch.where(label == 2, 1, 0))
    perfect = scene_with(renamed, label)
    assert perfect == {"ari_fg": 1.0, "miou": 1.0, "slot_count_error": 0, "duplicates": 0.0}

    split = renamed.clone()
    split[:4, :8] = 2  # half of object 1 goes to another slot
    scores = scene_with(split, label)
    assert scores["slot_count_error"] == 1
    assert scores["duplicates"] == pytest.approx(1 / 3)
    assert scores["miou"] == pytest.approx(0.75)
    assert 0 < scores["ari_fg"] < 1

    merged = torch.where(label > 0, 1, 0)
    scores = scene_with(merged, label)
    assert scores["ari_fg"] == 0.0
    assert scores["slot_count_error"] == 1
    assert scores["miou"] == pytest.approx(64 / 100 / 2)

    missing = torch.where(label == 1, 3, 0)
    assert scene_with(missing, label)["miou"] == 0.5


def test_cell_offset_is_the_distance_from_the_middle_of_a_segment():
    owned = torch.zeros(1, 3, 16, 16)
    owned[:, 0] = 0.5
    owned[:, 1, :4, 4:8] = 1.0  # middle at (-0.75, -0.25)
    cell = torch.tensor([[[-0.75, 0.0], [0.0, 0.0]]])  # the second slot owns nothing
    assert train_mvae.cell_offsets(owned, cell).tolist() == [0.25]


def test_psnr_counts_only_the_pixels_asked_for():
    truth, image, where = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.bool)
    image[:, 0], where[0] = 0.1, True
    assert train_mvae.psnr(image, truth, where) == pytest.approx(20)
    assert train_mvae.psnr(image, truth, ~where) == 100  # no error at all, as far as the figure goes


class Oracle(torch.nn.Module):
    """Stands in for a trained model: slot k is object k as it is seen, whatever encoder and decoder would do."""

    op, compose_at, n_slots = "sum", "data", 3
    responsibilities = MVAE.responsibilities

    def __init__(self, pictures):
        super().__init__()
        self.layers = {image.sum().item(): layer for image, layer in pictures}

    def encode(self, image):
        layer = torch.stack([self.layers[i.sum().item()] for i in image])
        return train_mvae.Encoding(layer, None, layer, None, None, None, None)

    def decode(self, z, cell):
        return z

    def compose(self, layer, background=None):
        return layer.sum(1)


def oracle_scores(damage=lambda layer: layer):
    data = train_mvae.Sprites(32, (3, 3), 0, torch.device("cpu"))
    both = data.pairs(8)
    known = []
    for first in (True, False):
        image, label = data.render(train_mvae.showing(both, (torch.arange(6) < 3) == first))
        numbers = range(1, 4) if first else range(4, 7)
        for i, t in zip(image, label, strict=True):
            known.append((i, damage(torch.stack([i * (t == k) for k in numbers]))))
    return train_mvae.score_recomposition(Oracle(known), data, n=8)


def test_recomposition_scores_a_perfect_model_perfectly_and_a_blind_one_badly():
    perfect = oracle_scores()
    assert perfect["reconstruction_psnr"] > 20  # a pixel on an edge mixes two colours, but has one label
    assert perfect["recomposition_psnr"] > 15  # what was hidden in its own scene cannot be shown, nor who is in front
    assert perfect["recomposition_psnr_shown"] > perfect["recomposition_psnr"]
    swapped = oracle_scores(lambda layer: layer.flip(1))  # the right segments, but their colours swapped
    assert swapped["recomposition_psnr"] < perfect["recomposition_psnr"] - 3


def test_a_scene_without_objects_has_no_scores():
    assert train_mvae.segmentation_scores(torch.rand(4, 16, 16), torch.zeros(16, 16, dtype=torch.long)) == {}


def test_a_slot_on_two_objects_by_halves_is_no_duplicate():
    label = torch.zeros(16, 16, dtype=torch.long)
    label[:4], label[4:8] = 1, 2
    segments = torch.zeros(16, 16, dtype=torch.long)
    segments[2:6, :8], segments[:8, 8:] = 1, 2
    assert scene_with(segments, label)["duplicates"] == 0


# ---------------------------------------------------------------- The script


def options_of(folder):
    return json.loads((folder / "config.json").read_text())["options"]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_a_run_folder_holds_what_the_contract_says(clevr_run):
    figures = {"decomposition.png", "recomposition.png", "traversals.png", "moved.png", "curve.png"}
    assert {f.name for f in (clevr_run / "figures").iterdir()} == figures
    curve = json.loads((clevr_run / "curve.json").read_text())
    assert [point["step"] for point in curve] == [1, 2, 3]
    metrics = json.loads((clevr_run / "metrics.json").read_text())
    assert metrics["data"] == "built-in CLEVR-like renderer"
    assert metrics["step"] == 3
    assert {
        "mse",
        "kl",
        "ari_fg",
        "miou",
        "slot_count_error",
        "duplicates",
        "cell_offset",
        "recomposition_psnr",
    } <= metrics.keys()
    assert {f"kl_rank/{r}" for r in range(1, 6)} <= metrics.keys()
    assert all(math.isfinite(v) for v in metrics.values() if not isinstance(v, str))
    config = json.loads((clevr_run / "config.json").read_text())
    assert torch.__version__.startswith(config["history"][0]["versions"]["torch"])
    assert config["options"]["n_slots"] == 3
    assert list(clevr_run.glob("events.out.tfevents.*"))


def test_two_runs_and_a_resumed_one_are_equal_bit_for_bit(tmp_path):
    common = ["--dataset", "sprites", *TINY]
    for name in ("a", "b"):
        train(*common, "--steps", 4, "--out", tmp_path / name)
    state = interrupted_after(2, common, tmp_path / "c")
    assert state["step"] == 2
    train("--resume", tmp_path / "c")
    assert len(json.loads((tmp_path / "c" / "config.json").read_text())["history"]) == 2
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(a[k], c[k]) for k in a)


def interrupted_after(steps, args, folder):
    """Train to 4 steps, but ask to stop, as Ctrl-C does, once `steps` are done; returns the checkpoint."""
    real, done = train_mvae.update, []

    def update(*a):
        values = real(*a)
        done.append(1)
        if len(done) == steps:
            signal.raise_signal(signal.SIGINT)
        return values

    train_mvae.update = update
    try:
        result = train(*args, "--steps", 4, "--out", folder)
    finally:
        train_mvae.update = real
    assert f"stopped at step {steps}" in result.output
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def wait_for_first_step(process):
    seen = ""
    while "step 1," not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, SCRIPT, "--dataset", "sprites", "--minutes", "10", *TINY, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    wait_for_first_step(process)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "--resume" in rest
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 1


def test_nan_stops_the_run_with_its_step_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    interrupted_after(2, ["--dataset", "sprites", *TINY], tmp_path / "run")
    before = weights(tmp_path / "run")
    monkeypatch.setattr(train_mvae, "gaussian_log_likelihood", lambda x, *_: x.flatten(1).sum(1) * math.nan)
    result = CliRunner().invoke(train_mvae.main, ["--resume", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "step 2 is not finite" in result.output and "loss/reconstruction" in result.output
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_training_finds_objects(tmp_path, monkeypatch):
    """Three hundred steps on scenes of two sprites already tell the two apart."""
    monkeypatch.setattr(train_mvae, "HELD_OUT", 64)
    args = ["--dataset", "sprites", "--objects", 2, "--N", 2, "--op", "sum", "--background", "none", "--steps", 300]
    train(*args, "--size", 32, "--cells", 8, "--device", "cpu", "--out", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mse"] < 0.015  # black pictures: 0.026
    assert metrics["ari_fg"] > 0.7  # one slot for all: 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--dataset", "faces"], 2, "'sprites', 'clevr'"),
        (["--N", "0"], 2, "--N"),
        (["--N", "300", "--cells", "8"], 2, "map of 8 x 8"),
        (["--suppress", "4"], 2, "drawn"),
        (["--channels", "12"], 2, "multiple of 8"),
        (["--size", "40", "--cells", "16"], 2, "times the cells"),
        (["--op", "alpha", "--background", "none"], 2, "needs a --background"),
        (["--op", "max", "--background", "none"], 2, "needs a --background"),
        (["--lr", "nan"], 2, "no finite number"),
        (["--minutes", "inf"], 2, "no finite number"),
        (["--download"], 2, "it needs --data-root"),
        (["--objects", "6-3"], 2, "smaller number first"),
        (["--objects", "many"], 2, "no number or range"),
        (["--data-root", "nowhere"], 2, "no such folder"),
        (["--resume", "nowhere"], 2, "no config.json"),
        (["--out", str(SCRIPT)], 2, "exists already"),
    ],
)
def test_wrong_options_end_in_one_clear_line(args, code, message):
    result = CliRunner().invoke(train_mvae.main, args)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


def test_resume_refuses_another_model_and_a_half_written_checkpoint(sprites_run, tmp_path):
    result = CliRunner().invoke(train_mvae.main, ["--resume", str(sprites_run), "--N", "7"])
    assert result.exit_code == 2
    assert "n_slots = 4, which cannot become 7" in result.output
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((sprites_run / "config.json").read_text())
    (broken / "checkpoint.pt").write_bytes((sprites_run / "checkpoint.pt").read_bytes()[:5000])
    result = CliRunner().invoke(train_mvae.main, ["--resume", str(broken)])
    assert result.exit_code == 1
    assert "damaged" in result.output


def test_resume_refuses_other_data_and_another_script(clevr_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clevr_run, run)
    config = json.loads((run / "config.json").read_text())
    write_clevr(tmp_path / "CLEVR_v1.0", sizes=[(320, 240)] * 3)
    before = (run / "metrics.json").read_bytes()
    args = ["--resume", str(run), "--data-root", str(tmp_path / "CLEVR_v1.0"), "--objects", "3-6"]
    result = CliRunner().invoke(train_mvae.main, args)
    assert result.exit_code == 2
    assert "was trained on built-in CLEVR-like renderer" in result.output
    assert json.loads((run / "config.json").read_text()) == config
    assert (run / "metrics.json").read_bytes() == before
    (run / "config.json").write_text(json.dumps(config | {"script": "train_vae_mnist"}))
    result = CliRunner().invoke(train_mvae.main, ["--resume", str(run)])
    assert result.exit_code == 2
    assert "is a run of train_vae_mnist.py" in result.output


def test_a_damaged_picture_stops_the_run_but_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train_mvae, "BLOCK", 4)
    root = write_clevr(tmp_path / "CLEVR_v1.0", sizes=[(320, 240)] * 300)
    broken = root / "images" / "train" / "CLEVR_train_000290.png"
    broken.write_bytes(broken.read_bytes()[:200])
    args = ["--dataset", "clevr", "--data-root", root, "--objects", "1-10", "--steps", 100, *TINY, "--size", 32]
    result = CliRunner().invoke(train_mvae.main, [str(a) for a in [*args, "--out", tmp_path / "run"]])
    assert result.exit_code == 1
    assert "step 72, saved:" in result.output and "CLEVR_train_000290.png: damaged" in result.output
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 72


def test_presets_are_defaults_that_the_command_line_overrides():
    def dry(*args):
        result = CliRunner().invoke(train_mvae.main, [*args, "--dry-run"])
        assert result.exit_code == 0, result.output
        return json.loads(result.output)

    assert dry()["size"] == train_mvae.PRESETS["sprites"]["size"]
    clevr = dry("--dataset=clevr", "--sigma", "0.2")
    assert clevr["size"] == train_mvae.PRESETS["clevr"]["size"]
    assert clevr["sigma"] == 0.2
    assert dry("--dataset", "clevr", "--steps", "10")["minutes"] is None
    assert dry("--steps", "10", "--minutes", "3")["minutes"] == 3
    shown = CliRunner().invoke(train_mvae.main, ["--dataset", "clevr", "--help"]).output
    assert "default: latent" in shown


# ---------------------------------------------------------------- Several processes


def gradients_of(rank, world, folder):
    """The averaged gradients of one step, this process drawing its share of a batch of 32."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that the order of summation does not show
    train_mvae.start_distributed(torch.device("cpu"))
    data = train_mvae.Sprites(32, (3, 3), 0, torch.device("cpu"))
    model = build(background="picture")
    optimizer = torch.optim.Adam(model.parameters())
    share = 32 // world
    mine = slice(rank * share, (rank + 1) * share)
    noise = noise_for(model, 32)[mine]
    train_mvae.CLIP = math.inf
    train_mvae.update(model, optimizer, data.batch(0, mine.start, mine.stop, 32), noise, 1.0, 0.0, PRICES)
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"{world}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_of_16_have_the_gradients_of_one_of_32(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.spawn(gradients_of, (world, tmp_path), nprocs=world)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max() + 1e-12, name


def torchrun(port, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", SCRIPT]
    return list(map(str, [*command, "--dataset", "sprites", *TINY, *args]))


def test_torchrun_stopped_by_ctrl_c_saves(tmp_path):
    """torchrun sends its processes SIGINT and, at once, SIGTERM."""
    command = torchrun(29579, "--minutes", 10, "--out", tmp_path / "run")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    wait_for_first_step(process)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert "stopped at step" in rest
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 1


def test_torchrun_trains_two_processes(tmp_path):
    command = torchrun(29578, "--steps", 2, "--out", tmp_path / "run")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["history"][0]["processes"] == 2
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == 2
