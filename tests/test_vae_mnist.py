"""Stage 1: likelihoods against models whose likelihood is known, bounds against their theory, and the command line."""

import gzip
import json
import math
import os
import shutil
import signal
import struct

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import write_digits
from PIL import Image

import common
import export
import train_vae_mnist as stage
from common import FlowPrior

CPU = torch.device("cpu")
NORMAL = torch.distributions.Normal(0.0, 1.0)
TINY = ["--hidden", "16,8", "--D", "3", "--batch", "20", "--eval-samples", "10", "--device", "cpu"]


def generator(name):
    return common.random_generator("test", name)


class LinearGaussian(torch.nn.Module):
    """p(z) = N(0, I), p(x | z) = N(W z, s^2 I), with a posterior that is exact, or made `wider` than that."""

    s = 0.5

    def __init__(self, wider=1.0):
        super().__init__()
        self.d, self.prior, self.wider = 2, None, wider
        self.weight = torch.tensor([[1.0, 0.0], [0.6, 0.0], [0.0, 1.3]], dtype=torch.float64)
        self.precision = torch.eye(2, dtype=torch.float64) + self.weight.T @ self.weight / self.s**2  # diagonal

    def encode(self, x):
        mu = x @ self.weight @ torch.linalg.inv(self.precision) / self.s**2
        return mu, (self.wider / self.precision.diagonal()).log().expand_as(mu)

    def decode(self, z):
        return z @ self.weight.T

    def log_likelihood(self, x):
        covariance = self.weight @ self.weight.T + self.s**2 * torch.eye(3, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x)


@pytest.fixture
def gaussian(monkeypatch):
    """The script's Bernoulli likelihood replaced by the linear model's, in double precision; and pictures x."""

    def likelihood(x, mean):
        return torch.distributions.Normal(mean, LinearGaussian.s).log_prob(x).sum(-1)

    monkeypatch.setattr(stage, "bernoulli_log_likelihood", likelihood)
    torch.set_default_dtype(torch.float64)
    yield torch.randn(100, 3, generator=generator("x"))
    torch.set_default_dtype(torch.float32)


def small_vae(d=3, arch="mlp", prior="standard"):
    torch.manual_seed(0)
    return stage.VAE(prior, arch=arch, d=d, hidden=[16, 8], channels=4)


# ---------------------------------------------------------------- Likelihood and bounds


def test_the_bernoulli_likelihood_is_torch_s_and_does_not_overflow():
    logits = torch.tensor([[-1e4, -30.0, -1.0, 0.0, 2.0, 30.0, 1e4]])
    for x in (torch.zeros(7), torch.ones(7), torch.full((7,), 0.3)):
        expected = -torch.nn.functional.binary_cross_entropy_with_logits(logits, x.expand(1, 7), reduction="sum")
        torch.testing.assert_close(stage.bernoulli_log_likelihood(x, logits).sum(), expected)


@pytest.mark.parametrize("k", [1, 7])
def test_with_the_exact_posterior_every_estimate_and_bound_is_the_exact_likelihood(gaussian, k):
    model, noise = LinearGaussian(), torch.randn(k, 100, 2, generator=generator("noise"))
    exact = model.log_likelihood(gaussian)
    torch.testing.assert_close(stage.importance_estimates(model, gaussian, k)[0], exact)
    loss, terms = stage.objective(model, gaussian, noise, 1.0, "iwae")
    torch.testing.assert_close(-loss, exact.mean())
    torch.testing.assert_close(terms["loss/negative_bound"], loss)


def test_with_another_posterior_the_estimate_rises_to_the_exact_likelihood(gaussian):
    model = LinearGaussian(wider=2.0)
    exact = model.log_likelihood(gaussian).mean()
    gaps = [(exact - stage.importance_estimates(model, gaussian, k)[0].mean()).item() for k in (1, 10, 100, 5000)]
    assert gaps[0] > gaps[1] > gaps[2] > abs(gaps[3])
    assert abs(gaps[3]) < 2e-3


