"""Every feature method on the same small job: accuracy over seeds, what a step costs, and memory at ViT-B size.

Command   python benchmarks/feature_methods.py accuracy [--seeds 0 1 2] [--only vitkd at]
          python benchmarks/feature_methods.py cost
          python benchmarks/feature_methods.py page [--seeds 0 1 2]
          python benchmarks/feature_methods.py memory

The first three are those of `response_methods.py`, see there; costs are relative to a step of plain KD with the same
ViT teacher. `memory` is `feature_memory.py`: forward and backward of the loss alone at ViT-B size, against the formula
written down plainly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import feature_memory
from response_methods import METHODS as RESPONSE_METHODS
from small_job import ALONE, CNN, TRAINING, VIT, Job, Method, create_model, main, one

from kdvit.cli.quickstart import STUDENT
from kdvit.losses import make
from kdvit.schedules import Steps

#: Half of the epochs for the teacher alone, the rest for the labels alone: pretraining and fine-tuning in one run.
_FIRST_HALF, _SECOND_HALF = Steps({0: 1.0, TRAINING.epochs / 2: 0.0}), Steps({0: 0.0, TRAINING.epochs / 2: 1.0})
BOTH = (VIT, CNN)


def feature(name: str, weight: Any = 1.0, *, task_weight: float = 1.0, note: str = "", **options: Any) -> Method:
    """A loss taught by the shipped ViT, beside the labels."""
    return Method(one(name, weight, **options), task_weight, VIT, note=note)


def pretraining(name: str, *, note: str = "", **options: Any) -> Method:
    """A loss that pretrains, then the labels."""
    return Method(one(name, _FIRST_HALF, **options), _SECOND_HALF, VIT, note=note)


def dino_heads(runs: Path, seed: int) -> list:
    """The shipped ViT has no DINO head: its classifier, ten prototypes, stands in for one."""
    head = create_model(VIT).get_classifier()
    return [(_FIRST_HALF, make("dino_heads", cls_head=head, patch_head=head))]


# Weights and options are the published ones for small images, where there are any; the notes name the others. The
# student has 4 blocks of width 96 with 3 heads, the ViT 6 blocks of width 96 with 4 heads, both on a 4x4 grid; the
# CNN's stage "layer2" has the same grid.
METHODS: dict[str, Method] = {
    "alone": ALONE,
    "kd, ViT teacher": RESPONSE_METHODS["kd, ViT teacher"],
    # ViT-native
    "vitkd": feature("vitkd"),
    "tinymim, then labels": pretraining("tinymim", num_relation_heads=12),
    "minilm, then labels": pretraining("minilm"),
    "attndistill, then labels": pretraining("attndistill"),
    "manifold": Method(lambda runs, seed: [(1.0, make("kd", temperature=1.0)), (1.0, make("manifold"))], 0.0, VIT),
    "attention_probe": feature("attention_probe", 0.8),
    "cross_arch": feature("cross_arch"),
    "dearkd": Method(one("dearkd", _FIRST_HALF), 1.0, CNN, note="off after half of the epochs"),
    "mr_mae, then labels": pretraining("mr_mae"),
    "cls_queue, then labels": pretraining("cls_queue", normed_teacher=True),
    "dense, then labels": pretraining("dense"),
    "cls_dense, then labels": pretraining("cls_dense", normed_teacher=True),
    "dino_heads, then labels": Method(dino_heads, _SECOND_HALF, VIT, note="the teacher's classifier as DINO's head"),
    # From other tasks
    "pfi": feature("pfi"),
    "vit_frd": Method(one("vit_frd"), 1.0, CNN, note="numbers are ours"),
    "cfd": feature("cfd"),
    "afd": Method(lambda runs, seed: [(0.9, make("kd")), (200.0, make("afd"))], 1.0, VIT),
    "sam_net": feature("sam_net", note="numbers are ours"),
    "kdfas": feature("kdfas", 0.05, note="numbers are ours"),
    "dmkd": feature("dmkd", note="numbers are ours"),
    "promptkd": feature("promptkd", 10.0, task_weight=0.0, note="its mean is over classes too: weight C, as for KD"),
    "crosskd": feature("crosskd"),
    "pkd": feature("pkd", note="the published weight 6 is for detectors"),
    "takt": feature("takt", 0.3),
    "tat": Method(one("tat", 0.2), 0.1, VIT),
    # Several teachers
    "kd, both teachers": Method(one("kd", 0.9), 0.1, BOTH),
    "ca_mkd": Method(one("ca_mkd"), 1.0, BOTH),
    "mmkd": Method(one("mmkd", batch_size=TRAINING.batch_size), 1.0, BOTH),
    # The classical ones
    "fitnet": feature("fitnet", 100.0),
    "at": feature("at", 1000.0),
    "sp": feature("sp", 3000.0),
    "nst": feature("nst", 50.0),
    "rkd": feature("rkd"),
    "pkt": feature("pkt", 30000.0),
    "cc": feature("cc", 0.02, note="the weight is published for the official code's formula, not for this one"),
    "vid": feature("vid"),
    "ft": feature("ft", 200.0),
    "crd": feature(
        "crd",
        0.8,
        num_negatives=2048,
        note="2,048 negatives of 8,000 images (published: 16,384 of 50,000); run before its memories began alike",
    ),
    "ofd": Method(one("ofd", 1e-3), 1.0, CNN),
    "reviewkd": feature("reviewkd"),
    "mgd": feature("mgd", 7e-5),
    "cwd": feature("cwd", 50.0),
    "srrl": feature("srrl", feature="pooled", relu=False),
    "simkd": Method(one("simkd"), 0.0, CNN, note="deployed with the CNN's classifier"),
    "simkd, ViT teacher": feature(
        "simkd", task_weight=0.0, feature="pooled", relu=False, note="deployed with the ViT's classifier"
    ),
}

_TEXT = f"""\
The job of [response methods](response_methods.md): the quickstart's student, a ViT {json.dumps(STUDENT)},
{TRAINING.epochs} epochs of 8,000 images (7,200 for mmkd, ft and ofd, which hold a tenth out), batch
{TRAINING.batch_size}, AdamW lr {TRAINING.lr:g}, weight decay {TRAINING.weight_decay:g}, images flipped at random.
Teachers: a ViT of 6 blocks of width 96 (89.5 %), also 4x4 patches; where it is the method's case, a CNN (92.7 %).
Accuracy on the 2,000 test images, last epoch, mean and standard deviation over seeds; "minus alone" is the difference
to the row `alone`, seed by seed. Rows "..., then labels" are methods of pretraining: three epochs of the teacher alone,
three of the labels alone, in one run, so they see the labels half as often as `alone` does. Time and memory are those
of a training step relative to `kd`'s with the ViT teacher: the median over rounds timed in turn in one process, and the
peak of what torch allocates in the step.

What this can rank: what a method costs; and differences of several points, such as a method whose published weight does
not fit ten classes, a small grid or six epochs. What it cannot: methods within about two points of each other. The
standard error of one accuracy on 2,000 images is 0.9 points, three seeds are few, and nothing was tuned: weights are
those published, mostly for CNNs on CIFAR-100 and hundreds of epochs; where none is known, or where it depends on the
number of classes, the notes say so. Teacher and student have the same width here, so projectors between widths play no
part."""

JOB = Job("feature_methods", "Feature methods on one small job", _TEXT, "kd, ViT teacher", METHODS)

if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        feature_memory.main(sys.argv[2:])
    else:
        main(JOB, __doc__)
