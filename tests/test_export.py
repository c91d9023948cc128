"""Exported graphs against the trained models: the same cells, numbers and pictures, at other sizes than traced with."""

import importlib
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
from common import Vocoder, load_config, random_generator


def graphs_of(run):
    script = importlib.import_module(load_config(run)["script"])
    return script.graphs(script.load(run))


def names_of(session):
    return [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]


@pytest.fixture(params=["vae_run", "clevr_run", "sprites_run", "duo_run"])
def any_run(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def test_pytorch_torchscript_and_onnxruntime_agree_at_other_sizes(any_run):
    for name, (graph, example) in graphs_of(any_run).items():
        if name == "vocoder":
            continue  # its iterations multiply rounding: export.py compares spectral convergence
        for batch, slots in ((1, 1), (3, 9)):
            inputs = export.resized(example, batch, slots, random_generator("other"))
            expected = export.as_tuple(graph(*inputs.values()))
            written = [export.run_onnx(any_run / "export" / f"{name}.onnx", inputs)]
            if (any_run / "export" / f"{name}.pt").exists():
                written.append(export.run_torchscript(any_run / "export" / f"{name}.pt", inputs))
            for outputs in written:
                assert len(outputs[0]) == batch
                for output, e, a in zip(graph.outputs, expected, outputs, strict=True):
                    np.testing.assert_allclose(a, e.numpy(), atol=1e-4, rtol=1e-4, err_msg=f"{name} {output}")


def test_names_axes_and_metadata_are_those_of_the_contract(clevr_run):
    folder = clevr_run / "export"
    graphs = "encoder", "prior", "decoder", "composer"
    sessions = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in graphs}
    assert {name: names_of(session) for name, session in sessions.items()} == {
        "encoder": (["image"], ["mu", "logvar", "cell", "kl", "kl_map", "background", "light"]),
        "prior": (["noise", "kept", "given", "light"], ["z", "cell", "count", "background"]),
        "decoder": (["z", "cell"], ["layer"]),
        "composer": (["layer", "background"], ["image"]),
    }
    for name, session in sessions.items():
        for tensor in session.get_inputs():
            assert tensor.shape[0] == "batch"
            assert name == "prior" or tensor.name in ("image", "background") or tensor.shape[1] == "slots"
        model = onnx.load(folder / f"{name}.onnx")
        assert {o.version for o in model.opset_import if not o.domain} == {export.OPSET}
        optional = [tensor.name for tensor in session.get_overridable_initializers()]
        assert ("slots" in optional) == (name == "encoder"), optional
    image = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    for given, n in (({}, 3), ({"slots": np.arange(1)}, 1), ({"slots": np.arange(12)}, 12)):
        mu, _, cell, kl, *_ = sessions["encoder"].run(None, {"image": image, **given})
        assert mu.shape == (2, n, 4) and cell.shape == (2, n, 2) and (np.diff(kl) <= 0).all()
    about = json.loads((folder / "model.json").read_text())
    assert about == json.loads(sessions["decoder"].get_modelmeta().custom_metadata_map["model"])
    expected = {"kind": "mvae-image", "N": 3, "D": 4, "op": "alpha", "compose": "data", "size": 64, "dataset": "clevr"}
    assert expected | {"data_source": "built-in CLEVR-like renderer", "steps": 3, "crop": "clevr"} == {
        name: about[name] for name in (*expected, "data_source", "steps", "crop")
    }


def test_torchscript_files_hold_the_weights_they_use_no_gradients_and_the_metadata(clevr_run):
    sizes, folder = {}, clevr_run / "export"
    for name in ("encoder", "decoder", "composer"):
        sizes[name], extra = (folder / f"{name}.pt").stat().st_size, {"model.json": ""}
        graph = torch.jit.load(folder / f"{name}.pt", _extra_files=extra)
        assert not any(parameter.requires_grad for parameter in graph.parameters())
        assert json.loads(extra["model.json"]) == json.loads((folder / "model.json").read_text())
    assert sizes["composer"] < 40_000
    assert sizes["composer"] < sizes["encoder"] and sizes["composer"] < sizes["decoder"]


