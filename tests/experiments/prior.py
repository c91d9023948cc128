"""What a prior over slots is worth: samples and completions that obey a rule, and nats; all priors on one encoder.

    python -m tests.experiments.prior runs/mvae-sprites-alpha-N4-seed0 --rule mirror --objects 2 4
    python -m tests.experiments.prior runs/mvae-clevr-alpha-N6-seed0

The encoder and decoder of the run stay as they are; every prior is fitted to what they find in the train split. `obeys`
checks a rule on slots, sampled ones and those that the encoder finds again in the pictures drawn of them; its rate on
what is found in pictures of the test split is the data's own. By chance: slots of different pictures, shuffled. Larger:
of scenes of more than two slots. Completions are given two of a test picture with more; those that draw no other, for
which there is nothing to judge, are left out.
"""

import math
import time
from functools import partial

import click
import torch
import torch.nn.functional as F

import train_mvae
from common import FOLDER, random_generator, reparameterize
from tests.experiments.rules import BRIGHTER, DARK, RULES, ruled
from train_mvae import ORDERS, Scene, SlotPrior, gaussian_log_likelihood, position_grid

NEAR, ALIKE, AS_LARGE = 0.12, 0.15, 0.25  # half picture widths; of a channel of a colour; of an area's logarithm
OVERLAP = 0.05  # of the smaller one's pixels
TESTED, SAMPLES, KEPT = 1024, 1000, 2  # test pictures, and samples, that are checked; slots that are completed
LIKELIHOODS, IMPORTANCE = 128, 50  # pictures whose likelihood is estimated, by so many samples of each posterior


@torch.no_grad()
def judge_rule(rule, model, scene):
    """Which Scenes obey a rule: (B,) bool. Those without slots do not."""
    z, cell, background = model.slots(scene)
    layer = model.decode(z, cell)
    n, there = layer.shape[1], torch.arange(layer.shape[1]) < scene.count[:, None]
    pair = there[:, :, None] & there[:, None] & ~torch.eye(n, dtype=torch.bool)
    mask = (layer[:, :, -1:] > 0).float()  # (B, N, 1, H, W): all of a slot, what others hide of it too
    area = mask.sum((2, 3, 4)).clamp(min=1)
    centre = (mask * position_grid(*mask.shape[3:])).sum((3, 4)) / area[..., None]  # (B, N, 2)
    colour = (mask * layer[:, :, 2:5]).sum((3, 4)) / area[..., None]
    alike = (colour[:, :, None] - colour[:, None]).abs().amax(3) < ALIKE  # (B, N, N)
    if rule == "colour":
        obeyed = (alike | ~pair).all(2)
    elif rule == "row":
        obeyed = ((centre[:, :, None, 0] - centre[:, None, :, 0]).abs() < NEAR) | ~pair
        obeyed = obeyed.all(2)
    elif rule == "apart":
        shared = mask.flatten(2) @ mask.flatten(2).mT / torch.minimum(area[:, :, None], area[:, None])
        obeyed = ((shared < OVERLAP) | ~pair).all(2)
    elif rule == "mirror":
        facing = (centre[:, :, None] - centre[:, None] * torch.tensor([1.0, -1.0])).abs().amax(3) < NEAR
        as_large = (area[:, :, None] / area[:, None]).log().abs() < AS_LARGE
        obeyed = ((pair & facing & alike & as_large).sum(2) == 1) | ~there  # each with one other: in pairs
    else:  # "count"
        grey = background.flatten(1).median(1).values  # of what is behind all slots
        obeyed = ((grey - DARK - BRIGHTER * scene.count).abs() < BRIGHTER / 2)[:, None]
    return obeyed.all(1) & (scene.count > 0)


def judge_fifth(model, scene):
    """Whether two slots stand a fifth apart, to half a semitone and the half of a cell."""
    y = model.slots(scene)[1][..., 0]
    semitones = (y[:, 0] - y[:, 1]).abs() / 2 * 12 * math.log2(train_mvae.RATE / 2 / train_mvae.LOWEST)
    return ((semitones - 7).abs() < 1) & (scene.count == 2)


@torch.no_grad()
def scenes_of(model, data, split, n):
    """What the encoder finds in n pictures or mixtures of a split, z and light = mu: Scene."""
    images = data.levels(data.mixtures(split, n).sum(1)) if model.sound else data.scenes(split, n)[0]
    return found_in(model, images)


