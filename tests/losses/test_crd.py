from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import kdvit
from kdvit.losses import CRD, crd
from kdvit.losses.crd import EPS
from kdvit.signals import ModelInfo, SignalInfo
from tests import tiny
from tests.losses.golden import assert_close, golden

CASES = golden("feature_crd")
#: Official names of what a CRD holds; v1 is the student.
OFFICIAL = {
    "embed_s.linear.": "student_head.0.",
    "embed_t.linear.": "teacher_head.0.",
    "contrast.memory_v1": "student_memory",
    "contrast.memory_v2": "teacher_memory",
}


def built(student_dim: int = 3, teacher_dim: int = 5, **options) -> CRD:
    loss = CRD(**{"dim": 4, "num_negatives": 6, "num_samples": 10, "other_labels": False} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        loss.build(*(ModelInfo.of(pooled=SignalInfo("pooled", "output", (dim,))) for dim in (student_dim, teacher_dim)))
    return loss


def features(batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(dtype) for dim in (3, 5))


IDS = torch.tensor([7, 0, 4])
NEGATIVES = torch.tensor([[1, 2, 3, 5, 6, 8], [1, 1, 9, 3, 2, 4], [0, 7, 9, 8, 5, 5]])


def ours(name: str) -> str:
    for theirs, our in OFFICIAL.items():
        name = name.replace(theirs, our)
    return name


def state(case, group: str) -> dict[str, Tensor]:
    """The official state by our names; log Z is infinite where the official one is not set."""
    weights = {ours(name): x for name, x in case.group(group).items()}
    z = weights.pop("contrast.params")[2:4]
    # The official first constant belongs to the scores of the student's embeddings.
    return weights | {"log_z": torch.where(z > 0, z, math.inf).log(), "seen_labels": torch.full((40,), -1)}


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss_and_memories(case):
    options = case.options
    loss = built(8, 12, dim=options["feat_dim"], num_negatives=options["nce_k"], temperature=options["nce_t"],
                 momentum=options["nce_m"], num_samples=options["n_data"])  # fmt: skip
    loss.load_state_dict(state(case, "w"))
    student = case["in.student"].clone().requires_grad_()
    index = case["in.contrast_idx"]
    assert torch.equal(index[:, 0], case["in.idx"])
    inputs = (student, case["in.teacher"], case["in.idx"])
    value = sum(loss(*inputs, negatives=index[:, 1:]).values())
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    expected = {ours(name): x for name, x in case.group("wgrad").items()}
    assert expected.keys() == {name for name, _ in loss.named_parameters()}
    for name, grad in expected.items():
        assert_close(loss.get_parameter(name).grad, grad, 1e-5)
    second = sum(loss(*inputs, negatives=index[:, 1:]).values())
    assert_close(second, case["out.loss_second"].squeeze(), 1e-5)
    after = state(case, "wafter")
    assert after.keys() == loss.state_dict().keys()
    for name, x in loss.state_dict().items():
        assert_close(x, after[name], 1e-5)


def test_equals_a_plain_loop():
    loss = built().double()
    student, teacher = features(dtype=torch.float64)
    memories = [loss.teacher_memory.clone(), loss.student_memory.clone()]
    terms = loss(student, teacher, IDS, negatives=NEGATIVES)
    loss.requires_grad_(False)
    for name, x, memory in (("student", student, memories[0]), ("teacher", teacher, memories[1])):
        head = getattr(loss, f"{name}_head")[0]
        embedded = [head.weight @ row + head.bias for row in x]
        embedded = [row / row.square().sum().sqrt() for row in embedded]
        own = [math.exp(memory[IDS[i]] @ embedded[i] / 0.07) for i in range(3)]
        others = [[math.exp(memory[j] @ embedded[i] / 0.07) for j in NEGATIVES[i]] for i in range(3)]
        z = 10 * (sum(own) + sum(map(sum, others))) / (3 * 7)
        value = 0.0
        for i in range(3):
            value -= math.log(own[i] / z / (own[i] / z + 6 / 10 + EPS)) / 3
            for other in others[i]:
                value -= math.log(6 / 10 / (other / z + 6 / 10 + EPS)) / 3
        assert terms[name].item() == pytest.approx(value, rel=1e-9)
        memory = getattr(loss, f"{name}_memory")
        before = memories[1] if name == "student" else memories[0]
        for i in range(3):
            moved = 0.5 * before[IDS[i]] + 0.5 * embedded[i]
            torch.testing.assert_close(memory[IDS[i]], moved / moved.norm(), rtol=1e-12, atol=0)
        untouched = [i for i in range(10) if i not in IDS]
        assert torch.equal(memory[untouched], before[untouched])


def test_gradients_in_float64_equal_differences_where_z_is_known():
    loss = built().double().eval()
    loss.log_z.copy_(torch.tensor([3.0, 4.0]))
    student, teacher = features(dtype=torch.float64)
    weights = dict(loss.named_parameters())

    def function(student: Tensor, *values: Tensor) -> Tensor:
        inputs = (student, teacher, IDS)
        terms = torch.func.functional_call(loss, dict(zip(weights, values)), inputs, {"negatives": NEGATIVES})
        return 2 * terms["student"] + terms["teacher"]

    assert torch.autograd.gradcheck(function, (student.requires_grad_(), *weights.values()))


def test_refuses_a_second_derivative():
    """Its gradient is found in forward: a second derivative would lack what the scores change."""
    student, teacher = features()
    value = built()(student.requires_grad_(), teacher, IDS, negatives=NEGATIVES)["student"]
    with pytest.raises(RuntimeError, match="CRD: create_graph must be False, got True; take differences of gradients"):
        torch.autograd.grad(value, student, create_graph=True)


def test_z_is_that_of_the_first_training_batch():
    loss = built()
    assert loss.log_z.isinf().all()
    loss.eval()(*features(), IDS, negatives=NEGATIVES)
    assert loss.log_z.isinf().all()
    loss.train()(*features(), IDS, negatives=NEGATIVES)
    first = loss.log_z.clone()
    assert first.isfinite().all() and first[0] != first[1]
    loss(*features(seed=1), IDS, negatives=NEGATIVES)
    assert torch.equal(loss.log_z, first)


def test_nothing_is_remembered_in_eval_mode():
    loss = built(other_labels=True).eval()
    before = copy.deepcopy(loss.state_dict())
    loss(*features(), IDS, torch.tensor([0, 1, 0]), torch.zeros(3, 2))
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


def test_an_image_that_is_there_twice_is_remembered_by_its_mean():
    loss, twin = built(), built()
    student, teacher = features(2)
    loss(student, teacher, torch.tensor([3, 3]), negatives=NEGATIVES[:2])
    with torch.no_grad():
        embedded = torch.nn.functional.normalize(twin.student_head(student), dim=1).mean(0)
    moved = 0.5 * twin.student_memory[3] + 0.5 * embedded
    torch.testing.assert_close(loss.student_memory[3], moved / moved.norm())


def test_its_own_image_pulls_and_others_push():
    loss = built(student_dim=4).eval()
    loss.student_head[0].load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
    loss.log_z.zero_()
    loss.teacher_memory[:4] = torch.eye(4)
    student = torch.ones(1, 4).requires_grad_()
    negatives = torch.ones(1, 6, dtype=torch.long)
    loss(student, features(1)[1], torch.tensor([0]), negatives=negatives)["student"].backward()
    own, other, *rest = student.grad[0]
    assert own < 0 < other  # downhill is towards its own row, away from that of the other image
    assert own < min(rest) and max(rest) < other


def test_scale_of_the_features_does_not_matter_behind_a_head_without_bias():
    loss = built().eval()
    torch.nn.init.zeros_(loss.student_head[0].bias)
    student, teacher = features()
    values = [loss(scale * student, teacher, IDS, negatives=NEGATIVES)["student"] for scale in (1.0, 7.0)]
    torch.testing.assert_close(*values)


def test_negatives_are_other_images():
    loss = built(num_negatives=4000)
    drawn = loss._draw(IDS, None)
    for i, row in enumerate(drawn):
        shares = torch.bincount(row, minlength=10) / 4000
        assert shares[IDS[i]] == 0
        assert ((shares - 1 / 9).abs() < 0.03)[torch.arange(10) != IDS[i]].all()


def test_negatives_are_not_known_to_have_the_label():
    loss = built(num_negatives=4000, other_labels=True)
    loss.seen_labels.copy_(torch.tensor([0, 1, 1, 2, -1, 0, -1, -1, 2, 1]))
    labels = torch.tensor([1, 0, 2])
    drawn = loss._draw(IDS, labels)  # of images 7, 0 and 4, whose labels the batch tells: 1, 0 and 2
    allowed = [{0, 3, 4, 5, 6, 8}, {1, 2, 3, 4, 6, 7, 8, 9}, {0, 1, 2, 5, 6, 7, 9}]
    for row, images in zip(drawn, allowed, strict=True):
        shares = torch.bincount(row, minlength=10) / 4000
        assert set(shares.nonzero().flatten().tolist()) == images
        assert (shares[list(images)] - 1 / len(images)).abs().max() < 0.03
    assert loss.seen_labels[7] == -1  # drawing remembers nothing


def test_labels_are_remembered_and_the_largest_share_counts():
    loss = built(other_labels=True)
    logits = torch.zeros(3, 4)
    loss(*features(), IDS, torch.tensor([3, 1, 2]), logits)
    assert loss.seen_labels.tolist() == [1, -1, -1, -1, 2, -1, -1, 3, -1, -1]
    soft = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0], [0.0, 0.0, 0.4, 0.6]])
    loss(*features(), IDS, soft, logits)
    assert loss.seen_labels[IDS].tolist() == [0, 1, 3]