def test_the_chunks_of_an_estimate_do_not_show(gaussian, monkeypatch):
    """Many small chunks, their last one smaller, agree with few large ones as far as their noise lets them."""
    model = LinearGaussian(wider=2.0)
    large = stage.importance_estimates(model, gaussian, 3001)
    monkeypatch.setitem(stage.ROWS, "cpu", 64)
    small = stage.importance_estimates(model, gaussian, 3001)
    assert (large[0] - small[0]).abs().max() < 0.15
    assert (large[1] - small[1]).abs().mean() < 0.05
    torch.testing.assert_close(large[2:], small[2:])


def test_the_gap_between_likelihood_and_elbo_is_the_posterior_s_divergence(gaussian):
    """log p(x) - ELBO = KL(q(z | x) || p(z | x)) (Kingma & Welling 2013, eq. 1): known for Gaussians."""
    model = LinearGaussian(wider=2.0)
    scores = stage.evaluate(model, gaussian, 4000)
    expected = 2 * 0.5 * (2.0 - 1 - math.log(2.0))  # every latent's variance is twice the exact one
    assert (model.log_likelihood(gaussian).mean() - scores["elbo"]).item() == pytest.approx(expected, abs=0.01)
    assert scores["elbo"] == -scores["reconstruction"] - scores["kl"] and scores["active_units"] == 2


def test_beta_weighs_the_prior_and_posterior_in_every_importance_weight(gaussian):
    model, noise = LinearGaussian(wider=2.0), torch.randn(5, 100, 2, generator=generator("noise"))
    mu, logvar = model.encode(gaussian)
    z = mu + (0.5 * logvar).exp() * noise
    log_likelihood = torch.distributions.Normal(model.decode(z), model.s).log_prob(gaussian).sum(-1)
    log_ratio = (NORMAL.log_prob(z) - torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z)).sum(-1)
    loss, terms = stage.objective(model, gaussian, noise, 0.3, "iwae")
    for beta, value in ((0.3, loss), (1.0, terms["loss/negative_bound"])):
        torch.testing.assert_close(value, -(log_likelihood + beta * log_ratio).exp().mean(0).log().mean())


def test_the_importance_weighted_bound_meets_the_elbo_at_one_sample_and_rises_with_k():
    model, x = small_vae(), torch.rand(8, 784, generator=generator("bits")).round()
    torch.nn.init.normal_(model.encoder[-1].weight, std=0.5)  # a posterior worth bounding
    noise = torch.randn(1000, 8, 3, generator=generator("noise"))
    with torch.no_grad():
        elbo, _ = stage.objective(model, x, noise, 1.0, "elbo")
        losses = [
            np.mean([stage.objective(model, x, part, 1.0, "iwae")[0].item() for part in noise.split(k)])
            for k in (1, 2, 10, 100)
        ]
    assert losses[0] == pytest.approx(elbo.item(), abs=0.2)
    assert losses == sorted(losses, reverse=True)


def test_the_kl_is_that_of_torch_and_beta_weighs_it():
    model, x = small_vae(), torch.rand(8, 784, generator=generator("bits")).round()
    mu, logvar = model.encode(x)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, NORMAL).sum(1).mean()
    loss, terms = stage.objective(model, x, torch.randn(1, 8, 3, generator=generator("noise")), 4.0, "elbo")
    torch.testing.assert_close(terms["loss/kl"], expected)
    torch.testing.assert_close(loss, terms["loss/reconstruction"] + 4 * expected)


def test_active_units_are_those_whose_mean_varies(monkeypatch):
    mu = torch.randn(1000, 4, generator=generator("mu")) * torch.tensor([1.0, 0.2, 0.05, 0.0])
    monkeypatch.setattr(stage, "importance_estimates", lambda *_: (torch.zeros(1000),) * 3 + (mu,))
    assert stage.evaluate(None, mu, 1)["active_units"] == 2


