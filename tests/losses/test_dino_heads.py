from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kdvit.losses import DINOHeads, PrototypeHead
from kdvit.losses.dino_heads import cosine_gram_distance, crops_cross_entropy, patches_cross_entropy, sinkhorn
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_dinov3_distill")
CLS = {name: case for name, case in CASES.items() if name.startswith("cls_")}
PATCH = {name: case for name, case in CASES.items() if name.startswith("patch_")}
GRAM = {name: case for name, case in CASES.items() if name.startswith("gram_")}


def heads(*num_prototypes: int, dim: int = 4) -> list[PrototypeHead]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = [PrototypeHead(dim, k, hidden_dim=6, bottleneck_dim=3) for k in num_prototypes]
        for head in made:
            for p in head.parameters():
                nn.init.normal_(p)
    return made


def infos(grids=((2, 2), (2, 2)), num_prefix: int = 1, dims: tuple[int, int] = (3, 4)) -> tuple[ModelInfo, ModelInfo]:
    num_patches = math.prod(grids[1])
    student = ModelInfo.of(
        pooled=SignalInfo("pooled", "output", (dims[0],)),
        feature_map=SignalInfo("feature_map", "blocks.1", (dims[0], *grids[0]), grid=grids[0]),
    )
    teacher = ModelInfo.of(
        normed_cls_token=SignalInfo("normed_cls_token", "norm", (dims[1],)),
        normed_patch_tokens=SignalInfo(
            "normed_patch_tokens", "norm", (num_patches, dims[1]), num_prefix_tokens=num_prefix, grid=grids[1]
        ),
    )
    return student, teacher


def built(grids=((2, 2), (2, 2)), num_prefix: int = 1, **options) -> DINOHeads:
    cls_head, patch_head = heads(5, 6)
    given = {"cls_head": cls_head, "patch_head": patch_head, "views": 1, "hidden_dim": 8, "bottleneck_dim": 3}
    loss = DINOHeads(**given | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        loss.build(*infos(grids, num_prefix))
        for p in loss.parameters():
            nn.init.normal_(p)
    return loss


def inputs(loss: DINOHeads, grids=((2, 2), (2, 2)), batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "student_pooled": (3,),
        "student_feature_map": (3, *grids[0]),
        "teacher_normed_cls_token": (4,),
        "teacher_normed_patch_tokens": (math.prod(grids[1]), 4),
    }
    every = {
        f"{view}{name}": torch.randn(batch, *shape, generator=generator)
        for view in ("", "second_")
        for name, shape in shapes.items()
    }
    return {name: every[name] for name in loss.inputs()}


def noise(batch: int = 3, views: int = 1, num_patches: int = 4) -> Tensor:
    return torch.rand(batch, views, num_patches, generator=torch.Generator().manual_seed(9))


def test_cases_were_found():
    assert (len(CLS), len(PATCH), len(GRAM)) == (1, 1, 2) and len(CASES) == 4


@pytest.mark.parametrize("case", CLS.values(), ids=CLS)
def test_class_tokens_equal_the_official_loss(case):
    options, student = case.options, case["in.student_logits"].clone().requires_grad_()
    probs = sinkhorn(case["in.teacher_logits"].flatten(0, 1), options["teacher_temp"], options["n_iterations"])
    assert_close(probs.unflatten(0, (2, 4)), case["out.teacher_probs"], 1e-5)
    value = crops_cross_entropy(student, probs.unflatten(0, (2, 4)), options["student_temp"],
                                options["ignore_diagonal"])  # fmt: skip
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student_logits"], 1e-5)


@pytest.mark.parametrize("case", PATCH.values(), ids=PATCH)
def test_patches_equal_the_official_loss(case):
    """There, images have masks of several sizes, and the mean is over images of means over patches."""
    options, mask, student = case.options, case["in.mask"], case["in.student_logits"].clone().requires_grad_()
    probs = sinkhorn(case["in.teacher_logits"], options["teacher_temp"], 3)
    assert_close(probs, case["out.teacher_probs"], 1e-5)
    shares = (1 / mask.sum(1, keepdim=True) / len(mask)).expand_as(mask)[mask]
    value = patches_cross_entropy(student, probs, options["student_temp"], shares)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student_logits"], 1e-5)


@pytest.mark.parametrize("case", GRAM.values(), ids=GRAM)
def test_gram_equals_the_official_loss(case):
    options, student = case.options, case["in.student"].clone().requires_grad_()
    negatives = "clamp" if options["remove_neg"] else "keep"
    assert options["apply_norm"] and not options["remove_only_teacher_neg"]
    value = cosine_gram_distance(student, case["in.teacher"], negatives, over_batch=not options["img_level"])
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)