def test_one_label_alone_still_gives_numbers():
    loss = built(num_samples=3, other_labels=True)
    terms = loss(*features(), torch.arange(3), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2))
    assert all(value.isfinite() for value in terms.values())


def test_generator_draws_the_negatives():
    loss = built().eval()
    values = []
    for seed in (7, 7, 8):
        loss.generator = torch.Generator().manual_seed(seed)
        values.append(loss(*features(), IDS)["student"].item())
    assert values[0] == values[1] != values[2]


def test_many_negatives_are_looked_up_in_parts():
    """More than one part, the last of them smaller; values as with all at once."""
    loss = built(num_negatives=150).eval()
    index = torch.randint(10, (3, 150), generator=torch.Generator().manual_seed(0))
    student, teacher = features()
    student.requires_grad_()
    loss(student, teacher, IDS, negatives=index)["student"].backward()
    embedded = torch.nn.functional.normalize(loss.student_head(copy.deepcopy(student.data).requires_grad_()), dim=1)
    rows = loss.teacher_memory[torch.cat([IDS[:, None], index], dim=1)]
    h = torch.einsum("bd,bkd->bk", embedded, rows).div(0.07).exp()
    h = h / (10 * h.mean().detach())
    value = -(h[:, 0] / (h[:, 0] + 15 + EPS)).log().mean() - (15 / (h[:, 1:] + 15 + EPS)).log().sum(1).mean()
    torch.testing.assert_close(loss(student, teacher, IDS, negatives=index)["student"], value)
    weight = loss.student_head[0].weight
    torch.testing.assert_close(weight.grad, torch.autograd.grad(value, weight)[0])