# ---------------------------------------------------------------- The learned prior


def flow(d, prior=None):
    """A flow with weights as if trained: its last layers, zero at first, are of the size of the others."""
    prior = prior or FlowPrior(d, width=16)
    for net in prior.nets:
        torch.nn.init.normal_(net[-1].weight, std=0.4, generator=generator("flow"))
        torch.nn.init.normal_(net[-1].bias, std=0.4, generator=generator("bias"))
    return prior


@torch.no_grad()
def test_the_learned_prior_s_density_integrates_to_one_and_starts_as_the_standard_normal():
    at = torch.linspace(-12, 12, 801)
    z = torch.cartesian_prod(at, at)
    density = flow(2).log_prob(z).exp()
    assert density.sum() * (at[1] - at[0]) ** 2 == pytest.approx(1, abs=1e-3)
    assert (density - NORMAL.log_prob(z).sum(1).exp()).abs().max() > 0.05  # and is another than N(0, I)
    torch.testing.assert_close(FlowPrior(2).log_prob(z[::997]), NORMAL.log_prob(z[::997]).sum(1))


@pytest.mark.parametrize("d", [2, 5])
def test_samples_of_the_learned_prior_have_its_density(d):
    """By the change of variables, its Jacobian by automatic differentiation: one map inverts the other."""
    prior, noise = flow(d).double(), torch.randn(20, d, generator=generator("noise"), dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(prior.sample))(noise)
    expected = NORMAL.log_prob(noise).sum(1) - jacobian.det().abs().log()
    torch.testing.assert_close(prior.log_prob(prior.sample(noise)), expected, atol=1e-5, rtol=0)


class Mapped(LinearGaussian):
    """The linear model where p(z) = N(m, 4 I): its exact likelihood and, made `wider`, its posterior are known."""

    def __init__(self, wider=1.0):
        super().__init__(wider)
        self.mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
        self.precision = torch.eye(2, dtype=torch.float64) / 4 + self.weight.T @ self.weight / self.s**2
        self.prior = FlowPrior(2, couplings=2, width=4).double()  # each coupling changes one latent
        for net, k in zip(self.prior.nets, (1, 0), strict=True):
            net[-1].bias.data = torch.tensor([self.mean[k], 2 * math.atanh(math.log(2) / 2)])

    def encode(self, x):
        mu = (x @ self.weight / self.s**2 + self.mean / 4) @ torch.linalg.inv(self.precision)
        return mu, (self.wider / self.precision.diagonal()).log().expand_as(mu)

    def log_likelihood(self, x):
        covariance = 4 * self.weight @ self.weight.T + self.s**2 * torch.eye(3, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.weight @ self.mean, covariance).log_prob(x)


@torch.no_grad()
def test_with_a_learned_prior_estimates_and_bounds_are_below_the_exact_likelihood_and_rise_to_it(gaussian):
    exact, noise = Mapped().log_likelihood(gaussian), torch.randn(7, 100, 2, generator=generator("noise"))
    for kind in ("elbo", "iwae"):  # with the exact posterior they are the likelihood
        loss, terms = stage.objective(Mapped(), gaussian, noise, 1.0, kind)
        torch.testing.assert_close(-loss, exact.mean())
        torch.testing.assert_close(terms["loss/negative_bound"], loss)
    wider = Mapped(wider=2.0)
    gaps = [exact.mean().item() + stage.evaluate(wider, gaussian, k)["nll"] for k in (1, 10, 100, 5000)]
    assert gaps[0] > gaps[1] > gaps[2] > abs(gaps[3]) and abs(gaps[3]) < 2e-3
    gap = 2 * 0.5 * (2.0 - 1 - math.log(2.0))  # KL(q || posterior), every latent's variance twice the exact one
    assert exact.mean().item() - stage.evaluate(wider, gaussian, 4000)["elbo"] == pytest.approx(gap, abs=0.03)


