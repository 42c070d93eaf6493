"""The share of each loss in the student's gradient: right, and without a trace in the training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdvit import Distiller
from kdvit.losses import ViTKD
from kdvit.training.gradient_share import gradient_share
from tests import tiny
from tests.processes import run_two
from tests.training import gradient_share_worker as worker
from tests.training.conftest import distiller as trainer_distiller
from tests.training.conftest import metrics


def make(dropout: float = 0.0) -> Distiller:
    torch.manual_seed(3)
    losses = [(0.5, "kd"), ViTKD(alpha=1e-2, beta=1e-2)]
    return Distiller(tiny.vit(7, embed_dim=32), tiny.vit(proj_drop_rate=dropout), losses, task_weight=0.7).train()


def test_terms_sum_to_the_loss_and_their_graph_goes_with_it():
    distiller = make()
    out = distiller(tiny.images(), tiny.labels())
    assert list(out.weighted) == ["task", "kd", "vitkd.mimic", "vitkd.generate"] == list(out.losses)
    assert torch.equal(sum(out.weighted.values()), out.loss)
    torch.testing.assert_close(out.weighted["kd"], 0.5 * out.losses["kd"], rtol=0, atol=0)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.weighted["task"].backward()


def test_shares_and_cosines_are_those_of_separate_backward_passes():
    distiller = make()
    torch.manual_seed(0)
    out = distiller(tiny.images(), tiny.labels())
    found = gradient_share(out.weighted, distiller.student.parameters())
    gradients = {}
    for name in out.weighted:
        other = copy.deepcopy(distiller)
        torch.manual_seed(0)
        other(tiny.images(), tiny.labels()).weighted[name].backward()
        gradients[name] = torch.cat(
            [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in other.student.parameters()]
        ).double()
    total = sum(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert found.share[name] == pytest.approx((gradient.norm() / total).item(), abs=2e-6)
        if name != "task":
            cosine = torch.cosine_similarity(gradient, gradients["task"], dim=0).item()
            assert found.cosine[name] == pytest.approx(cosine, abs=2e-5)
    assert min(found.share.values()) > 1e-4 and sum(found.share.values()) == pytest.approx(1, abs=1e-5)
    assert set(found.cosine) == {"kd", "vitkd.mimic", "vitkd.generate"}


def test_the_task_may_come_last_or_be_missing():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    terms = {"kd": w[0] + w[1], "task": w[0] * 4}
    found = gradient_share(terms, [w])
    assert found.cosine == {"kd": pytest.approx(0.5**0.5, abs=1e-6)}
    assert list(found.share) == ["kd", "task"] and found.share["task"] == pytest.approx(4 / (4 + 2**0.5), abs=1e-6)
    assert gradient_share({"kd": terms["kd"]}, [w]).cosine == {}


def test_nothing_is_left_behind():
    distiller = make()
    parameters = list(distiller.parameters())
    counts = {"accumulated": 0}
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: counts.update(accumulated=counts["accumulated"] + 1))
    out = distiller(tiny.images(), tiny.labels())
    state = torch.get_rng_state()
    assert gradient_share(out.weighted, distiller.student.parameters()) is not None
    assert counts["accumulated"] == 0 and all(parameter.grad is None for parameter in parameters)
    assert torch.equal(torch.get_rng_state(), state)
    out.loss.backward()
    assert counts["accumulated"] > 10


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_training_is_the_same_to_the_bit(autocast):
    ends = []
    for measure in (False, True):
        distiller = make(dropout=0.2)
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = distiller(tiny.images(seed=step), tiny.labels())
            if measure:
                shares = gradient_share(out.weighted, distiller.student.parameters()).share
                assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(distiller.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["student.model.head.weight"], make().student.model.head.weight)


def test_a_term_that_does_not_pull_has_no_share():
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    terms = {"task": w.sum(), "off": 0 * w.sum(), "constant": torch.tensor(3.0), "elsewhere": other.sum()}
    found = gradient_share(terms, [w])
    assert found.share == {"task": 1.0, "off": 0.0, "constant": 0.0, "elsewhere": 0.0}
    assert found.cosine == {}
    assert gradient_share({"off": 0 * w.sum()}, [w]).share == {"off": 0.0}


def test_a_frozen_parameter_does_not_count():
    w, frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)
    found = gradient_share({"task": (w * frozen).sum(), "kd": (3 * w).sum()}, [w, frozen])
    assert found.share == {"task": 0.25, "kd": 0.75}


def test_scale_keeps_small_half_precision_gradients_and_no_ratio_depends_on_it():
    w = nn.Parameter(torch.ones(4))
    terms = {"task": w.sum() * 2**-24, "kd": (w.half() * 2**-14).float().sum() * 2**-14}  # 2^-28 underflows in half
    assert gradient_share(terms, [w]).share["kd"] == 0
    found = gradient_share(terms, [w], scale=2.0**16)
    plain = gradient_share({"task": w.sum() * 2**-24, "kd": w.sum() * 2**-28}, [w])
    assert found.share["kd"] == pytest.approx(1 / 17, abs=1e-6)
    assert found == plain and found.cosine == {"kd": 1.0}
    distiller = make()
    out = distiller(tiny.images(), tiny.labels())
    one, scaled = (gradient_share(out.weighted, distiller.student.parameters(), scale=s) for s in (1.0, 1024.0))
    assert one == scaled  # a power of two


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_gives_none(value):
    w = nn.Parameter(torch.ones(2))
    assert gradient_share({"task": w.sum(), "kd": (w * value).sum()}, [w]) is None


def test_wrong_arguments_are_refused():
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(
        ValueError, match=r"weighted must hold a term, got none; pass DistillerOutput\.weighted of a step"
    ):
        gradient_share({}, [w])
    with pytest.raises(ValueError, match="parameters must hold one that requires a gradient, got none"):
        gradient_share({"task": w.sum()}, [w.detach()])


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.ones(2), DeviceMesh("cpu", [0])))
        with pytest.raises(ValueError, match=r"must be whole in every process, got sharded ones \(FSDP\); leave"):
            gradient_share({"task": torch.ones(())}, [sharded])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_the_joined_batch_and_train_as_without_measuring(tmp_path):
    ranks = run_two(["-m", "tests.training.gradient_share_worker"], tmp_path)
    for rank in ranks:
        assert all(torch.equal(rank["plain"][name], value) for name, value in rank["measured"].items())
        assert len(rank["shares"]) == 2 * worker.NUM_STEPS
    assert ranks[0]["shares"][::2] == ranks[1]["shares"][::2]  # averaged
    assert ranks[0]["shares"][1::2] != ranks[1]["shares"][1::2]  # of each one's own images
    distiller, _ = worker.make()
    images, labels = worker.batch(0)
    one = gradient_share(distiller(images, labels).weighted, distiller.student.parameters())
    assert ranks[0]["shares"][0]["share"] == pytest.approx(one.share, abs=2e-6)
    assert ranks[0]["shares"][0]["cosine"] == pytest.approx(one.cosine, abs=2e-6)


def test_a_run_records_it_and_stays_the_same_run(make_trainer, tmp_path):
    for name, every in (("with", 3), ("without", None)):
        subject = trainer_distiller([(0.5, "kd"), "vitkd"])
        make_trainer(subject, folder=tmp_path / name, epochs=2, gradient_share_steps=every).fit()
    for file in ("student/model.safetensors", "state/step_00000008/tensors.safetensors"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    found = metrics(tmp_path / "with", "gradient")
    assert [record["step"] for record in found] == [3, 6]
    for record in found:
        assert list(record["gradient_share"]) == ["task", "kd", "vitkd.mimic", "vitkd.generate"]
        assert sum(record["gradient_share"].values()) == pytest.approx(1, abs=1e-5)
        assert list(record["gradient_cosine"]) == ["kd", "vitkd.mimic", "vitkd.generate"]
    assert metrics(tmp_path / "with", "step") == metrics(tmp_path / "without", "step")
