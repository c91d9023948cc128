"""What the slots of a run are good for: recomposed and scored against the truth, varied, moved, remixed.

    python -m tests.experiments.slots runs/mvae-sprites-alpha-N4-seed0
    python -m tests.experiments.slots runs/mvae-clevr-alpha-N6-seed0 --data-root CLEVR_v1.0

Scores in RUN_DIR/recomposition.json, of the trained model, of that of step 0 and of a trivial baseline: of a run on
pictures with masks the companions of ARI-FG on its test scenes, as many as metrics.json is of; PSNRs on pairs of
built-in test scenes, which can be drawn anew, of CLEVR besides, how many of 7 to 10 objects it finds; of sounds, on
the test mixtures, how near slots are to their stems, and slots of two mixtures to the true mix. Of every run figures of
the valid split in RUN_DIR/figures: of pictures traversals.png, moved.png and recomposition.png; of sounds remix.png.
"""

import copy
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import train_mvae
from common import FOLDER, RATE, SAMPLES, gaussian_kl, log_spectral_distance, random_generator, write_json
from recompose import Tile, contact_sheet, kl_tile, spectrum_tile, to_uint8
from train_mvae import SMALLEST, VISIBLE, BuiltInClevr, adjusted_rand_index, assign, averages, reconstruct, separate

PAIRS = 64  # of scenes recomposed, and scenes that an object is taken out of
PRINTED = ("ari_fg", "ari_fg_slots", "miou", "slot_count_error", "duplicates", "recomposition_psnr",
           "recomposition_psnr_shown", "reconstruction_psnr", "removal_psnr", "removal_psnr_shadow",
           "whole_reconstruction_psnr", "own_instrument", "lsd_recomposed")  # fmt: skip


def load_run(folder, data_root=None):
    """The trained model of a run folder and its data, from `data_root` or where config.json has them.

    Raises click.UsageError where those are not the data that the run was trained on.
    """
    model = train_mvae.load(folder)
    defaults = train_mvae.main.make_context("", ["--dataset", model.config["options"]["dataset"]]).params
    options = defaults | model.config["options"]  # of earlier commits some may be missing
    root = data_root or options["data_root"]
    data = train_mvae.load_data(options | {"data_root": root and Path(root), "download": False}, torch.device("cpu"))
    if data.source != model.config["data"]["source"]:
        raise click.UsageError(f"{folder} was trained on {model.config['data']['source']}; this is {data.source}")
    return model, data


def load_start(model, data):
    """The model that the run set out from, at step 0."""
    options = model.config["options"]
    torch.manual_seed(options["seed"] % 2**63)
    start = train_mvae.build(options)
    start.config = model.config
    start.start_at_mean(data.batch(0, slice(0, 256), 256).mean(0))
    return start.eval()


# ---------------------------------------------------------------- Masks against the truth


def match(segment, label, n_slots):
    """Hungarian, by IoU: segment, label (H, W) -> label, slot, IoU of all matches, shared pixels (K, N), slot sizes."""
    table = F.one_hot(label.flatten()).double().T @ F.one_hot(segment.flatten(), n_slots + 1).double()  # in pixels
    objects = 1 + torch.nonzero(table[1:].sum(1) >= SMALLEST * label.numel())[:, 0]  # (K,)
    shared, sizes = table[objects, 1:], table[:, 1:].sum(0)
    iou = shared / (table[objects].sum(1, keepdim=True) + sizes - shared).clamp(min=1)
    rows, columns = linear_sum_assignment(-iou.cpu().numpy())
    return objects[rows], columns, iou[rows, columns], shared, sizes


def segmentation_scores(responsibility, label):
    """Scores of a scene: responsibility (N + 1, H, W), label (H, W) -> dict, {} where it has no object of SMALLEST."""
    foreground, segment = label > 0, responsibility.argmax(0)
    _, _, iou, shared, sizes = match(segment, label, len(responsibility) - 1)
    if not len(shared):
        return {}
    active = sizes >= SMALLEST * label.numel()
    most, owner = shared[:, active].max(0)
    claimed = owner[most > 0.5 * sizes[active]]
    # `ari_fg` has the background among the predicted. Duplicates: all but one of the slots mostly of one object.
    scores = {"ari_fg": adjusted_rand_index(segment[foreground], label[foreground])}
    scores["ari_fg_slots"] = adjusted_rand_index(responsibility[1:].argmax(0)[foreground], label[foreground])
    scores |= {"miou": iou.sum().item() / len(shared), "slot_count_error": abs(int(active.sum()) - len(shared))}
    return scores | {"duplicates": (len(claimed) - len(claimed.unique())) / max(1, int(active.sum()))}