def test_sinkhorn_balances_prototypes():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] += 3  # a favourite
    probs = sinkhorn(logits, 1.0, 100)
    torch.testing.assert_close(probs.sum(1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(probs.sum(0), torch.full((4,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(sinkhorn(logits + 50, 1.0, 3), sinkhorn(logits, 1.0, 3))  # offsets do not matter
    once = sinkhorn(logits, 0.5, 1)  # by hand: columns, then rows, of exp(2 * logits)
    columns = (2 * logits).exp() / (2 * logits).exp().sum(0)
    torch.testing.assert_close(once, columns / columns.sum(1, keepdim=True))
    assert sinkhorn(1e4 * logits, 0.04, 3).isfinite().all()


def test_crops_do_not_predict_themselves():
    logits = torch.randn(2, 3, 5)
    probs = torch.randn(2, 3, 5).softmax(-1)
    logs = (logits / 0.1).log_softmax(-1)
    pairs = [[-(probs[b] * logs[a]).sum(-1).mean() for b in range(2)] for a in range(2)]
    torch.testing.assert_close(crops_cross_entropy(logits, probs, 0.1, True), (pairs[0][1] + pairs[1][0]) / 2)
    torch.testing.assert_close(crops_cross_entropy(logits, probs, 0.1, False), sum(map(sum, pairs)) / 4)


@pytest.mark.parametrize(
    ("negatives", "value"),
    # Cosines between two patches: student -1, teacher -0.6, and twice 1 on the diagonals.
    [("keep", 0.5 * 0.4**2), ("clamp", 0.0), ("clamp_teacher", 0.0)],
)
def test_gram_by_hand_where_both_are_negative(negatives, value):
    student, teacher = torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [-0.6, 0.8]]])
    assert cosine_gram_distance(student, teacher, negatives, False).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("negatives", "value"), [("keep", 0.5 * 1.6**2), ("clamp", 0.5 * 0.6**2), ("clamp_teacher", 0.5 * 1.6**2)]
)
def test_gram_by_hand_where_the_student_alone_is_negative(negatives, value):
    student, teacher = torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    assert cosine_gram_distance(student, teacher, negatives, False).item() == pytest.approx(value)


@pytest.mark.parametrize("views", [1, 2])
def test_equals_a_plain_loop(views):
    loss = built(views=views, gram_weight=2.0, cls_weight=3.0, patch_weight=0.5, mask_ratio=0.5, gram_over="image")
    loss = loss.double()
    given = {name: x.double() for name, x in inputs(loss).items()}
    u = noise(views=views)
    terms = loss(**given, noise=u)
    loss.requires_grad_(False)
    each = ["", "second_"][:views]

    student = [loss.heads["cls"](given[f"{view}student_pooled"]) for view in each]
    teacher = [loss.cls_head(given[f"{view}teacher_normed_cls_token"]) for view in each]
    probs = sinkhorn(torch.cat(teacher), 0.07, 3).chunk(views)
    values = [
        -(probs[b][i] * (student[a][i] / 0.1).log_softmax(0)).sum()
        for a in range(views) for b in range(views) for i in range(3)
        if views == 1 or a != b
    ]  # fmt: skip
    torch.testing.assert_close(terms["cls"], 3.0 * sum(values) / len(values))

    chosen_student, chosen_teacher, gram = [], [], 0.0
    for v, view in enumerate(each):
        for i in range(3):
            tokens = given[f"{view}student_feature_map"][i].flatten(1).T
            tokens = torch.nn.functional.layer_norm(tokens, (3,)) * loss.norm.weight + loss.norm.bias
            targets = given[f"{view}teacher_normed_patch_tokens"][i]
            for n in u[i, v].argsort()[:2]:
                chosen_student.append(loss.heads["patch"](tokens[n]))
                chosen_teacher.append(loss.patch_head(targets[n]))
            for n in range(4):
                for m in range(4):
                    cosines = [torch.nn.functional.cosine_similarity(x[n], x[m], dim=0) for x in (tokens, targets)]
                    gram += 2.0 * (cosines[0] - cosines[1]) ** 2 / (views * 3 * 16)
    probs = sinkhorn(torch.stack(chosen_teacher), 0.07, 3)
    rows = [-(p * (s / 0.1).log_softmax(0)).sum() for p, s in zip(probs, chosen_student, strict=True)]
    torch.testing.assert_close(terms["patch"], 0.5 * sum(rows) / len(rows))
    torch.testing.assert_close(terms["gram"], gram)


def test_over_the_batch_patches_of_other_images_are_compared_too():
    loss = built(cls_weight=0.0, patch_weight=0.0, gram_weight=1.0)
    given = inputs(loss)
    value = loss(**given)["gram"]
    tokens = loss.norm(given["student_feature_map"].flatten(2).transpose(1, 2)).flatten(0, 1)
    x, y = (
        torch.nn.functional.normalize(z, dim=1) for z in (tokens, given["teacher_normed_patch_tokens"].flatten(0, 1))
    )
    torch.testing.assert_close(value, (x @ x.T - y @ y.T).square().mean())
    per_image = built(cls_weight=0.0, patch_weight=0.0, gram_weight=1.0, gram_over="image")(**given)["gram"]
    assert (value - per_image).abs() > 1e-3


def test_the_teachers_heads_stay_as_they_are():
    cls_head, patch_head = heads(5, 6)
    loss = built(cls_head=cls_head, patch_head=patch_head)
    before = [p.clone() for head in (cls_head, patch_head) for p in head.parameters()]
    sum(loss.train()(**inputs(loss), noise=noise()).values()).backward()
    assert loss.cls_head is cls_head and not cls_head.training
    assert all(p.grad is None and not p.requires_grad for p in cls_head.parameters())
    assert all(torch.equal(x, p) for x, p in zip(before, [*cls_head.parameters(), *patch_head.parameters()]))
    assert not {id(p) for p in cls_head.parameters()} & {id(p) for p in loss.parameters()}
    assert not [name for name in loss.state_dict() if name.startswith("frozen")]
    assert [head.num_prototypes for head in loss.heads.values()] == [5, 6]


def test_any_head_will_do():
    loss = built(cls_head=nn.Linear(4, 9), patch_weight=0.0)
    assert loss.heads["cls"].num_prototypes == 9 and loss(**inputs(loss)).keys() == {"cls"}


def test_the_value_is_least_where_the_student_has_the_teachers_probabilities():
    """With the teacher's features, its head, and its temperature, only balancing is between the two."""
    loss = built(patch_weight=0.0, student_temperature=0.07, sinkhorn_iterations=1)
    given = inputs(loss)
    teacher = given["teacher_normed_cls_token"]
    probs = sinkhorn(loss.cls_head(teacher), 0.07, 1)
    logits = nn.Parameter(0.07 * probs.log())
    least = crops_cross_entropy(logits[None], probs[None], 0.07, False)
    torch.testing.assert_close(least, -(probs * probs.log()).sum(1).mean())
    (grad,) = torch.autograd.grad(least, logits)
    assert grad.abs().max() < 1e-5 and loss(**given)["cls"] > least


@pytest.mark.parametrize(("grids", "num_prefix"), [(((2, 2), (3, 3)), 5), (((4, 4), (2, 2)), 0)], ids=str)
def test_the_students_map_comes_to_the_teachers_grid(grids, num_prefix):
    loss = built(grids, num_prefix)
    given, u = inputs(loss, grids), noise(num_patches=math.prod(grids[1]))
    value = loss(**given, noise=u)["patch"]
    resized = torch.nn.functional.interpolate(
        given["student_feature_map"], size=grids[1], mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(loss(**given | {"student_feature_map": resized}, noise=u)["patch"], value)


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({"patch_weight": 0.0}, ("student_pooled", "teacher_normed_cls_token")),
        ({"cls_weight": 0.0}, ("student_feature_map", "teacher_normed_patch_tokens")),
        ({"cls_weight": 0.0, "patch_weight": 0.0, "gram_weight": 1.0},
         ("student_feature_map", "teacher_normed_patch_tokens")),
    ],
    ids=str,
)  # fmt: skip
def test_reads_what_its_terms_need(weights, names):
    loss = DINOHeads(**weights, views=1)
    assert loss.inputs() == names
    assert loss.locations() == ({"student_feature_map": -1} if "student_feature_map" in names else {})
    twice = DINOHeads(**weights)
    assert twice.inputs() == (*names, *(f"second_{name}" for name in names))
    assert twice.extra_forwards() == {"student": 1, "teacher": 1}


