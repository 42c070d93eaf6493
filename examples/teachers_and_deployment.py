"""Several teachers, weighted image by image; and a student that is shipped with its teacher's classifier.

Both shipped teachers teach one student; then the CNN's student learns its features alone and predicts through the CNN's
own classifier. What is saved needs no teacher.
"""

import torch

import kdvit
from kdvit.data import FASHION_MNIST_TRANSFORM as TRANSFORM
from kdvit.data import make_loader, open_data


def small_vit() -> kdvit.Student:
    facts = dict(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=48, depth=3, num_heads=3)
    model = kdvit.create_model("vit_tiny_patch16_224", **facts)
    return kdvit.Student(model, mean=TRANSFORM.mean, std=TRANSFORM.std)


def train(distiller: kdvit.Distiller, steps: int) -> None:
    data = open_data("fashion-mnist-sample").subset(512, 32)
    loader = make_loader(data.train, TRANSFORM, batch_size=64, seed=0, train=True)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    distiller.train()
    for _, batch in zip(range(steps), loader):
        out = distiller(batch["image"], batch["label"])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        print({name: round(value.item(), 4) for name, value in out.losses.items()})


torch.manual_seed(0)
teachers = ["fashion_mnist_vit", "fashion_mnist_cnn"]

# CA-MKD trusts, for each image, the teachers that know its label; "kd" reads one teacher, and is averaged over both.
train(kdvit.Distiller(teachers, small_vit(), losses=["ca_mkd", (0.5, "kd")]), steps=4)

# SimKD: no labels, no logits; the student's own classifier is replaced.
distiller = kdvit.Distiller("fashion_mnist_cnn", small_vit(), losses=["simkd"], task_loss=None)
train(distiller, steps=4)
deployed = distiller.deployable.eval()
kdvit.save_model(deployed, "student", normalisation=(TRANSFORM.mean, TRANSFORM.std))

loaded = kdvit.create_model("student")  # alone: projector and classifier are inside
images = torch.randn(2, 1, 28, 28)
print("the same logits:", torch.equal(loaded(images), deployed(images)))
