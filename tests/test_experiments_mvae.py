"""The experiments on MVAE runs: recomposition against the truth, NMF and ideal masks, grids, curves; on tiny runs."""

import json
import shutil
import subprocess

import pytest
import torch
from click.testing import CliRunner
from test_data import write_clevr
from torchmetrics.clustering import AdjustedRandScore

from common import RATE, Vocoder, random_generator
from recompose import load_picture
from tests.experiments import clusters, curves, exchange, grid, mixed, properties, separation, slots, transfer
from tests.experiments.judges import FamilyClassifier
from train_mvae import COLOURS, CUBE, RADII, SOUND_FFT, BuiltInClevr, Encoding, PictureFolder, assign, separate


def invoke(command, *args):
    """The output of a command, whose exit code must be 0."""
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.mark.parametrize("kind", ["clevr_run", "sprites_run"])
def test_recompositions_of_a_run_are_scored_and_its_slots_drawn(kind, request, monkeypatch):
    monkeypatch.setattr(slots, "PAIRS", 3)
    folder = request.getfixturevalue(kind)
    printed = invoke(slots.main, folder)
    assert "| recomposition_psnr | " in printed and "built-in" in printed
    assert ("7 to 10 objects, ten slots, found: 0." in printed) == (kind == "clevr_run")
    scores = json.loads((folder / "recomposition.json").read_text())
    for name in ("ari_fg", "step_0/ari_fg"):
        assert scores[name] == pytest.approx(json.loads((folder / "metrics.json").read_text())[name], abs=1e-3)
    for name in ("ari_fg_slots", "miou", "slot_count_error", "duplicates"):
        assert f"| {name} | " in printed and {name, f"step_0/{name}"} <= scores.keys()
    assert (scores["split"], scores["pairs"]) == ("test", 3)
    assert scores["step_0/recomposition_psnr"] > 0 and scores["recomposition_psnr_baseline"] > 0
    for name in ("traversals", "moved", "recomposition"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 10_000


def test_slots_of_mixtures_are_remixed_and_scored(duo_run):
    assert "| lsd_recomposed | " in invoke(slots.main, duo_run)
    assert (duo_run / "figures" / "remix.png").stat().st_size > 10_000
    scores = json.loads((duo_run / "recomposition.json").read_text())
    assert 0 <= scores["own_instrument"] <= 1 and 0 <= scores["step_0/own_instrument"] <= 1
    assert scores["lsd_recomposed"] > 0 and scores["lsd_recomposed_baseline"] > 0


def test_the_start_of_a_run_is_what_it_was_trained_from(sprites_run):
    model, data = slots.load_run(sprites_run)
    start, again = (slots.load_start(model, data).state_dict() for _ in range(2))
    trained = model.state_dict()
    assert all(torch.equal(start[name], again[name]) for name in start)
    moved = max(float((start[name] - trained[name]).abs().max()) for name in start)
    assert 0 < moved < 0.01, "two steps at the first learning rates of the warm-up"


class Cutout:
    """A model that knows: its slots are the objects of the scenes drawn last, which its composition lays together."""

    def __init__(self, data):
        self.render, data.render, self.shown = data.render, self.record, []

    def record(self, scene):
        self.shown.append(self.render(scene))
        return self.shown[-1]

    def encode(self, image):
        index = next(i for i, (shown, _) in enumerate(self.shown) if torch.equal(shown, image))
        return Encoding(torch.tensor(index), *7 * [None])._replace(background=image)

    def decode(self, mu, cell):
        image, label = self.shown[int(mu)]
        masks = (label[:, None] == torch.arange(1, 9)[:, None, None]).float()[:, :, None]  # (n, 8, 1, H, W)
        return torch.cat([masks * image[:, None], masks], dim=2)  # (n, 8, 4, H, W)

    def responsibilities(self, layer, background):
        masks = layer[:, :, 3]  # (n, 8, H, W)
        return torch.cat([0.5 * torch.ones_like(masks[:, :1]), masks], dim=1)

    def compose(self, layer, background):
        return layer[:, :, :3].amax(1)


def test_a_model_that_knows_recomposes_without_error_what_is_shown(sprites_run):
    _, data = slots.load_run(sprites_run)
    scores = slots.score_recomposition(Cutout(data), data, "test", 6)
    assert scores["recomposition_psnr_shown"] > 30 and scores["reconstruction_psnr"] > 60
    assert scores["recomposition_psnr_baseline"] < 15


def test_a_model_that_knows_draws_a_scene_without_an_object(sprites_run):
    _, data = slots.load_run(sprites_run)
    model = Cutout(data)
    scores = slots.score_removal(model, data, "test", 20)
    assert min(scores["removal_psnr"], scores["whole_reconstruction_psnr"]) > 30  # what is lost are edges
    assert scores["removal_psnr_baseline"] < 25
    model.compose = lambda layer, background: background  # it takes nothing out
    model.shown.clear()
    assert slots.score_removal(model, data, "test", 20)["removal_psnr"] == scores["removal_psnr_baseline"]


def test_a_run_on_a_folder_is_scored_on_scenes_that_can_be_drawn_anew(clevr_run, tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "PAIRS", 3)
    root = tmp_path / "CLEVR_v1.0"
    write_clevr(root, sizes=[(320, 240)] * 4, train=30)
    result = CliRunner().invoke(slots.main, [str(clevr_run), "--data-root", str(root)])
    assert result.exit_code == 2 and "was trained on built-in" in result.output
    folder = tmp_path / "run"
    shutil.copytree(clevr_run, folder, ignore=shutil.ignore_patterns("recomposition.json"))
    config = json.loads((folder / "config.json").read_text())
    config["data"]["source"], config["options"]["data_root"] = f"CLEVR folder {root.name}", str(root)
    (folder / "config.json").write_text(json.dumps(config))
    assert f"trained on: CLEVR folder {root.name}" in invoke(slots.main, folder)
    scores = json.loads((folder / "recomposition.json").read_text())
    assert scores["data"] == "built-in CLEVR-like renderer" and scores["removal_psnr_baseline"] > 15


# ---------------------------------------------------------------- Masks


def test_in_ari_fg_the_background_is_a_component_like_any_other():
    """As in deepmind's segmentation_metrics; of the argmax over slots alone, ari_fg_slots, it is not."""
    generator = random_generator("responsibility")
    responsibility = torch.rand(5, 16, 16, generator=generator).softmax(0)
    label = torch.randint(4, (16, 16), generator=generator)
    for k in range(1, 4):
        responsibility[k][label == k] += 0.06
    scores, on = slots.segmentation_scores(responsibility, label), label > 0
    expected = AdjustedRandScore()(responsibility.argmax(0)[on], label[on]).item()
    of_slots = AdjustedRandScore()(responsibility[1:].argmax(0)[on], label[on]).item()
    assert scores["ari_fg"] == pytest.approx(expected, abs=1e-6) and expected < of_slots - 0.02
    assert scores["ari_fg_slots"] == pytest.approx(of_slots, abs=1e-6)

    label = torch.zeros(16, 16, dtype=torch.long)
    label[:8, :8], label[10:, 10:] = 1, 2
    weak = torch.zeros(3, 16, 16)
    weak[0], weak[1, :8, :8], weak[2, 10:, 10:] = 0.6, 0.4, 0.4  # the slots are right, but the background owns all
    scores = slots.segmentation_scores(weak, label)
    assert (scores["ari_fg"], scores["ari_fg_slots"]) == (0.0, 1.0)


def scene_with(segments, label):
    """Scores for hard segments (H, W) with 4 slots: 0 is the background."""
    return slots.segmentation_scores(torch.eye(5)[segments].permute(2, 0, 1), label)


def test_scores_of_perfect_split_merged_and_missing_segments():
    label = torch.zeros(16, 16, dtype=torch.long)
    label[:8, :8], label[10:, 10:] = 1, 2
    renamed = torch.where(label == 1, 3, torch.where(label == 2, 1, 0))
    perfect = scene_with(renamed, label)
    assert perfect == {"ari_fg": 1.0, "ari_fg_slots": 1.0, "miou": 1.0, "slot_count_error": 0, "duplicates": 0.0}

    split = renamed.clone()
    split[:4, :8] = 2  # half of object 1 goes to another slot
    scores = scene_with(split, label)
    assert scores["slot_count_error"] == 1
    assert scores["duplicates"] == pytest.approx(1 / 3)
    assert scores["miou"] == pytest.approx(0.75)
    assert 0 < scores["ari_fg"] < 1

    scores = scene_with(torch.where(label > 0, 1, 0), label)
    assert scores["ari_fg"] == 0.0
    assert scores["slot_count_error"] == 1
    assert scores["miou"] == pytest.approx(64 / 100 / 2)

    missing = scene_with(torch.where(label == 1, 3, 0), label)
    assert missing["miou"] == 0.5 and missing["ari_fg"] == 1.0  # what is left out is a segment of its own


def test_a_slot_on_two_objects_by_halves_is_no_duplicate():
    label = torch.zeros(16, 16, dtype=torch.long)
    label[:4], label[4:8] = 1, 2
    segments = torch.zeros(16, 16, dtype=torch.long)
    segments[2:6, :8], segments[:8, 8:] = 1, 2
    assert scene_with(segments, label)["duplicates"] == 0


def test_a_scene_without_objects_has_no_scores():
    assert slots.segmentation_scores(torch.rand(4, 16, 16), torch.zeros(16, 16, dtype=torch.long)) == {}


def test_pixels_of_one_colour_are_one_cluster(tmp_path, monkeypatch):
    colours = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    label = torch.randint(3, (20, 20), generator=random_generator("label"))
    found = clusters.segment(colours[label].permute(2, 0, 1), 3, 0.0)
    assert AdjustedRandScore()(found.flatten(), label.flatten()) == 1
    halves = clusters.segment(torch.zeros(3, 20, 20), 2, 1.0)  # by places alone
    assert 180 <= int(halves.sum()) <= 220
    monkeypatch.setattr(clusters, "CHOSEN_BY", 2)
    monkeypatch.setattr(clusters, "CLUSTERS", (5,))
    assert "built-in sprites, 3 test scenes: ari_fg 0." in invoke(clusters.main, "--scenes", 3)
    write_clevr(tmp_path, masks=False, sizes=[(320, 240)] * 4, train=30)
    result = CliRunner().invoke(clusters.main, ["--dataset", "clevr", "--data-root", str(tmp_path)])
    assert result.exit_code == 2 and "has no masks to score by" in result.output


# ---------------------------------------------------------------- Properties


def test_properties_are_read_from_the_slots_of_a_run(clevr_run, monkeypatch):
    monkeypatch.setattr(properties, "TESTED", 8)
    monkeypatch.setattr(properties, "VISIBLE_SHARE", 10 / 64**2)
    printed = invoke(properties.main, clevr_run, "--scenes", 12)
    scores = json.loads((clevr_run / "properties.json").read_text())
    assert scores["objects"]["train"] >= 8 and scores["objects"]["test"] >= 4
    for name in properties.PROPERTIES:
        assert f"| {name} | " in printed
        assert all(0 <= scores[name][kind] <= 1 for kind in ("mu", "drawn", "true crops", "commonest"))


def test_described_scenes_are_those_that_were_drawn():
    data = BuiltInClevr(32, (3, 6), 0, torch.device("cpu"))
    images, labels, answers = properties.described_scenes(data, "test", 5)
    scene = data.sample(5, properties.random_generator("properties", "test", device=data.device))
    again, label = data.render(scene)
    assert torch.equal(images, again) and torch.equal(labels, label)
    assert torch.equal(torch.tensor(COLOURS)[answers["color"]] / 255, scene["rgb"])
    small = scene["half"] <= RADII[0]
    assert torch.equal(answers["size"] == 1, small) and 0.2 < small.float().mean() < 0.8
    assert torch.equal(answers["shape"] == CUBE, scene["shape"] == CUBE)


def test_words_become_places_in_their_vocabulary():
    table = properties.as_integers([["cube", "ball"], ["disc", "cube", "cube"]])
    assert table.tolist() == [[1, 0, 0], [2, 1, 1]]


@torch.no_grad()
def test_a_crop_is_a_square_about_the_object():
    label, image = torch.zeros(40, 40, dtype=torch.long), torch.zeros(1, 3, 40, 40)
    label[10:20, 16:36], image[..., 10:20, 16:36] = 2, 1.0
    (crop,) = properties.crops(image, label, 2)
    side = 1.2 * 19 + 1  # pixels; centres are 19 apart
    assert crop.mean() == pytest.approx(20 * 10 / side**2, abs=0.02)
    assert crop[:, 12:20, 8:24].min() > 0.95 and crop[:, :6].max() < 0.05


def test_a_classifier_learns_what_can_be_learnt():
    x = torch.randn(300, 4, generator=properties.random_generator("points"))
    answer = (x[:, 0] + x[:, 1].square() > 1).long()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))
    assert properties.read(properties.train_classifier(net, x, answer, 200), x, answer) > 0.93


