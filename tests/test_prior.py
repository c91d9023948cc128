"""The prior over slots: a density, of sets where it says so; what it samples, completes and learns; its graph."""

import itertools
import json
import math
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, train
from PIL import Image
from test_mvae import build
from test_recompose import refused, run

import recompose
import train_mvae
from common import FlowPrior, choose, random_generator
from tests.experiments import prior as experiment
from tests.experiments import prior_scenes
from tests.experiments.rules import RULES, Fifths, ruled
from train_mvae import ORDERS, Scene, SlotPrior


def prior(order, e=1, n_slots=2, light=0, std=0.3):
    """A prior with weights as if trained: those that are zero at first are of the size of others."""
    torch.manual_seed(0)
    made = SlotPrior(order, e, n_slots, light, width=16, key=4)
    for layer in (*(net[-1] for net in made.flow.nets), made.rating[-2]):
        torch.nn.init.normal_(layer.weight, std=std)
    return made.double()


def scenes(made, n, light=0, count=None):
    """n Scenes with random contents."""
    generator, e = random_generator("scenes"), made.sizes[1]
    slots = torch.randn(n, made.n_slots, e, generator=generator, dtype=torch.float64)
    count = torch.randint(made.n_slots + 1, (n,), generator=generator) if count is None else torch.full((n,), count)
    slots = slots * (torch.arange(made.n_slots) < count[:, None])[..., None]
    return Scene(torch.randn(n, light, generator=generator, dtype=torch.float64), count, slots)


@torch.no_grad()
def of_all_tries(made, scene, n=200):
    """log p of Scenes, (B,): over many orders and tries the density itself, of which each alone gives a lower bound."""
    return torch.stack([made.log_prob(scene, random_generator("try", i)) for i in range(n)]).logsumexp(0) - math.log(n)


def noise_for(made, n, key="noise"):
    return torch.randn(n, *made.noise_shape, generator=random_generator(key), dtype=torch.float64)


def sample(made, noise, kept=0, scene=None, light=0):
    scene = scene or Scene(noise[:, 0, :light], None, noise[:, : made.n_slots, : made.sizes[1]])
    return made.sample(noise, torch.full((len(noise),), kept), scene.light, scene.slots)


# ---------------------------------------------------------------- A density


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_the_densities_of_all_scenes_add_up_to_one(order):
    """Of no, one and two slots of one number each; a set of two is counted in either order, so that half of it is."""
    made, at = prior(order), torch.linspace(-9, 9, 73, dtype=torch.float64)
    step, pairs = float(at[1] - at[0]), torch.cartesian_prod(at, at)
    total = 0.0
    for count, slots in enumerate((torch.zeros(1, 2), torch.stack([at, 0 * at], dim=1), pairs)):
        scene = Scene(torch.zeros(len(slots), 0).double(), torch.full((len(slots),), count), slots[..., None].double())
        draws = range(1 + 7 * (count == 2))
        log_p = torch.stack([made.log_prob(scene, random_generator("order", i), tries=4) for i in draws])
        total += (
            float(log_p.exp().mean(0).sum()) * step**count / (1 if order == "autoregressive" else math.factorial(count))
        )
    assert total == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_a_set_has_the_density_of_all_its_orders_and_it_does_not_depend_on_the_one_it_comes_in():
    made, scene = prior("set", e=2, n_slots=3), scenes(prior("set", e=2, n_slots=3), 5, count=3)

    def by_order(order):
        made.order = "autoregressive"  # by the order that it comes in
        return made.log_prob(scene._replace(slots=scene.slots[:, list(order)]), None, tries=1)

    expected = torch.stack([by_order(order) for order in itertools.permutations(range(3))]).logsumexp(0)
    alone = by_order((0, 1, 2)) + math.log(6)  # what a set's density would be if one order were all
    assert (alone - expected).abs().max() > 0.3  # or the next lines would see nothing
    made.order = "set"
    for order in ((0, 1, 2), (2, 0, 1)):
        moved = scene._replace(slots=scene.slots[:, list(order)])
        drawn = torch.stack([made.log_prob(moved, random_generator(order, i), tries=1) for i in range(400)])
        torch.testing.assert_close(drawn.logsumexp(0) - math.log(400), expected, atol=0.15, rtol=0)


@torch.no_grad()
def test_independent_slots_know_nothing_of_one_another_nor_of_the_light():
    made = prior("independent", e=2, n_slots=3, light=2)
    one, other = scenes(made, 6, light=2, count=3), scenes(made, 6, light=2, count=3)
    other = Scene(one.light + 1, one.count, one.slots.roll(1, 0))
    first, last = (torch.cat([a.slots[:, :1], b.slots[:, 1:]], dim=1) for a, b in ((one, other), (other, one)))
    pairs = (one, other), (one._replace(slots=first), other._replace(slots=last))  # the first slots exchanged
    log_p = (sum(of_all_tries(made, s) - made.light.log_prob(s.light, made.numbers[s.count]) for s in p) for p in pairs)
    torch.testing.assert_close(*log_p, atol=0.1, rtol=0)


# ---------------------------------------------------------------- Samples