@torch.no_grad()
def found_in(model, images):
    parts = []
    for some in images.split(64):
        encoding = model.encode(some)
        exact = encoding._replace(logvar=torch.full_like(encoding.logvar, -math.inf))
        parts.append(model.scene(exact, random_generator("found")))
    return Scene(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def drawn(model, scene):
    """Pictures of Scenes, or levels: (B, C, H, W)."""
    z, cell, background = model.slots(scene)
    layers = model.decode(z, cell).split(1)
    parts = zip(
        layers,
        scene.count.tolist(),
        background.split(1) if background is not None else [None] * len(layers),
        strict=True,
    )
    return torch.cat([model.compose(layer[:, :n], behind) for layer, n, behind in parts])


def shuffled(scene):
    """Every slot in the place of one of the same number, of another scene."""
    generator, slots = random_generator("shuffled"), scene.slots.clone()
    for k in range(slots.shape[1]):
        there = torch.nonzero(scene.count > k)[:, 0]
        slots[there, k] = slots[there[torch.randperm(len(there), generator=generator)], k]
    light = scene.light[torch.randperm(len(slots), generator=generator)]
    return Scene(light, scene.count, slots)


@torch.no_grad()
def sampled(prior, model, n, key, kept=0, light=None, slots=None):
    """n Scenes of a prior, whose first `kept` slots, and light, are given."""
    noise = torch.randn(n, *prior.noise_shape, generator=random_generator("sampled", key))
    light = noise[:, 0, : model.noise_sizes[1]] if light is None else light
    slots = noise[:, 1 : model.n_slots + 1, : 2 + model.d] if slots is None else slots
    return prior.sample(noise, torch.full((n,), kept), light, slots)


def completed(prior, model, scene, kept=KEPT):
    """Of Scenes with more than `kept` slots all but a random `kept` drawn anew; those that go on, with more."""
    some = torch.nonzero(scene.count > kept)[:, 0]
    generator = random_generator("kept")
    there = torch.arange(scene.slots.shape[1]) < scene.count[some, None]
    order = (torch.rand(there.shape, generator=generator) - 1.0 * there).argsort(1)[:, :kept].sort(1).values
    slots = scene.slots[some].gather(1, order[..., None].expand(-1, -1, scene.slots.shape[2]))
    slots = F.pad(slots, (0, 0, 0, scene.slots.shape[1] - kept))
    whole = sampled(prior, model, len(some), "completed", kept, scene.light[some], slots)
    return Scene(*(values[whole.count > kept] for values in whole))


def standard_log_prob(model, scene):
    """log p of Scenes if latents are N(0, I), and numbers and places uniform: (B,)."""
    there = torch.arange(scene.slots.shape[1]) < scene.count[:, None]
    z = scene.slots[..., 2:]
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(2)
    area = 2 * model.unit * 2 * model.blur if model.sound else (2 + 2 * train_mvae.SHIFT) ** 2  # of cells, blurred
    each = torch.where(there, normal - math.log(area), 0.0).sum(1)
    light = -0.5 * (scene.light.square() + math.log(2 * math.pi)).sum(1)
    return each + light - math.log(model.n_slots + 1) + torch.lgamma(scene.count + 1.0)


@torch.no_grad()
def likelihoods(model, priors, images, sigma):
    """{prior: (importance-weighted log p(x), KL), means over pictures, in nats}; priors are {name: log_prob(scene)}."""
    totals = {name: [] for name in priors}
    for k, image in enumerate(images.split(1)):
        encoding, generator = model.encode(image), random_generator("importance", k)
        repeated = [v if v is None else v.expand(IMPORTANCE, *v.shape[1:]) for v in encoding]
        encoding = train_mvae.Encoding(*repeated)
        log_q = torch.zeros(IMPORTANCE)
        if not model.sound:
            mu, logvar = model.background.posterior(model.encoder(image)[3]).chunk(2, dim=1)
            logvar = logvar + train_mvae.LOGVAR_START
            light = reparameterize(mu, logvar, torch.randn(IMPORTANCE, mu.shape[1], generator=generator))
            encoding = encoding._replace(light=light)
            log_q = gaussian_log_density(light, mu, logvar).sum(1)
        scene = model.scene(encoding, generator)
        n = int(scene.count[0])
        z = scene.slots[:, :n, 2:]
        log_q = log_q + gaussian_log_density(z, encoding.mu[:, :n], encoding.logvar[:, :n]).sum((1, 2))
        log_q = log_q - n * 2 * math.log(2 * model.blur)
        reconstruction = gaussian_log_likelihood(image, drawn(model, scene), sigma)
        for name, log_prob in priors.items():
            ratio = log_prob(scene) - log_q
            bound = (reconstruction + ratio).logsumexp(0) - math.log(IMPORTANCE)
            totals[name].append((bound.item(), -ratio.mean().item()))
    return {name: torch.tensor(values).mean(0).tolist() for name, values in totals.items()}


def gaussian_log_density(x, mu, logvar):
    return -0.5 * ((x - mu).square() / logvar.exp() + logvar + math.log(2 * math.pi))


def fitted_priors(model, data, orders, steps, seed):
    """({order: prior}, {order: seconds}), each fitted to the same posteriors of the train split."""
    encoding = train_mvae.posteriors(model, data, train_mvae.POOL, seed)
    priors, seconds = {}, {}
    for order in orders:
        torch.manual_seed(seed)
        priors[order] = SlotPrior(order, 2 + model.d, model.n_slots, model.noise_sizes[1], model.prior.cells)
        start = time.monotonic()
        train_mvae.fit_prior(priors[order], model, encoding, steps, seed)
        seconds[order] = time.monotonic() - start
    return priors, seconds


def rows_of(model, data, rule, orders, steps, seed, sigma):
    """Rows of the table: name; slots, larger scenes', pictures, completions that obey; log p(x), KL; seconds to fit."""
    judge = partial(judge_fifth, model) if rule == "fifth" else partial(judge_rule, rule, model)
    test = scenes_of(model, data, "test", TESTED)
    images = (
        data.levels(data.mixtures("test", LIKELIHOODS).sum(1)) if model.sound else data.scenes("test", LIKELIHOODS)[0]
    )
    priors, seconds = fitted_priors(model, data, orders, steps, seed)
    densities = {order: partial(prior.log_prob, generator=random_generator("order")) for order, prior in priors.items()}
    nats = likelihoods(model, {"N(0, I)": partial(standard_log_prob, model)} | densities, images, sigma)
    if rule:
        obeyed = judge(test)
        again = judge(found_in(model, drawn(model, test)))
        yield "the data's own", obeyed, obeyed[test.count > KEPT], again, None, None, None
        obeyed, again = judge(chance := shuffled(test)), judge(found_in(model, drawn(model, chance)))
        yield "by chance", obeyed, obeyed[test.count > KEPT], again, None, None, None
    yield "N(0, I)", None, None, None, None, nats["N(0, I)"], None
    for order, prior in priors.items():
        scene, obeyed = sampled(prior, model, SAMPLES, seed), (None, None, None, None)
        if rule:
            can = rule not in ("count", "fifth") and (test.count > KEPT).any()  # of these there is nothing to complete
            more = judge(completed(prior, model, test)) if can else None
            obeyed = judge(scene)
            obeyed = obeyed, obeyed[scene.count > KEPT], judge(found_in(model, drawn(model, scene))), more
        yield order, *obeyed, nats[order], seconds[order]


def check(model, dataset, rule):
    """Whether `judge_rule` can read what a model's slots draw; raises click.UsageError."""
    if rule not in RULES.get(dataset, ()):
        raise click.UsageError(f"--rule {rule}: expected a run on {' or '.join(k for k in RULES if rule in RULES[k])}")
    if not model.sound:
        check_masks(model)


def check_masks(model):
    """Whether a model's slots have masks; raises click.UsageError."""
    if model.sound or (model.op, model.compose_at) != ("alpha", "data"):
        raise click.UsageError("expected a run on pictures with --op alpha --compose data, whose slots have masks")


def cell(value):
    if isinstance(value, list):
        return " | ".join(f"{number:.1f}" for number in value)
    if torch.is_tensor(value):
        return f"{value.float().mean():.1%}"
    return f"{value:.0f}" if isinstance(value, float) else ""


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=FOLDER)
@click.option("--rule", type=click.Choice(sum(RULES.values(), ())), help="That the data obeys; the run's own has none.")
@click.option("--objects", type=click.IntRange(1, 10), nargs=2, help="In a scene, if not as in the run.")
@click.option("--data-root", type=FOLDER, help="Of the run's data set.")
@click.option("--steps", type=click.IntRange(1), default=train_mvae.FIT_STEPS, help="Updates of every prior.")
@click.option("--prior", "orders", type=click.Choice(ORDERS), default=ORDERS, multiple=True, help="Those to fit.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of priors, and of the pictures they are fitted to.")
def main(run_dir, rule, objects, data_root, steps, orders, seed):
    """Fit every prior to what a run of train_mvae.py finds, and judge it; prints a table."""
    model = train_mvae.load(run_dir)
    options = model.config["options"] | {"data_root": data_root, "download": False, "seed": seed}
    options["objects"] = objects or options["objects"]
    if rule:
        check(model, options["dataset"], rule)
        kind = "Mixtures" if rule == "fifth" else "Sprites"
        setattr(train_mvae, kind, ruled(rule))
    data = train_mvae.load_data(options, torch.device("cpu"))
    click.echo(f"{data.source}; {steps} updates, seed {seed}")
    columns = "prior", "slots", "larger", "pictures", "completions", "log p(x)", "KL", "seconds"
    click.echo(f"| {' | '.join(columns)} |\n{'|-' * len(columns)}|")
    for name, *values, nats, seconds in rows_of(model, data, rule, orders, steps, seed, options["sigma"]):
        shown = [cell(value) for value in values] + [cell(nats) if nats else " | ", cell(seconds)]
        click.echo(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
