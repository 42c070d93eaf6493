"""Every response method on the same small job: accuracy over seeds, and what a step costs next to plain KD.

Command   python benchmarks/response_methods.py accuracy [--seeds 0 1 2] [--only kd dkd]
          python benchmarks/response_methods.py cost
          python benchmarks/response_methods.py page [--seeds 0 1 2]

`accuracy` trains the quickstart's student once for every method and seed, with the same images, epochs, batch and
learning rate, and the shipped teacher; runs that are there already are kept. `cost` times training steps of each method
and of `kd` in turn, in one process, and takes the median of the ratios; memory is the peak of what torch allocates in
a step, beyond what is held before it. `page` writes docs/benchmarks/response_methods.md, and all figures as JSON
beside it, from both.
"""

from __future__ import annotations

import json
from pathlib import Path

from small_job import ALONE, CNN, TRAINING, VIT, Job, Method, main, one

from kdvit.cli.quickstart import STUDENT
from kdvit.data import open_data
from kdvit.generation import train_generator
from kdvit.losses import make
from kdvit.schedules import Linear, Steps, WarmUp

GENERATOR_EPOCHS = 5


def mekd(runs: Path, seed: int) -> list:
    """MEKD beside the labels, on real images; its generator is trained once and not counted in the seconds."""
    return [(1.0, make("mekd", generator=generator(runs)))]


def generator(runs: Path, epochs: int = GENERATOR_EPOCHS) -> Path:
    """MEKD's first stage: a generator of images, trained once."""
    path = runs / "generator"
    if not (path / "config.json").is_file():
        data = open_data("fashion-mnist-sample")
        train_generator(CNN, data, image_size=28, width=32, epochs=epochs, batch_size=64, seed=0).save(path)
    return path


# Weights and options are the published ones for small images (CIFAR-100), where there are any; warm-ups of 20 of 240
# epochs become 1 of 6; k, gamma and weights that depend on the number of classes are set for 10 classes, see `note`.
METHODS: dict[str, Method] = {
    "alone": ALONE,
    "kd": Method(one("kd", 0.9), 0.1),
    "kd, standardised": Method(one("kd", 9.0, standardize=True, temperature=2.0), 0.1),
    "kd, T from 8 to 2": Method(one("kd", 0.9, temperature=Linear(8.0, 2.0)), 0.1, note="not published: a schedule"),
    "deit hard": Method(one("deit", 0.5), 0.5, distilled=True),
    "deit soft": Method(one("deit", 0.5, kind="soft", temperature=3.0), 0.5, distilled=True),
    "dkd": Method(one("dkd", WarmUp(epochs=1))),
    "dkd, standardised": Method(one("dkd", WarmUp(epochs=1), standardize=True, alpha=9.0, beta=72.0, temperature=2.0)),
    "normkd": Method(one("normkd", 0.9), 0.1),
    "nkd": Method(one("nkd", 1.0, gamma=1.0, temperature=1.0)),
    "uskd": Method(one("uskd", 1.0, alpha=0.1, beta=0.1, mu=0.1, feature="cls_token"), teacher=None),
    "atkd": Method(one("atkd", 1.0, alpha=Steps({0: 0.9, 3.6: 0.5, 4.8: 0.1})), 0.0, note="steps at 60 and 80 %"),
    "mkd": Method(one("mkd", 1.0), note="numbers are ours"),
    "mlld": Method(one("mlld", 0.9), 0.1),
    "skd": Method(one("skd", 1.0), note="numbers are ours"),
    "ptloss": Method(one("ptloss", 1.0), note="numbers are ours"),
    "ntce": Method(one("ntce", WarmUp(8.0, epochs=1))),
    "ntce, two views": Method(one("ntce", WarmUp(8.0, epochs=1), diversity=True)),
    "cskd": Method(lambda runs, seed: [(0.5, make("deit")), (1.0, make("cskd"))], 0.5, VIT, distilled=True),
    "tfkd self": Method(one("tfkd", 0.95, multiplier=10.0), 0.05, "self", note="multiplier C, as for 100 classes"),
    "tfkd regularization": Method(
        one("tfkd", 0.1, kind="regularization", multiplier=10.0), 0.9, None, note="multiplier C, as for 100 classes"
    ),
    "tfkd label smoothing": Method(one("tfkd", 0.1, kind="label_smoothing"), 0.9, None),
    "ofakd": Method(one("ofakd", 1.0)),
    "mekd": Method(mekd, note="on real images, beside the labels; published: generated images alone"),
    "ttm": Method(one("ttm", 4.0, gamma=0.5), note="weight and gamma are published for 100 classes only"),
    "wttm": Method(one("wttm", 1.0, gamma=0.5), note="weight and gamma are published for 100 classes only"),
    "tinyvit": Method(one("tinyvit", 1.0, k=3), 0.0, note="k for 10 classes"),
    "sdd": Method(one("sdd", 0.9, scales=(1, 2)), 0.1, VIT),
    "dist": Method(one("dist", 2.0, temperature=4.0)),
    "mtkd_ssr": Method(one("mtkd_ssr", 1.0), note="numbers are ours"),
    "psd": Method(one("psd", 1.0), teacher=None, note="numbers are ours"),
    "kd, ViT teacher": Method(one("kd", 0.9), 0.1, VIT, note="the teacher of methods that need a grid of patches"),
}

_TEXT = f"""\
The quickstart's student, a ViT {json.dumps(STUDENT)} (with a distillation token for deit and cskd),
{TRAINING.epochs} epochs of 8,000 images (7,200 for mkd and ptloss, which hold a tenth out), batch
{TRAINING.batch_size}, AdamW lr {TRAINING.lr:g}, weight decay {TRAINING.weight_decay:g}, images flipped at random.
Accuracy on the 2,000 test images, last epoch, mean and standard deviation over seeds; "minus alone" is the difference
to the row `alone`, seed by seed. Time and memory are those of a training step relative to `kd`'s: the median over
rounds timed in turn in one process, and the peak of what torch allocates in the step.

What this can rank: what a method costs; and differences of several points, such as a method whose published weights do
not fit ten classes or six epochs. What it cannot: methods within about two points of each other. The standard error of
one accuracy on 2,000 images is 0.9 points, three seeds are few, nothing was tuned, and the weights are those published
for 100 or 1,000 classes and hundreds of epochs. A method that is not first here is not worse: these papers win by one
or two points after long training."""

JOB = Job("response_methods", "Response methods on one small job", _TEXT, "kd", METHODS)

if __name__ == "__main__":
    main(JOB, __doc__)
