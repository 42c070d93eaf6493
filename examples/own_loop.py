"""Distillation in a training loop of your own: three lines more than without."""

import timm
import torch

import kdvit
from kdvit.data import make_loader, open_data
from kdvit.losses import KD, ViTKD
from kdvit.training import transform_for

student = timm.create_model(
    "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=48, depth=3, num_heads=3
)

distiller = kdvit.Distiller("fashion_mnist_vit", student, losses=[KD(temperature=4.0), ViTKD()])
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
# Images normalised as the student states it; the teacher, who was trained with another mean and std, gets its own.
data = open_data("fashion-mnist-sample")
loader = make_loader(data.train, transform_for(distiller.student), batch_size=128, train=True)

distiller.train()
for step, batch in enumerate(loader):
    out = distiller(batch["image"], batch["label"])
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(step, {name: round(value.item(), 4) for name, value in out.losses.items()})
    if step == 30:
        break

torch.save(distiller.student_state_dict(), "student.pt")  # the plain timm model's weights
student.load_state_dict(torch.load("student.pt", weights_only=True), strict=True)