@torch.no_grad()
def score_masks(model, data, split, n):
    """ARI-FG of n scenes, z = mu, as train_mvae.py has it, and its companions; {} where the data have no masks."""
    (images, labels), scores = data.scenes(split, n), []
    for image, label in zip(images.split(1), labels, strict=True):
        encoding, layer, _ = reconstruct(model, image)
        scores.append(segmentation_scores(model.responsibilities(layer, encoding.background)[0], label))
    return averages(scores)


# ---------------------------------------------------------------- Recomposition against the truth


def psnr(image, truth, where):
    """Peak signal-to-noise ratio in dB on the pixels `where` (H, W) of pictures (3, H, W)."""
    error = (image.clamp(0, 1) - truth).square()[:, where].mean()
    return float(-10 * torch.log10(error.clamp(min=1e-10)))


def encode_and_match(model, image, label, wanted):
    """Encoding, layers, and for every picture the layers of the slots matched to the objects `wanted` (K,)."""
    encoding = model.encode(image)
    layer = model.decode(encoding.mu, encoding.cell)
    segment, chosen = model.responsibilities(layer, encoding.background).argmax(1), []
    for b in range(len(image)):
        objects, slots, iou, _, _ = match(segment[b], label[b], layer.shape[1])
        chosen.append(layer[b, slots[(wanted[objects - 1] & (iou > 0)).cpu().numpy()]])
    return encoding, layer, chosen


@torch.no_grad()
def score_recomposition(model, data, split, n):
    """Half the objects of A and half of B, through slots, against the scene drawn anew: PSNRs in dB, means over n.

    All are on object pixels; "shown" are those that the new scene's objects show in their own sources too: what is
    hidden there no model can know. The baseline is A itself, and "reconstruction_psnr" that of A, so that the price of
    recomposing is seen. A and B are placed as one scene: their objects do not run into each other when drawn together.
    """
    twice = copy.copy(data)
    twice.objects = tuple(2 * count for count in data.objects)
    both = twice.sample(n, random_generator("recomposition", split, device=data.device))
    index = torch.arange(both["present"].shape[1], device=data.device)
    in_a, half = index % 2 == 0, index % 4 < 2
    (truth, true_label), (image, label), (image_b, label_b) = (
        data.render(both | {"present": both["present"] & wanted}) for wanted in (half, in_a, ~in_a)
    )
    encoding, layer, from_a = encode_and_match(model, image, label, half)
    _, _, from_b = encode_and_match(model, image_b, label_b, half)
    plain = model.compose(layer, encoding.background)
    shown, scores = (true_label > 0) & ((true_label == label) | (true_label == label_b)), []
    for k in range(n):
        if not shown[k].any() or not (label[k] > 0).any():
            continue
        background = None if encoding.background is None else encoding.background[k : k + 1]
        parts = torch.cat([from_a[k], from_b[k]])[None]  # (1, M, C, h, w)
        parts = parts if parts.shape[1] else model.slot_decoder.beyond.expand(1, 1, -1, *layer.shape[3:])
        recomposed = model.compose(parts, background)[0]
        scores.append({
            "recomposition_psnr": psnr(recomposed, truth[k], true_label[k] > 0),
            "recomposition_psnr_baseline": psnr(image[k], truth[k], true_label[k] > 0),
            "recomposition_psnr_shown": psnr(recomposed, truth[k], shown[k]),
            "recomposition_psnr_shown_baseline": psnr(image[k], truth[k], shown[k]),
            "reconstruction_psnr": psnr(plain[k], image[k], label[k] > 0)
        })  # fmt: skip
    return averages(scores)