# ---------------------------------------------------------------- Model, graphs, figures


@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_every_parameter_gets_a_gradient_and_the_graphs_are_the_model(arch):
    model, x = small_vae(arch=arch), torch.rand(5, 784, generator=generator("bits"))
    stage.objective(model, x, torch.randn(2, 5, 3, generator=generator("noise")), 1.0, "elbo")[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    made = stage.graphs(model)
    mu, logvar, kl = made["encoder"][0](*made["encoder"][1].values())
    expected = model.encode(made["encoder"][1]["image"].flatten(1))
    assert torch.equal(mu, expected[0]) and torch.equal(logvar, expected[1])
    torch.testing.assert_close(kl, common.gaussian_kl(mu, logvar).sum(1))
    image, z = made["decoder"][0](*made["decoder"][1].values()), made["decoder"][1]["z"]
    assert image.shape == (len(z), 1, 28, 28) and torch.equal(image.flatten(1), model.decode(z).sigmoid())
    held = sum(p.numel() for graph, _ in made.values() for p in graph.parameters())
    assert held == sum(p.numel() for p in model.parameters())  # no file holds what it does not use


def test_a_traversal_moves_one_latent_and_begins_with_the_most_active():
    model, x = small_vae(), torch.rand(50, 784, generator=generator("bits"))
    mu = model.encode(x)[0].detach()
    with torch.no_grad():
        moved, names = stage.traverse(model, x, 2, torch.tensor([-3.0, 0.5]))
    latent = mu.var(0).argmax().item()
    expected = mu[0].clone()
    expected[latent] = 0.5
    torch.testing.assert_close(moved[0, 1], model.decode(expected[None])[0].sigmoid().detach())
    assert moved.shape == (2, 2, 784) and names[0] == f"z_{latent}, variance {mu.var(0).max():.2f}"


# ---------------------------------------------------------------- Data


def load(root, binarize="dynamic", seed=0, batch=20):
    options = {"dataset": "mnist", "data_root": root, "download": False, "binarize": binarize, "seed": seed}
    return stage.Digits(options | {"batch": batch}, CPU)


def batch(data, step, first, last, total):
    return data.batch(step, slice(first, last), total)


def test_the_last_tenth_of_the_training_digits_is_valid(digits):
    data, every = load(digits, "none"), stage.MNIST(digits, train=True).data.flatten(1) / 255
    assert torch.equal(torch.cat([data.train, data.valid]), every)
    assert (len(data.train), len(data.valid), len(data.test)) == (108, 12, 40)


def test_an_epoch_shows_every_digit_once_in_an_order_of_its_own(digits):
    data = load(digits, "none")
    epochs = [torch.cat([batch(data, 3 * e + i, 0, 36, 36) for i in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch.sort(0).values, data.train.sort(0).values)
    assert not torch.equal(*epochs)
    data, other = load(digits), load(digits)  # two processes share one batch
    halves = batch(data, 7, 0, 10, 20), batch(other, 7, 10, 20, 20)
    assert torch.equal(torch.cat(halves), batch(load(digits), 7, 0, 20, 20))


def test_dynamic_binarisation_samples_the_grey_values_anew_and_the_test_set_once(digits):
    data, other = load(digits), load(digits, seed=1)
    sampled = torch.stack([data.binarized(data.train[:5], generator(i)) for i in range(2000)])
    assert set(sampled.unique().tolist()) == {0.0, 1.0}
    assert (sampled.mean(0) - data.train[:5]).abs().max() < 0.06
    assert torch.equal(data.test, other.test) and torch.equal(data.valid, other.valid)
    assert not torch.equal(batch(other, 0, 0, 20, 20), batch(data, 0, 0, 20, 20))


def test_the_static_split_is_read_packed_or_as_larochelle_s_own_text_files(tmp_path, monkeypatch):
    sizes = {"train": 20, "valid": 5, "test": 5}
    bits = {split: np.random.default_rng(0).integers(0, 2, (n, 784), np.uint8) for split, n in sizes.items()}
    np.savez(tmp_path / "binarized_mnist_any.npz", **{split: np.packbits(v, axis=1) for split, v in bits.items()})
    for split, value in bits.items():
        np.savetxt(tmp_path / f"binarized_mnist_{split}.amat", value, fmt="%d")
    with pytest.raises(stage.click.UsageError, match=r"expected \(50000, 784\)"):
        load(tmp_path, "static")
    monkeypatch.setattr(stage, "LAROCHELLE", sizes)
    packed, file = load(tmp_path, "static"), load(tmp_path / "binarized_mnist_any.npz", "static")
    (tmp_path / "binarized_mnist_any.npz").unlink()
    text = load(tmp_path, "static")
    for data in (packed, file, text):
        for split in sizes:
            assert torch.equal(getattr(data, split), torch.from_numpy(bits[split]).float())
        assert torch.equal(data.train, data.train_fixed)


# ---------------------------------------------------------------- Runs


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(stage, "draw_figures", lambda *_: None)


def train(*args):
    result = CliRunner().invoke(stage.main, [str(a) for a in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_a_run_leaves_numbers_and_figures(vae_run):
    metrics = metrics_of(vae_run)
    assert (metrics["split"], metrics["step"], metrics["eval_samples"]) == ("test", 12, 10)
    assert metrics["data"] == "MNIST, dynamic binarisation"
    assert -metrics["nll"] > metrics["elbo"]
    assert abs(metrics["step_0/nll"] - metrics["nll_mean_picture"]) < 5  # training starts at the mean picture
    assert metrics["step_0/nll"] > metrics["nll"]
    curve = json.loads((vae_run / "curve.json").read_text())
    steps = [point["step"] for point in curve]
    assert steps == sorted(set(steps)) and (steps[0], steps[-1]) == (0, 12) and curve[-1]["samples_seen"] == 240
    assert curve[0].keys() == {"step", "minutes", "samples_seen", "nll", "elbo", "train/elbo"}
    for name in ("reconstructions", "samples", "traversals", "interpolations"):
        with Image.open(vae_run / "figures" / f"{name}.png") as image:
            assert np.asarray(image).std() > 5
    assert not (vae_run / "figures" / "manifold.png").exists()
    model = stage.load(vae_run)
    about = {"kind": "vae-image", "size": 28, "scaling": "grey / 255, then binarised"}
    assert stage.describe(model) == about and not model.training


def test_a_learned_prior_is_trained_and_its_graph_samples_as_it_does(digits, tmp_path):
    run = tmp_path / "run"
    train("--data-root", digits, *TINY, "--prior", "flow", "--lr", 1e-2, "--steps", 5, "--out", run)
    model = stage.load(run)
    assert all(net[-1].weight.abs().sum() > 0 for net in model.prior.nets) and math.isfinite(metrics_of(run)["nll"])

    flow(3, model.prior)  # weights that a mistake would show with
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"model": model.state_dict()}, run / "checkpoint.pt")
    result = CliRunner().invoke(export.main, [str(run)])
    assert result.exit_code == 0, result.output
    noise = torch.randn(9, 3, generator=generator("noise"))
    (z,) = onnxruntime.InferenceSession(run / "export" / "prior.onnx").run(None, {"noise": noise.numpy()})
    torch.testing.assert_close(torch.from_numpy(z), model.sample(noise).detach(), atol=1e-4, rtol=1e-4)
    assert np.abs(z - noise.numpy()).max() > 0.1
    (encoder,) = [graph for name, (graph, _) in stage.graphs(model).items() if name == "encoder"]
    assert encoder.outputs == ("mu", "logvar")  # that KL has no closed form


def test_a_run_of_before_there_were_priors_has_the_standard_normal_one(vae_run, tmp_path):
    shutil.copytree(vae_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"].pop("prior") == "standard"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    x = torch.rand(2, 784, generator=generator("bits"))
    assert torch.equal(stage.load(tmp_path / "run").encode(x)[0], stage.load(vae_run).encode(x)[0])
    train("--resume", tmp_path / "run", "--eval-samples", 11)
    assert metrics_of(tmp_path / "run")["elbo"] == pytest.approx(metrics_of(vae_run)["elbo"], abs=2)


def test_training_learns(digits, tmp_path, no_figures):
    train("--data-root", digits, *TINY, "--steps", 1000, "--lr", 1e-2, "--out", tmp_path / "run")
    metrics = metrics_of(tmp_path / "run")
    # A model that ignores its latents cannot do better than one picture.
    assert -metrics["elbo"] < metrics["nll_mean_picture"] - 5 and metrics["active_units"] > 0


@pytest.mark.parametrize(
    "args",
    [
        ["--objective", "iwae", "--k", "5", "--D", "2", "--hidden", "16", "--dataset", "fashion-mnist"],
        ["--arch", "conv", "--channels", "4", "--binarize", "none", "--k", "2", "--beta", "4", "--precision", "bf16"],
    ],
    ids=["mlp", "conv"],
)
def test_every_kind_of_run(digits, tmp_path, args):
    root = digits if "conv" in args else write_digits(tmp_path, "FashionMNIST")
    args = [*TINY[2 if "conv" in args else 0 :], *args, "--eval", "quick", "--steps", 1]
    train("--data-root", root, *args, "--out", tmp_path / "run")
    metrics = metrics_of(tmp_path / "run")
    assert math.isfinite(metrics["nll"])
    assert metrics["data"] == ("MNIST, grey values" if "conv" in args else "FashionMNIST, dynamic binarisation")
    assert (tmp_path / "run" / "figures" / "manifold.png").exists() == ("conv" not in args)


def test_a_run_stopped_by_ctrl_c_ends_bit_for_bit_where_an_uninterrupted_one_does(
    digits, tmp_path, monkeypatch, no_figures
):
    args, taken, step = ["--data-root", digits, *TINY, "--steps", 10], [], stage.optimizer_step
    train(*args, "--out", tmp_path / "whole")

    def interrupted(*arguments):
        taken.append(None)
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(stage, "optimizer_step", interrupted)
    assert "stopped at step 7" in train(*args, "--out", tmp_path / "parts")
    assert not (tmp_path / "parts" / "metrics.json").exists()
    train("--resume", tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert len(taken) == 10 and all(torch.equal(whole[name], parts[name]) for name in whole)
    curves = [json.loads((tmp_path / name / "curve.json").read_text()) for name in ("whole", "parts")]
    whole, parts = ([point | {"minutes": 0} for point in curve] for curve in curves)
    assert whole == parts and {point["step"] for point in whole} >= {0, 1, 4, 7, 10}
    whole, parts = (metrics_of(tmp_path / name) | {"minutes": 0} for name in ("whole", "parts"))
    assert whole == parts  # step 0 among them


def test_a_finished_run_is_evaluated_again_and_an_interruption_leaves_its_scores(vae_run, tmp_path, monkeypatch):
    shutil.copytree(vae_run, tmp_path / "run")
    again = ["--resume", tmp_path / "run", "--eval-samples", 200]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "evaluate", interrupted)
        assert CliRunner().invoke(stage.main, list(map(str, again))).exit_code == 1
    assert metrics_of(tmp_path / "run") == metrics_of(vae_run)
    train(*again)
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["eval_samples"], metrics["step"]) == (200, 12) and metrics["nll"] < metrics_of(vae_run)["nll"]
    before = weights(vae_run)
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())


# ---------------------------------------------------------------- Bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--D", "0"], "--D"),
        (["--k", "0"], "--k"),
        (["--eval-samples", "0"], "--eval-samples"),
        (["--hidden", "200,x"], "--hidden"),
        (["--hidden", "200,0"], "--hidden"),
        (["--binarize", "static"], "--data-root"),
        (["--binarize", "static", "--dataset", "fashion-mnist", "--data-root", "."], "static is Larochelle's MNIST"),
        (["--arch", "conv", "--hidden", "3"], "--hidden does not belong to --arch conv"),
        (["--channels", "3"], "--channels does not belong to --arch mlp"),
        (["--data-root", "nowhere"], "no such folder"),
    ],
)
def test_wrong_options_end_in_one_clear_line(args, message):
    assert message in refused(*args)