def test_no_lookup_is_larger_than_the_scores(monkeypatch):
    sizes = []

    def recorded(index: Tensor, dim: int) -> tuple[Tensor, ...]:
        parts = chunks(index, dim)
        sizes.extend(dim * part.numel() for part in parts)
        return parts

    chunks = crd._chunks
    monkeypatch.setattr(crd, "_chunks", recorded)
    loss = built(num_negatives=999)
    loss(*features(), IDS)
    assert len(sizes) > 4 and max(sizes) <= 3 * 1000 * 1.1


@pytest.mark.parametrize("options", [{"temperature": 0.2}, {"dim": 8}, {"num_samples": 20}], ids=str)
def test_options_change_the_value(options):
    def value(**options) -> float:
        return sum(built(**options)(*features(), IDS, negatives=NEGATIVES).values()).item()

    assert abs(value(**options) - value()) > 1e-3


def test_momentum_changes_what_is_remembered():
    after = []
    for momentum in (0.0, 0.5, 0.9):
        loss = built(momentum=momentum)
        before = loss.student_memory.clone()
        loss(*features(), IDS, negatives=NEGATIVES)
        after.append((loss.student_memory - before).norm().item())
    assert after[0] > after[1] > after[2]


def test_labels_are_read_only_where_they_matter():
    assert CRD().inputs() == ("student_pooled", "teacher_pooled", "sample_ids", "labels", "student_logits")
    assert CRD(other_labels=False).inputs() == ("student_pooled", "teacher_pooled", "sample_ids")


def test_training_waits_for_the_number_of_images():
    loss = built(num_samples=None)
    ids, some = torch.tensor([0, 1, 0]), NEGATIVES % 2
    loss.eval()(*features(), ids, negatives=some)  # the Distiller's rehearsal
    with pytest.raises(RuntimeError) as caught:
        loss.train()(*features(), ids, negatives=some)
    assert str(caught.value) == (
        "CRD: the memories must be allocated before training; train with kdvit.Trainer, pass num_samples=, or call "
        "allocate(number of training images)."
    )
    loss.allocate(10)
    assert loss.student_memory.shape == loss.teacher_memory.shape == (10, 4)
    loss(*features(), IDS, negatives=NEGATIVES)
    assert "num_samples=None" in repr(loss)


