"""The model, its objective, its scores, and the training script from start to resume."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributions as td
from click.testing import CliRunner
from conftest import TINY, train
from test_data import write_clevr
from torchmetrics.clustering import AdjustedRandScore

import common
import train_mvae
from common import OPS, random_generator
from train_mvae import MVAE, position_grid

SCRIPT = Path(train_mvae.__file__)


def build(**changes):
    options = {
        "size": 32, "cells": 8, "n_slots": 3, "d": 4, "channels": 8, "op": "alpha", "compose_at": "data",
        "detail": 2, "dataset": "sprites", "prior": "set",
    }  # fmt: skip
    torch.manual_seed(0)
    model = MVAE(**options | changes)
    shape = (train_mvae.FRAMES, 32, 1) if model.sound else (3, 32, 32)
    model.start_at_mean(torch.full(shape, 0.3))
    return model


def pictures(n=2):
    return torch.rand(n, 3, 32, 32, generator=random_generator("pictures"))


def noise_for(model, n=2):
    return torch.randn(n, sum(model.noise_sizes), generator=random_generator("noise"))


def reconstruct(model, image):
    """As evaluation does: z = mu, N slots."""
    encoding = model.encode(image)
    return model.compose(model.decode(encoding.mu, encoding.cell), encoding.background)


# ---------------------------------------------------------------- Model


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("compose_at", ["data", "feature"])
def test_every_parameter_gets_a_gradient_and_what_is_trained_is_what_is_scored(op, compose_at):
    model = build(op=op, compose_at=compose_at)
    image = pictures(4)
    encoding, mean, haze = model(image, noise_for(model, 4))
    assert mean.shape == (4, 3, 32, 32)
    assert encoding.mu.shape == encoding.logvar.shape == (4, 3, 4)
    loss, _ = train_mvae.objective(image, mean, encoding, haze, 1.0, 0.1)
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert {name.split(".")[0] for name in silent} <= {"prior"}  # which is fitted at the end of a run


def narrow(model):
    """The same model, with posteriors without a width."""
    for head in (model.encoder.head, model.closer.head[-2], model.background.posterior):
        head.bias.data[len(head.bias) // 2 :] = -60.0
        head.weight.data[len(head.bias) // 2 :] = 0
    return model


@torch.no_grad()
@pytest.mark.parametrize("op", OPS)
def test_training_composes_what_evaluation_does(op):
    model, image = narrow(build(op=op)), pictures()
    torch.testing.assert_close(model(image, noise_for(model))[1], reconstruct(model, image))


@torch.no_grad()
def test_before_slots_look_closer_their_details_change_nothing_and_cost_nothing():
    model, image = narrow(build()), pictures()
    encoding, mean, _ = model(image, noise_for(model), detailed=False)
    z = torch.cat([encoding.mu[..., :2], torch.zeros(2, 3, 2)], dim=2)
    torch.testing.assert_close(mean, model.compose(model.decode(z, encoding.cell), encoding.background))
    details = common.gaussian_kl(encoding.mu, encoding.logvar)[..., 2:].sum((1, 2))
    torch.testing.assert_close(model(image, noise_for(model))[0].kl_all - encoding.kl_all, details)


@torch.no_grad()
def test_slots_are_cells_in_falling_order_of_their_kl_each_once():
    for n in (3, 64):
        encoding = build(n_slots=n).encode(pictures())
        assert (encoding.kl[:, :-1] >= encoding.kl[:, 1:]).all()
        torch.testing.assert_close(encoding.kl[:, 0], encoding.kl_map.flatten(1).amax(1))
        row, column = ((encoding.cell + 1) * 4 - 0.5).round().long().unbind(-1)  # before training none is shifted
        torch.testing.assert_close(encoding.kl_map.flatten(1).gather(1, row * 8 + column), encoding.kl)
        assert all(len(set(cells)) == n for cells in (row * 8 + column).tolist())


@torch.no_grad()
@pytest.mark.parametrize("dataset", ["sprites", "nsynth-duo"])
def test_an_encoder_gives_as_many_slots_as_it_is_asked_for(dataset):
    """The same as a model of so many slots has, up to MOST_SLOTS; those of fewer are among those of more."""
    options = {"dataset": dataset} | ({"op": "sum", "detail": 0} if dataset == "nsynth-duo" else {})
    model = build(**options)
    data = torch.rand(2, train_mvae.FRAMES, 32, 1) if model.sound else pictures()
    most = 8 if model.sound else train_mvae.MOST_SLOTS  # eight cells
    assert model.most_slots == most
    seen = [set()] * len(data)
    for n in (1, 3, 5, most):
        asked, built = model.encode(data, slots=torch.arange(n)), build(**options, n_slots=n).encode(data)
        assert asked.mu.shape == (2, n, 4)
        for one, other in zip(asked, built, strict=True):
            torch.testing.assert_close(one, other)
        places = [set(map(tuple, cells)) for cells in asked.cell.tolist()]
        assert all(few <= more for few, more in zip(seen, places, strict=True))
        seen = places
    assert torch.equal(model.encode(data).mu, model.encode(data, slots=torch.arange(3)).mu)


@torch.no_grad()
def test_cells_within_the_canvas_of_a_chosen_slot_become_no_slots():
    model = build()
    kl_map, place, half = torch.zeros(1, 8, 8), position_grid(8, 8)[None].clone(), torch.full((1, 8, 8), 0.2)
    half[0, 2, 2] = 0.9  # a large canvas, 0.65 of which reaches 2.3 cells far
    for k, (row, column) in enumerate([(2, 2), (2, 4), (4, 2), (3, 3), (6, 6), (2, 6), (7, 0)]):
        kl_map[0, row, column] = 20 - k
    place[0, :, 2, 6] = torch.tensor([-0.375, -0.375])  # its slot would stand in the large canvas
    place[0, :, 0, 7] = place[0, :, 6, 6] + 0.2  # and this one's beside a small one, beyond its canvas
    kl_map[0, 0, 7] = 13.5
    half = half.flatten(1)
    assert model.select(kl_map.flatten(1), place, half, 3).tolist() == [[2 * 8 + 2, 6 * 8 + 6, 7 * 8 + 0]]


@torch.no_grad()
def test_a_cell_far_from_where_its_slot_stands_counts_less():
    model = build()
    kl_map, half = torch.zeros(1, 8, 8), torch.full((1, 64), 0.2)
    kl_map[0, 1, 1], kl_map[0, 6, 6], kl_map[0, 1, 6] = 4, 3, 2
    place = position_grid(8, 8)[None].clone()
    assert model.select(kl_map.flatten(1), place, half, 2).tolist() == [[9, 54]]
    place[0, 0, 1, 1] += 0.3 * 0.8  # exp(-0.64) of 4 is 2.1, below 3 and above 2
    place[0, 1, 6, 6] -= 0.3  # exp(-1) of 3 is 1.1, below 2
    assert model.select(kl_map.flatten(1), place, half, 2).tolist() == [[9, 14]]


@torch.no_grad()
def test_a_slot_stands_at_most_the_shift_from_its_cell_and_is_moved_with_its_content():
    model = build(n_slots=1)
    middle = model.encode(pictures()).cell
    model.encoder.shift.bias.copy_(torch.tensor([100.0, -0.5]))
    moved = model.encode(pictures()).cell - middle
    torch.testing.assert_close(moved, torch.tensor([0.3, 0.3 * math.tanh(-0.5)]).expand(2, 1, 2))


@torch.no_grad()
@pytest.mark.parametrize("op", OPS)
def test_a_slot_is_decoded_by_itself_the_same_wherever_it_stands(op):
    model = build(op=op)
    z, cell = torch.randn(1, 3, 4), torch.rand(1, 3, 2)
    torch.testing.assert_close(model.decode(z[:, 1:2], cell[:, 1:2])[:, 0], model.decode(z, cell)[:, 1])
    step = 2 / 32  # one pixel
    layer = model.decode(z[:, :1].expand(-1, 2, -1), torch.tensor([[[0.0, 0.0], [3 * step, -2 * step]]]))
    if op == "alpha":
        assert (layer[0, 1, 0] > layer[0, 0, 0]).all(), "lower in the picture is nearer"
        layer = layer[:, :, 1:]
    torch.testing.assert_close(layer[0, 0, :, :-3, 2:], layer[0, 1, :, 3:, :-2], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_resampling_is_exact_for_planes_keeps_means_and_cuts_out_what_it_pasted():
    y, x = position_grid(12, 12)
    plane = (0.3 + 0.5 * y - 0.2 * x)[None, None]  # linear interpolation is exact on planes
    scale, offset = torch.tensor([0.5]), torch.tensor([[0.1, -0.2]])
    v, u = position_grid(20, 20)
    seen = train_mvae.resample(plane, scale, offset, 20)
    torch.testing.assert_close(seen[0, 0], 0.3 + 0.5 * (0.1 + 0.5 * v) - 0.2 * (-0.2 + 0.5 * u))
    noise = torch.rand(1, 2, 32, 32, generator=random_generator("noise"))
    small = train_mvae.resample(noise, torch.ones(1), torch.zeros(1, 2), 8)  # every pixel counts, as in an average
    assert small.std() < 0.5 * noise.std()
    torch.testing.assert_close(small[..., 1:-1, 1:-1].mean(), noise.mean(), atol=0.02, rtol=0)
    pasted = train_mvae.resample(plane, 1 / scale, -offset / scale[:, None], 96)
    assert not pasted[..., position_grid(96, 96)[1] > 0.35].any(), "beyond the canvas there is nothing"
    again = train_mvae.resample(pasted, scale, offset, 12)  # far from the border, where it fades
    torch.testing.assert_close(again[..., 3:-3, 3:-3], plane[..., 3:-3, 3:-3], atol=5e-3, rtol=0)


def test_the_weight_of_the_kl_rises_and_falls():
    weights = [train_mvae.beta_at(at, 4.0, 0.2, 0.5, train_mvae.FALL) for at in (0, 0.1, 0.2, 0.35, 0.5, 0.65, 1)]
    assert weights == pytest.approx([0, 2, 4, 4, 2.25, 0.5, 0.5])


@torch.no_grad()
def test_a_closer_look_sees_where_the_slot_stands_and_nothing_else():
    model = build(n_slots=1)
    image = 0.5 * torch.ones(2, 3, 32, 32)
    image[:, :, 10:14, 18:22] += torch.rand(3, 4, 4, generator=random_generator("object"))
    encoding, half = model.encode(image), model.slot_decoder.half(model.encode(image).mu)[0, 0]
    y, x = position_grid(32, 32)
    away = torch.maximum((y - encoding.cell[0, 0, 0]).abs(), (x - encoding.cell[0, 0, 1]).abs()) > half + 3 / 32
    changed = image + away * torch.tensor([0.0, 0.2])[:, None, None, None]
    seen = []
    model.closer.trunk.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.encode(image)
    centred = image - image.mean((2, 3), keepdim=True)
    cut = train_mvae.resample(centred, half.expand(2), encoding.cell[:, 0], train_mvae.CLOSER)
    torch.testing.assert_close(seen[0], 4 * cut)
    cut = train_mvae.resample(changed, half.expand(2), encoding.cell[:, 0], train_mvae.CLOSER)
    model.closer(cut, encoding.mu[:, 0, :2])
    torch.testing.assert_close(seen[1][0], seen[1][1])


def test_a_grids_positions_are_symmetric_and_inside():
    grid = position_grid(4, 6)
    torch.testing.assert_close(grid, -grid.flip(1, 2))
    assert grid[0, 0, 0] == -0.75
    assert grid[1, 0, 0] == pytest.approx(-5 / 6)


@torch.no_grad()
@pytest.mark.parametrize("op", OPS)
def test_a_slot_is_drawn_within_its_canvas(op):
    """Beyond it, composing the slot with the background changes nothing but, by its shade, up to twice as far."""
    model = build(op=op)
    model.slot_decoder.mean += 3 * torch.rand(model.slot_decoder.mean.shape, generator=random_generator("drawn"))
    z, cell = torch.randn(1, 1, 4), torch.tensor([[[0.25, -0.5]]])
    half, (y, x) = model.slot_decoder.half(z)[0, 0], position_grid(32, 32)
    distance = torch.maximum((y - 0.25).abs(), (x + 0.5).abs()) - half
    background = torch.rand(1, 3, 32, 32, generator=random_generator("background"))
    layer = model.decode(z, cell)
    image = model.compose(layer, background)
    expected = background / 2 if op == "mean" else background
    pixel = 2 / 32
    assert (image - expected)[..., distance < -half / 2].abs().max() > 0.01
    if op == "alpha":
        assert (image <= background + 1e-4)[..., distance > pixel].all(), "a shade only darkens"
        layer[:, :, 1] = 0
        image = model.compose(layer, background)
    torch.testing.assert_close(image[..., distance > pixel], expected[..., distance > pixel], atol=2e-4, rtol=0)


@torch.no_grad()
def test_the_model_starts_from_the_mean_picture():
    mean = torch.rand(3, 32, 32, generator=random_generator("mean"))
    model = build(op="sum")
    model.start_at_mean(mean)
    encoding, image, _ = model(pictures(), 0 * noise_for(model))
    assert (image - mean).abs().mean() < 0.15
    assert encoding.kl_map.mean() < 20


@torch.no_grad()
def test_the_backgrounds_kl_is_computed_in_full_precision():
    model, posterior = build(), []
    model.background.posterior.register_forward_hook(lambda module, inputs, output: posterior.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        kl = model.background(torch.rand(2, 8), None)[1]
    assert posterior[0].dtype == torch.bfloat16 and kl.dtype == torch.float32
    mu, logvar = posterior[0].double().chunk(2, dim=1)
    exact = td.Normal(mu, (0.5 * (logvar + train_mvae.LOGVAR_START)).exp())
    expected = td.kl_divergence(exact, td.Normal(torch.zeros_like(mu), 1.0)).sum(1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- Objective


def test_the_likelihood_is_that_of_torch_summed_over_an_example():
    x, mean = torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5)
    expected = td.Normal(mean, 0.3).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(train_mvae.gaussian_log_likelihood(x, mean, 0.3), expected)


def test_objective_by_hand():
    model = build()
    image = pictures()
    encoding, mean, haze = model(image, noise_for(model))
    loss, terms = train_mvae.objective(image, mean, encoding, haze, 2.5, 0.2)
    mu, logvar, _, features = model.encoder(image)
    kl = common.gaussian_kl(mu, logvar).sum((1, 2, 3)) + model.background(features, None)[1]
    kl = kl + common.gaussian_kl(encoding.mu, encoding.logvar)[..., 2:].sum((1, 2))  # of all cells, and of details
    expected = -td.Normal(mean, 0.2).log_prob(image).sum((1, 2, 3)) + 2.5 * kl + train_mvae.HAZE * haze
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(terms["loss/kl"], kl.mean())


@pytest.mark.parametrize("detailed", [True, False])
@torch.no_grad()
def test_haze_is_largest_where_masks_are_one_half_and_at_first_a_price_on_what_is_seen_through(detailed):
    model = narrow(build())
    _, mean, haze = model(pictures(), noise_for(model), detailed)
    encoding = model.encode(pictures())
    z = encoding.mu * (detailed | (torch.arange(model.d) < model.d - model.detail))
    layer = model.decode(z, encoding.cell)
    behind = model.responsibilities(layer, encoding.background)[:, 0]
    change = (mean - encoding.background * layer[:, :, 1:2].sum(1).exp()).abs().mean(1)  # of the background, by layers
    seen = 0 if detailed else train_mvae.SEEN_THROUGH * (behind * change).sum((1, 2))
    torch.testing.assert_close(haze, (behind - behind.square()).sum((1, 2)) + seen)
    assert build(op="max")(pictures(), noise_for(model))[2].tolist() == [0, 0]


def gradients(own):
    """Of one step, for a process that has the slice `own` of a batch of 32."""
    model, image = build(), train_mvae.Sprites(32, (3, 3), 0, torch.device("cpu")).batch(0, own, 32).double()
    encoding, mean, haze = model(image, noise_for(model, 32)[own])
    loss, terms = train_mvae.objective(image, mean, encoding, haze, 1.0, 0.1)
    trained = {
        name: p for name, p in model.named_parameters() if not name.startswith("prior.")
    }  # which is fitted later
    common.optimizer_step(loss, terms, torch.optim.Adam(trained.values()), 1e-3, math.inf)
    return {name: parameter.grad for name, parameter in trained.items()}


def test_two_processes_of_16_have_the_gradients_of_one_of_32(monkeypatch):
    """In double precision, as the order of summation differs; the first one's messages are kept for the second."""
    kept, dtype = [], torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        one = gradients(slice(0, 32))
        monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(common.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(common.dist, "all_reduce", lambda message: kept.append(message.clone()))
        gradients(slice(0, 16))
        monkeypatch.setattr(common.dist, "all_reduce", lambda message: message.add_(kept.pop(0)))
        two = gradients(slice(16, 32))
    finally:
        torch.set_default_dtype(dtype)
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max() + 1e-12, name


# ---------------------------------------------------------------- Scores


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("compose_at", ["data", "feature"])
@torch.no_grad()
def test_pixels_beyond_every_slots_canvas_belong_to_the_background(op, compose_at):
    model = build(op=op, compose_at=compose_at)
    encoding = model.encode(pictures())
    cell = torch.tensor([[[-0.8, -0.8]]]).expand(2, 3, 2)
    layer = model.decode(5 * torch.randn(2, 3, 4), cell)
    owned = model.responsibilities(layer, encoding.background)
    assert owned.shape == (2, 4, 32, 32)
    assert (owned.argmax(1)[:, 24:, 24:] == 0).all()


def test_adjusted_rand_index_is_that_of_torchmetrics():
    generator = random_generator("ari")
    for groups in (2, 3, 6):
        a = torch.randint(groups, (40,), generator=generator)
        b = torch.where(torch.rand(40, generator=generator) < 0.6, a, torch.randint(5, (40,), generator=generator))
        assert train_mvae.adjusted_rand_index(b, a) == pytest.approx(AdjustedRandScore()(b, a).item(), abs=1e-6)
    assert train_mvae.adjusted_rand_index((a + 3) % 6, a) == 1.0  # names do not matter
    one = torch.zeros(9, dtype=torch.long)
    assert train_mvae.adjusted_rand_index(one, one) == 1.0


def test_ari_fg_is_of_scenes_with_an_object_and_has_the_background_among_the_predicted():
    """As in deepmind's segmentation_metrics."""
    model, label = build(), torch.randint(3, (4, 32, 32), generator=random_generator("labels"))
    label[2:], label[3, 5, 5] = 0, 1  # nothing, and a pixel, which is less than SMALLEST
    data = SimpleNamespace(scenes=lambda split, n: (pictures(4), label))
    scores = train_mvae.evaluate_pictures(model, data, "test", 4, 0.1)
    with torch.no_grad():
        encoding = model.encode(pictures(4))
        owned = model.responsibilities(model.decode(encoding.mu, encoding.cell), encoding.background)
    expected = [AdjustedRandScore()(owned[b].argmax(0)[label[b] > 0], label[b][label[b] > 0]).item() for b in range(2)]
    assert scores["ari_fg"] == pytest.approx(sum(expected) / 2, abs=1e-6) and scores["scenes"] == 4
    with torch.no_grad():
        errors = [(mean - pictures(4)).square().mean().item() for mean in (reconstruct(model, pictures(4)),
                                                                          pictures(4).mean(0))]  # fmt: skip
    assert [scores["mse"], scores["mse_baseline"]] == pytest.approx(errors)
    label[:] = 0
    assert "ari_fg" not in train_mvae.evaluate_pictures(model, data, "test", 4, 0.1)


def test_a_picture_without_a_mask_has_no_objects_to_score(tmp_path):
    data, model = train_mvae.PictureFolder(write_clevr(tmp_path), 32, (2, 3), 0, torch.device("cpu")), build()
    (tmp_path / "masks" / "val" / "CLEVR_val_000000.png").unlink()
    labels = data.scenes("test", 2)[1]
    assert not labels[0].any() and labels[1].any()
    assert "ari_fg" in train_mvae.evaluate_pictures(model, data, "test", 2, 0.1)
    (tmp_path / "masks" / "val" / "CLEVR_val_000001.png").unlink()
    assert "ari_fg" not in train_mvae.evaluate_pictures(model, data, "test", 2, 0.1)


def test_what_a_scene_has_no_score_for_is_left_out_of_averages():
    assert train_mvae.averages([{"a": 1.0}, {}, {"a": 2.0}]) == {"a": 1.5}


# ---------------------------------------------------------------- The script


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def refused(*args):
    """The message and exit code of a run that does not start, or does not end well."""
    result = CliRunner().invoke(train_mvae.main, [str(a) for a in args])
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output, result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def silent(monkeypatch):
    """No scores and figures."""
    monkeypatch.setattr(train_mvae, "evaluate_pictures", lambda *_: {})
    monkeypatch.setattr(train_mvae, "show_pictures", lambda *_: None)


def test_a_run_folder_holds_what_the_contract_says(clevr_run):
    assert (clevr_run / "figures" / "decomposition.png").is_file()
    curve = json.loads((clevr_run / "curve.json").read_text())
    assert [point["step"] for point in curve][-3:] == [1, 2, 3]
    metrics = json.loads((clevr_run / "metrics.json").read_text())
    assert (metrics["data"], metrics["split"], metrics["step"]) == ("built-in CLEVR-like renderer", "test", 3)
    names = {"ari_fg", "mse", "mse_baseline", "kl", "step_0/ari_fg", "step_0/mse"}
    assert names <= metrics.keys()
    assert all(math.isfinite(value) for value in metrics.values() if not isinstance(value, str))
    config = json.loads((clevr_run / "config.json").read_text())
    assert torch.__version__.startswith(config["history"][0]["versions"]["torch"])
    assert config["options"]["n_slots"] == 3
    assert list(clevr_run.glob("events.out.tfevents.*"))


def test_test_scenes_are_touched_at_the_end_of_a_run_alone(tmp_path, monkeypatch):
    asked, scenes = [], train_mvae.Sprites.scenes
    monkeypatch.setattr(train_mvae.Sprites, "scenes", lambda self, *a: asked.append(a[0]) or scenes(self, *a))
    train("--dataset", "sprites", *TINY, "--size", 32, "--steps", 2, "--out", tmp_path / "run")
    assert asked[-2:] == ["test", "test"] and set(asked[:-2]) == {"valid"}  # the trained model and its start


def interrupted_after(steps, args, folder, monkeypatch):
    """Train to 4 steps, but ask to stop, as Ctrl-C does, once `steps` are done; returns the checkpoint."""
    real, done = train_mvae.optimizer_step, []

    def optimizer_step(*a):
        done.append(1)
        if len(done) == steps:
            signal.raise_signal(signal.SIGINT)
        return real(*a)

    with monkeypatch.context() as patch:
        patch.setattr(train_mvae, "optimizer_step", optimizer_step)
        result = train(*args, "--steps", 4, "--out", folder)
    assert f"stopped at step {steps}" in result.output
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_two_runs_and_a_resumed_one_are_equal_bit_for_bit(tmp_path, monkeypatch, silent):
    args = ["--dataset", "sprites", *TINY, "--size", 32]
    for name in ("a", "b"):
        train(*args, "--steps", 4, "--out", tmp_path / name)
    assert interrupted_after(2, args, tmp_path / "c", monkeypatch)["step"] == 2
    train("--resume", tmp_path / "c")
    assert len(json.loads((tmp_path / "c" / "config.json").read_text())["history"]) == 2
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(a[k], c[k]) for k in a)


