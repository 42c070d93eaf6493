"""A loss of your own: its inputs are the parameters of `forward`, where it reads is a constructor argument."""

import timm
import torch
from torch import Tensor, nn

import kdvit
from kdvit.losses import Loss, make, register


@register("cosine")
class Cosine(Loss):
    """Turn the student's patch tokens towards the teacher's: 1 - cos, after a linear map to the teacher's width."""

    def __init__(self, student_block: int = -1, teacher_block: int = -1) -> None:
        super().__init__()
        self.student_block, self.teacher_block = student_block, teacher_block

    def locations(self) -> dict[str, int]:
        return {"student_patch_tokens": self.student_block, "teacher_patch_tokens": self.teacher_block}

    def build(self, student: kdvit.signals.ModelInfo, teacher: kdvit.signals.ModelInfo) -> None:
        # Called once with real sizes, before the optimizer exists; trained with the student, never exported with it.
        self.projector = nn.Linear(student["patch_tokens"].dim, teacher["patch_tokens"].dim)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(self.projector(student_patch_tokens), teacher_patch_tokens, dim=-1).mean()


small = {"img_size": 32, "patch_size": 8, "num_classes": 10, "num_heads": 3}
teacher = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=96, **small)
student = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, **small)

distiller = kdvit.Distiller(teacher, student, losses=[(0.5, make("cosine", teacher_block=2)), "kd"])
print(distiller.describe())
out = distiller(torch.randn(8, 3, 32, 32), torch.arange(8))
out.loss.backward()
print({name: round(value.item(), 4) for name, value in out.losses.items()})