@torch.no_grad()
def test_a_category_is_chosen_as_often_as_it_is_likely():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    chosen = choose(p.log(), torch.randn(20_000, generator=random_generator("choose")))
    torch.testing.assert_close(chosen.bincount(minlength=4) / 20_000, p, atol=0.01, rtol=0)
    extremes = choose(torch.tensor([-1e30, 0.0, 1.0, -1e30]), torch.tensor([-40.0, -11.0, 11.0, 40.0]))
    assert extremes.tolist() == [1, 1, 2, 2]  # none of probability 0


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_samples_have_the_density(order):
    """Shares of samples, by number and by the sign of the first slot, beside the density's integral over them."""
    made, at = prior(order), torch.linspace(-12, 12, 2401, dtype=torch.float64)
    scene = sample(made, noise_for(made, 8_000))
    expected = made.count(made.numbers[:1, :1]).softmax(1)[0]
    torch.testing.assert_close(scene.count.bincount(minlength=3) / 8_000, expected.float(), atol=0.02, rtol=0)
    line = Scene(torch.zeros(2401, 0).double(), torch.ones(2401, dtype=torch.long), F_pad(at))
    below = (made.log_prob(line, random_generator("x")).exp() * (at < 0)).sum() * (at[1] - at[0]) / expected[1]
    found = (scene.slots[scene.count == 1, 0, 0] < 0).double().mean()
    assert found == pytest.approx(float(below), abs=0.02)


def F_pad(at):  # noqa: N802
    return torch.stack([at, 0 * at], dim=1)[..., None]


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_a_completion_keeps_what_is_given_and_begins_nothing_anew(order):
    made = prior(order, e=2, n_slots=4, light=3)
    given = scenes(made, 50, light=3, count=4)
    noise = noise_for(made, 50)
    whole = sample(made, noise, kept=2, scene=given)
    torch.testing.assert_close(whole.slots[:, :2], given.slots[:, :2])
    torch.testing.assert_close(whole.light, given.light)
    assert whole.count.min() >= 2 and whole.count.max() == 4
    other = sample(made, noise, kept=2, scene=given._replace(slots=given.slots + 0))
    nonsense = given._replace(slots=torch.cat([given.slots[:, :2], math.inf * given.slots[:, 2:]], dim=1))
    torch.testing.assert_close(sample(made, noise, kept=2, scene=nonsense).slots, other.slots)  # is not looked at
    new = sample(made, noise, kept=0, scene=given)
    assert (new.slots - given.slots).abs().amax((1, 2)).min() > 1e-3 and (new.light - given.light).abs().min() > 0


@torch.no_grad()
def test_a_completion_keeps_what_is_given_however_unlikely_it_is():
    made = prior("set", e=2, n_slots=4, light=3)
    for net in made.light.nets:
        torch.nn.init.normal_(net[-1].weight)
    given = scenes(made, 200, light=3, count=4)
    far = given._replace(light=20 * given.light, slots=20 * given.slots)
    assert sample(made, noise_for(made, 200), kept=3, scene=far).count.min() >= 3


