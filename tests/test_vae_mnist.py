"""Stage 1: likelihoods against models whose likelihood is known, bounds against their theory, and the command line."""

import gzip
import json
import math
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import train, write_digits
from PIL import Image

import common
import export
import train_vae_mnist as stage
from train_vae_mnist import main

CPU = torch.device("cpu")
OPTIONS = {"objective": "elbo", "free_bits": 0.0}
TINY = ["--hidden", "16,8", "--D", "3", "--batch", "20", "--eval-samples", "10", "--device", "cpu"]


def generator(name):
    return common.random_generator("test", name)


class LinearGaussian(torch.nn.Module):
    """p(z) = N(0, I), p(x | z) = N(W z, s^2 I), with a posterior that is exact, or made `wider` than that."""

    s = 0.5

    def __init__(self, wider=1.0):
        super().__init__()
        self.d, self.wider = 2, wider
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
    """The scripts' Bernoulli likelihood replaced by the linear model's, in double precision; and pictures x."""

    def likelihood(x, mean):
        return torch.distributions.Normal(mean, LinearGaussian.s).log_prob(x).sum(-1)

    monkeypatch.setattr(stage, "bernoulli_log_likelihood", likelihood)
    torch.set_default_dtype(torch.float64)
    yield torch.randn(100, 3, generator=generator("x"))
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------- Likelihood and bounds


def test_with_the_exact_posterior_one_sample_gives_the_exact_likelihood(gaussian):
    model = LinearGaussian()
    estimate = stage.importance_estimates(model, gaussian, 1)["log_likelihood"]
    torch.testing.assert_close(estimate, model.log_likelihood(gaussian))


def test_with_another_posterior_the_estimate_rises_to_the_exact_likelihood(gaussian):
    model = LinearGaussian(wider=2.0)
    exact = model.log_likelihood(gaussian)
    gaps = [
        (exact - stage.importance_estimates(model, gaussian, k)["log_likelihood"]).mean().item()
        for k in (1, 10, 100, 5000)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > abs(gaps[3])
    assert abs(gaps[3]) < 2e-3


def test_the_chunks_of_an_estimate_do_not_show(gaussian, monkeypatch):
    """Many small chunks, their last one smaller, agree with few large ones as far as their noise lets them."""
    model = LinearGaussian(wider=2.0)
    large = stage.importance_estimates(model, gaussian, 3001)
    monkeypatch.setitem(stage.ROWS, "cpu", 64)
    small = stage.importance_estimates(model, gaussian, 3001)
    assert (large["log_likelihood"] - small["log_likelihood"]).abs().max() < 0.15
    assert (large["reconstruction"] - small["reconstruction"]).abs().mean() < 0.05
    torch.testing.assert_close(large["kl"], small["kl"])


def test_the_gap_between_likelihood_and_elbo_is_the_posterior_s_divergence(gaussian):
    """log p(x) - ELBO = KL(q(z | x) || p(z | x)) (Kingma & Welling 2013, eq. 1): known for Gaussians."""
    model = LinearGaussian(wider=2.0)
    estimates = stage.importance_estimates(model, gaussian, 4000)
    elbo = -(estimates["reconstruction"] + estimates["kl"])
    expected = 2 * 0.5 * (2.0 - 1 - math.log(2.0))  # every latent's variance is twice the exact one
    assert (model.log_likelihood(gaussian) - elbo).mean().item() == pytest.approx(expected, abs=0.01)
    assert -stage.bound(model, gaussian.repeat(50, 1)) == pytest.approx(elbo.mean().item(), abs=0.05)


@pytest.mark.parametrize("k", [1, 7])
def test_with_the_exact_posterior_every_importance_weighted_bound_is_the_likelihood(gaussian, k):
    model, noise = LinearGaussian(), torch.randn(k, 100, 2, generator=generator("noise"))
    loss, terms = stage.objective(model, gaussian, noise, 1.0, OPTIONS | {"objective": "iwae"})
    torch.testing.assert_close(-loss, model.log_likelihood(gaussian).mean())
    torch.testing.assert_close(terms["loss/negative_bound"], loss)


def test_beta_weighs_the_prior_and_posterior_in_every_importance_weight(gaussian):
    model, noise = LinearGaussian(wider=2.0), torch.randn(5, 100, 2, generator=generator("noise"))
    mu, logvar = model.encode(gaussian)
    z = mu + (0.5 * logvar).exp() * noise
    log_likelihood = torch.distributions.Normal(model.decode(z), model.s).log_prob(gaussian).sum(-1)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)
    loss, terms = stage.objective(model, gaussian, noise, 0.3, OPTIONS | {"objective": "iwae"})
    for beta, value in ((0.3, loss), (1.0, terms["loss/negative_bound"])):
        weights = (log_likelihood + beta * (prior - posterior)).exp()
        torch.testing.assert_close(value, -weights.mean(0).log().mean())


