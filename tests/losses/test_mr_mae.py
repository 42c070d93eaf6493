from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kdvit
from kdvit.losses import MRMAE
from kdvit.signals import ModelInfo, SignalInfo
from tests.tiny import cnn, images, labels, vit


def student(x: Tensor) -> dict[str, Tensor]:
    """2x2-pixel patches: their mean colours, and those of the whole image."""
    means = F.adaptive_avg_pool2d(x, (3, 2))
    return {"student_feature_map": torch.cat([means, means.mean((2, 3), keepdim=True) + means], dim=1)}


def example(grid=(3, 2), batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 6, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(batch, 5, *grid, generator=generator, dtype=torch.float64)
    return {**student(x), "teacher_feature_map": teacher, "images": x, "rerun_student": student}


def built(inputs: dict, **options) -> MRMAE:
    loss = MRMAE(**{"patch_pixels": 2, **options})
    torch.manual_seed(0)
    size = tuple(inputs["images"].shape[1:])
    sides = "student", "teacher"
    infos = [SignalInfo.of("feature_map", inputs[f"{side}_feature_map"]) for side in sides]
    loss.build(*(ModelInfo.of(input_size=size, feature_map=info) for info in infos))
    return loss.to(torch.float64)


def noise(batch: int = 2) -> Tensor:
    return torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.8, 0.4], [0.6, 0.3, 0.7, 0.9, 0.1, 0.2]], dtype=torch.float64)[:batch]