def fit(made, scene, steps):
    optimizer = torch.optim.Adam(made.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        (-made.log_prob(scene, random_generator("fit", step), 4).mean()).backward()
        optimizer.step()


def test_the_light_tells_the_number_of_slots_and_the_number_the_light():
    """No light in between is drawn, as a single flow would; and the light of what is completed tells how many come."""
    made, scene = prior("set", e=1, n_slots=3, light=2, std=0.0), scenes(prior("set", n_slots=3), 400, light=2)
    scene = scene._replace(light=scene.count[:, None] - 1.5 + 0.1 * scene.light)
    fit(made, scene, 300)
    with torch.no_grad():
        new = sample(made, noise_for(made, 400), light=2)
        bright = scene._replace(light=0 * scene.light + 1.5)
        whole = sample(made, noise_for(made, 400), kept=1, scene=bright)
    assert (new.light - new.count[:, None] + 1.5).abs().amax(1).quantile(0.98) < 0.5
    assert (whole.count == 3).double().mean() > 0.98
    torch.testing.assert_close(
        new.count.bincount(minlength=4) / 400, scene.count.bincount(minlength=4) / 400, atol=0.1, rtol=0
    )


def test_what_slots_owe_to_one_another_is_learnt():
    """Two slots, the second the first's opposite: the independent prior has it by chance alone."""
    shares = {}
    first = torch.randn(128, 2, generator=random_generator("first"))
    slots = torch.stack([first, -first], dim=1)
    slots = slots + 0.05 * torch.randn(slots.shape, generator=random_generator("blur"))
    scene = Scene(torch.zeros(128, 0), torch.full((128,), 2), slots)
    for order in ORDERS:
        torch.manual_seed(0)
        made = SlotPrior(order, 2, 2, 0, width=32, key=4)
        fit(made, scene, 250)
        found = sample(made, torch.randn(500, *made.noise_shape, generator=random_generator("found")))
        shares[order] = float(((found.slots.sum(1).abs().amax(1) < 0.4) & (found.count == 2)).float().mean())
    assert shares["independent"] < 0.3 < 0.6 < min(shares["autoregressive"], shares["set"])


def test_slots_that_keep_apart_leave_holes():
    """Two slots anywhere in a square, never near each other: what is drawn near is passed over, as it is rated low."""
    generator = random_generator("apart")
    slots = 2 * torch.rand(4000, 2, 2, generator=generator) - 1
    slots = slots[(slots[:, 0] - slots[:, 1]).norm(dim=1) > 0.8]
    scene = Scene(torch.zeros(len(slots), 0), torch.full((len(slots),), 2), slots)
    share = {}
    for order in ("independent", "set"):
        torch.manual_seed(0)
        made = SlotPrior(order, 2, 2, 0, width=32, key=4)
        fit(made, Scene(*(values[:256] for values in scene)), 150)
        found = sample(made, torch.randn(500, *made.noise_shape, generator=random_generator("found")))
        near = (found.slots[:, 0] - found.slots[:, 1]).norm(dim=1) < 0.7
        share[order] = near[found.count == 2].float().mean().item()
    assert share["set"] < 0.3 * share["independent"], share


def test_slots_that_are_kept_tell_how_many_there_are():
    """Scenes of one slot, at 2, or of two, at -2: a completion around either is of its kind."""
    count = 1 + torch.arange(128) % 2
    slots = (6.0 - 4 * count)[:, None, None] * (torch.arange(2) < count[:, None])[..., None]
    slots = slots + 0.3 * torch.randn(slots.shape, generator=random_generator("kept"))
    torch.manual_seed(0)
    made = SlotPrior("set", 1, 2, 0, width=32, key=4)
    fit(made, Scene(torch.zeros(128, 0), count, slots * (torch.arange(2) < count[:, None])[..., None]), 150)
    kept = Scene(torch.zeros(100, 0), None, torch.tensor([[2.0], [-2.0]]).repeat(50, 1)[..., None].expand(-1, 2, -1))
    whole = sample(made, torch.randn(100, *made.noise_shape, generator=random_generator("whole")), 1, kept)
    assert whole.count[::2].float().mean() < 1.1 and whole.count[1::2].float().mean() > 1.9
    new = sample(made, torch.randn(100, *made.noise_shape, generator=random_generator("whole")), 0, kept)
    assert 1.3 < new.count.float().mean() < 1.7


def test_a_flow_that_is_given_a_context_is_a_density_for_each():
    torch.manual_seed(0)
    flow = FlowPrior(2, context=1, couplings=3, width=8)
    for net in flow.nets:
        torch.nn.init.normal_(net[-1].weight, std=0.4)
    at = torch.linspace(-9, 9, 361)
    z = torch.cartesian_prod(at, at)
    a, b = (
        flow.log_prob(z, torch.full((len(z), 1), value)).exp().sum() * (at[1] - at[0]) ** 2 for value in (-1.0, 2.0)
    )
    assert a.item() == pytest.approx(1, abs=1e-3) and b.item() == pytest.approx(1, abs=1e-3)
    noise, context = torch.randn(9, 2), torch.randn(9, 1)
    z = flow.sample(noise, context)
    jacobian = torch.func.vmap(torch.func.jacrev(flow.sample))(noise, context)
    expected = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1) - jacobian.det().abs().log()
    torch.testing.assert_close(flow.log_prob(z, context), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- In the model


@torch.no_grad()
def test_a_scene_holds_the_slots_that_hold_something_near_where_they_are():
    model = build()
    encoding = model.encode(torch.rand(3, 3, 32, 32, generator=random_generator("x")))
    kl = torch.tensor([[9.0, 5.0, 1.0], [9.0, 1.0, 0.5], [3.0, 2.0, 1.0]])
    scene = model.scene(encoding._replace(kl=kl), random_generator("scene"))
    assert scene.count.tolist() == [2, 1, 0]
    assert (scene.slots[0, 2] == 0).all() and (scene.slots[2] == 0).all() and (scene.slots[0, :2] != 0).all()
    z, cell, background = model.slots(scene)
    assert (cell[0, :2] - encoding.cell[0, :2]).abs().max() <= train_mvae.BLUR
    spread = (z[0, :2] - encoding.mu[0, :2]) / (0.5 * encoding.logvar[0, :2]).exp()
    assert 0.05 < spread.abs().mean() < 3
    torch.testing.assert_close(background, encoding.background)


@torch.no_grad()
def test_slots_of_sounds_stand_in_the_middle_of_cells():
    model = build(dataset="nsynth-duo", op="sum", detail=0, n_slots=2)
    encoding = model.encode(torch.rand(2, train_mvae.FRAMES, 32, 1, generator=random_generator("x")))
    scene = model.scene(encoding._replace(kl=torch.full((2, 2), 99.0)), random_generator("scene"))
    spread = scene.slots[..., :1] - model.unit * encoding.cell[..., :1]  # over their cells
    assert 0.05 < spread.abs().max() <= 0.5
    _, cell, background = model.slots(scene)
    torch.testing.assert_close(cell, encoding.cell)
    assert background is None and scene.light.shape == (2, 0)


@torch.no_grad()
@pytest.mark.parametrize("cells", [6, 7])
def test_other_slots_of_a_sound_know_its_cell_and_not_where_in_it_it_was_drawn(cells):
    made = SlotPrior("autoregressive", 3, 2, 0, cells, width=16, key=4)
    middles = train_mvae.position_grid(cells, 1)[0, :, 0] * cells / 2
    slots = torch.randn(cells, 2, 3, generator=random_generator("cells"))
    slots[:, 0, 0] = middles
    beside = slots.clone()
    beside[:, 0, 0] += 0.49 * (2 * torch.rand(cells, generator=random_generator("beside")) - 1)
    torch.testing.assert_close(made.known(beside)[:, 0], slots[:, 0])
    one, other = (made.suggestions(slots[:, 0, :0], torch.full((cells,), 2), s) for s in (slots, beside))
    for a, b in zip(one[:2] + one[3:], other[:2] + other[3:], strict=True):  # all but the density of the slots
        torch.testing.assert_close(a, b)


def test_a_run_fits_its_prior_and_leaves_all_else_as_it_is(tmp_path):
    states = {}
    for order in ("independent", "set"):
        train("--steps", 3, "--size", 32, "--prior", order, "--out", tmp_path / order)
        states[order] = torch.load(tmp_path / order / "checkpoint.pt", weights_only=True)["model"]
    fitted = [name for name in states["set"] if name.startswith("prior.")]
    torch.manual_seed(0)
    assert fitted and all(states["set"][n].equal(v) for n, v in states["independent"].items() if n not in fitted)
    assert any(not states["set"][name].equal(states["independent"][name]) for name in fitted)


def test_a_prior_is_fitted_anew_where_a_run_goes_on_and_kept_where_it_fails(tmp_path, monkeypatch):
    train("--steps", 3, "--size", 32, "--out", tmp_path / "run")
    before = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    result = CliRunner().invoke(train_mvae.main, ["--resume", str(tmp_path / "run")])
    assert result.exit_code == 0, (result.output, result.exception)
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert all(after[name].equal(value) for name, value in before.items())
    monkeypatch.setattr(train_mvae, "fit_prior", lambda *_: math.nan)
    (tmp_path / "run" / "metrics.json").unlink()
    result = CliRunner().invoke(train_mvae.main, ["--resume", str(tmp_path / "run")])
    assert result.exit_code == 1 and "is not finite: {'prior': nan}" in result.output
    assert (tmp_path / "run" / "metrics.json").is_file(), "scores do not wait for the prior"
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert all(kept[name].equal(value) for name, value in before.items())


def test_a_run_that_was_stopped_exports_no_prior_and_the_shortest_run_has_one(tmp_path, monkeypatch):
    train("--minutes", 1e-4, "--size", 32, "--out", tmp_path / "short")
    model = train_mvae.load(tmp_path / "short")
    assert model.config["step"] == 1 and [*train_mvae.graphs(model)] == ["encoder", "prior", "decoder", "composer"]
    step = train_mvae.optimizer_step

    def interrupted(*a, **k):
        signal.raise_signal(signal.SIGINT)
        return step(*a, **k)

    monkeypatch.setattr(train_mvae, "optimizer_step", interrupted)
    train("--steps", 3, "--size", 32, "--out", tmp_path / "stopped")
    assert [*train_mvae.graphs(train_mvae.load(tmp_path / "stopped"))] == ["encoder", "decoder", "composer"]
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    config["options"]["minutes"] = None  # finished, and now to go on
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"options": config["options"] | {"steps": 3}}))
    train("--resume", tmp_path / "short")
    model = train_mvae.load(tmp_path / "short")  # its prior was fitted to another encoder
    assert model.config["step"] == 2 and [*train_mvae.graphs(model)] == ["encoder", "decoder", "composer"]


