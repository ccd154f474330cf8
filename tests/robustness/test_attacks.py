"""Attacks: against references of a few lines and independent libraries, their geometry, and what they leave behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnull.compat import import_timm
from fastnull.robustness import apgd, autoattack, cw_l2, fgsm, mi_fgsm, patch_attack, pgd
from fastnull.robustness.attacks.adaptive import dlr_loss, targeted_dlr_loss
from fastnull.robustness.attacks.base import Best
from fastnull.vit import NormalizedModel
from tests.robustness.small_model import CLASSES, Returning, make_model

EPS = 8 / 255

BALL_ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "mi_fgsm": mi_fgsm,
    "apgd": lambda *a, **k: apgd(*a, steps=10, **k),
    "apgd_dlr": lambda *a, **k: apgd(*a, steps=10, loss="dlr", **k),
    "apgd_dlr_targeted": lambda *a, **k: apgd(*a, steps=10, loss="dlr_targeted", targets=3, **k),
}
FREE_ATTACKS: dict[str, Callable[..., Tensor]] = {
    "cw_l2": lambda *a, **k: cw_l2(*a, steps=20, search_steps=2, **k),
    "patch_attack": lambda *a, **k: patch_attack(*a, patch_size=4, steps=10, **k),
}


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(images), labels, reduction="none")


def every_attack() -> dict[str, Callable[..., Tensor]]:
    ball = {name: (lambda m, x, y, a=attack, **k: a(m, x, y, EPS, **k)) for name, attack in BALL_ATTACKS.items()}
    return {**ball, **FREE_ATTACKS}


# --- against references


def reference_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    F.cross_entropy(model(images), labels).backward()
    assert images.grad is not None
    return images.grad


@pytest.mark.parametrize("step_size", [None, 1 / 255])
def test_pgd_is_the_formula(model: NormalizedModel, batch: tuple[Tensor, Tensor], step_size: float | None) -> None:
    images, labels = batch
    point = images
    for _ in range(10):
        point = point + (step_size or EPS / 4) * reference_step(model, point, labels).sign()
        point = (images + (point - images).clamp(-EPS, EPS)).clamp(0, 1)
    assert torch.equal(pgd(model, images, labels, EPS, step_size=step_size, random_start=False), point)


def test_mi_fgsm_equals_torchattack(model: NormalizedModel, batch: tuple[Tensor, Tensor]) -> None:
    import_timm()  # makes torchvision importable beside any torch; torchattack imports it
    library = pytest.importorskip("torchattack")
    images, labels = batch
    # it keeps the change instead of the image, which rounds differently where eps / 10 is not exact
    theirs = library.MIFGSM(model, device="cpu", eps=EPS, steps=10, decay=1.0)(images, labels)
    torch.testing.assert_close(mi_fgsm(model, images, labels, EPS), theirs, atol=1e-6, rtol=0)


def test_fgsm_and_pgd_equal_foolbox(model: NormalizedModel, batch: tuple[Tensor, Tensor]) -> None:
    library = pytest.importorskip("foolbox")
    images, labels = batch
    theirs = library.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, expected, _ = library.attacks.LinfFastGradientAttack(random_start=False)(theirs, images, labels, epsilons=EPS)
    assert torch.equal(fgsm(model, images, labels, EPS), expected)
    attack = library.attacks.LinfPGD(rel_stepsize=0.25, steps=10, random_start=False)
    _, expected, _ = attack(theirs, images, labels, epsilons=EPS)
    assert torch.equal(pgd(model, images, labels, EPS, random_start=False), expected)
    attack = library.attacks.L2PGD(rel_stepsize=0.25, steps=10, random_start=False)
    _, expected, _ = attack(theirs, images, labels, epsilons=0.5)
    mine = pgd(model, images, labels, 0.5, norm="l2", random_start=False)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 2 / 255), ("l2", 0.1)])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr_targeted"])
def test_apgd_has_the_robust_flags_of_pyautoattack(norm: str, eps: float, loss: str) -> None:
    library = pytest.importorskip("pyautoattack.autopgd_base")
    model = make_model()
    images = torch.rand(128, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = model(images).argmax(1)
    settings = {"n_restarts": 1, "n_iter": 50, "eps": eps, "norm": {"linf": "Linf", "l2": "L2"}[norm], "seed": 0}
    if loss == "dlr_targeted":
        attack = library.APGDAttack_targeted(model, device="cpu", n_target_classes=3, **settings)
    else:
        attack = library.APGDAttack(model, device="cpu", loss=loss, rho=0.75, **settings)
    theirs = model(attack.perturb(images, labels)).argmax(1) == labels
    # for one loss the same start as theirs: from the second target on they draw for the rest of the images alone
    same_start = torch.Generator().manual_seed(0) if norm == "linf" and loss != "dlr_targeted" else None
    found = apgd(model, images, labels, eps, norm=norm, loss=loss, steps=50, targets=3, generator=same_start)
    mine = model(found).argmax(1) == labels
    assert 0.02 < theirs.double().mean() < 0.98, "the case must tell strong from weak"
    # elsewhere than where this was written the last bits, and with them another start's flags, may differ by an image
    assert int((mine != theirs).sum()) <= (0 if same_start is not None else 1)


def test_apgd_finds_a_maximum_inside_the_ball() -> None:
    # steps of a fixed size jump over it for ever; halving them must not
    class Hill(nn.Module):
        """The cross entropy of class 0 is largest where the image equals `top`."""

        def __init__(self, top: Tensor) -> None:
            super().__init__()
            self.top = top

        def forward(self, images: Tensor) -> Tensor:
            height = -(images - self.top).square().flatten(1).sum(1)
            return torch.stack([torch.zeros_like(height), height], 1)

    images = torch.full((4, 3, 16, 16), 0.5)
    top = images + 0.05 * (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1)
    labels = torch.zeros(4, dtype=torch.long)
    found = apgd(Hill(top), images, labels, 0.1, steps=100)
    fixed = pgd(Hill(top), images, labels, 0.1, steps=100)
    assert (found - top).abs().mean() < 0.002
    assert (found - top).abs().mean() < 0.2 * (fixed - top).abs().mean()


# --- geometry and strength


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", BALL_ATTACKS)
def test_attacks_stay_in_the_ball_and_raise_the_loss(
    model: NormalizedModel, batch: tuple[Tensor, Tensor], name: str, norm: str
) -> None:
    images, labels = batch
    eps = EPS if norm == "linf" else 0.6
    found = BALL_ATTACKS[name](model, images, labels, eps, norm=norm)
    change = (found - images).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= eps * (1 + 1e-5)
    assert size.min() > eps / 2, "the ball must be used"
    assert found.min() >= 0
    assert found.max() <= 1
    assert loss_of(model, found, labels).mean() > 0.5 + loss_of(model, images, labels).mean()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(model: NormalizedModel, norm: str) -> None:
    images = torch.full((256, 3, 16, 16), 0.5)
    labels = torch.zeros(256, dtype=torch.long)
    start = pgd(model, images, labels, 0.1, norm=norm, steps=1, step_size=0) - images
    size = start.abs() if norm == "linf" else start.flatten(1).norm(dim=1)
    # uniform in a ball of dimension d: mean radius d / (d + 1); per coordinate of a cube 1/2
    expected = 0.05 if norm == "linf" else 0.1 * 768 / 769
    assert size.mean().item() == pytest.approx(expected, rel=0.01)
    assert abs(start.mean()) < 1e-3
    assert size.max() <= 0.1 * (1 + 1e-5)


def test_pgd_is_stronger_than_fgsm_and_restarts_never_weaken(
    model: NormalizedModel, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    one = pgd(model, images, labels, EPS / 8)
    assert loss_of(model, one, labels).mean() >= loss_of(model, fgsm(model, images, labels, EPS / 8), labels).mean()
    three = pgd(model, images, labels, EPS / 8, restarts=3)
    success = [model(found).argmax(1) != labels for found in (one, three)]
    assert not (success[0] & ~success[1]).any()
    same = success[0] == success[1]
    assert (loss_of(model, three, labels) >= loss_of(model, one, labels) - 1e-6)[same].all()
    assert not torch.equal(one, three), "some image must gain by a restart"


def test_a_success_is_never_given_up() -> None:
    images = [torch.full((3, 1, 1, 1), float(k)) for k in range(3)]
    best = Best(images[0])
    best.offer(images[1], torch.tensor([True, False, False]), torch.tensor([1.0, 1.0, 1.0]))
    best.offer(images[2], torch.tensor([False, True, False]), torch.tensor([9.0, 0.0, 0.5]))
    assert best.images.flatten().tolist() == [1, 2, 1]
    assert best.success.tolist() == [True, True, False]


@pytest.mark.parametrize("attack", [fgsm, pgd, mi_fgsm])
def test_targeted_attacks_approach_the_target(
    model: NormalizedModel, batch: tuple[Tensor, Tensor], attack: Callable[..., Tensor]
) -> None:
    images, labels = batch
    targets = (labels + 1) % CLASSES
    found = attack(model, images, targets, EPS, targeted=True)
    assert loss_of(model, found, targets).mean() < 0.7 * loss_of(model, images, targets).mean()


def test_criterion_replaces_the_loss(model: NormalizedModel, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch

    def margin(logits: Tensor, labels: Tensor) -> Tensor:
        return -logits.gather(1, labels[:, None])[:, 0]

    found = pgd(model, images, labels, EPS, criterion=margin)
    own = [model(x).gather(1, labels[:, None]).mean() for x in (images, found)]
    assert own[1] < own[0]
    with pytest.raises(ValueError, match=r"criterion must return one loss per image, \[32\]"):
        pgd(model, images, labels, EPS, criterion=lambda z, y: F.cross_entropy(z, y))


def test_soft_labels_equal_hard_ones(model: NormalizedModel, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    soft = F.one_hot(labels, CLASSES).float()
    hard = pgd(model, images, labels, EPS, restarts=2)
    torch.testing.assert_close(pgd(model, images, soft, EPS, restarts=2), hard, atol=1e-6, rtol=0)


def test_dlr_by_hand() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [2.0, 6.0, 4.0, -1.0]])
    labels = torch.tensor([0, 0])
    # right: -(5 - 3) / (5 - 1); wrong: -(2 - 6) / (6 - 2)
    torch.testing.assert_close(dlr_loss(logits, labels), torch.tensor([-0.5, 1.0]))
    torch.testing.assert_close(dlr_loss(3 * logits + 7, labels), torch.tensor([-0.5, 1.0]))
    # -(5 - 1) / (5 - (1 + 0) / 2) and -(2 - 4) / (6 - (2 - 1) / 2)
    targeted = targeted_dlr_loss(logits, torch.stack([labels, torch.tensor([2, 2])], 1))
    torch.testing.assert_close(targeted, torch.tensor([-4 / 4.5, 2 / 5.5]))


def test_cw_finds_the_nearest_point_of_a_linear_classifier() -> None:
    # two classes, logit difference w·x + b: the distance to the border is |w·x + b| / ‖w‖
    torch.manual_seed(0)
    linear = nn.Linear(3 * 16 * 16, 2).double()
    model = nn.Sequential(nn.Flatten(), linear)
    images = torch.rand(8, 3, 16, 16, dtype=torch.float64) * 0.4 + 0.3
    logits = model(images)
    labels = logits.argmax(1)
    normal = linear.weight[0] - linear.weight[1]
    distance = (logits[:, 0] - logits[:, 1]).abs() / normal.norm()
    # Adam's first step changes every value by lr / 2 at most: with 1e-2 that is farther than some borders are
    found = cw_l2(model, images, labels, steps=200, search_steps=7, lr=1e-3)
    assert (model(found).argmax(1) != labels).all()
    size = (found - images).flatten(1).norm(dim=1)
    assert (size >= distance * (1 - 1e-9)).all()
    assert (size <= distance * 1.1 + 1e-3).all()


def test_cw_leaves_what_is_misled_already(model: NormalizedModel, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    wrong = (labels + 1) % CLASSES
    assert torch.equal(cw_l2(model, images, wrong, steps=2, search_steps=1), images)


# --- reproducibility


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_an_image_gets_the_same_in_every_batch(name: str) -> None:
    # float64: in float32 another batch size may round the gradient of a near-zero to another sign
    model = make_model(dtype=torch.float64)
    images = torch.rand(12, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = model(images).argmax(1)
    whole = BALL_ATTACKS[name](model, images, labels, EPS)
    order = torch.tensor([7, 0, 11, 3])
    part = BALL_ATTACKS[name](model, images[order], labels[order], EPS, indices=order)
    torch.testing.assert_close(part, whole[order], atol=1e-9, rtol=0)
    other = BALL_ATTACKS[name](model, images[order], labels[order], EPS)
    assert not torch.allclose(other, part, atol=1e-6), "without indices the starts are other ones"


def test_generator_and_seed_choose_the_starts(model: NormalizedModel, batch: tuple[Tensor, Tensor]) -> None:
    def run(**settings: object) -> Tensor:
        return pgd(model, *batch, EPS, steps=1, **settings)  # type: ignore[arg-type]

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    assert torch.equal(run(), first), "the global seed has no effect"
    assert not torch.equal(run(seed=1), first)
    generator = torch.Generator().manual_seed(5)
    drawn = run(generator=generator)
    assert not torch.equal(run(generator=generator), drawn), "a generator moves on"
    assert torch.equal(run(generator=torch.Generator().manual_seed(5)), drawn)


# --- what is left behind


@pytest.mark.parametrize("name", every_attack())
def test_state_is_restored(name: str, batch: tuple[Tensor, Tensor]) -> None:
    class Noisy(nn.Module):
        """Draws random numbers also in eval mode, and has a mixed state."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model().train()
            self.inner.network[1].eval()
            self.inner.network[0].weight.requires_grad_(False)
            self.modes: set[bool] = set()

        def forward(self, images: Tensor) -> Tensor:
            self.modes.add(self.inner.training)
            return self.inner(images) + 1e-6 * torch.randn(len(images), 1)

    model = Noisy().train()
    images, labels = batch
    kept = images.clone()
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    found = every_attack()[name](model, images, labels)
    assert model.modes == {False}
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept)
    assert not found.requires_grad
    assert images.grad is None