def test_the_graphs_of_a_model_of_sounds_are_those_of_the_contract(duo_run):
    names = {}
    for name in ("encoder", "prior", "decoder", "composer", "vocoder"):
        path = duo_run / "export" / f"{name}.onnx"
        assert path.stat().st_size < 5e6, "matrices of the Fourier transform are computed in the graph, not stored"
        names[name] = names_of(onnxruntime.InferenceSession(path))
    assert names == {
        "encoder": (["waveform"], ["mu", "logvar", "cell", "kl", "kl_map", "gain"]),
        "prior": (["noise", "kept", "given"], ["z", "cell", "count"]),
        "decoder": (["z", "cell"], ["layer"]),
        "composer": (["layer"], ["spectrogram"]),
        "vocoder": (["spectrogram"], ["waveform"]),
    }
    about = json.loads((duo_run / "export" / "model.json").read_text())
    expected = {"kind": "mvae-sound", "N": 2, "D": 3, "op": "sum", "n_fft": 4096, "hop": 1024}
    assert expected | {"sample_rate": 16000} == {name: about[name] for name in (*expected, "sample_rate")}


@torch.no_grad()
def test_the_encoder_of_sounds_hears_what_training_saw_at_any_loudness(duo_run):
    waveform = graphs_of(duo_run)["encoder"][1]["waveform"]
    expected = train_mvae.load(duo_run).encode(train_mvae.SoundLevels(64)(waveform))
    for factor in (1, 0.01):
        *outputs, gain = export.run_onnx(duo_run / "export" / "encoder.onnx", {"waveform": factor * waveform})
        mu, *_, kl_map = outputs
        np.testing.assert_allclose(kl_map, expected.kl_map.numpy(), atol=1e-3)
        np.testing.assert_allclose(mu, expected.mu.numpy(), atol=1e-3)
        np.testing.assert_allclose(gain / 16, factor * waveform.square().mean(1).sqrt(), rtol=1e-4)