@pytest.mark.parametrize(
    ("term", "options"),
    [
        ("cls", {"cls_weight": 2.0}),
        ("patch", {"patch_weight": 2.0}),
        ("patch", {"mask_ratio": 0.7}),
        ("gram", {"gram_weight": 3.0}),
        ("gram", {"gram_negatives": "clamp"}),
        ("gram", {"gram_negatives": "clamp_teacher"}),
        ("gram", {"gram_over": "image"}),
        ("cls patch", {"student_temperature": 0.2}),
        ("cls patch", {"teacher_temperature": 0.04}),
        ("cls patch", {"sinkhorn_iterations": 1}),
        ("patch gram", {"resize": "nearest"}),
        ("cls patch", {"hidden_dim": 4}),
    ],
    ids=str,
)
def test_options_change_their_terms(term, options):
    grids = ((2, 2), (3, 3))
    values = []
    for given in ({}, options):
        loss = built(grids, **{"gram_weight": 1.0} | given)
        values.append(loss(**inputs(loss, grids), noise=noise(num_patches=9)))
    differs = {name for name in values[0] if abs(values[0][name] - values[1][name]) > 1e-4}
    assert differs >= set(term.split())
    assert "hidden_dim" in options or differs == set(term.split())


def test_chosen_patches_are_as_many_for_every_image_and_drawn_anew():
    loss = built()
    given, values = inputs(loss), []
    for seed in (7, 7, 8):
        loss.generator = torch.Generator().manual_seed(seed)
        values.append(loss(**given)["patch"].item())
    assert values[0] == values[1] != values[2]
    few = built(mask_ratio=0.01)  # one patch at least
    few(**given)["patch"].backward()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"cls_head": "dino.pth"}, TypeError,
         "DINOHeads: cls_head must be an nn.Module, got 'dino.pth'; pass a PrototypeHead with the teacher's weights."),
        ({"cls_weight": 0, "patch_weight": 0}, ValueError,
         "DINOHeads: weights must be > 0 for some term, got 0 for all; give one a weight."),
        ({"cls_weight": -1}, ValueError, "DINOHeads: cls_weight must be >= 0, got -1; 0 switches the term off."),
        ({"patch_weight": -1}, ValueError, "DINOHeads: patch_weight must be >= 0, got -1; 0 switches the term off."),
        ({"gram_weight": -1}, ValueError, "DINOHeads: gram_weight must be >= 0, got -1; 0 switches the term off."),
        ({"views": 3}, ValueError, "DINOHeads: views must be 1 or 2, got 3; there is no third view."),
        ({"views": 0}, ValueError, "DINOHeads: views must be > 0, got 0; 2 for pairs of views, 1 for single ones."),
        ({"student_temperature": 0}, ValueError,
         "DINOHeads: student_temperature must be > 0, got 0; the published value is 0.1."),
        ({"teacher_temperature": 0}, ValueError,
         "DINOHeads: teacher_temperature must be > 0, got 0; the published value is 0.07."),
        ({"sinkhorn_iterations": 0}, ValueError,
         "DINOHeads: sinkhorn_iterations must be > 0, got 0; the published number is 3."),
        ({"mask_ratio": 1}, ValueError,
         "DINOHeads: mask_ratio must be in (0, 1), got 1; 0.3 is a third of the patches."),
        ({"gram_negatives": "drop"}, ValueError,
         "DINOHeads: gram_negatives must be a known one, got 'drop'; Known: keep, clamp, clamp_teacher."),
        ({"gram_over": "images"}, ValueError,
         "DINOHeads: gram_over must be a known one, got 'images'; did you mean 'image'? Known: batch, image."),
        ({"hidden_dim": 0}, ValueError, "DINOHeads: hidden_dim must be > 0, got 0; the published width is 2048."),
        ({"bottleneck_dim": 0}, ValueError,
         "DINOHeads: bottleneck_dim must be > 0, got 0; the published width is 256."),
        ({"resize": "linear"}, ValueError,
         "DINOHeads: resize must be a known one, got 'linear'; did you mean 'bilinear'? Known: pool, bilinear, "
         "bicubic, nearest."),
        ({"gather": 1}, TypeError, "DINOHeads: gather must be True or False, got 1; write one of them."),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        DINOHeads(**options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "DINOHeads: cls_head must be given, got None; pass the head that the teacher was trained with, or "
             "cls_weight=0."),
        ({"cls_weight": 0}, "DINOHeads: patch_head must be given, got None; pass the head that the teacher was "
                            "trained with, or patch_weight=0."),
        ({"cls_head": nn.Flatten(0)}, "DINOHeads: cls_head must give scores (B, K) for K >= 2 prototypes, got (4,); "
                                      "pass the head with its last layer."),
    ],
    ids=["cls", "patch", "scores"],
)  # fmt: skip
def test_refuses_at_build_what_it_has_no_head_for(options, sentence):
    loss = DINOHeads(**options)
    with pytest.raises(ValueError) as caught:
        loss.build(*infos())
    assert str(caught.value) == sentence