def test_a_given_number_of_images_stays():
    loss = built()
    before = loss.student_memory.clone()
    loss.allocate(8)
    assert torch.equal(loss.student_memory, before)
    with pytest.raises(ValueError) as caught:
        loss.allocate(11)
    assert str(caught.value) == "CRD: num_samples must be at least the 11 training images, got 10; leave it out."


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"dim": 0}, ValueError, "CRD: dim must be > 0, got 0; 128 is the published width."),
        ({"num_negatives": 1.5}, TypeError,
         "CRD: num_negatives must be an integer > 0, got 1.5; 16384 is the published number."),
        ({"temperature": 0}, ValueError, "CRD: temperature must be > 0, got 0; the published value is 0.07."),
        ({"momentum": -1}, ValueError, "CRD: momentum must be >= 0, got -1; the published value is 0.5."),
        ({"momentum": 1}, ValueError, "CRD: momentum must be < 1, got 1; with 1 the memories would never change."),
        ({"num_samples": 1}, ValueError, "CRD: num_samples must be >= 2, got 1; one image has none to differ from."),
        ({"other_labels": 1}, TypeError, "CRD: other_labels must be True or False, got 1; write one of them."),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        CRD(**options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"sample_ids": torch.tensor([1, 10, 3])}, ValueError,
         "CRD: sample_ids must be in 0..9, got 1..10; allocate the memories for all training images."),
        ({"sample_ids": torch.tensor([1, -1, 3])}, ValueError,
         "CRD: sample_ids must be in 0..9, got -1..3; allocate the memories for all training images."),
        ({"sample_ids": torch.rand(3)}, TypeError,
         "CRD: sample_ids must be integers, got torch.float32; pass sample_ids.long()."),
        ({"sample_ids": torch.tensor([[1], [2], [3]])}, ValueError,
         "CRD: sample_ids must have shape (B,), got (3, 1); give one per image."),
        ({"sample_ids": torch.tensor([1, 2])}, ValueError,
         "CRD: sample_ids has B=2 but student_pooled has B=3; give both the same batch."),
        ({"negatives": NEGATIVES[:, :5]}, ValueError,
         "CRD: negatives must have shape (3, 6), got (3, 5); give num_negatives sample ids for each image."),
        ({"teacher_pooled": torch.rand(3, 4)}, ValueError,
         "CRD: teacher_pooled must have D=5 as in build, got D=4; build the loss for these models."),
        ({"student_pooled": torch.rand(3, 4, 3)}, ValueError,
         "CRD: student_pooled must have shape (B, D), got (3, 4, 3); give the signal of that name."),
    ],
    ids=range(8),
)  # fmt: skip
def test_refuses_other_inputs(change, error, sentence):
    student, teacher = features()
    inputs = {"student_pooled": student, "teacher_pooled": teacher, "sample_ids": IDS, "negatives": NEGATIVES}
    with pytest.raises(error) as caught:
        built()(**inputs | change)
    assert str(caught.value) == sentence


def test_must_be_built_and_given_its_labels():
    with pytest.raises(RuntimeError, match="CRD: build must be called before forward; put the loss into a kdvit"):
        CRD()(*features(), IDS)
    with pytest.raises(RuntimeError, match="CRD: build must be called before forward; put the loss into a kdvit"):
        CRD().allocate(10)
    with pytest.raises(TypeError) as caught:
        built(other_labels=True)(*features(), IDS)
    assert str(caught.value) == (
        "CRD: labels and student_logits must be given with other_labels=True; pass both, or other_labels=False."
    )


def test_memories_are_made_alike_everywhere_and_not_copied_at_each_step():
    def memories(seed: int) -> tuple[kdvit.Distiller, dict[str, Tensor]]:
        torch.manual_seed(seed)
        distiller = kdvit.Distiller(tiny.vit(7), tiny.vit(), [CRD(dim=8, num_negatives=4)])
        distiller.allocate(9)
        loss = distiller.losses["crd"]
        return distiller, {name: getattr(loss, name) for name in loss.replicated}

    (distiller, first), (_, second) = memories(0), memories(1)
    assert set(first) == {"student_memory", "teacher_memory", "seen_labels"}
    assert all(len(x) == 9 and torch.equal(x, second[name]) for name, x in first.items())
    left_alone = distiller._ddp_params_and_buffers_to_ignore  # what DistributedDataParallel goes by
    assert {f"losses.crd.{name}" for name in first} <= set(left_alone) & set(distiller.state_dict())
    assert not any("memory" in name for name in distiller.parameters_without_gradient)
