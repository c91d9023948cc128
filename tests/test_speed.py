"""Slot Attention is the paper's; the race and the benchmark of a step still run. No speed is asserted anywhere."""

import json
import math
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner

from tests.benchmarks import throughput
from tests.benchmarks.slot_attention import LR, SLOT, SlotAttention, learning_rate_at
from tests.experiments import race


def invoke(command, *args):
    """The output of a command, whose exit code must be 0."""
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SlotAttention(16, n_slots=4, channels=8)


@pytest.fixture(scope="module")
def scene():
    """Two pictures, and noise of four slots."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 16, 16, generator=generator), torch.randn(2, 4, SLOT, generator=generator)


# ---------------------------------------------------------------- Slot Attention


def parameters_by_layer(c, steps):
    """Weights and biases as the paper's tables of layers have them: c channels, slots of 64, an MLP of 128."""
    return {
        "four 5x5 convolutions": (25 * 3 * c + c) + 3 * (25 * c * c + c),
        "two position embeddings": (4 * c + c) + (4 * 64 + 64),
        "norm, MLP, norm": 2 * c + 2 * (c * c + c) + 2 * c,
        "key, value, query": 2 * c * 64 + 64 * 64,
        "GRU": 3 * (64 * 64 + 64 * 64 + 2 * 64),
        "norm of slots": 2 * 64,
        "norm, MLP of slots": 2 * 64 + (64 * 128 + 128) + (128 * 64 + 64),
        "mean, deviation of the first slots": 2 * 64,
        "5x5 transposed convolutions": (25 * 64 * c + c) + (steps - 1) * (25 * c * c + c),
        "5x5, 3x3 convolutions": (25 * c * c + c) + (9 * c * 4 + 4)
    }  # fmt: skip


@pytest.mark.parametrize(("size", "channels", "expected"), [(128, 64, 890_308), (64, 64, 787_844), (64, 32, 261_444)])
def test_slot_attention_has_the_parameters_of_the_papers_layers(size, channels, expected):
    layers = parameters_by_layer(channels, steps=int(math.log2(size / 8)))
    count = sum(p.numel() for p in SlotAttention(size, channels=channels).parameters())
    assert count == sum(layers.values()) == expected


def test_attention_is_a_softmax_over_slots(model):
    key, slots = torch.randn(2, 5, SLOT), torch.randn(2, 4, SLOT)
    share = model.attend(key, slots)  # (2, 4, 5)
    query = torch.nn.functional.layer_norm(slots, (SLOT,)) @ model.query.weight.T
    match = torch.einsum("bkd,bpd->bkp", query, key) / math.sqrt(SLOT)
    torch.testing.assert_close(share, match.exp() / match.exp().sum(1, keepdim=True))
    torch.testing.assert_close(share.sum(1), torch.ones(2, 5))


def test_slots_are_the_mean_of_values_after_one_iteration(scene):
    model = SlotAttention(16, n_slots=1, iterations=1, channels=8)  # one slot has all of every pixel
    image, noise = scene[0], scene[1][:, :1]
    seen = []
    model.gru.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode(image, noise)
    features = model.features(model.encoder_position(model.encoder(2 * image - 1)).flatten(2).mT)
    torch.testing.assert_close(seen[0], model.value(features).mean(1))


def test_slots_permute_with_their_noise(model, scene):
    image, noise = scene
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        mean, masks, slots = model(image, noise)
        permuted = model(image, noise[:, order])
    for one, other in zip((mean, masks[:, order], slots[:, order]), permuted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_masks_sum_to_one(model, scene):
    mean, masks, slots = model(*scene)
    assert mean.shape == (2, 3, 16, 16) and masks.shape == (2, 4, 16, 16) and slots.shape == (2, 4, SLOT)
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 16, 16))


def test_every_parameter_gets_a_gradient(model, scene):
    image, noise = scene
    (model(image, noise)[0] - image).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_size_without_whole_steps_is_refused():
    with pytest.raises(ValueError, match="size 24"):
        SlotAttention(24)


def test_the_learning_rate_is_the_papers():
    paper = [learning_rate_at(step / 500_000, step, LR) for step in (0, 5_000, 10_000, 110_000)]
    assert paper == pytest.approx([0, LR / 2 * 0.5**0.05, LR * 0.5**0.1, LR * 0.5**1.1])
    assert learning_rate_at(0.02, 9, LR) == pytest.approx(LR, rel=1e-3)  # a short run rises in its own 2 %