def refused(*args, code=2):
    """The last line of a run that must end with this exit code."""
    result = CliRunner().invoke(stage.main, [str(a) for a in [*args, "--steps", 1, "--device", "cpu"]])
    assert result.exit_code == code and "Traceback" not in result.output, (result.output, result.exception)
    return result.stderr.splitlines()[-1]


def test_missing_and_damaged_files_end_in_one_clear_line(digits, tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    line = refused("--data-root", tmp_path)
    assert "train-images-idx3-ubyte.gz" in line and "--download" in line
    for name, _ in stage.MNIST.resources:  # damaged archives are not unpacked
        (raw / name).write_bytes(gzip.compress(b"no digits"))
    assert "no usable MNIST" in refused("--data-root", tmp_path)
    shutil.rmtree(tmp_path / "MNIST")

    good = {file.name: file.read_bytes() for file in (digits / "MNIST" / "raw").iterdir()}
    large = struct.pack(">4i", 2051, 120, 32, 32) + bytes(120 * 32 * 32)
    for name, content in (
        ("t10k-images-idx3-ubyte", good["t10k-images-idx3-ubyte"][:1000]),  # cut short
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", large),  # of another size
        ("t10k-labels-idx1-ubyte", struct.pack(">2i", 2049, 3) + bytes(3)),  # fewer labels than pictures
    ):
        shutil.copytree(digits, tmp_path, dirs_exist_ok=True)
        (raw / name).write_bytes(content)
        assert "no usable MNIST" in refused("--data-root", tmp_path), name

    monkeypatch.chdir(tmp_path)  # without a network
    monkeypatch.setattr(stage.MNIST, "download", lambda _: (_ for _ in ()).throw(RuntimeError("Error downloading")))
    line = refused()
    assert "Error downloading" in line and "MNIST/raw/train-images-idx3-ubyte.gz" in line


def test_damaged_static_files_end_in_one_clear_line(tmp_path):
    assert "binarized_mnist_{train,valid,test}.amat" in refused("--data-root", tmp_path, "--binarize", "static")
    (tmp_path / "binarized_mnist.npz").write_bytes(b"PK no archive")
    assert "no usable MNIST" in refused("--data-root", tmp_path, "--binarize", "static")
    np.savez(tmp_path / "binarized_mnist.npz", train=np.zeros((5, 98)), valid=0, test=0)
    assert "no usable MNIST" in refused("--data-root", tmp_path, "--binarize", "static")
    np.save(tmp_path / "digits.npy", np.zeros(3))
    assert "no usable MNIST" in refused("--data-root", tmp_path / "digits.npy", "--binarize", "static")


def test_a_batch_larger_than_the_data_is_refused(digits, tmp_path):
    line = refused("--data-root", digits, "--batch", 109, "--out", tmp_path / "run")
    assert "only 108 pictures" in line and not (tmp_path / "run").exists()


def test_nan_stops_the_run_with_its_step(digits, tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr(stage, "watch", lambda *_: {})
    monkeypatch.setattr(stage, "bernoulli_log_likelihood", lambda x, logits: logits.sum(-1) * math.nan)
    line = refused("--data-root", digits, *TINY, "--out", tmp_path / "run", code=1)
    assert "step 0 is not finite" in line and "loss/reconstruction" in line
