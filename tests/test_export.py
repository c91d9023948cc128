"""Exported graphs against the PyTorch model: the same cells, numbers and pictures, at other sizes than traced with."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

import export
import recompose
import train_mvae
import train_vae_mnist
from common import random_generator


def model_and_inputs(run, batch, slots):
    model, config, step = export.load_model(run)
    return model, export.example_inputs(model, export.describe(config, step).get("size"), batch, slots, seed=42)


def flat(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.fixture(params=["vae_run", "clevr_run", "sprites_run", "duo_run"])
def any_run(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("batch", "slots"), [(1, 1), (3, 9)])
@torch.no_grad()
def test_pytorch_torchscript_and_onnxruntime_agree(any_run, batch, slots):
    run = any_run
    model, inputs = model_and_inputs(run, batch, slots)
    for name, graph in export.graphs_of(model).items():
        if name == "vocoder":
            continue  # its iterations multiply rounding: export.py compares spectral convergence
        expected = [e.numpy() for e in flat(graph(*inputs[name].values()))]
        for actual in (
            export.run_onnx(run / "export" / f"{name}.onnx", inputs[name]),
            export.run_torchscript(run / "export" / f"{name}.pt", inputs[name]),
        ):
            for output, e, a in zip(graph.outputs, expected, actual, strict=True):
                np.testing.assert_allclose(a, e, atol=1e-4, rtol=0, err_msg=f"{name} {output}")


def test_names_axes_and_metadata_are_those_of_the_contract(clevr_run):
    sessions = {
        n: onnxruntime.InferenceSession(clevr_run / "export" / f"{n}.onnx") for n in ("encoder", "decoder", "composer")
    }
    names = {n: ([i.name for i in s.get_inputs()], [o.name for o in s.get_outputs()]) for n, s in sessions.items()}
    assert names == {
        "encoder": (["image"], ["mu", "logvar", "cell", "kl", "kl_map", "background"]),
        "decoder": (["z", "cell"], ["layer"]),
        "composer": (["layer", "background"], ["image"]),
    }
    for name, session in sessions.items():
        for tensor in session.get_inputs():
            assert isinstance(tensor.shape[0], str), "the batch must be free"
            assert tensor.name in ("image", "background") or isinstance(tensor.shape[1], str), "the slots must be free"
        model = onnx.load(clevr_run / "export" / f"{name}.onnx")
        assert {o.version for o in model.opset_import if not o.domain} == {export.OPSET}
    written = json.loads((clevr_run / "export" / "model.json").read_text())
    inside = json.loads(sessions["decoder"].get_modelmeta().custom_metadata_map["model"])
    assert written == inside
    assert (inside["kind"], inside["N"], inside["D"], inside["op"], inside["size"]) == ("mvae-image", 3, 4, "alpha", 64)
    assert inside["data_source"] == "built-in CLEVR-like renderer"


def test_the_graphs_of_a_model_of_sounds_are_those_of_the_contract(duo_run):
    names = {}
    for name in ("encoder", "decoder", "composer", "vocoder"):
        path = duo_run / "export" / f"{name}.onnx"
        assert path.stat().st_size < 5e6, "matrices of the Fourier transform are computed in the graph, not stored"
        session = onnxruntime.InferenceSession(path)
        names[name] = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
    assert names == {
        "encoder": (["waveform"], ["mu", "logvar", "cell", "kl", "kl_map"]),
        "decoder": (["z", "cell"], ["layer"]),
        "composer": (["layer"], ["spectrogram"]),
        "vocoder": (["spectrogram"], ["waveform"]),
    }
    about = json.loads((duo_run / "export" / "model.json").read_text())
    wanted = {
        "kind": "mvae-sound",
        "N": 2,
        "D": 4,
        "op": "sum",
        "domain": "magnitude",
        "sample_rate": 16000,
        "hop": 1024,
    }
    assert wanted.items() <= about.items()


@torch.no_grad()
def test_the_encoder_of_sounds_hears_what_training_saw_at_any_loudness(duo_run):
    model, inputs = model_and_inputs(duo_run, 2, 1)
    waveform = inputs["encoder"]["waveform"]
    expected = model.encode(train_mvae.SoundLevels(64)(waveform))
    for factor in (1, 0.01):
        mu, *_, kl_map = export.run_onnx(duo_run / "export" / "encoder.onnx", {"waveform": factor * waveform})
        np.testing.assert_allclose(kl_map, expected.kl_map.numpy(), atol=1e-3)
        np.testing.assert_allclose(mu, expected.mu.numpy(), atol=1e-3)


def test_a_graph_holds_only_the_weights_it_uses(clevr_run):
    sizes = {n: (clevr_run / "export" / f"{n}.pt").stat().st_size for n in ("encoder", "decoder", "composer")}
    assert sizes["composer"] < 40_000
    assert sizes["composer"] < sizes["encoder"] and sizes["composer"] < sizes["decoder"]


def test_a_mismatch_is_an_error_and_leaves_the_old_export(clevr_run, tmp_path, monkeypatch):
    real = export.run_onnx
    monkeypatch.setattr(export, "run_onnx", lambda path, inputs: [o + 1e-3 for o in real(path, inputs)])
    out = tmp_path / "export"
    out.mkdir()
    (out / "encoder.onnx").write_text("old")
    result = CliRunner().invoke(export.main, [str(clevr_run), "--out", str(out)])
    assert result.exit_code == 1
    assert "DIFFERS" in result.output and "nothing was written" in result.output
    assert (out / "encoder.onnx").read_text() == "old"
    assert len(list(out.iterdir())) == 1


def test_a_later_export_leaves_nothing_of_the_one_before(clevr_run, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    (out / "encoder.pt").write_text("of another model")
    result = CliRunner().invoke(export.main, [str(clevr_run), "--out", str(out), "--no-torchscript"])
    assert result.exit_code == 0, result.output
    assert {f.name for f in out.iterdir()} == {"encoder.onnx", "decoder.onnx", "composer.onnx", "model.json"}
    result = CliRunner().invoke(export.main, [str(clevr_run), "--out", str(out / "model.json")])
    assert result.exit_code == 2
    assert "cannot be written" in result.output


@torch.no_grad()
def test_other_cells_count_as_a_difference():
    class Graph:
        outputs = ("mu", "cell")

    cell = torch.tensor([[[0.5, 0.25]]])
    mu = torch.rand(1, 1, 4, generator=random_generator("mu"))
    assert export.largest_difference(Graph, (mu, cell), (mu.numpy(), cell.numpy())) == 0
    assert export.largest_difference(Graph, (mu, cell), (mu.numpy() + 0.5, cell.numpy())) == pytest.approx(0.5)
    assert export.largest_difference(
        Graph, (100 * mu / mu.max(), cell), (100 * (mu / mu.max()).numpy() + 1, cell.numpy())
    ) == pytest.approx(0.01)
    assert export.largest_difference(Graph, (mu, cell), (mu.numpy(), cell.numpy() + 0.01)) == float("inf")
    assert export.largest_difference(Graph, (mu, cell), (mu.numpy() * np.nan, cell.numpy())) == float("inf")


def test_folders_that_are_no_runs_are_refused(tmp_path, clevr_run):
    result = CliRunner().invoke(export.main, [str(tmp_path)])
    assert result.exit_code == 2
    assert "no config.json" in result.output
    config = json.loads((clevr_run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"script": "train_other"}))
    result = CliRunner().invoke(export.main, [str(tmp_path)])
    assert result.exit_code == 2
    assert "expected a run of train_vae_mnist.py or train_vae_audio.py or train_mvae.py" in result.output
    wrong = {**config, "options": {**config["options"], "d": 7}}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    (tmp_path / "checkpoint.pt").write_bytes((clevr_run / "checkpoint.pt").read_bytes())
    result = CliRunner().invoke(export.main, [str(tmp_path)])
    assert result.exit_code == 1
    assert "does not fit" in result.output


def test_the_graphs_of_a_vae_encode_and_decode_digits(vae_run, digits):
    folder = vae_run / "export"
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    data = train_vae_mnist.Digits("mnist", digits, False, "dynamic", 0, torch.device("cpu"))
    mu, logvar, kl = encoder.run(None, {"image": data.test[:7].view(7, 1, 28, 28).numpy()})
    assert mu.shape == logvar.shape == (7, 3) and kl.shape == (7,)
    np.testing.assert_allclose(kl, 0.5 * (mu**2 + np.exp(logvar) - logvar - 1).sum(1), rtol=1e-4)
    (image,) = decoder.run(None, {"z": mu})
    assert image.shape == (7, 1, 28, 28) and image.min() >= 0 and image.max() <= 1
    model, _, _ = export.load_model(vae_run)
    with torch.no_grad():
        expected = model.decode(model.encode(data.test[:7])[0]).sigmoid()
    np.testing.assert_allclose(image.reshape(7, 784), expected.numpy(), atol=1e-5)
    info = json.loads((folder / "model.json").read_text())
    assert info["kind"] == "vae-image" and info["D"] == 3 and info["data_source"] == "MNIST, dynamic binarisation"
    assert info == json.loads(decoder.get_modelmeta().custom_metadata_map["model"])


def test_recompose_refuses_a_vae(vae_run):
    picture = Path(export.__file__).parent / "models" / "clevr" / "a.png"
    result = CliRunner().invoke(recompose.main, [str(picture), "--model", str(vae_run / "export")])
    assert result.exit_code == 2
    assert "expected the export of a train_mvae.py run" in result.output