# ---------------------------------------------------------------- The race


@pytest.fixture
def small_scenes(monkeypatch):
    monkeypatch.setattr(race.train_mvae, "CHUNK", 2)
    monkeypatch.setattr(race, "CHUNK", 2)


class Given:
    """A model that reconstructs every picture, and has the masks it is given."""

    n_slots = 4

    def __init__(self, masks):
        self.masks = masks

    def __call__(self, image, noise):
        return image, self.masks, None


def test_the_score_is_of_all_masks_on_object_pixels():
    truth = torch.zeros(2, 16, 16, dtype=torch.long)
    truth[:, 3:6, 3:6], truth[:, 9:12, 9:12] = 1, 2
    image, masks = torch.rand(2, 3, 16, 16), torch.nn.functional.one_hot(truth, 4).permute(0, 3, 1, 2).float()
    assert race.evaluate(Given(masks), image, truth) == {"ari_fg": 1.0, "mse": 0.0}
    striped = masks.clone()
    striped[:, 3, ::2] = 1.0 - masks[:, 1:3, ::2].sum(1)  # a fourth component, but only of the background
    assert race.evaluate(Given(striped), image, truth)["ari_fg"] == 1.0
    masks[:, 0] = 2.0  # the background's is the largest everywhere
    assert race.evaluate(Given(masks), image, truth)["ari_fg"] == 0.0


def test_the_race_trains_goes_on_and_is_drawn(tmp_path, small_scenes):
    options = ["--size", 32, "--channels", 2, "--batch", 1, "--scenes", 2, "--out", tmp_path / "race"]
    invoke(race.main, *options, "--minutes", 0.005)
    first = json.loads((tmp_path / "race" / "curve.json").read_text())
    assert first[0]["step"] == 0 and first[-1]["minutes"] >= 0.005
    assert {"step", "minutes", "cpu_minutes", "ari_fg", "mse"} == first[0].keys()
    invoke(race.main, *options, "--minutes", 0.008)
    curve = json.loads((tmp_path / "race" / "curve.json").read_text())
    assert curve[: len(first)] == first and curve[-1]["step"] > first[-1]["step"]
    assert all(a["step"] < b["step"] for a, b in pairwise(curve))

    (tmp_path / "mvae").mkdir()
    config = {"script": "train_mvae", "options": {}, "data": {"source": "scenes"}, "history": []}
    (tmp_path / "mvae" / "config.json").write_text(json.dumps(config))
    points = [{"step": k, "minutes": k / 100, "ari_fg": k / 20, "mse": 0.1} for k in range(20)]
    (tmp_path / "mvae" / "curve.json").write_text(json.dumps(points))
    output = invoke(race.main, "--draw", tmp_path / "mvae", "--out", tmp_path / "race")
    assert "| MVAE | 0.2 minutes | 0.2 minutes |" in output and "| Slot Attention | not in 0 minutes: best" in output
    assert (tmp_path / "race" / "race.png").stat().st_size > 10_000


# ---------------------------------------------------------------- The benchmark of a step


def test_saved_bytes_count_every_storage_once_and_no_parameter(monkeypatch):
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def scaled(options):
        model = Scale()

        def loss(image):  # the product keeps the image; the square keeps the product, twice the same
            product = model.scale * image
            error = (product.square() + product.sin()).mean()
            return error, {"loss": error}

        return model, loss

    monkeypatch.setitem(throughput.MODELS, "scale", scaled)
    assert throughput.saved_bytes("scale", {"batch": 2, "size": 4}) == 2 * (2 * 3 * 4 * 4) * 4


def test_a_step_is_measured(monkeypatch, small_scenes):
    monkeypatch.setattr(throughput, "WARM_UP", 1)
    monkeypatch.setattr(throughput, "LEAST", 0)
    monkeypatch.setattr(throughput, "CALLS", 2)
    monkeypatch.setattr(throughput, "peak_growth_apart", throughput.peak_growth)  # a process takes seconds to start
    output = invoke(throughput.main, "--size", 32, "--batch", 1, "--rounds", 1, "--only", "plain")
    assert "| plain: whole pictures, N = 6 | " in output and "selection of slots" in output and "logging" in output