# ---------------------------------------------------------------- Separation


def test_factors_of_a_matrix_of_two_components_are_found():
    first, second = torch.tensor([[4.0], [1.0], [0.0]]), torch.tensor([[0.0], [2.0], [3.0]])
    true = torch.stack([first @ torch.tensor([[1.0, 1.0, 0.0, 0.0]]), second @ torch.tensor([[0.0, 1.0, 1.0, 2.0]])])
    found = separation.factorize(true.sum(0)[None], 2)[0]
    torch.testing.assert_close(found.sum(0), true.sum(0), atol=1e-2, rtol=1e-2)
    order = [0, 1] if found[0, 0, 0] > found[1, 0, 0] else [1, 0]
    torch.testing.assert_close(found[order], true, atol=0.1, rtol=0)


def test_ways_to_take_two_notes_apart_are_compared_with_a_run(duo_run, monkeypatch):
    monkeypatch.setattr(FamilyClassifier, "STEPS", 3)
    printed = invoke(separation.main, "--run", duo_run, "--mixtures", 2)
    assert "| the mixture itself (baseline) | 0 | 0 |" in printed
    rows = dict(line.strip("| ").split(" | ", 1) for line in printed.splitlines() if line.startswith("| "))
    gained = {name: float(cells.split(" | ")[0]) for name, cells in rows.items() if "masks" in name or "NMF" in name}
    assert len(gained) == 6 and gained["ideal masks"] == max(gained.values()) > 10
    assert {"the run at step 0", "family_slot", "family_mixture_ceiling"} <= rows.keys()
    assert any(name.startswith("the run, step ") for name in rows)