def small_vae(d=3):
    torch.manual_seed(0)
    return stage.VAE(arch="mlp", d=d, hidden=[16, 8], channels=1)


def test_the_importance_weighted_bound_meets_the_elbo_at_one_sample_and_rises_with_k():
    model, x = small_vae(), torch.rand(8, 784, generator=generator("bits")).round()
    torch.nn.init.normal_(model.encoder[-1].weight, std=0.5)  # a posterior worth bounding
    noise = torch.randn(1000, 8, 3, generator=generator("noise"))
    with torch.no_grad():
        elbo, _ = stage.objective(model, x, noise, 1.0, OPTIONS)
        iwae = OPTIONS | {"objective": "iwae"}
        losses = {
            k: np.mean([stage.objective(model, x, part, 1.0, iwae)[0].item() for part in noise.split(k)])
            for k in (1, 2, 10, 100)
        }
    assert losses[1] == pytest.approx(elbo.item(), abs=0.2)
    assert losses[1] > losses[2] > losses[10] > losses[100]


def test_samples_grow_by_equal_factors():
    assert [stage.samples_at(p, 64, 1) for p in (0, 1 / 6, 0.5, 1)] == [1, 2, 8, 64]
    assert [stage.samples_at(p, 50, 50) for p in (0, 0.3, 1)] == [50, 50, 50]


def test_the_kl_is_that_of_torch_and_beta_weighs_it():
    model, x = small_vae(), torch.rand(8, 784, generator=generator("bits")).round()
    noise = torch.randn(1, 8, 3, generator=generator("noise"))
    mu, logvar = model.encode(x)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum(1).mean()
    loss, terms = stage.objective(model, x, noise, 4.0, OPTIONS)
    torch.testing.assert_close(terms["loss/kl"], expected)
    torch.testing.assert_close(loss, terms["loss/reconstruction"] + 4 * expected)


def test_free_bits_leave_the_latents_below_them_alone():
    model, x = small_vae(), torch.rand(8, 784, generator=generator("bits")).round()
    mu, logvar = (v.detach().requires_grad_() for v in model.encode(x))
    model.encode = lambda _: (mu, logvar)
    kl = common.gaussian_kl(mu, logvar).mean(0)
    threshold = kl.sort().values[:2].mean().item()  # one latent below it, two above
    noise = torch.zeros(1, 8, 3)
    model.decode = lambda z: torch.zeros(1, 8, 784)
    loss, _ = stage.objective(model, x, noise, 1.0, OPTIONS | {"free_bits": threshold})
    (gradient,) = torch.autograd.grad(loss, logvar)
    assert torch.equal(gradient.abs().sum(0) > 0, kl > threshold)


def test_active_units_are_those_whose_mean_varies():
    mu = torch.randn(1000, 4, generator=generator("mu")) * torch.tensor([1.0, 0.2, 0.05, 0.0])
    assert stage.active_units(mu) == 2