def test_a_finished_run_goes_on_at_its_final_beta_and_learning_rate(tmp_path, monkeypatch, silent):
    logged, log = [], common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda self, values: logged.append(values) or log(self, values))
    train("--dataset", "sprites", *TINY, "--size", 32, "--steps", 3, "--beta", 4, "--lr", 1, "--out", tmp_path / "run")
    assert logged[0]["schedule/beta"] == 0
    train("--resume", tmp_path / "run", "--steps", 6)
    assert [values["schedule/beta"] for values in logged[3:]] == [0.5, 0.5, 0.5]
    assert [values["schedule/lr"] for values in logged[3:]] == pytest.approx([0.05 * k / 100 for k in (4, 5, 6)])


def test_nan_stops_the_run_with_its_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, silent):
    interrupted_after(2, ["--dataset", "sprites", *TINY, "--size", 32], tmp_path / "run", monkeypatch)
    before = weights(tmp_path / "run")
    monkeypatch.setattr(train_mvae, "gaussian_log_likelihood", lambda x, *_: x.flatten(1).sum(1) * math.nan)
    code, message = refused("--resume", tmp_path / "run")
    assert code == 1 and "step 2 is not finite" in message and "loss/reconstruction" in message
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_damaged_picture_is_named_once_and_another_takes_its_place(tmp_path, silent):
    root = write_clevr(tmp_path / "CLEVR_v1.0", sizes=[(320, 240)], train=20)
    broken = root / "images" / "train" / "CLEVR_train_000003.png"
    broken.unlink()
    broken.write_bytes((root / "images" / "train" / "CLEVR_train_000000.png").read_bytes()[:200])
    args = ["--dataset", "clevr", "--data-root", root, "--objects", 1, 10, "--steps", 12, *TINY, "--size", 32]
    result = train(*args, "--out", tmp_path / "run")
    assert result.output.count("CLEVR_train_000003.png: damaged") == 1
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 12