def test_refuses_the_head_of_another_teacher():
    with pytest.raises(ValueError) as caught:
        DINOHeads(*heads(5, 6, dim=7)).build(*infos())
    text = str(caught.value)
    assert text.startswith("DINOHeads: cls_head must take the teacher's D=4, got ")
    assert text.endswith("; pass the head that the teacher was trained with.")


def test_refuses_other_inputs():
    loss = built()
    given = inputs(loss)
    cls_token, tokens = given["teacher_normed_cls_token"], given["teacher_normed_patch_tokens"]
    for change, sentence in (
        ({"teacher_normed_cls_token": cls_token[:, :3]},
         "DINOHeads: teacher_normed_cls_token must have D=4 as in build, got D=3"),
        ({"teacher_normed_patch_tokens": tokens[..., :3]},
         "DINOHeads: teacher_normed_patch_tokens must have D=4 as in build, got D=3"),
        ({"teacher_normed_patch_tokens": tokens[:, :3]}, "tokens_to_map: patch_tokens must have 2x2 = 4 tokens, got 3"),
        ({"teacher_normed_patch_tokens": tokens[:2]},
         "DINOHeads: teacher_normed_patch_tokens has B=2 but student_feature_map has B=3; give both"),
        ({"teacher_normed_cls_token": cls_token[:2]},
         "DINOHeads: teacher_normed_cls_token has B=2 but student_pooled has B=3; give both the same batch"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            loss(**given | change)
    with pytest.raises(TypeError) as caught:
        built(views=2)(**given)
    assert str(caught.value) == "DINOHeads: second_student_pooled must be given for views=2; pass it by name."
    with pytest.raises(ValueError, match="DINOHeads: noise must have shape"):
        loss(**given, noise=noise(num_patches=3))


def test_refuses_a_teacher_without_a_grid():
    student, teacher = infos()
    tokens = SignalInfo("normed_patch_tokens", "norm", (4, 4))
    with pytest.raises(ValueError, match="DINOHeads: teacher must have a patch grid, got none for normed_patch_tokens"):
        DINOHeads(cls_weight=0, gram_weight=1, patch_weight=0).build(student, ModelInfo.of(normed_patch_tokens=tokens))


@pytest.mark.parametrize("grids", [((1, 1), (2, 2)), ((2, 2), (1, 1))], ids=["student", "teacher"])
def test_refuses_pairs_within_an_image_of_a_single_patch(grids):
    """A single patch, interpolated or not, is like itself whatever the student does."""
    with pytest.raises(ValueError, match="DINOHeads: grids must have more than one position in common, got "):
        built(grids, gram_weight=1.0, gram_over="image")
    built(grids, gram_over="image")  # without that term
    loss = built(grids, gram_weight=1.0)  # with pairs of patches of the whole batch
    given = inputs(loss, grids)
    student = given["student_feature_map"].requires_grad_()
    loss(**given)["gram"].backward()
    assert student.grad.abs().max() > 1e-4


def test_must_be_built():
    loss = DINOHeads(*heads(5, 6), views=1)
    with pytest.raises(RuntimeError, match="DINOHeads: build must be called before forward; put the loss into a"):
        loss(**inputs(loss))