@torch.no_grad()
def test_masks_of_nmf_are_shares_of_power_as_the_models_are(duo_run):
    model, data = slots.load_run(duo_run)
    stems = data.mixtures("test", 2)
    found = separate(model, data.levels, stems.sum(1))
    magnitude = data.levels.to_stft_magnitude(found.alone.flatten(0, 1)).unflatten(0, (2, 2))
    torch.testing.assert_close(separation.apply_masks(stems.sum(1), magnitude), found.parts, atol=1e-6, rtol=0)
    loud = 1 + magnitude[:, 0]
    parts = separation.apply_masks(stems.sum(1), torch.stack([3 * loud, loud], dim=1))
    torch.testing.assert_close(parts[:, 0], 0.9 * stems.sum(1), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- Grid, curves


def fake_training(template):
    """subprocess.run, that leaves a copy of the run `template` instead of training."""
    calls = []

    def run(command, **_):
        folder = command[command.index("--out") + 1]
        calls.append(command)
        return subprocess.check_call(["cp", "-r", str(template), folder])

    return run, calls


def test_the_grid_trains_each_row_once_and_prints_a_table(sprites_run, tmp_path, monkeypatch):
    run, calls = fake_training(sprites_run)
    monkeypatch.setattr(slots, "PAIRS", 2)
    monkeypatch.setattr(subprocess, "run", run)
    args = ["ablation", "--only", "closer", "--steps", 2, "--seeds", "0,1", "--out", tmp_path]
    (tmp_path / "sprites").mkdir()
    printed = [invoke(grid.main, *args) for _ in range(2)]
    assert printed[0] == printed[1] and len(calls) == 2 * 2
    assert "| | step 0: ari_fg | ari_fg | ari_fg_slots |" in printed[0]
    row = next(line for line in printed[0].splitlines() if line.startswith("| no closer look |"))
    assert all(cell.strip() for cell in row.strip("|").split("|")), "every score is there, recomposition too"
    assert (tmp_path / "sprites-ablation.png").stat().st_size > 10_000


@pytest.mark.parametrize("rows", grid.ROWS)
def test_every_row_of_a_grid_is_a_command_that_train_mvae_takes(rows):
    import train_mvae

    dataset = "nsynth-duo" if rows == "sounds" else "sprites"
    for options in grid.ROWS[rows].values():
        if isinstance(options, str):
            assert hasattr(train_mvae, options.split(" = ")[0].split(".")[0])
            continue
        words = ["--dataset", dataset, *grid.DATA[dataset], *options]
        train_mvae.check_options(train_mvae.main.make_context("", words).params)


def test_grids_belong_to_their_data():
    for args in (["sounds"], ["ablation", "--dataset", "nsynth-duo"], ["ablation", "--only", "no such row"]):
        assert CliRunner().invoke(grid.main, args).exit_code == 2


def test_curves_show_scores_with_units_and_never_nothing(sprites_run, duo_run, tmp_path, monkeypatch):
    seen = []
    real = curves.curve_figure
    monkeypatch.setattr(curves, "curve_figure", lambda *a: seen.append(real(*a)) or seen[-1])
    for folder, unit, lines in ((sprites_run, "ARI-FG, 1 is best", 1), (duo_run, "SI-SDR gained, dB", 2)):
        invoke(curves.main, folder, "--out", tmp_path / "curve.png", "--by", "step")
        axes = seen[-1].axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel(), len(axes.lines)) == ("steps of training", unit, lines)
        assert (tmp_path / "curve.png").stat().st_size > 5_000
    axes = real({"a": [{"minutes": 1, "mse": 0.1}], "b": [{"minutes": 2, "mse": 0.2}]}).axes[0]
    assert axes.get_ylabel() == "mean squared error" and len(axes.lines) == 2
    assert CliRunner().invoke(curves.main, [str(sprites_run), str(duo_run)]).exit_code == 2