@torch.no_grad()
def score_removal(model, data, split, n):
    """An object's slot taken out, against the scene drawn without the object: PSNRs in dB, means over n scenes.

    On all pixels, beside the reconstruction of the whole scene; and on those outside the object that are other without
    it, by VISIBLE: its shadow, and what was behind it is not among them. The baseline is the scene as it is.
    """
    scene = data.sample(n, random_generator("removal", split, device=data.device))
    others = torch.arange(scene["present"].shape[1], device=data.device) > 0
    (image, label), (truth, _) = (
        data.render(scene | {"present": scene["present"] & w}) for w in (others | True, others)
    )
    encoding, layer, plain = reconstruct(model, image)
    segment, scores = model.responsibilities(layer, encoding.background).argmax(1), []
    for k in range(n):
        objects, slots, iou, _, _ = match(segment[k], label[k], layer.shape[1])
        taken = slots[((objects == 1) & (iou > 0)).cpu().numpy()]
        if not (objects == 1).any() or layer.shape[1] == 1:
            continue
        kept = [slot for slot in range(layer.shape[1]) if slot not in taken]
        left, every = model.compose(layer[k : k + 1, kept], encoding.background[k : k + 1])[0], label[k] >= 0
        score = {
            "removal_psnr": psnr(left, truth[k], every),
            "removal_psnr_baseline": psnr(image[k], truth[k], every),
            "whole_reconstruction_psnr": psnr(plain[k], image[k], every)
        }  # fmt: skip
        shadow = (label[k] != 1) & ((image[k] - truth[k]).abs().mean(0) > VISIBLE)
        if shadow.any():
            score["removal_psnr_shadow"] = psnr(left, truth[k], shadow)
            score["removal_psnr_shadow_baseline"] = psnr(image[k], truth[k], shadow)
        scores.append(score)
    return averages(scores)


@torch.no_grad()
def score_crowds(model, n):
    """Built-in CLEVR scenes of 7 to 10 objects, ten slots: share of objects found (IoU of at least 0.5), and others."""
    data, model.n_slots, trained = BuiltInClevr(model.size, (7, 10), 0, torch.device("cpu")), 10, model.n_slots
    scores = []
    for image, label in zip(*data.scenes("test", n), strict=True):
        encoding, layer, _ = reconstruct(model, image[None])
        responsibility = model.responsibilities(layer, encoding.background)[0]
        iou = match(responsibility.argmax(0), label, 10)[2]
        scores.append({"found": (iou >= 0.5).double().mean().item()} | segmentation_scores(responsibility, label))
    model.n_slots = trained
    return {f"crowds/{name}": score for name, score in averages(scores).items()}


def separate_by_stems(model, data, stems):
    """Stems (B, S, samples) -> levels of mixtures; of each stem's slot layer, levels alone (B, S, ...), dB gained."""
    found, b = separate(model, data.levels, stems.sum(1)), torch.arange(len(stems), device=stems.device)[:, None]
    slot, gained = assign(found.parts, stems)
    return found.level, found.layer[b, slot], found.alone[b, slot], gained


@torch.no_grad()
def score_remixes(model, data, split, n):
    """Scores of n mixtures of a split; a slot of each and a slot of another are held against their stems' true mixture.

    "own_instrument": the share of mixtures all of whose slots are nearest, in levels, to their own stem. The baseline
    of "lsd_recomposed", a log-spectral distance in dB, is the first of the two mixtures as it is.
    """
    scores = []
    for stems in data.mixtures(split, n).to(data.device).split(train_mvae.CHUNK):
        level, layer, alone, gained = separate_by_stems(model, data, stems)
        own, silent = data.levels.as_loud(stems.flatten(0, 1)).unflatten(0, stems.shape[:2]), gained.isnan()
        apart = (alone[:, :, None] - own[:, None]).square().mean((3, 4, 5))  # (B, slot, stem)
        nearest = apart.diagonal(dim1=1, dim2=2) <= apart.masked_fill(silent[:, None], torch.inf).amin(2)  # (B, S)
        recomposed = model.compose(torch.stack([layer[:, 0], layer.roll(1, 0)[:, 1]], dim=1))
        remix = data.levels.as_loud(stems[:, 0] + stems.roll(1, 0)[:, 1])
        score = {"own_instrument": (nearest | silent).all(1).float()}
        score["lsd_recomposed"] = log_spectral_distance(recomposed, remix, axis=2)
        score["lsd_recomposed_baseline"] = log_spectral_distance(level, remix, axis=2)
        scores += [{name: value[b].item() for name, value in score.items()} for b in range(len(stems))]
    return averages(scores)


def measure(model, data):
    if model.sound:
        return score_remixes(model, data, "test", train_mvae.MIXTURES)
    scores = score_recomposition(model, data, "test", PAIRS) | score_removal(model, data, "test", PAIRS)
    return scores | (score_crowds(model, PAIRS) if isinstance(data, BuiltInClevr) else {})