def test_training_finds_objects(tmp_path, monkeypatch):
    """200 steps on scenes of two sprites already tell the two apart."""
    monkeypatch.setattr(train_mvae, "SCENES", 64)
    args = ["--dataset", "sprites", "--objects", 2, 2, "--N", 2, "--channels", 24, "--beta", 1, "--lr", 4e-3]
    monkeypatch.setattr(train_mvae, "show_pictures", lambda *_: None)
    train(*args, "--steps", 200, "--size", 32, "--cells", 8, "--device", "cpu", "--out", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mse"] < 0.02 < metrics["mse_baseline"]  # black pictures; four seeds had 0.007 to 0.015
    assert metrics["ari_fg"] > 0.4 > metrics["step_0/ari_fg"]  # one slot for all: 0; four seeds had 0.55 to 0.74


# ---------------------------------------------------------------- Options


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "faces"], "'sprites', 'clevr'"),
        (["--N", "0"], "--N"),
        (["--N", "300", "--cells", "8"], "--N 300: expected at most 64, the cells"),
        (["--channels", "12"], "num_channels (12) must be divisible by num_groups (8)"),
        (["--size", "40", "--cells", "16"], "times the cells"),
        (["--lr", "nan"], "expected a finite number"),
        (["--minutes", "inf"], "expected a finite number"),
        (["--download"], "--download does not belong to --dataset sprites"),
        (["--dataset", "clevr", "--download"], "--download needs --data-root"),
        (["--objects", "6", "3"], "--objects: expected the fewest first"),
        (["--objects", "3", "many"], "'many' is not a valid integer"),
        (["--detail", "20"], "--detail 20: expected less than --D, 20"),
        (["--data-root", "nowhere"], "no such folder"),
        (["--resume", "nowhere"], "nowhere/config.json: missing, damaged"),
        (["--out", str(SCRIPT)], "exists already"),
        (["--families", "bass"], "--families does not belong to --dataset sprites"),
        (["--detail", "3", "--dataset", "nsynth-duo"], "--detail does not belong to --dataset nsynth-duo"),
    ],
)
def test_wrong_options_end_in_one_clear_line(args, message):
    for dry_run in [[], ["--dry-run"]][: 1 if "--channels" in args else 2]:  # of those building a model says
        code, said = refused("--steps", 1, *args, *dry_run)
        assert code == 2 and message in said, said


