"""The shared mathematics against independent references, and the run helpers' promises."""

import itertools
import json

import click
import numpy as np
import pytest
import torch
import torch.distributions as td

import common
from common import OPS


def test_gaussian_kl_is_that_of_torch():
    mu, logvar = torch.randn(50), torch.randn(50)
    expected = td.kl_divergence(td.Normal(mu, (0.5 * logvar).exp()), td.Normal(0.0, 1.0))
    torch.testing.assert_close(common.gaussian_kl(mu, logvar), expected)


def test_likelihoods_are_those_of_torch_summed_over_an_example():
    x, mean = torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5)
    expected = td.Normal(mean, 0.3).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(common.gaussian_log_likelihood(x, mean, 0.3), expected)
    logits, bits = 3 * torch.randn(7, 4, 20, dtype=torch.float64), (torch.rand(4, 20) > 0.5).double()
    expected = td.Bernoulli(logits=logits).log_prob(bits.expand(7, 4, 20)).sum(-1)
    torch.testing.assert_close(common.bernoulli_log_likelihood(bits, logits), expected)


def test_the_bernoulli_likelihood_neither_overflows_nor_loses_its_gradient():
    logits = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0], requires_grad=True)
    for bit in (0.0, 1.0):
        value = common.bernoulli_log_likelihood(torch.full((5,), bit), logits)
        reference = -torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.full((5,), bit), reduction="sum"
        )
        torch.testing.assert_close(value, reference)
        (gradient,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(gradient, bit - logits.detach().sigmoid(), atol=1e-7, rtol=1e-5)


def test_reparameterize_has_the_posterior_as_its_distribution():
    noise = torch.randn(200_000, generator=common.random_generator("test"))
    z = common.reparameterize(torch.tensor(1.5), torch.tensor(-1.0), noise)
    assert z.mean().item() == pytest.approx(1.5, abs=0.01)
    assert z.var().item() == pytest.approx(np.exp(-1.0), abs=0.01)


def test_beta_rises_from_its_start_to_its_end_and_stays():
    values = [common.beta_at(p, 4.0, 0.5, 0.4) for p in np.linspace(0, 1, 101)]
    assert values[0] == 0.5
    assert all(b >= a for a, b in itertools.pairwise(values))
    assert values[20] == pytest.approx(2.25)  # half way through the rise
    assert set(values[40:]) == {4.0}
    assert common.beta_at(0.0, 1.0, 0.0, 0.0) == 1.0  # no warm-up at all


def test_learning_rate_starts_small_and_ends_at_a_twentieth():
    assert common.learning_rate_at(0.0, 0, 1.0) == pytest.approx(0.01)
    assert common.learning_rate_at(0.0, 99, 1.0) == 1.0
    assert common.learning_rate_at(0.5, 5000, 1.0) == pytest.approx(0.525)
    assert common.learning_rate_at(1.0, 10**6, 1.0) == pytest.approx(0.05)


# ---------------------------------------------------------------- Selection


def reference_selection(kl_map, n, window):
    """Top-N with neighbour suppression, cell by cell."""
    height, width = kl_map.shape
    reach = window // 2
    peaks, rest = [], []
    for y, x in itertools.product(range(height), range(width)):
        around = kl_map[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        (peaks if kl_map[y, x] == around.max() else rest).append((kl_map[y, x], y * width + x))
    ranked = [i for _, i in sorted(peaks, reverse=True)] + [i for _, i in sorted(rest, reverse=True)]
    return ranked[:n]


@pytest.mark.parametrize("window", [1, 3, 5])
def test_selected_cells_are_those_of_a_loop(window):
    maps = torch.rand(6, 7, 9, generator=common.random_generator("maps"))
    index = common.select_cells(maps, 20, window)
    assert index.tolist() == [reference_selection(m.numpy(), 20, window) for m in maps]


def test_suppression_gives_two_objects_two_slots():
    kl_map = torch.zeros(1, 8, 8)
    kl_map[0, 2, 2], kl_map[0, 2, 3], kl_map[0, 6, 6] = 10.0, 9.0, 5.0  # one object lifts two cells
    assert common.select_cells(kl_map, 2, 1).tolist() == [[18, 19]]
    assert common.select_cells(kl_map, 2, 3).tolist() == [[18, 54]]


def test_gather_cells_takes_whole_vectors():
    values = torch.randn(2, 4, 3, 5)
    index = torch.tensor([[0, 14], [7, 7]])
    gathered = common.gather_cells(values, index)
    torch.testing.assert_close(gathered[0, 1], values[0, :, 2, 4])
    torch.testing.assert_close(gathered[1, 0], values[1, :, 1, 2])


# ---------------------------------------------------------------- Composition


def layers(op, slots=5):
    generator = common.random_generator("layers")
    channels = 4 if op == "alpha" else 3
    return torch.randn(2, slots, channels, 6, 6, generator=generator), torch.rand(2, 3, 6, 6, generator=generator)


@pytest.mark.parametrize("op", OPS)
def test_composition_does_not_depend_on_the_order_of_slots(op):
    layer, background = layers(op)
    shuffled = layer[:, torch.tensor([3, 0, 4, 1, 2])]
    torch.testing.assert_close(common.compose(shuffled, background, op), common.compose(layer, background, op))


@pytest.mark.parametrize(("op", "reference"), [("sum", np.sum), ("mean", np.mean), ("max", np.max), ("min", np.min)])
def test_operators_are_those_of_numpy_over_slots_and_background(op, reference):
    layer, background = layers(op)
    every = np.concatenate([background[:, None], layer], axis=1)
    np.testing.assert_allclose(common.compose(layer, background, op), reference(every, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(common.compose(layer, None, op), reference(layer.numpy(), axis=1), rtol=1e-5, atol=1e-6)


def test_alpha_masks_share_every_pixel_and_can_hide_a_slot():
    layer, background = layers("alpha")
    masks = common.alpha_masks(layer)
    assert masks.shape == (2, 6, 1, 6, 6)
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 1, 6, 6))
    layer[:, :, -1] = -1e4
    torch.testing.assert_close(common.compose(layer, background, "alpha"), background)
    layer[:, 2, -1] = 1e4
    torch.testing.assert_close(common.compose(layer, background, "alpha"), layer[:, 2, :3])


def test_an_unknown_operator_is_refused():
    with pytest.raises(ValueError, match="product"):
        common.compose(*layers("sum"), "product")


# ---------------------------------------------------------------- Layers


def test_relative_coordinates_move_a_slot_with_its_cell():
    decoder = common.BroadcastDecoder(4, 8, (32, 32), blocks=1, coords="relative")
    z = torch.randn(1, 4).expand(2, -1)
    step = 2 / 32  # one cell of the grid
    features = decoder(z, torch.tensor([[0.0, 0.0], [3 * step, -2 * step]]))
    inner = slice(8, 24)  # far from the border, where zero padding shows
    torch.testing.assert_close(features[0, :, inner, inner], features[1, :, 11:27, 6:22], rtol=1e-4, atol=1e-5)


def test_absolute_coordinates_ignore_the_cell():
    decoder = common.BroadcastDecoder(4, 8, (16, 16), blocks=1, coords="absolute")
    z = torch.randn(1, 4).expand(2, -1)
    features = decoder(z, torch.tensor([[0.0, 0.0], [0.5, -0.5]]))
    assert torch.equal(features[0], features[1])


def test_position_grid_is_symmetric_and_inside():
    grid = common.position_grid(4, 6)
    torch.testing.assert_close(grid, -grid.flip(1, 2))
    assert grid[0, 0, 0] == -0.75
    assert grid[1, 0, 0] == pytest.approx(-5 / 6)


# ---------------------------------------------------------------- Run helpers


def test_generators_repeat_by_key_and_differ_between_keys():
    draws = [torch.rand(8, generator=common.random_generator("noise", 0, step)) for step in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    common.write_atomically(path, lambda p: p.write_text("old"))

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"no archive at all"])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(click.ClickException, match="damaged or was not written"):
        common.load_checkpoint(tmp_path, "cpu")


def test_a_foreign_checkpoint_or_config_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(click.ClickException, match="was not written"):
        common.load_checkpoint(tmp_path, "cpu")
    with pytest.raises(click.UsageError, match=r"no config\.json"):
        common.load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1, 2]))
    with pytest.raises(click.UsageError, match="not written by"):
        common.load_config(tmp_path)


def test_clock_takes_whichever_ends_first():
    clock = common.Clock(steps=100, minutes=60, elapsed=30 * 60)
    assert clock.progress(10) == pytest.approx(0.5, abs=1e-3)
    assert clock.progress(80) == 0.8
    assert clock.progress(1000) == 1.0
    assert common.Clock(steps=4, minutes=None, elapsed=1e9).progress(1) == 0.25


def test_presets_must_name_options():
    with pytest.raises(ValueError, match="nonsense"):
        common.PresetCommand("name", params=[], presets={"data": {"nonsense": 1}})