def test_drawn_scenes_are_added_to_a_folder_where_clevrs_crop_finds_them(tmp_path):
    write_clevr(tmp_path / "few", sizes=[(320, 240)] * 2, train=4)
    printed = invoke(mixed.main, "--data-root", tmp_path / "few", "--out", tmp_path / "mixed", "--scenes", 32)
    assert "32 drawn scenes beside those of few" in printed
    wrong = ["--data-root", str(tmp_path), "--out", str(tmp_path / "none")]
    assert CliRunner().invoke(mixed.main, wrong).exit_code == 2 and not (tmp_path / "none").exists()
    data = PictureFolder(tmp_path / "mixed", 64, (1, 10), 0, torch.device("cpu"))
    assert len(data.files["train"]) + len(data.files["valid"]) == 36
    drawn = BuiltInClevr(192, (3, 10), 0, torch.device("cpu")).make(0, 32)[5]  # (3, 192, 192)
    file = tmp_path / "mixed" / "images" / "train" / "CLEVR_builtin_000005.png"
    assert (load_picture(file, 192, "clevr") == drawn.permute(1, 2, 0).numpy()).all()


def test_a_run_is_scored_on_scenes_it_was_not_trained_on(clevr_run, sprites_run, tmp_path):
    printed = invoke(transfer.main, clevr_run, "--objects", 7, 10, "--n-slots", 10, "--scenes", 4)
    assert "7 to 10 objects" in printed and "| trained, 10 slots, 4 scenes | " in printed and "| step 0, 10" in printed
    write_clevr(tmp_path / "few", sizes=[(320, 240)] * 2, train=4)
    printed = invoke(transfer.main, clevr_run, "--data-root", tmp_path / "few", "--objects", 1, 10)
    assert "CLEVR folder few" in printed and "2 scenes | " in printed
    assert CliRunner().invoke(transfer.main, [str(sprites_run)]).exit_code == 2