def test_static_graphs_have_the_sizes_of_one_example(vae_run, duo_run):
    for run, first in ((vae_run, "image"), (duo_run, "waveform")):
        about = json.loads((run / "export" / "model.json").read_text())
        for name in about["graphs"]:
            session = onnxruntime.InferenceSession(run / "export" / f"{name}.static.onnx")
            tensors = [*session.get_inputs(), *session.get_outputs()]
            assert all(isinstance(size, int) for tensor in tensors for size in tensor.shape)
            assert all(tensor.shape[0] == 1 for tensor in tensors)
            if name == "encoder":
                assert names_of(session)[0] == [first], "the number of slots is the model's"
                assert next(t.shape for t in tensors if t.name == "mu")[1] == about.get("N", about["D"])
    assert session.get_inputs()[0].shape[2] == about["frames"] == -(-about["samples"] // about["hop"]) + 1


def test_small_graphs_are_small_and_near(vae_run):
    folder = vae_run / "export"
    inputs = {"z": torch.randn(5, 3, generator=random_generator("z"))}
    (exact,) = export.run_onnx(folder / "decoder.onnx", inputs)
    for form, most in (("fp16", 0.005), ("int8", export.ROUNDED)):
        path = folder / f"decoder.{form}.onnx"
        (image,) = export.run_onnx(path, inputs)
        assert 0 < np.abs(image - exact).max() < most
        assert path.stat().st_size < 0.9 * (folder / "decoder.onnx").stat().st_size, "a large part of it is text"
        assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_small_graph_that_differs_too_much_is_left_out(vae_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ROUNDED", 1e-9)
    result = CliRunner().invoke(export.main, [str(vae_run), "--out", str(tmp_path), "--no-torchscript", "--int8"])
    assert result.exit_code == 0, result.output
    assert "DIFFERS, left out" in result.output
    assert {f.name for f in tmp_path.iterdir()} == {"encoder.onnx", "decoder.onnx", "model.json", "SHA256SUMS"}


@torch.no_grad()
def test_sounds_that_are_decoded_times_the_gain_are_as_loud_as_the_input(duo_run):
    """The chain of the contract, whose loudness is that of the mean power of all magnitudes."""
    folder, waveform = duo_run / "export", 0.05 * graphs_of(duo_run)["encoder"][1]["waveform"][:1]
    level = train_mvae.SoundLevels(64)
    same = level.to_stft_magnitude(level(waveform))  # what a perfect model would decode
    layer = train_mvae.log_expand(level(waveform)).clamp(min=1e-9).log()[:, None]
    (spectrogram,) = export.run_onnx(folder / "composer.onnx", {"layer": layer})
    np.testing.assert_allclose(spectrogram, same.numpy() * 64, rtol=1e-3, atol=1e-3)
    *_, gain = export.run_onnx(folder / "encoder.onnx", {"waveform": waveform})
    loudness = np.sqrt(np.square(gain * spectrogram).mean()) / level.magnitude(waveform).square().mean().sqrt()
    assert loudness == pytest.approx(1, abs=0.25), "bands and pairs of frames are averages, which lose some power"


def test_the_exported_vocoder_gives_numbers_for_silence_noise_and_full_scale(duo_run):
    magnitude = graphs_of(duo_run)["vocoder"][1]["spectrogram"][:1, :, :16]
    silent_end = magnitude.clone()
    silent_end[..., -6:] = 0
    noise = torch.rand(magnitude.shape, generator=random_generator("noise"))
    for spectrogram in (silent_end, 0 * magnitude, noise, 1000 * magnitude / magnitude.max()):
        (waveform,) = export.run_onnx(duo_run / "export" / "vocoder.onnx", {"spectrogram": spectrogram})
        assert waveform.shape == (1, 15 * 1024) and np.isfinite(waveform).all()
        assert spectrogram.any() or not waveform.any()


def test_the_graphs_of_a_vae_encode_and_decode_digits(vae_run, digits):
    folder = vae_run / "export"
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    image = torch.rand(7, 1, 28, 28, generator=random_generator("digits"))
    mu, logvar, kl = encoder.run(None, {"image": image.numpy()})
    assert mu.shape == logvar.shape == (7, 3) and kl.shape == (7,)
    np.testing.assert_allclose(kl, 0.5 * (mu**2 + np.exp(logvar) - logvar - 1).sum(1), rtol=1e-4)
    (decoded,) = decoder.run(None, {"z": mu})
    model = train_vae_mnist.load(vae_run)
    with torch.no_grad():
        expected = model.decode(model.encode(image.flatten(1))[0]).sigmoid()
    np.testing.assert_allclose(decoded.reshape(7, 784), expected.numpy(), atol=1e-5)
    about = json.loads((folder / "model.json").read_text())
    assert about["kind"] == "vae-image" and about["D"] == 3 and about["data_source"] == "MNIST, dynamic binarisation"
    assert about == json.loads(decoder.get_modelmeta().custom_metadata_map["model"])


# ---------------------------------------------------------------- The check


def verdict(graph, example, written=None):
    """export.check's of what is written, by default the graph in real arithmetic, without writing a file."""

    def run(path, inputs):
        with torch.no_grad():
            return [output.numpy() for output in export.as_tuple((written or graph)(*inputs.values()))]

    generator = random_generator("check")
    cases = {"other": export.resized(example, 1, 1, generator)}
    cases |= export.extremes(export.resized(example, 1, 1, generator), generator)
    with torch.no_grad():
        trained = {what: export.as_tuple(graph(*case.values())) for what, case in cases.items()}
    if not written:
        export.in_real_arithmetic(graph)
    return export.check(graph, Path("graph.onnx"), run, cases, trained)


def test_a_graph_whose_stft_is_not_torchaudios_differs(duo_run, capsys):
    graph, example = graphs_of(duo_run)["encoder"]
    assert verdict(graph, example)
    trained, _ = graphs_of(duo_run)["encoder"]
    stft = next(module for module in graph.modules() if isinstance(module, export.RealSTFT))
    stft.window.copy_(torch.hann_window(4096, periodic=False).roll(1024))
    assert not verdict(trained, example, graph)
    assert "DIFFERS" in capsys.readouterr().out


def test_a_vocoder_that_stops_early_or_gives_nan_differs():
    example = {"spectrogram": torch.rand(2, 65, 16, generator=random_generator("magnitudes"))}
    graph = Vocoder(128)
    assert verdict(Vocoder(128), example)
    assert not verdict(graph, example, export.GriffinLim(128, iterations=1))
    assert not verdict(graph, example, lambda spectrogram: graph(spectrogram) / spectrogram[:, 0, :1].sign())


def test_what_counts_as_a_difference():
    cell, mu = torch.tensor([[[0.5, 0.25]]]), torch.rand(1, 1, 4, generator=random_generator("mu"))

    def difference(mu_, cell_=cell, scale=1.0, kl=1.0, ties=True):
        expected = (scale * mu, torch.ones(1, 1), cell)
        actual = (mu_, np.full((1, 1), kl), np.asarray(cell_))
        return export.largest_difference(("mu", "kl", "cell"), expected, actual, ties)

    mu = mu / mu.max()
    assert difference(mu.numpy()) == 0
    assert difference(mu.numpy() + 0.5) == pytest.approx(0.5)
    assert difference(100 * mu.numpy() + 1, scale=100.0) == pytest.approx(0.01)  # relative, of what exceeds 1
    assert difference(mu.numpy() * np.nan) == float("inf")
    assert difference(mu.numpy()[:, :, :2]) == float("inf")
    assert difference(mu.numpy() + 0.5, cell + 0.5) == 0  # a tie: other cells of the same KL
    assert difference(mu.numpy() + 0.5, cell + 0.5, ties=False) == pytest.approx(0.5)
    assert difference(mu.numpy(), kl=1.5) == pytest.approx(0.5)
    assert difference(mu.numpy(), cell + 0.5, kl=1.5) == 0  # and what is chosen after them


# ---------------------------------------------------------------- The folder


@pytest.fixture
def quick(monkeypatch):
    """An export that writes and runs nothing: its graphs say what the model does."""
    graphs = {}
    monkeypatch.setattr(
        export, "write_onnx", lambda graph, inputs, path, info: path.write_text("") or graphs.update({path: graph})
    )
    monkeypatch.setattr(
        export, "run_onnx", lambda path, inputs: [o.numpy() for o in export.as_tuple(graphs[path](*inputs.values()))]
    )


def test_a_mismatch_is_an_error_and_leaves_the_old_export(vae_run, tmp_path, monkeypatch, quick):
    real = export.run_onnx
    monkeypatch.setattr(export, "run_onnx", lambda path, inputs: [o + 1e-3 for o in real(path, inputs)])
    out = tmp_path / "export"
    out.mkdir()
    (out / "encoder.onnx").write_text("old")
    (out / "SHA256SUMS").write_text(f"{'0' * 64}  encoder.onnx\n")
    result = CliRunner().invoke(export.main, [str(vae_run), "--out", str(out)])
    assert result.exit_code == 1
    assert "DIFFERS" in result.output and "nothing was written" in result.output
    assert (out / "encoder.onnx").read_text() == "old"
    assert len(list(out.iterdir())) == 2


def test_a_later_export_leaves_nothing_of_the_one_before(vae_run, tmp_path, quick, monkeypatch):
    out = tmp_path / "export"
    out.mkdir()
    monkeypatch.chdir(out)
    old, kept = ("composer.onnx", "vocoder.static.onnx", "decoder.fp16.onnx", "encoder.pt"), {"encoder.pth", "prior.pt"}
    for name in (*old, *kept):
        (out / name).write_text("of another model")
    result = CliRunner().invoke(export.main, [str(vae_run), "--out", ".", "--no-torchscript"])
    assert result.exit_code == 2 and "is there, which no export wrote" in result.output
    assert {f.name for f in out.iterdir()} == {*old, *kept}
    (out / "notes.txt").write_text("no graph, if in the list")
    (out / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in (*old, "notes.txt")) + "\n")
    kept.add("notes.txt")
    result = CliRunner().invoke(export.main, [str(vae_run), "--out", ".", "--no-torchscript"])
    assert result.exit_code == 0, result.output
    assert {f.name for f in out.iterdir()} == {"encoder.onnx", "decoder.onnx", "model.json", "SHA256SUMS"} | kept
    result = CliRunner().invoke(export.main, [str(vae_run), "--out", str(out / "model.json")])
    assert result.exit_code == 2
    assert "cannot be written" in result.output


def test_folders_that_are_no_runs_are_refused(tmp_path, clevr_run):
    def refused():
        result = CliRunner().invoke(export.main, [str(tmp_path)])
        assert isinstance(result.exception, SystemExit)
        return result.exit_code, " ".join(result.output.split())

    code, message = refused()
    assert code == 2 and "config.json: missing" in message
    config = json.loads((clevr_run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"script": "train_other"}))
    code, message = refused()
    assert code == 2 and "expected a run of train_vae_mnist or train_vae_audio or train_mvae" in message
    wrong = {**config, "options": {**config["options"], "d": 7}}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    (tmp_path / "checkpoint.pt").write_bytes((clevr_run / "checkpoint.pt").read_bytes())
    code, message = refused()
    assert code == 1 and "does not fit" in message


def test_recompose_refuses_a_vae(vae_run):
    picture = Path(export.__file__).parent / "models" / "clevr" / "a.png"
    result = CliRunner().invoke(recompose.main, [str(picture), "--model", str(vae_run / "export")])
    assert result.exit_code == 2
    assert "train_mvae.py" in result.output
