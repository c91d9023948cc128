"""The shared mathematics against independent references, the options, and the run's promises."""

import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
import pytest
import torch
import torch.distributions as td
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import recompose
import train_mvae
import train_vae_audio
import train_vae_mnist
from common import OPS, Run

SCRIPTS = (train_vae_mnist, train_vae_audio, train_mvae)


def test_gaussian_kl_is_that_of_torch():
    mu, logvar = torch.randn(50), torch.randn(50)
    expected = td.kl_divergence(td.Normal(mu, (0.5 * logvar).exp()), td.Normal(0.0, 1.0))
    torch.testing.assert_close(common.gaussian_kl(mu, logvar), expected)


def test_reparameterize_has_the_posterior_as_its_distribution():
    noise = torch.randn(200_000, generator=common.random_generator("test"))
    z = common.reparameterize(torch.tensor(1.5), torch.tensor(-1.0), noise)
    assert z.mean().item() == pytest.approx(1.5, abs=0.01)
    assert z.var().item() == pytest.approx(np.exp(-1.0), abs=0.01)


def test_beta_rises_from_zero_to_its_end_and_stays():
    values = [common.beta_at(p, 4.0, 0.4) for p in np.linspace(0, 1, 101)]
    assert values[0] == 0
    assert all(b >= a for a, b in itertools.pairwise(values))
    assert values[20] == pytest.approx(2.0)  # half way through the rise
    assert set(values[40:]) == {4.0}
    assert common.beta_at(0.0, 1.0, 0.0) == 1.0  # no warm-up at all


def test_learning_rate_starts_small_and_ends_at_a_twentieth():
    assert common.learning_rate_at(0.0, 0, 1.0) == pytest.approx(0.01)
    assert common.learning_rate_at(0.0, 99, 1.0) == 1.0
    assert common.learning_rate_at(0.5, 5000, 1.0) == pytest.approx(0.525)
    assert common.learning_rate_at(1.0, 10**6, 1.0) == pytest.approx(0.05)


def test_gather_cells_takes_whole_vectors():
    values = torch.randn(2, 4, 3, 5)
    gathered = common.gather_cells(values, torch.tensor([[0, 14], [7, 7]]))
    torch.testing.assert_close(gathered[0, 1], values[0, :, 2, 4])
    torch.testing.assert_close(gathered[1, 0], values[1, :, 1, 2])


# ---------------------------------------------------------------- Composition


def layers(op, slots=5):
    generator = common.random_generator("layers")
    layer = torch.randn(2, slots, 5 if op == "alpha" else 3, 6, 6, generator=generator)
    if op == "alpha":  # how near a layer is, the same in all its pixels
        layer[:, :, 0] = layer[:, :, 0, :1, :1]
    return layer, torch.rand(2, 3, 6, 6, generator=generator)


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
    torch.testing.assert_close(common.compose(layer, background, "alpha"), layer[:, 2, 1:4])


def test_layers_lie_over_one_another_the_nearest_on_top():
    layer, background = layers("alpha")
    for b in range(2):  # painted one after the other, the farthest first
        expected = background[b]
        for k in layer[b, :, 0, 0, 0].argsort():
            mask = layer[b, k, -1].sigmoid()
            expected = (1 - mask) * expected + mask * layer[b, k, 1:4]
        torch.testing.assert_close(common.compose(layer, background, "alpha")[b], expected)
    twice = torch.cat([layer[:, :1], layer[:, :1]], dim=1)  # equally near
    torch.testing.assert_close(common.alpha_masks(twice).sum(1), torch.ones(2, 1, 6, 6))


# ---------------------------------------------------------------- Options


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_presets_name_options_and_help_shows_the_values_that_will_be_used(script, tmp_path):
    names = {parameter.name for parameter in script.main.params}
    assert all(set(preset) <= names for preset in script.PRESETS.values())
    for dataset in script.PRESETS:
        shown = CliRunner().invoke(script.main, ["--dataset", dataset, "--help"]).output
        result = CliRunner().invoke(script.main, ["--dataset", dataset, "--data-root", str(tmp_path), "--dry-run"])
        assert result.exit_code == 0, result.output
        used = json.loads(result.output)
        assert f"default: {used['minutes']}" in shown and f"default: {used['beta']}" in shown
        assert str(2**63 - 1) not in shown


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_options_of_every_training_script(script):
    flags = {flag for parameter in script.main.params for flag in parameter.opts}
    asked = "data-root download steps minutes batch lr beta warmup seed device precision out resume dry-run"
    assert {f"--{name}" for name in asked.split()} <= flags


# ---------------------------------------------------------------- Generators, files


def test_generators_repeat_by_key_and_differ_between_keys():
    draws = [torch.rand(8, generator=common.random_generator("noise", 0, step)) for step in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    recompose.write_atomically(path, lambda p: p.write_text("old"))

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        recompose.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_write_one_file_have_partial_files_of_their_own(tmp_path, monkeypatch):
    partials = []
    for process in (100, 200):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        recompose.write_atomically(tmp_path / "a.json", lambda path: partials.append(path) or path.write_text("{}"))
    assert len(set(partials)) == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"no archive at all"])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(click.ClickException, match="missing, damaged, or not the file"):
        common.load_checkpoint(tmp_path, "cpu")