def test_a_prior_is_fitted_to_every_example_as_often(monkeypatch):
    monkeypatch.setattr(train_mvae, "CHUNK", 4)
    model, pictures = build(), torch.rand(6, 3, 32, 32, generator=random_generator("six"))

    def batch(k, own, total):
        return pictures[(k * total + torch.arange(total)[own]) % 6]

    for length, n, expected in ((6, 20, 18), (6, 5, 5), (100, 6, 6)):
        data = SimpleNamespace(batch=batch, length=length, device=torch.device("cpu"))
        kl = train_mvae.posteriors(model, data, n, 0).kl
        assert len(kl) == expected
        for i in range(0, expected, 6):
            torch.testing.assert_close(kl[i : i + 6], kl[: len(kl[i : i + 6])])


@torch.no_grad()
def test_a_scene_of_no_slots_is_its_background():
    model, background = build(), torch.rand(1, 3, 32, 32, generator=random_generator("background"))
    scene = Scene(torch.zeros(1, 8), torch.tensor([0]), torch.zeros(1, 3, 6))
    torch.testing.assert_close(experiment.drawn(model, scene), model.background.paint(scene.light))
    torch.testing.assert_close(model.compose(torch.zeros(1, 0, 6, 32, 32), background), background)


def test_the_prior_graph_samples_as_the_model_does(sprites_run):
    model = train_mvae.load(sprites_run)
    session = recompose.Model(sprites_run / "export", "mvae-image", others=["prior"])
    noise = torch.randn(6, *model.prior.noise_shape, generator=random_generator("graph"))
    given = noise[:, 1 : model.n_slots + 1, : model.d + 2].contiguous()
    kept = torch.tensor([0, 1, 2, 0, 3, 0]).clamp(max=model.n_slots)
    light = noise[:, 0, : model.noise_sizes[1]].contiguous()
    inputs = {"noise": noise, "kept": kept, "given": given, "light": light}
    made = session.run("prior", **{name: value.numpy() for name, value in inputs.items()})
    contract = json.loads((Path(__file__).parents[1] / "docs" / "contract.json").read_text())
    rows, *columns = re.search("batch, (.*), W.*of (.*) and (.*)", contract["tensors"]["noise (mvae-image)"]).groups()
    sizes = {"N": model.n_slots, "D": model.d, "L": model.noise_sizes[1]}
    assert noise.shape[1:] == (eval(rows, sizes), max(eval(one, sizes) for one in columns))
    with torch.no_grad():
        scene = model.prior.sample(noise, kept, light, given)
        z, cell, background = model.slots(scene)
    for name, value in {"z": z, "cell": cell, "count": scene.count, "background": background}.items():
        np.testing.assert_allclose(made[name], value.numpy(), atol=1e-4)


# ---------------------------------------------------------------- The recomposition tool


def test_new_scenes_are_drawn_and_the_seed_says_which(sprites_run, tmp_path):
    model = sprites_run / "export"
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run("--sample", 3, "--seed", seed, "--model", model, "--out", tmp_path / f"{name}.png")
        assert result.exit_code == 0, result.output
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    size = json.loads((model / "model.json").read_text())["size"]
    assert recompose.Image.open(tmp_path / "a.png").size == (3 * size, size)
    assert recompose.Image.open(tmp_path / "a_figure.png").height > 3 * 128