def dry(*args):
    result = CliRunner().invoke(train_mvae.main, [*args, "--dry-run"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_presets_are_defaults_that_the_command_line_overrides():
    preset = train_mvae.PRESETS["clevr"]
    clevr = dry("--dataset=clevr", "--sigma", "0.2")
    assert (clevr["sigma"], clevr["n_slots"], clevr["minutes"]) == (0.2, preset["n_slots"], preset["minutes"])
    assert dry()["dataset"] == "sprites"
    assert dry("--dataset", "sprites", "--dataset", "clevr") == dry("--dataset", "clevr")
    assert dry("--dataset", "clevr", "--steps", "10")["minutes"] is None
    assert dry("--steps", "10", "--minutes", "3")["minutes"] == 3


def test_help_shows_a_data_sets_own_options_and_values():
    results = (CliRunner().invoke(train_mvae.main, ["--dataset", name, "--help"]) for name in ("clevr", "nsynth-duo"))
    clevr, duo = (" ".join(result.output.split("Options:")[1].split()) for result in results)
    assert "--objects" in clevr and "--families" not in clevr
    assert "--families" in duo and "default: 384" in duo
    assert not any(f"--{name}" in duo for name in train_mvae.FOREIGN["nsynth-duo"])


def test_resume_refuses_another_model_and_a_half_written_checkpoint(clevr_run, tmp_path):
    code, message = refused("--resume", clevr_run, "--N", "7")
    assert code == 2 and "--N 7: the run to resume has 3" in message
    (tmp_path / "config.json").write_text((clevr_run / "config.json").read_text())
    (tmp_path / "checkpoint.pt").write_bytes((clevr_run / "checkpoint.pt").read_bytes()[:5000])
    code, message = refused("--resume", tmp_path)
    assert code == 1 and "damaged" in message


def test_resume_refuses_other_data_and_another_script(clevr_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clevr_run, run, ignore=shutil.ignore_patterns("export"))
    config = json.loads((run / "config.json").read_text())
    write_clevr(tmp_path / "CLEVR_v1.0", sizes=[(320, 240)] * 3)
    before = (run / "metrics.json").read_bytes()
    code, message = refused("--resume", run, "--data-root", tmp_path / "CLEVR_v1.0")
    assert code == 2 and "the run saw built-in CLEVR-like renderer" in message
    assert json.loads((run / "config.json").read_text()) == config
    assert (run / "metrics.json").read_bytes() == before
    (run / "config.json").write_text(json.dumps(config | {"script": "train_vae_mnist"}))
    code, message = refused("--resume", run)
    assert code == 2 and "is a run of train_vae_mnist.py" in message


# ---------------------------------------------------------------- Processes


def wait_for_first_step(process):
    seen = ""
    while "step 1," not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    args = ["--dataset", "sprites", "--steps", 3000, *TINY, "--size", 32, "--eval", "quick", "--out", tmp_path / "run"]
    command = [sys.executable, SCRIPT, *args]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "run" / "figures" / "decomposition.png").exists():
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "--resume" in rest
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 1