@torch.no_grad()
def test_slots_exchange_their_cells_and_stay_with_their_stems(duo_run):
    model, data = slots.load_run(duo_run)
    stems = data.mixtures("test", 2)
    stay, move = exchange.heard(model, data, stems)
    found = separate(model, data.levels, stems.sum(1))
    alone = found.alone[1, assign(found.parts, stems)[0][1]]
    alone = Vocoder(SOUND_FFT)(data.levels.to_stft_magnitude(alone))
    torch.testing.assert_close(stay[1], alone[:, : stems.shape[2]], atol=1e-4, rtol=0)
    assert stay.shape == move.shape == stems.shape and not torch.allclose(stay, move)


def test_how_often_an_exchange_is_heard_is_printed(duo_run, monkeypatch):
    monkeypatch.setattr(FamilyClassifier, "STEPS", 3)
    printed = invoke(exchange.main, duo_run, "--mixtures", 2)
    assert "| pitch, exchanged | " in printed and "| family of the other stem (baseline) | " in printed


def test_what_is_asked_for_is_what_a_perfect_exchange_gives():
    t = torch.arange(4 * RATE) / RATE
    stems = torch.stack([torch.sin(2 * torch.pi * f * t) for f in (220.0, 330.0)])[None]
    first = lambda waveform: (waveform[:, :10].abs().amax(1) * 0).long()  # noqa: E731  # hears one family in all
    hits = exchange.judge(stems, stems, stems.flip(1), torch.ones(1, 2, 1), first)
    assert all(hit.all() for hit in hits.values())
    hits = exchange.judge(stems, stems, stems, torch.ones(1, 2, 1), first)
    assert hits["pitch, where it is"].all() and not hits["pitch, exchanged"].any()