def test_a_scene_is_completed_around_the_slots_that_are_kept(sprites_run, tmp_path, monkeypatch):
    monkeypatch.setitem(recompose.EMPTY, "mvae-image", 0.0)  # the run has learnt nothing
    asked, real = [], recompose.Model.run
    monkeypatch.setattr(recompose.Model, "run", lambda self, graph, **inputs: asked.append((graph, inputs)) or real(
        self, graph, **inputs))  # fmt: skip
    model = sprites_run / "export"
    size = json.loads((model / "model.json").read_text())["size"]
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    recompose.Image.fromarray(pixels).resize((size, size)).save(tmp_path / "in.png")
    seen = {}
    for seed, extra in (("none", ()), *((seed, ("--complete", "--seed", seed)) for seed in range(5))):
        result = run(tmp_path / "in.png", "--slots", "0", *extra, "--model", model, "--out", tmp_path / f"{seed}.png")
        assert result.exit_code == 0, result.output
        seen[seed] = (tmp_path / f"{seed}.png").read_bytes()
    assert len(set(seen.values())) > 1
    said = real(recompose.Model(model, "mvae-image"), "encoder", **next(i for graph, i in asked if graph == "encoder"))
    given = [inputs for graph, inputs in asked if graph == "prior"]
    assert len(given) == 5 and all(inputs["kept"] == [1] for inputs in given)
    kept = np.concatenate([said["cell"], said["mu"]], axis=2)[0, :1]
    np.testing.assert_allclose(given[0]["given"][0, :1], kept, atol=1e-5)
    np.testing.assert_allclose(given[0]["light"], said["light"], atol=1e-5)
    monkeypatch.setitem(recompose.EMPTY, "mvae-image", float(said["kl"][0, :2].mean()))  # so that slot 1 is empty
    asked.clear()
    result = run(tmp_path / "in.png", "--slots", "1,0", "--complete", "--model", model, "--out", tmp_path / "e.png")
    assert result.exit_code == 0, result.output
    (inputs,) = [inputs for graph, inputs in asked if graph == "prior"]
    assert inputs["kept"] == [1]
    np.testing.assert_allclose(inputs["given"][0, :1], kept, atol=1e-5)
    drawn = [len(inputs["z"][0]) for graph, inputs in asked if graph == "decoder"][-1]  # the given one among them
    assert (
        next(i["layer"].shape[1] for g, i in reversed(asked) if g == "composer" and len(i["layer"]) == 1) == drawn + 1
    )
    result = run(tmp_path / "in.png", "--slots", "1", "--complete", "--model", model, "--out", tmp_path / "e.png")
    refused(result, "--complete: 0 slots are kept that hold something; expected 1 to")


@torch.no_grad()
def test_a_note_that_is_given_stays_in_its_cell(duo_run):
    model = train_mvae.load(duo_run)
    graph, inputs = train_mvae.graphs(model)["prior"]
    cell = model.encoder.middles[:, :, 0].T[[3, 11]]  # (2, 2)
    inputs["given"][:, 0, :2], inputs["kept"][:] = cell, 1
    z, found, count = graph(*inputs.values())
    torch.testing.assert_close(found[:, 0], cell)
    torch.testing.assert_close(z[:, 0], inputs["given"][:, 0, 2:])
    assert (count >= 1).all()


def test_mixtures_are_sampled_as_sounds(duo_run, tmp_path):
    result = run("--sample", 2, "--model", duo_run / "export", "--out", tmp_path / "new.wav")
    assert result.exit_code == 0, result.output
    samples, rate = recompose.read_sound(tmp_path / "new.wav")
    about = json.loads((duo_run / "export" / "model.json").read_text())
    assert rate == about["sample_rate"] and len(samples) >= 2 * about["samples"] and np.abs(samples).max() > 1e-3