def test_a_foreign_checkpoint_or_config_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(click.ClickException, match="not the file that was expected"):
        common.load_checkpoint(tmp_path, "cpu")
    with pytest.raises(click.UsageError, match=r"config\.json: missing"):
        common.load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1, 2]))
    with pytest.raises(click.UsageError, match="not the file that was expected"):
        common.load_config(tmp_path)


# ---------------------------------------------------------------- The run


def open_run(folder, resume=None, **options):
    """A run of a model of one weight."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters())
    options = {"out": folder, "resume": resume, "batch": 4, "steps": 40, "minutes": None, "precision": "auto"} | options
    about = {"name": "numbers", "source": "made up"}
    return Run(options, "train_nothing", "numbers", about, model, optimizer, torch.device("cpu"))


def go_through(run):
    """Take all steps; returns [(step, progress), ...]."""
    taken = []
    with run:
        for step, progress in run.steps():
            taken.append((step, progress))
            run.log({"loss/a": 1.0})
            if run.due:
                run.report({"score": 0.5})
        if run.complete:
            run.finish({"score": 0.25}, {"score": 0.125})
    return taken


def test_scores_carry_the_name_of_their_split(tmp_path):
    taken = go_through(open_run(tmp_path / "run"))
    assert taken == [(k, k / 40) for k in range(40)]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert {"valid/score"} == {tag for tag in events.Tags()["scalars"] if "score" in tag}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["split"], metrics["score"], metrics["step_0/score"]) == ("test", 0.25, 0.125)
    curve = json.loads((tmp_path / "run" / "curve.json").read_text())
    assert [point["step"] for point in curve] == list(range(4, 41, 4))


def test_progress_goes_by_whichever_ends_first_and_never_falls(tmp_path):
    go_through(open_run(tmp_path / "run", steps=10))
    for more in ({"steps": 20}, {"steps": None, "minutes": 1e9}):
        run = open_run(None, tmp_path / "run", **more)
        with run:
            for (step, progress), _ in zip(run.steps(), range(3), strict=False):
                assert step >= 10 and progress == 1.0
                run.log({"loss/a": 1.0})
    run = open_run(tmp_path / "clock", steps=100, minutes=1)
    with run:
        run.started -= 30
        (_, progress), *_ = itertools.islice(run.steps(), 1)
        assert progress == pytest.approx(0.5, abs=0.01)


def test_runs_opened_at_the_same_time_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        folders = [run.folder for run in pool.map(lambda _: open_run(None), range(6))]
    assert len({folder.resolve() for folder in folders}) == 6
    assert {folder.name for folder in folders} == {"numbers", *(f"numbers-{k}" for k in range(2, 7))}


def test_process_1_of_2_takes_the_second_half_and_writes_nothing(tmp_path, monkeypatch):
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(common.dist, name, lambda value=value: value)
    run = open_run(tmp_path / "run")
    assert (run.own, run.total, run.folder) == (slice(4, 8), 8, None) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("precision", "half"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_products_are_in_half_precision_where_asked(tmp_path, precision, half):
    with open_run(tmp_path / "run", precision=precision).autocast():
        assert torch.is_autocast_enabled("cpu") == half


def test_the_last_checkpoint_is_two_minutes_old_at_most(tmp_path):
    run = open_run(tmp_path / "run", steps=1000)
    with pytest.raises(KeyboardInterrupt), run:
        for step, _ in run.steps():
            if step == 5:
                raise KeyboardInterrupt
            run.log({"loss/a": 1.0})
            run.saved -= 121 * (step == 2)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3


def test_what_is_not_finite_is_not_saved(tmp_path):
    run = open_run(tmp_path / "run")
    with pytest.raises(click.ClickException, match="step 3 is not finite"), run:
        for step, _ in run.steps():
            run.log({"loss/a": math.nan if step == 3 else 1.0})
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_step_that_is_not_finite_leaves_the_weights():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    for factor, moved in ((math.nan, False), (1.0, True)):
        values = common.optimizer_step((weight * factor).sum(), {}, optimizer, 0.1, 1.0)
        assert (weight != 1).any() == moved
    assert values["gradient_norm"] == pytest.approx(math.sqrt(3))
    assert values["schedule/lr"] == optimizer.param_groups[0]["lr"] == 0.1


def test_gradients_are_averaged_over_processes_before_they_are_clipped(monkeypatch):
    """The other process is played by a message that adds its gradients."""
    theirs = torch.tensor([5.0, -1.0])
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(common.dist, "all_reduce", lambda flat, **_: flat.add_(theirs))
    weight = torch.nn.Parameter(torch.zeros(2))
    values = common.optimizer_step((weight * torch.tensor([1.0, 3.0])).sum(), {}, torch.optim.SGD([weight]), 0.1, 1e9)
    torch.testing.assert_close(weight.grad, torch.tensor([3.0, 1.0]))
    assert values["gradient_norm"] == pytest.approx(math.sqrt(10))