@pytest.mark.parametrize("name", [*every_attack(), "autoattack"])
@pytest.mark.parametrize("channels", [1, 4])
def test_images_with_other_channels_than_the_model_are_refused(name: str, channels: int) -> None:
    if name == "autoattack":
        pytest.importorskip("pyautoattack")
    attack = {**every_attack(), "autoattack": lambda m, x, y: autoattack(m, x, y, EPS)}[name]
    with pytest.raises(ValueError, match=r"images must have 3 channels.*got \[2, \d, 16, 16\]"):
        attack(make_model(), torch.rand(2, channels, 16, 16), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", every_attack())
def test_state_is_restored_after_an_error(name: str, batch: tuple[Tensor, Tensor]) -> None:
    model = make_model().train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.6"):
        every_attack()[name](model, batch[0], batch[1] + CLASSES)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", every_attack())
def test_works_inside_no_grad_and_inference_mode(
    model: NormalizedModel, batch: tuple[Tensor, Tensor], name: str, caller: Callable[[], torch.no_grad]
) -> None:
    expected = every_attack()[name](model, *batch)
    with caller():
        images, labels = batch[0].clone(), batch[1].clone()  # inference tensors in the second case
        assert torch.equal(every_attack()[name](model, images, labels), expected)


# --- dtypes, layouts, outputs


@pytest.mark.parametrize("name", every_attack())
def test_bfloat16_model(name: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = make_model(dtype=torch.bfloat16)
    full = every_attack()[name](model, images, labels)
    assert full.dtype == torch.float32
    assert torch.isfinite(full).all()
    if name in BALL_ATTACKS:
        assert (full - images).abs().max() <= EPS * (1 + 1e-5), "steps are taken in float32"
    half = every_attack()[name](model, images.bfloat16(), labels)
    assert half.dtype == torch.bfloat16


def test_autocast_attack_is_about_as_strong(model: NormalizedModel, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pgd(model, images, labels, EPS / 4)
    full = loss_of(model, pgd(model, images, labels, EPS / 4), labels).mean()
    assert loss_of(model, found, labels).mean() > 0.9 * full


@pytest.mark.parametrize("name", every_attack())
def test_non_contiguous_images(model: NormalizedModel, batch: tuple[Tensor, Tensor], name: str) -> None:
    images, labels = batch
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    found, expected = every_attack()[name](model, strided, labels), every_attack()[name](model, images, labels)
    assert (loss_of(model, found, labels) - loss_of(model, expected, labels)).abs().mean() < 0.1


@pytest.mark.parametrize("name", every_attack())
def test_empty_batch(model: NormalizedModel, name: str) -> None:
    found = every_attack()[name](model, torch.empty(0, 3, 16, 16), torch.empty(0, dtype=torch.long))
    assert found.shape == (0, 3, 16, 16)


@pytest.mark.parametrize("name", BALL_ATTACKS)
def test_eps_zero_returns_the_images(model: NormalizedModel, batch: tuple[Tensor, Tensor], name: str) -> None:
    images, labels = batch
    found = BALL_ATTACKS[name](model, images, labels, 0.0)
    assert torch.equal(found, images)
    assert found.data_ptr() != images.data_ptr()


# --- bad input


@pytest.mark.parametrize("name", BALL_ATTACKS)
@pytest.mark.parametrize("eps", [-0.1, 1.5, math.nan, math.inf, 8])
def test_eps_outside_is_refused(model: NormalizedModel, batch: tuple[Tensor, Tensor], name: str, eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be"):
        BALL_ATTACKS[name](model, *batch, eps)


@pytest.mark.parametrize("name", every_attack())
def test_bad_images_and_labels(model: NormalizedModel, batch: tuple[Tensor, Tensor], name: str) -> None:
    attack = every_attack()[name]
    images, labels = batch
    with pytest.raises(ValueError, match=r"images must be pixels in \[0, 1\]"):
        attack(model, images * 255, labels)
    with pytest.raises(ValueError, match="images must be finite"):
        attack(model, images.clone().index_fill_(0, torch.tensor([3]), math.nan), labels)
    with pytest.raises(ValueError, match="labels must lie in"):
        attack(model, images, labels - 1 - labels.min())
    with pytest.raises(ValueError, match="labels must lie in"):
        attack(model, images, labels + 10)
    with pytest.raises(ValueError, match="one entry per image"):
        attack(model, images, labels[:5])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        attack(lambda x: x, images, labels)


@pytest.mark.parametrize("name", every_attack())
def test_a_model_that_returns_no_logits(model: NormalizedModel, batch: tuple[Tensor, Tensor], name: str) -> None:
    attack = every_attack()[name]
    with pytest.raises(TypeError, match=r"model must return logits \[B, K\] or an output with \.logits; got tuple"):
        attack(Returning(model, lambda logits: (logits, logits)), *batch)
    with pytest.raises(ValueError, match=r"model must return logits \[\d+, K\]; got shape \[\d+, 7, 1\]"):
        attack(Returning(model, lambda logits: logits[..., None]), *batch)


@pytest.mark.parametrize("name", every_attack())
@pytest.mark.parametrize("calls", [0, 2])
def test_nan_logits_are_named(name: str, calls: int, batch: tuple[Tensor, Tensor]) -> None:
    # right for some calls, then one NaN logit
    passed = itertools.count()

    def breaks(logits: Tensor) -> Tensor:
        if next(passed) < calls:
            return logits
        return logits.index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(math.nan))

    if name == "fgsm" and calls:
        pytest.skip("one call is all FGSM makes")
    with pytest.raises(ValueError, match="NaN"):
        every_attack()[name](Returning(make_model(), breaks), *batch)


def test_masked_classes_are_no_error(model: NormalizedModel, batch: tuple[Tensor, Tensor]) -> None:
    # -Inf at a class that no image has: how a subset of the classes is evaluated
    masked = Returning(model, lambda logits: F.pad(logits, (0, 1), value=-math.inf))
    assert torch.isfinite(pgd(masked, *batch, EPS)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be >= 1"),
        ({"restarts": 0}, "restarts must be >= 1"),
        ({"step_size": -1.0}, "step_size must be >= 0"),
        ({"norm": "l1"}, "norm must be one of"),
        ({"indices": torch.arange(3)}, "indices must hold one entry per image"),
    ],
)
def test_bad_settings(
    model: NormalizedModel, batch: tuple[Tensor, Tensor], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pgd(model, *batch, EPS, **settings)  # type: ignore[arg-type]


def test_dlr_needs_enough_classes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    images, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="needs 4 classes or more; the model has 3"):
        apgd(model, images, labels, EPS, loss="dlr_targeted")