@pytest.mark.parametrize(("trained", "name"), [("sprites_run", "a.png"), ("duo_run", "a.wav")])
def test_a_scene_of_no_slots_is_drawn_empty(trained, name, request, tmp_path, monkeypatch):
    plain, folder = recompose.Model.run, request.getfixturevalue(trained) / "export"
    none = {"prior": {"count": np.zeros(1, np.float32)}}
    monkeypatch.setattr(
        recompose.Model, "run", lambda self, graph, **to: plain(self, graph, **to) | none.get(graph, {})
    )
    result = run("--sample", 2, "--model", folder, "--out", tmp_path / name)
    if name == "a.wav":
        refused(result, "hold nothing", 1)  # of silence no file is written
    else:
        assert result.exit_code == 0, result.output
        width, height = Image.open(tmp_path / name).size
        assert width == 2 * height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected pictures or sounds"),
        (("a.png", "--sample", "2"), "expected pictures or sounds"),
        (("--sample", "0"), "0 is not in the range"),
        (("a.wav", "--complete"), "--complete is for pictures"),
        (("--sample", "2", "--slots", "0"), "--sample with --model, --seed, --out alone"),
        (("--sample", "2", "--front", "0"), "--sample with --model, --seed, --out alone"),
    ],
)
def test_what_cannot_be_sampled_or_completed_is_said(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.wav"):
        (tmp_path / name).write_bytes(b"")
    refused(run(*arguments), message)


def test_a_model_without_a_prior_is_refused(sprites_run, tmp_path):
    shutil.copytree(sprites_run / "export", tmp_path / "export")
    (tmp_path / "export" / "prior.onnx").unlink()
    refused(run("--sample", 1, "--model", tmp_path / "export", "--out", tmp_path / "a.png"), "prior.onnx: missing")
    (tmp_path / "export" / "SHA256SUMS").unlink()  # so that onnxruntime itself has to say it
    (tmp_path / "export" / "prior.onnx").write_bytes(b"half a graph")
    refused(run("--sample", 1, "--model", tmp_path / "export", "--out", tmp_path / "a.png"), "prior.onnx: missing")


# ---------------------------------------------------------------- Data with a rule


def test_ruled_sprites_obey_their_rules():
    for rule in RULES["sprites"]:
        data = ruled(rule)(32, (2, 4), 0, torch.device("cpu"))
        scene = data.sample(200, random_generator("rule"))
        centre, there = scene["centre"], scene["present"]
        if rule == "colour":
            assert (scene["rgb"] == scene["rgb"][:, :1]).all()
        elif rule == "row":
            assert (centre[..., 0] == centre[:, :1, 0]).all()
            assert centre[..., 1].sort(1).values.diff(dim=1).min() > 0.2
        elif rule == "apart":
            gap = (
                (centre[:, :, None] - centre[:, None]).norm(dim=3)
                - scene["radius"][:, :, None]
                - scene["radius"][:, None]
            )
            pairs = there[:, :, None] & there[:, None] & ~torch.eye(4, dtype=torch.bool)
            assert (gap[pairs] > 0).float().mean() > 0.97
        elif rule == "mirror":
            assert (there[:, ::2] == there[:, 1::2]).all()
            image, _ = data.render(scene)
            assert (
                (image - image.flip(3)).abs().amax((1, 2, 3)) < 1e-5
            ).float().mean() > 0.5  # but where pairs overlap
        else:
            image, label = data.render(scene)
            ground = torch.stack([one[:, mask].mean() for one, mask in zip(image, label == 0, strict=True)])
            assert torch.corrcoef(torch.stack([ground, there.sum(1).float()]))[0, 1] > 0.9


def test_ruled_mixtures_are_a_fifth_apart():
    options = {"data_root": None, "families": None, "download": False, "voices": (2, 2), "dataset": "nsynth-duo"}
    data = Fifths(options | {"size": 32, "seed": 0, "mix": False}, torch.device("cpu"))
    pair, _ = data.sample("train", 40, random_generator("fifth"))
    pitch = data.notes["train"].pitch[pair]
    assert ((pitch[:, 0] - pitch[:, 1]).abs() == 7).all()


# ---------------------------------------------------------------- Experiments


@pytest.fixture(scope="session")
def masked_run(tmp_path_factory):
    """A run of two steps on sprites whose slots have masks."""
    folder = tmp_path_factory.mktemp("masked")
    train("--dataset", "sprites", "--steps", 2, *TINY, "--out", folder)
    return folder


def test_the_experiments_judge_every_prior(masked_run, monkeypatch):
    monkeypatch.setattr(train_mvae, "POOL", 64)
    for name in ("TESTED", "SAMPLES"):
        monkeypatch.setattr(experiment, name, 16)
    monkeypatch.setattr(experiment, "LIKELIHOODS", 2)
    monkeypatch.setattr(prior_scenes, "SCENES", 8)
    monkeypatch.setattr(prior_scenes, "COUNTED", 12)
    monkeypatch.setattr(prior_scenes, "MOST", 2)
    monkeypatch.setattr(train_mvae, "Sprites", train_mvae.Sprites)  # as the rule replaces it
    monkeypatch.setitem(train_mvae.EMPTY, "mvae-image", 0.0)  # the run has learnt nothing
    result = CliRunner().invoke(experiment.main, [str(masked_run), "--rule", "colour", "--steps", "2"])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [line.split(" | ")[0] for line in result.output.splitlines() if line.startswith("| ")]
    assert rows == ["| prior", "| the data's own", "| by chance", "| N(0, I)", *(f"| {order}" for order in ORDERS)]
    result = CliRunner().invoke(prior_scenes.main, [str(masked_run), "--steps", "2"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(result.output.splitlines()) == 3 + 5


def test_runs_that_the_judges_cannot_read_are_refused(sprites_run, masked_run, duo_run):
    for main, args, said in (
        (experiment.main, (sprites_run, "--rule", "row"), "expected a run on pictures with --op alpha --compose data"),
        (prior_scenes.main, (sprites_run,), "expected a run on pictures with --op alpha --compose data"),
        (prior_scenes.main, (duo_run,), "expected a run on pictures with --op alpha --compose data"),
        (experiment.main, (masked_run, "--rule", "fifth"), "expected a run on nsynth-duo"),
    ):
        result = CliRunner().invoke(main, list(map(str, args)))
        assert result.exit_code == 2 and said in result.output, result.output


class Discs:
    """A model that draws discs: slots (y, x) and a colour."""

    def slots(self, scene):
        return scene.slots[..., 2:], scene.slots[..., :2], torch.full((len(scene.count), 3, 32, 32), 0.31)

    def decode(self, z, cell):
        grid = train_mvae.position_grid(32, 32)
        near = (grid - cell[..., None, None]).norm(dim=2, keepdim=True) < 0.2  # (B, N, 1, 32, 32)
        colour = z[..., None, None].expand(-1, -1, -1, 32, 32)
        return torch.cat([0 * colour[:, :, :2], colour, 20.0 * near - 10], dim=2)


def discs(*rows, count):
    """Scenes of as many of the first slots, y, x, red and green, as `count` says."""
    slots = torch.nn.functional.pad(torch.tensor(rows), (0, 1))
    return Scene(torch.zeros(len(count), 0), torch.tensor(count), slots.expand(len(count), *slots.shape))


def test_a_rule_is_judged_by_what_slots_draw():
    """Data that obey a rule are found to, and others are not."""
    scene = discs([-0.5, 0.5, 1.0, 0.0], [-0.5, -0.5, 1.0, 0.0], [0.5, 0.5, 0.0, 1.0], count=[2, 3])
    obeyed = {rule: experiment.judge_rule(rule, Discs(), scene).tolist() for rule in RULES["sprites"]}
    expected = {"colour": [True, False], "row": [True, False], "mirror": [True, False]}
    assert obeyed == expected | {"apart": [True, True], "count": [False, True]}
    crossed = scene._replace(slots=scene.slots * torch.tensor([0.2, 0.2, 1, 1, 1]))
    assert experiment.judge_rule("apart", Discs(), crossed).tolist() == [False, False]


def test_a_third_slot_where_a_pair_is_complete_mirrors_nothing():
    left, right = [-0.5, -0.5, 1.0, 0.0], [-0.5, 0.5, 1.0, 0.0]
    for fourth, obeyed in ((left, False), ([0.5, -0.5, 1.0, 0.0], False), (None, False)):
        rows = [left, right, right, *([fourth] if fourth else [])]
        assert experiment.judge_rule("mirror", Discs(), discs(*rows, count=[len(rows)])).tolist() == [obeyed]
    pairs = discs(left, right, [0.5, -0.5, 0.0, 1.0], [0.5, 0.5, 0.0, 1.0], count=[4])
    assert experiment.judge_rule("mirror", Discs(), pairs).tolist() == [True]


def test_objects_of_scenes_are_measured_by_what_slots_draw():
    scene = discs([0.0, 0.0, 1.0, 0.0], [0.0, 0.05, 1.0, 0.0], [0.0, 0.95, 0.0, 1.0], count=[1, 2, 3])
    shape, cut, overlap = prior_scenes.objects_of(Discs(), scene)
    assert cut.tolist() == [False, False, False, False, False, True]  # those of 1, of 2 and of 3 slots
    assert overlap.tolist() == [False, True, True]
    torch.testing.assert_close(shape[0], torch.tensor([18.0, 6.0, 6.0]) / 32)  # rows 13 to 18 of 32


class LinearGaussian:
    """x = W (z of two slots, light) + 0.5 noise: a sum of what each of three N(0, 1) draws, in columns at right angles.

    So their posteriors are independent, and known; or they are `wider` than that. Cells say which slot it is.
    """

    s, d, n_slots, blur, scene = 0.5, 1, 2, 0.01, train_mvae.MVAE.scene
    weight = torch.tensor([[1.0, 0.6, 0.0, 0.0], [0.6, -1.0, 0.0, 0.3], [0.3 * 0.6, -0.3, 0.0, -1.36]])  # (3, 4)

    def __init__(self, sound, wider):
        self.sound, self.unit, self.wider, self.k = sound, 2.0 if sound else 1.0, wider, 2 if sound else 3
        self.kind = "mvae-sound" if sound else "mvae-image"
        self.noise_sizes = [2, 0 if sound else 1]
        self.encoder, self.background = (lambda image: [image] * 4), SimpleNamespace(posterior=self.of_light)

    def posterior(self, x):  # (B, 4) -> mu, logvar (B, k)
        own = self.weight[: self.k]
        precision = 1 + own.square().sum(1) / self.s**2
        return x @ own.T / self.s**2 / precision, (self.wider / precision).log().expand(len(x), -1)

    def of_light(self, x):
        mu, logvar = (values[:, 2:] for values in self.posterior(x))
        return torch.cat([mu, logvar - train_mvae.LOGVAR_START], dim=1)

    def encode(self, x):
        mu, logvar = (values[:, :2, None] for values in self.posterior(x))
        cell = torch.tensor([[-0.5, 0.0], [0.5, 0.0]]).expand(len(x), -1, -1)
        return train_mvae.Encoding(mu, logvar, cell, torch.full((len(x), 2), 99.0), None, None, x[:, :0], None)

    def slots(self, scene):
        return scene.slots[..., 2:], scene.slots[..., :2], None if self.sound else scene.light @ self.weight[2:]

    def decode(self, z, cell):
        return z * self.weight[(cell[..., 0] > 0).long()]  # (B, 2, 4)

    def compose(self, layer, background):
        return layer.sum(1) if background is None else layer.sum(1) + background


@pytest.mark.parametrize(("sound", "wider"), [(True, 1.0), (False, 1.0), (False, 2.0)])
def test_likelihoods_are_those_of_a_model_whose_are_known(sound, wider, monkeypatch):
    monkeypatch.setattr(experiment, "IMPORTANCE", 20_000)
    model = LinearGaussian(sound, wider)
    own = model.weight[: model.k]
    assert (own @ own.T - (own @ own.T).diagonal().diag()).abs().max() < 1e-6
    x = torch.randn(3, 4, generator=random_generator("x"))
    density = torch.distributions.MultivariateNormal(torch.zeros(4), own.T @ own + model.s**2 * torch.eye(4))
    area = 2 * 2.0 * 2 * 0.01 if sound else (2 + 2 * train_mvae.SHIFT) ** 2
    places = 2 * math.log(0.02**2 / area) + math.log(2) - math.log(3)  # of two in any order, of none, one or two
    ((bound, kl),) = experiment.likelihoods(
        model, {"N(0, I)": lambda scene: experiment.standard_log_prob(model, scene)}, x, model.s
    ).values()
    assert bound == pytest.approx((density.log_prob(x).mean() + places).item(), abs=1e-4 if wider == 1 else 0.03)
    mu, logvar = model.posterior(x)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    exact = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean() - places
    assert kl == pytest.approx(exact.item(), abs=0.03)


def test_slots_by_chance_are_of_other_scenes_with_as_many():
    scene = scenes(prior("set", e=4, n_slots=3, light=2), 200, light=2)
    mixed = experiment.shuffled(scene)
    assert mixed.count.equal(scene.count)
    for k in range(3):
        there = scene.count > k
        assert not mixed.slots[~there, k].any()
        torch.testing.assert_close(*(one.slots[there, k].sort(0).values for one in (mixed, scene)))
    both = scene.count > 1
    apart = [(mixed.slots[both, k, None] == scene.slots[:, k]).all(2).float().argmax(1) for k in (0, 1)]
    assert (apart[0] == apart[1]).float().mean() < 0.05, "two slots of a scene are of two others"


def test_a_fifth_is_seven_semitones_up_or_down():
    step = 12 * math.log2(train_mvae.RATE / 2 / train_mvae.LOWEST) / 2  # semitones of half the axis
    semitones, count = torch.tensor([7.0, -7.0, 7.9, 6.0, 8.1, 7.0]), torch.tensor([2, 2, 2, 2, 2, 1])
    cell = torch.stack([torch.zeros(6), semitones / step], dim=1)[..., None]  # (6, 2, 1)
    model = SimpleNamespace(slots=lambda scene: (None, cell, None))
    found = experiment.judge_fifth(model, SimpleNamespace(count=count))
    assert found.tolist() == [True, True, True, False, False, False]


def test_numbers_of_slots_are_shares_and_few_draws_are_off_by_chance():
    scene = SimpleNamespace(count=torch.tensor([0, 2, 2, 1]), slots=torch.zeros(4, 3, 5))
    assert prior_scenes.numbers_of(scene).tolist() == [0.25, 0.25, 0.5, 0.0]
    mean_error = math.sqrt(2 / math.pi * 0.25 / 400)  # of a share of a half by 400 draws
    assert prior_scenes.chance_variation(torch.tensor([0.5, 0.5]), 400) == pytest.approx(mean_error, rel=0.15)


def test_a_classifier_tells_samples_that_are_brighter_and_not_the_data_from_themselves(monkeypatch):
    monkeypatch.setattr(prior_scenes, "MOST", 100)
    data = torch.rand(64, 3, 32, 32, generator=random_generator("pictures"))
    assert prior_scenes.discriminator_steps(data, data + 0.5) < 100
    assert prior_scenes.discriminator_steps(data, data) == 100


@torch.no_grad()
def test_completions_go_on_from_slots_of_their_own_scene():
    made = prior("set", e=5, n_slots=4).float()
    scene = Scene(*(v.float() if v.is_floating_point() else v for v in scenes(made, 40)))
    model = SimpleNamespace(noise_sizes=[20, 0], n_slots=4, d=3)
    whole = experiment.completed(made, model, scene)
    assert len(whole.count) > 0 and (whole.count > experiment.KEPT).all()
    own = (whole.slots[:, : experiment.KEPT, None, None] == scene.slots).all(4).any(3)  # (B, KEPT, scenes)
    assert own.all(1).any(1).all()  # both are of one scene
    assert not (whole.slots[:, experiment.KEPT, None, None] == scene.slots).all(3).any()  # a third is new


def test_the_density_without_a_fit_is_of_normal_latents_uniform_numbers_and_places():
    model = SimpleNamespace(sound=False, n_slots=3)
    scene = scenes(prior("set", e=4, n_slots=3, light=2), 20, light=2)
    there = torch.arange(3) < scene.count[:, None]
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = normal.log_prob(scene.light).sum(1) - math.log(4)  # of 0 to 3 slots
    expected += (normal.log_prob(scene.slots[..., 2:]).sum(2) * there).sum(1)
    side = 2 + 2 * train_mvae.SHIFT  # cells shift by SHIFT beyond the picture; a set of n comes in n! orders
    expected += torch.tensor([math.log(math.factorial(n) / side ** (2 * n)) for n in scene.count.tolist()])
    torch.testing.assert_close(experiment.standard_log_prob(model, scene), expected)


# ---------------------------------------------------------------- The shipped models


def test_the_shipped_models_draw_scenes_and_mixtures_that_they_know_again(tmp_path, capsys):
    """What the prior draws is taken apart without the warning that it is unlike what the model has learnt."""
    for name, n in (("new.png", 1), ("new.wav", 1)):
        result = run("--sample", n, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        again = run(tmp_path / name, "--out", tmp_path / f"again_{name}")
        assert again.exit_code == 0 and "unlike" not in again.output, again.output
        assert int(re.search(r": (\d+) (?:object|note)", again.output)[1]) >= 1


def test_a_completed_scene_still_has_the_slots_that_were_kept(tmp_path):
    source = recompose.SHIPPED["mvae-image"] / "a.png"
    for name, extra in (("two", ()), ("whole", ("--complete", "--seed", 2))):
        assert run(source, "--slots", "0,2", *extra, "--out", tmp_path / f"{name}.png").exit_code == 0
    two, whole = (np.asarray(recompose.Image.open(tmp_path / f"{n}.png"), np.float32) for n in ("two", "whole"))
    model = recompose.Model(recompose.SHIPPED["mvae-image"], "mvae-image")
    found = [model.run("encoder", image=im.transpose(2, 0, 1)[None] / 255) for im in (two, whole)]
    kept, every = (one["cell"][one["kl"] >= 4] for one in found)
    assert len(every) > len(kept) >= 2
    away = np.abs(kept[:, None] - every).max(2).min(1)  # of each that was kept to the nearest in the whole scene
    assert (away < 2 / 32).all()  # a cell
