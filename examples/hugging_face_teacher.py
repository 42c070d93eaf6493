"""A Hugging Face teacher and a timm student: signals have the same names on both sides.

With the network: ``ViTForImageClassification.from_pretrained("google/vit-base-patch16-224")`` in place of the random
one, and ``mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)``, which is what that checkpoint was trained with: transformers
keeps it in the image processor, so the model itself cannot say it.
"""

import timm
import torch
from transformers import ViTConfig, ViTForImageClassification

import kdvit
from kdvit.losses import KD, TinyMIM

torch.manual_seed(0)
config = ViTConfig(
    image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192,
    num_labels=10,
)  # fmt: skip
teacher = kdvit.Teacher(ViTForImageClassification(config), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
student = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10, embed_dim=48, depth=2, num_heads=3
)

# Queries, keys and values of the teacher's third layer, read under its fused attention; its last layer need not run
# for TinyMIM, but does for KD.
distiller = kdvit.Distiller(teacher, student, losses=[TinyMIM(teacher_block=2), (0.5, KD(temperature=2.0))])
print(distiller.describe())

optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
images, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
for step in range(5):
    out = distiller(images, labels)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    print(step, round(out.loss.item(), 4), {name: round(value.item(), 4) for name, value in out.losses.items()})