def test_the_probe_reads_what_is_linear_and_nothing_else():
    z = torch.randn(600, 5, generator=generator("z"))
    labels = (z[:, 0] > 0).long() + 2 * (z[:, 1] > 0).long()
    noise = torch.randint(0, 10, (600,), generator=generator("labels"))
    assert stage.probe_accuracy(z[:400], labels[:400], z[400:], labels[400:]) > 0.93
    assert stage.probe_accuracy(z[:400], noise[:400], z[400:], noise[400:]) < 0.3


@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_a_model_starts_from_the_mean_picture(arch):
    torch.manual_seed(0)
    model = stage.VAE(arch=arch, d=4, hidden=[16], channels=8)
    mean = torch.linspace(0.01, 0.9, 784)
    model.start_at(mean)
    with torch.no_grad():
        drawn = model.decode(torch.randn(64, 4, generator=generator("z"))).sigmoid().mean(0)
        mu, logvar = model.encode(torch.zeros(2, 784))
    assert (drawn - mean).abs().mean() < 0.06
    assert mu.shape == logvar.shape == (2, 4)


# ---------------------------------------------------------------- Data


def load(root, binarize="dynamic", seed=0):
    return stage.Digits("mnist", root, False, binarize, seed, CPU)


def test_an_epoch_shows_every_digit_once_in_an_order_of_its_own(digits):
    data = load(digits, "none")
    epochs = [torch.cat([data.batch(3 * e + i, 0, 40, 40) for i in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch.sort(0).values, data.train.sort(0).values)
    assert not torch.equal(*epochs)


def test_two_processes_share_one_batch(digits):
    data, other = load(digits), load(digits)
    halves = data.batch(7, 0, 10, 20), other.batch(7, 10, 20, 20)
    assert torch.equal(torch.cat(halves), load(digits).batch(7, 0, 20, 20))


def test_dynamic_binarisation_is_drawn_anew_from_the_grey_values_and_the_test_set_once(digits):
    data = load(digits)
    drawn = torch.stack([data.binarized(data.train[:5], generator(i)) for i in range(2000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn.mean(0) - data.train[:5]).abs().max() < 0.06
    assert torch.equal(data.test, load(digits, seed=1).test)
    assert not torch.equal(load(digits, seed=1).batch(0, 0, 20, 20), data.batch(0, 0, 20, 20))


def write_larochelle(folder, sizes, labels=True):
    bits = {split: np.random.default_rng(0).integers(0, 2, (n, 784), np.uint8) for split, n in sizes.items()}
    arrays = {split: np.packbits(value, axis=1) for split, value in bits.items()}
    if labels:
        arrays |= {"train_labels_inferred": np.zeros(sizes["train"]), "test_labels": np.zeros(sizes["test"])}
    np.savez(folder / "binarized_mnist_packed.npz", **arrays)
    return bits


def test_the_static_split_has_its_sizes(tmp_path):
    bits = write_larochelle(tmp_path, {"train": 50_000, "valid": 10_000, "test": 10_000})
    splits = stage.read_larochelle(tmp_path)
    assert [len(x) for x, _ in splits.values()] == [50_000, 10_000, 10_000]
    assert torch.equal(splits["test"][0], torch.from_numpy(bits["test"]).float())
    data = stage.Digits("mnist", tmp_path, False, "static", 0, CPU)
    assert torch.equal(data.batch(0, 0, 100, 100), load_again(tmp_path).batch(0, 0, 100, 100))
    assert len(data.train) == 50_000 and torch.equal(data.train, data.train_fixed)


def load_again(root):
    return stage.Digits("mnist", root, False, "static", 0, CPU)


def test_larochelle_s_own_text_files_are_read(tmp_path, monkeypatch):
    sizes = {"train": 20, "valid": 5, "test": 5}
    monkeypatch.setattr(stage, "LAROCHELLE", sizes)
    bits = write_larochelle(tmp_path, sizes, labels=False)
    (tmp_path / "binarized_mnist_packed.npz").unlink()
    for split, value in bits.items():
        np.savetxt(tmp_path / f"binarized_mnist_{split}.amat", value, fmt="%d")
    data = load_again(tmp_path)
    assert torch.equal(data.train, torch.from_numpy(bits["train"]).float()) and data.labels is None


# ---------------------------------------------------------------- Runs


def test_a_run_leaves_numbers_and_figures(vae_run):
    metrics = json.loads((vae_run / "metrics.json").read_text())
    assert metrics["step"] == 12 and metrics["eval_samples"] == 10
    assert metrics["data"] == "MNIST, dynamic binarisation"
    assert -metrics["nll"] > metrics["elbo"] and metrics["elbo"] == pytest.approx(
        -metrics["reconstruction"] - metrics["kl"]
    )
    curve = json.loads((vae_run / "curve.json").read_text())
    steps = [point["step"] for point in curve]
    assert steps == sorted(set(steps)) and steps[-1] == 12 and curve[-1]["samples_seen"] == 240
    for name in ("curves", "reconstructions", "samples", "traversals", "interpolations"):
        with Image.open(vae_run / "figures" / f"{name}.png") as image:
            assert np.asarray(image).std() > 5
    assert not (vae_run / "figures" / "manifold.png").exists()


def test_training_learns(digits, tmp_path):
    train("--data-root", digits, *TINY, "--steps", 1000, "--lr", 1e-2, "--out", tmp_path / "run", main=main)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    data = load(digits)
    mean = data.train.mean(0).clamp(1e-3, 1 - 1e-3).logit()
    one_picture = -common.bernoulli_log_likelihood(data.test, mean).mean().item()
    assert -metrics["elbo"] < one_picture - 5  # a model that ignores its latents cannot do better than one picture
    assert metrics["probe_accuracy"] > 0.5


@pytest.mark.parametrize(
    "args",
    [
        ["--objective", "iwae", "--k", "5", "--D", "2"],
        ["--arch", "conv", "--channels", "4", "--D", "2"],
        ["--binarize", "none", "--free-bits", "0.1", "--k", "2", "--beta", "4", "--warmup", "1"],
        ["--precision", "bf16", "--hidden", "16"],
    ],
    ids=lambda args: " ".join(args),
)
def test_every_kind_of_run(digits, tmp_path, args):
    arguments = TINY if "--arch" not in args else [a for a in TINY if a not in ("--hidden", "16,8")]
    train("--data-root", digits, *arguments, "--steps", 2, *args, "--out", tmp_path / "run", main=main)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert math.isfinite(metrics["nll"])
    assert (tmp_path / "run" / "figures" / "manifold.png").exists() == ("2" in args and "--D" in args)


def test_fashion_mnist_is_read_from_its_own_folder(tmp_path):
    write_digits(tmp_path, "FashionMNIST")
    args = ["--dataset", "fashion-mnist", "--data-root", tmp_path, *TINY, "--steps", 1, "--out", tmp_path / "run"]
    assert "FashionMNIST, dynamic" in train(*args, main=main).output


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(digits, tmp_path, monkeypatch):
    args = ["--data-root", digits, *TINY, "--steps", 10]
    train(*args, "--out", tmp_path / "whole", main=main)
    done = []

    def update(*arguments):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(None)
        return real(*arguments)

    real = stage.update
    monkeypatch.setattr(stage, "update", update)
    CliRunner().invoke(main, [str(a) for a in [*args, "--out", tmp_path / "parts"]])
    assert len(done) == 7
    monkeypatch.setattr(stage, "update", real)
    train("--resume", tmp_path / "parts", main=main)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    curves = [json.loads((tmp_path / name / "curve.json").read_text()) for name in ("whole", "parts")]
    whole, parts = ({p["step"]: (p["train_elbo"], p["test_elbo"], p["nll"]) for p in curve} for curve in curves)
    assert set(range(1, 11)) == set(whole) == set(parts) and whole == parts  # every step is a tenth of the run


def test_a_finished_run_is_evaluated_again_with_more_samples(vae_run, tmp_path):
    shutil.copytree(vae_run, tmp_path / "run")
    before = weights(tmp_path / "run")
    train("--resume", tmp_path / "run", "--eval-samples", 200, main=main)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["eval_samples"] == 200 and metrics["step"] == 12
    assert metrics["nll"] < json.loads((vae_run / "metrics.json").read_text())["nll"]
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())


def test_a_run_starts_from_the_weights_of_another(vae_run, digits, tmp_path):
    args = ["--data-root", digits, *TINY, "--objective", "iwae", "--k", 5, "--steps", 1, "--lr", 1e-9]
    train(*args, "--start-from", vae_run, "--out", tmp_path / "run", main=main)
    before, after = weights(vae_run), weights(tmp_path / "run")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    args = ["--data-root", digits, "--D", 2, "--steps", 1, "--start-from", vae_run, "--batch", 20]
    result = CliRunner().invoke(main, [str(a) for a in [*args, "--out", tmp_path / "other"]])
    assert result.exit_code == 1 and "does not fit this model" in result.output
    assert not (tmp_path / "other").exists()


def test_scores_outlive_an_evaluation_that_is_interrupted(vae_run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    shutil.copytree(vae_run, tmp_path / "run")
    monkeypatch.setattr(stage, "evaluate", interrupted)
    CliRunner().invoke(main, ["--resume", str(tmp_path / "run"), "--eval-samples", "5000"])
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (vae_run / "metrics.json").read_bytes()


def test_a_sweep_stopped_in_the_middle_goes_on_and_ends_in_a_table_and_a_figure(digits, tmp_path, monkeypatch):
    args = ["--data-root", digits, *TINY, "--steps", 5, "--sweep-beta", "0,1,4", "--out", tmp_path / "sweep"]
    done, real = [], stage.update

    def update(*arguments):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(None)
        return real(*arguments)

    monkeypatch.setattr(stage, "update", update)
    CliRunner().invoke(main, [str(a) for a in args])
    assert not (tmp_path / "sweep" / "beta-4").exists()
    monkeypatch.setattr(stage, "update", real)
    result = train("--resume", tmp_path / "sweep", main=main)
    assert "| beta | nll |" in result.output
    table = json.loads((tmp_path / "sweep" / "metrics.json").read_text())["table"]
    assert [row["beta"] for row in table] == [0, 1, 4]
    assert (tmp_path / "sweep" / "figures" / "sweep.png").is_file()
    config = json.loads((tmp_path / "sweep" / "beta-4" / "config.json").read_text())
    assert config["options"]["beta"] == 4 and config["options"]["sweep_beta"] is None
    result = CliRunner().invoke(export.main, [str(tmp_path / "sweep")])
    assert result.exit_code == 2 and "is a sweep; name one of the runs" in result.output


def test_two_processes_of_20_train_the_model_of_one_of_40(digits, tmp_path):
    args = ["--data-root", digits, "--hidden", 16, "--D", 2, "--steps", 6, "--eval-samples", 5, "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29581"]
    command = [*torchrun, stage.__file__, *args, "--batch", 20, "--out", tmp_path / "two"]
    result = subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    train(*args, "--batch", 40, "--out", tmp_path / "one", main=main)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- Bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--D", "0"], "--D"),
        (["--k", "0"], "--k"),
        (["--eval-samples", "0"], "--eval-samples"),
        (["--hidden", "200,x"], "numbers with commas"),
        (["--hidden", "200,0"], "at least 1"),
        (["--sweep-beta", "1,nan"], "at least 0"),
        (["--sweep-beta", ""], "numbers with commas"),
        (["--binarize", "static"], "--data-root"),
        (["--binarize", "static", "--dataset", "fashion-mnist", "--data-root", "."], "static is MNIST"),
        (["--objective", "iwae", "--free-bits", "1"], "--free-bits belongs to"),
        (["--k-from", "2"], "belongs to --objective iwae"),
        (["--objective", "iwae", "--k", "2", "--k-from", "3"], "at most --k"),
        (["--beta", "2", "--sweep-beta", "1,2"], "give one of them"),
        (["--seed", "9" * 20], "--seed"),
        (["--arch", "conv", "--hidden", "3"], "--hidden does not belong to --arch conv"),
        (["--channels", "3"], "--channels does not belong to --arch mlp"),
        (["--data-root", "nowhere"], "no such folder"),
    ],
)
def test_wrong_options_end_in_one_clear_line(args, message):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]


def refused(*args):
    result = CliRunner().invoke(main, [str(a) for a in [*args, "--steps", 1]])
    assert result.exit_code in (1, 2) and "Traceback" not in result.output
    return result.output.splitlines()[-1]


def test_an_empty_folder_is_told_which_files_belong_there(tmp_path):
    line = refused("--data-root", tmp_path)
    assert "train-images-idx3-ubyte.gz" in line and "--download" in line
    assert "binarized_mnist_train.amat" in refused("--data-root", tmp_path, "--binarize", "static")


def test_a_batch_larger_than_the_data_is_refused(digits, tmp_path):
    line = refused("--data-root", digits, "--batch", 121, "--out", tmp_path / "run")
    assert "only 120 pictures" in line and not (tmp_path / "run").exists()


def test_a_corrupt_archive_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, _ in stage.MNIST.resources:
        (raw / name).write_bytes(gzip.compress(b"no digits"))
    line = refused("--data-root", tmp_path)
    assert "train-images-idx3-ubyte.gz is damaged" in line and "MD5" in line


def test_an_unpacked_file_cut_short_is_refused(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    file = tmp_path / "data" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    assert "remove what is unpacked there" in refused("--data-root", tmp_path / "data")


def test_fewer_labels_than_pictures_are_refused(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    raw = tmp_path / "data" / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 3) + bytes(3))
    assert "not as many labels" in refused("--data-root", tmp_path / "data")


def test_without_a_network_the_run_says_where_the_files_belong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def unreachable(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(stage.MNIST, "download", unreachable)
    line = refused()
    assert "put train-images-idx3-ubyte.gz" in line and "data/MNIST/raw" in line


def test_damaged_static_files_are_refused(tmp_path):
    (tmp_path / "binarized_mnist.npz").write_bytes(b"PK no archive")
    assert "damaged" in refused("--data-root", tmp_path, "--binarize", "static")
    np.savez(tmp_path / "binarized_mnist.npz", train=np.zeros((5, 98)), valid=0, test=0)
    assert "damaged" in refused("--data-root", tmp_path, "--binarize", "static")
    np.save(tmp_path / "digits.npy", np.zeros(3))
    assert "damaged" in refused("--data-root", tmp_path / "digits.npy", "--binarize", "static")
    (tmp_path / "binarized_mnist.npz").unlink()
    write_larochelle(tmp_path, {"train": 20, "valid": 5, "test": 5})
    assert "expected (50000, 784)" in refused("--data-root", tmp_path, "--binarize", "static")


def test_a_model_that_diverges_between_the_steps_is_reported_so(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "bound", lambda *_: math.inf)
    args = ["--data-root", digits, *TINY, "--steps", 1, "--out", tmp_path / "run"]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 1 and "step 1: a bound is not finite" in result.output


def test_nan_stops_the_run_with_its_step(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "bernoulli_log_likelihood", lambda x, logits: logits.sum(-1) * math.nan)
    line = refused("--data-root", digits, *TINY, "--out", tmp_path / "run")
    assert "step 0 is not finite" in line and "loss/reconstruction" in line