def seen(loss: MRMAE, inputs: dict, u: Tensor | None = None) -> Tensor:
    """The images that the student is run on again."""
    found = []
    loss(**inputs | {"rerun_student": lambda x: found.append(x) or student(x)}, noise=u)
    return found[0]


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_a_plain_loop(normalize):
    inputs, u = example(), noise()
    loss = built(inputs, alpha=0.5, beta=3.0, mask_ratio=0.5, normalize=normalize)
    masked = inputs["images"].clone()
    places = [(i, j) for i in range(3) for j in range(2)]
    visible = [[0, 3, 5], [4, 5, 1]]  # the three smallest of each row
    for b in range(2):
        for n, (i, j) in enumerate(places):
            if n not in visible[b]:
                masked[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = 0
    features = student(masked)["student_feature_map"]
    mimic = reconstruct = 0.0
    for b in range(2):
        for n, (i, j) in enumerate(places):
            x = features[b, :, i, j]
            x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
            if n in visible[b]:
                target = inputs["teacher_feature_map"][b, :, i, j]
                if normalize:
                    target = (target - target.mean()) / (target.var(unbiased=False) + 1e-5).sqrt()
                got = loss.mimic[0].weight @ x + loss.mimic[0].bias
                mimic += (got - target).square().mean().item() / 6
            else:
                target = inputs["images"][b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
                target = (target - target.mean()) / (target.var(unbiased=False) + 1e-6).sqrt()
                got = loss.reconstruct[0].weight @ x + loss.reconstruct[0].bias
                reconstruct += (got - target).square().mean().item() / 6
    terms = {name: x.item() for name, x in loss(**inputs, noise=u).items()}
    assert terms == pytest.approx({"mimic": 0.5 * mimic, "reconstruct": 3 * reconstruct}, rel=1e-10)


def test_value_by_hand():
    inputs = example()
    inputs["images"] = torch.zeros(1, 3, 6, 4, dtype=torch.float64)
    inputs["images"][:, :, ::2] = 2.0  # every patch: half 2, half 0; normalised to 1 and -1
    inputs["teacher_feature_map"] = torch.tensor([3.0, 3.0, 3.0, 3.0, 8.0]).double().view(1, 5, 1, 1).expand(1, 5, 3, 2)
    inputs |= student(inputs["images"])
    loss = built(inputs, normalize=False)
    for p in loss.parameters():
        p.data.zero_()
    loss.reconstruct[0].bias.data.fill_(0.5)
    terms = loss(**inputs)
    assert terms["mimic"].item() == pytest.approx((4 * 9 + 64) / 5)
    assert terms["reconstruct"].item() == pytest.approx((0.5**2 + 1.5**2) / 2, rel=1e-5)


@pytest.mark.parametrize(("ratio", "num_visible"), [(0.75, 1), (0.5, 3), (0.34, 3), (0.01, 5), (0.99, 1)])
def test_hides_as_many_whole_patches_in_every_image(ratio, num_visible):
    inputs = example()
    inputs["images"] = inputs["images"].abs() + 1
    masked = seen(built(inputs, mask_ratio=ratio), inputs, noise())
    visible = F.avg_pool2d((masked != 0).double(), 2)
    assert ((visible == 0) | (visible == 1)).all()
    assert visible[:, 0].flatten(1).sum(1).tolist() == [num_visible] * 2
    torch.testing.assert_close(masked, torch.where(masked != 0, inputs["images"], 0))
    assert visible[0, 0].flatten()[0] == 1  # the smallest noise


def test_targets_do_not_disagree():
    """What the paper changes in MAE: no patch is both mimicked and reconstructed."""
    inputs, u = example(), noise()
    loss = built(inputs, mask_ratio=0.5)
    hidden = seen(loss, inputs, u)[:, 0, ::2, ::2] == 0  # (B, 3, 2)
    teacher = inputs["teacher_feature_map"].clone()
    teacher.permute(0, 2, 3, 1)[hidden] = 100.0
    torch.testing.assert_close(loss(**inputs | {"teacher_feature_map": teacher}, noise=u), loss(**inputs, noise=u))
    teacher.permute(0, 2, 3, 1)[~hidden] *= -1
    assert loss(**inputs | {"teacher_feature_map": teacher}, noise=u)["mimic"] != loss(**inputs, noise=u)["mimic"]


def test_the_student_does_not_see_what_it_reconstructs():
    inputs, u = example(), noise()
    loss = built(inputs)
    x = inputs["images"].clone().requires_grad_()
    loss(**inputs | {"images": x}, noise=u)["reconstruct"].backward()
    hidden = (seen(loss, inputs, u) == 0).all(dim=1, keepdim=True).expand_as(x)
    assert (x.grad[hidden] == 0).all() and (x.grad[~hidden] != 0).any()


def test_the_first_pass_gets_no_gradient():
    inputs = example()
    inputs["student_feature_map"].requires_grad_()
    loss = built(inputs)
    total = sum(loss(**inputs, noise=noise()).values())
    (grad,) = torch.autograd.grad(total, inputs["student_feature_map"], allow_unused=True)
    assert grad is None and loss.extra_forwards() == {"student": 1, "teacher": 0}


def test_the_generator_draws_the_mask():
    inputs = example()
    loss = built(inputs)

    def draw(seed: int) -> Tensor:
        loss.generator = torch.Generator().manual_seed(seed)
        return seen(loss, inputs)

    assert torch.equal(draw(1), draw(1))
    assert any(not torch.equal(draw(1), draw(seed)) for seed in range(2, 6))


def test_a_normalised_target_forgets_scale_and_offset():
    inputs, u = example(), noise()
    loss = built(inputs)
    other = inputs | {"teacher_feature_map": 50 * inputs["teacher_feature_map"] + 7}
    torch.testing.assert_close(loss(**other, noise=u)["mimic"], loss(**inputs, noise=u)["mimic"], rtol=1e-4, atol=0)
    plain = built(inputs, normalize=False)
    assert not torch.allclose(plain(**other, noise=u)["mimic"], plain(**inputs, noise=u)["mimic"])


def test_images_of_other_sizes_are_pooled_to_the_decoders_pixels():
    inputs, u = example(), noise()
    coarse = built(inputs, patch_pixels=1)
    assert coarse.reconstruct[0].out_features == 3 and built(inputs).reconstruct[0].out_features == 12
    pixels = coarse._pixels(inputs["images"], (3, 2))
    means = F.avg_pool2d(inputs["images"], 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pixels, F.layer_norm(means, (3,), eps=1e-6))
    odd = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    assert all(x.isfinite() for x in built(inputs)(**inputs | {"images": odd}, noise=u).values())


@pytest.mark.parametrize("resize", ["pool", "bilinear"])
def test_the_teachers_map_comes_to_the_grid_of_the_mask(resize):
    inputs, u = example(grid=(6, 8)), noise()
    teacher = inputs["teacher_feature_map"]
    options = {"mode": resize, "align_corners": False}
    by_hand = F.adaptive_avg_pool2d(teacher, (3, 2)) if resize == "pool" else F.interpolate(teacher, (3, 2), **options)
    loss = built(inputs, resize=resize)
    torch.testing.assert_close(loss(**inputs, noise=u), loss(**inputs | {"teacher_feature_map": by_hand}, noise=u))


@pytest.mark.parametrize("make_student", [lambda: vit(embed_dim=40, num_heads=4), lambda: vit(patch_size=16)], ids=str)
@pytest.mark.parametrize("teacher", [cnn, vit, lambda: vit(reg_tokens=4)], ids=["cnn", "vit", "registers"])
def test_any_vit_learns_from_any_teacher(make_student, teacher):
    distiller = kdvit.Distiller(teacher(), make_student(), ["mr_mae"], task_loss=None)
    distiller(images(), labels()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in distiller.losses.parameters())


def test_a_student_with_one_patch_is_refused_at_construction():
    with pytest.raises(
        ValueError, match=r"MRMAE: student grid must have at least 2 patches, got 1x1 for 'resnet18' at"
    ):
        kdvit.Distiller(vit(), kdvit.Student(cnn(), input_size=(3, 32, 32)), ["mr_mae"])


def test_the_decoder_is_made_for_the_students_images_and_patches():
    student = kdvit.Student(vit(seed=1, in_chans=1))
    distiller = kdvit.Distiller(kdvit.Teacher(vit()), student, ["mr_mae"], task_loss=None)
    assert distiller.losses["mr_mae"].reconstruct[0].out_features == 8 * 8  # one channel, patches of 8x8
    inputs = example()
    infos = [SignalInfo.of("feature_map", inputs[f"{side}_feature_map"]) for side in ("student", "teacher")]
    with pytest.raises(ValueError, match="MRMAE: the size of the images of 'model' must be known, got none; pass"):
        MRMAE().build(*(ModelInfo.of(feature_map=info) for info in infos))
    other = inputs | {"images": inputs["images"][:, :1]}
    with pytest.raises(ValueError, match=r"MRMAE: images must have shape \(B, 3, H, W\), got \(2, 1, 6, 4\); give"):
        built(inputs)(**other)


def test_refuses_what_cannot_work():
    inputs = example()
    for options, error, sentence in (
        ({"alpha": -1}, ValueError, "MRMAE: alpha must be >= 0, got -1; 0 switches the mimicking off."),
        ({"beta": -1}, ValueError, "MRMAE: beta must be >= 0, got -1; 0 switches the reconstruction off."),
        ({"mask_ratio": 1}, ValueError, "MRMAE: mask_ratio must be in (0, 1), got 1; the published value is 0.75."),
        ({"normalize": 1}, TypeError, "MRMAE: normalize must be True or False, got 1; write one of them."),
        (
            {"patch_pixels": 0},
            ValueError,
            "MRMAE: patch_pixels must be > 0, got 0; None takes the size of the student's patches.",
        ),
        ({"resize": "area"}, ValueError, "MRMAE: resize must be a known one, got 'area'"),
    ):
        with pytest.raises(error) as caught:
            MRMAE(**options)
        assert str(caught.value).startswith(sentence)
    with pytest.raises(RuntimeError, match="MRMAE: build must be called before forward"):
        MRMAE()(**inputs)
    loss = built(inputs)
    with pytest.raises(ValueError, match="MRMAE: teacher_feature_map must have D=5 as in build, got D=4; build the"):
        loss(**inputs | {"teacher_feature_map": inputs["teacher_feature_map"][:, :4]})
    with pytest.raises(ValueError, match="MRMAE: images has B=1 but student_feature_map has B=2; give both the same"):
        loss(**inputs | {"images": inputs["images"][:1]})
    for u in (noise(1), noise()[:, :5], noise()[0]):
        with pytest.raises(ValueError, match=r"MRMAE: noise must have shape \(2, 6\), got \(.*\); give one number per"):
            loss(**inputs, noise=u)


def test_stages_are_where_it_reads():
    assert MRMAE(student_stage=2, teacher_stage="layer3").locations() == {
        "student_feature_map": 2,
        "teacher_feature_map": "layer3",
    }