def measure_masks(model, data):
    """score_masks on the test scenes of a run's metrics.json."""
    quick = model.config["options"].get("evaluation") == "quick"
    return score_masks(model, data, "test", train_mvae.SCENES // 10 if quick else train_mvae.SCENES)


def measure_recomposition(folder, model, data):
    """Scores of a run, on pictures of built-in test scenes, written to recomposition.json; and those at step 0."""
    drawn = data  # pictures that a folder holds cannot be drawn anew: scenes like those are
    if not (model.sound or hasattr(data, "render")):
        drawn = BuiltInClevr(model.size, (3, 6), 0, torch.device("cpu"))
    start = load_start(model, data)
    scores, of_start = measure(model, drawn), measure(start, drawn)
    if not model.sound:
        scores, of_start = scores | measure_masks(model, data), of_start | measure_masks(start, data)
    pairs = train_mvae.MIXTURES if model.sound else PAIRS
    about = {"split": "test", "pairs": pairs, "step": model.config["step"], "data": drawn.source}
    scores |= {f"step_0/{name}": score for name, score in of_start.items() if not name.endswith("baseline")}
    write_json(folder / "recomposition.json", about | scores)
    return scores


# ---------------------------------------------------------------- Figures of pictures


def picture(image):
    return to_uint8(image.cpu().numpy())


def composed_with(model, encoding, b, k, z=None, cell=None):
    """Picture b composed anew, its slot k with other latents z (n, D) or at other places cell (n, 2): (n, 3, H, W)."""
    n = len(z if z is not None else cell)
    every = [values[b : b + 1].repeat(n, 1, 1) for values in (encoding.mu, encoding.cell)]  # (n, N, ...)
    for values, new in zip(every, (z, cell), strict=True):
        if new is not None:
            values[:, k] = new
    background = None if encoding.background is None else encoding.background[b : b + 1].expand(n, -1, -1, -1)
    return model.compose(model.decode(*every), background)


def slot_tiles(images, encoding, b, k):
    """Scene b, and its KL map, on which slot k is marked."""
    scene, maps = picture(images[b]), (values[b].cpu().numpy() for values in (encoding.kl_map, encoding.cell))
    return [Tile(scene, f"scene {b}"), Tile(kl_tile(scene, *maps, [k]), f"slot {k}: {encoding.kl[b, k]:.0f} nats")]


@torch.no_grad()
def traversal_figure(model, images, rows=6, columns=7):
    """One latent of slot 0 at a time through the prior's width, a row each: those of highest KL.

    Of the scene whose slot 0 stands nearest to the middle.
    """
    encoding = model.encode(images)
    b = int(encoding.cell[:, 0].abs().amax(1).argmin())
    mu, values = encoding.mu[b, 0], torch.linspace(-2.4, 2.4, columns, device=images.device)
    kl, sheet, labels = gaussian_kl(mu, encoding.logvar[b, 0]), [], []
    for latent in kl.topk(min(rows, model.d)).indices.tolist():
        z = mu.repeat(columns, 1)
        z[:, latent] = values
        drawn = composed_with(model, encoding, b, 0, z=z)
        moved = [Tile(picture(d), f"z = {v:+.1f}") for d, v in zip(drawn, values.tolist(), strict=True)]
        sheet.append(slot_tiles(images, encoding, b, 0) + moved)
        labels.append(f"latent {latent}: {kl[latent]:.1f} nats")
    title = "Slot 0, ringed: one of its latents at a time from -2.4 to 2.4, all else as it was encoded"
    return contact_sheet(sheet, title, labels)


@torch.no_grad()
def moved_figure(model, images, columns=7):
    """A row a picture: its slot 0, whose place goes from left to right through the picture, and nothing else."""
    encoding = model.encode(images)
    x, sheet = torch.linspace(-0.75, 0.75, columns, device=images.device), []
    for b in range(len(images)):
        drawn = composed_with(model, encoding, b, 0, cell=torch.stack([encoding.cell[b, 0, 0].expand(columns), x], 1))
        moved = [Tile(picture(d), f"slot 0 at x = {v:+.2f}") for d, v in zip(drawn, x.tolist(), strict=True)]
        sheet.append(slot_tiles(images, encoding, b, 0) + moved)
    title = "Slot 0, ringed, moved through the picture; x in half picture widths, all else as it was encoded"
    return contact_sheet(sheet, title)


@torch.no_grad()
def recomposition_figure(model, images):
    """A row a pair of pictures A, B: both, the first two slots of each alone, and those together on A's background."""
    encoding = model.encode(images)
    layer = model.decode(encoding.mu, encoding.cell)
    sheet, count = [], min(2, model.n_slots)
    for a in range(0, len(images) - 1, 2):
        background = None if encoding.background is None else encoding.background[a : a + 1]
        parts = torch.cat([layer[a, :count], layer[a + 1, :count]])[None]  # (1, M, C, h, w)
        alone = model.alone(parts, background)[0]
        row = [Tile(picture(images[a]), f"A: scene {a}"), Tile(picture(images[a + 1]), f"B: scene {a + 1}")]
        row += [Tile(picture(one), f"{'AB'[k // count]}, slot {k % count}") for k, one in enumerate(alone)]
        sheet.append([*row, Tile(picture(model.compose(parts, background)[0]), "recomposition", True)])
    return contact_sheet(sheet, f"The first {count} slots of A and of B, alone and recomposed, on the background of A")


# ---------------------------------------------------------------- Figure of sounds


@torch.no_grad()
def remix_figure(model, data, rows=4):
    """Two mixtures a row, a slot of each, the two recomposed, and the true mixture of their stems.

    Bars end at a mixture's maximum, in its slot's tile too; of the last two at the true one's.
    """
    stems = data.mixtures("valid", 2 * rows).to(data.device)
    (level, layer, alone, _), sheet = separate_by_stems(model, data, stems), []
    recomposed = model.compose(torch.stack([layer[0::2, 0], layer[1::2, 1]], dim=1))
    true = data.levels.as_loud(stems[0::2, 0] + stems[1::2, 1])
    for r in range(rows):
        a, b = 2 * r, 2 * r + 1
        every = [level[a], alone[a, 0], level[b], alone[b, 1], true[r], recomposed[r]]
        magnitude = data.levels.to_stft_magnitude(torch.stack(every)).cpu().numpy()  # (6, F, T)
        names = (
            f"mixture {a}",
            "slot of its stem 0",
            f"mixture {b}",
            "slot of its stem 1",
            "true mixture",
            "recomposed",
        )
        tops = magnitude[::2].max((1, 2)).repeat(2)
        sheet.append([
            Tile(spectrum_tile(m, top, SAMPLES / RATE, RATE), name, name == "recomposed")
            for m, top, name in zip(magnitude, tops, names, strict=True)
        ])  # fmt: skip
    return contact_sheet(sheet, "A slot of each of two mixtures, recomposed, beside the true mixture of their stems")


# ---------------------------------------------------------------- Command line


def table_lines(scores):
    """The trained model beside its start, and the baseline; and crowded scenes."""
    yield "| PSNR, LSD in dB | trained | step 0 | baseline: the picture, or mixture, itself |\n|-|-|-|-|"
    for name in (name for name in PRINTED if name in scores):
        values = (scores.get(key) for key in (name, f"step_0/{name}", f"{name}_baseline"))
        yield f"| {name} | " + " | ".join("" if value is None else f"{value:.4g}" for value in values) + " |"
    for name in (name for name in scores if name.startswith("crowds/")):
        yield f"7 to 10 objects, ten slots, {name[7:]}: {scores[name]:.3f}, at step 0 {scores[f'step_0/{name}']:.3f}"


@click.command()
@click.argument("run_dir", type=FOLDER)
@click.option("--data-root", type=FOLDER, help="The run's data, where they are not where its config.json has them.")
def main(run_dir, data_root):
    """Score and draw what the slots of RUN_DIR, a run of train_mvae.py, are good for."""
    model, data = load_run(run_dir, data_root)
    if model.sound and data.parts == 1:
        raise click.UsageError(f"{run_dir}: a run on sounds as they are, of which no stems are known; expected --mix")
    if model.sound:
        figures = {"remix": remix_figure(model, data)}
    else:
        images = data.scenes("valid", 8)[0]
        figures = {"traversals": traversal_figure(model, images), "moved": moved_figure(model, images[:6])}
        figures["recomposition"] = recomposition_figure(model, images)
    (run_dir / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.save(run_dir / "figures" / f"{name}.png")
    click.echo(f"written: {', '.join(f'{run_dir}/figures/{name}.png' for name in figures)}")
    scores = measure_recomposition(run_dir, model, data)
    what = f"{train_mvae.MIXTURES} test mixtures" if model.sound else f"{PAIRS} pairs of built-in test scenes"
    click.echo(f"{what}; trained on: {data.source}")
    click.echo("\n".join(table_lines(scores)))


if __name__ == "__main__":
    main()
