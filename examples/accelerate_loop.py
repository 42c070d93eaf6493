"""A training loop of your own on Accelerate: one process or many, DDP, FSDP2, or DeepSpeed by its launcher's file.

python examples/accelerate_loop.py
accelerate launch --config_file recipes/accelerate/fsdp2.yaml examples/accelerate_loop.py
"""

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import kdvit
from kdvit.data import make_loader, open_data
from kdvit.training import transform_for
from kdvit.training.launch import autocast_alone
from kdvit.training.sharding import full_state, keep_tapped, make_equal

accelerator = Accelerator()
autocast_alone(accelerator)  # under FSDP: float32 weights, and half precision where autocast says so
set_seed(0)  # the same new weights in every process

student = timm.create_model(
    "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=48, depth=3, num_heads=4
)
distiller = kdvit.Distiller("fashion_mnist_vit", student, losses=["kd", "tinymim"]).to(accelerator.device)
make_equal(distiller)  # of new weights, each process would otherwise keep its own share under FSDP
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
data = open_data("fashion-mnist-sample")
loader = make_loader(data.train, transform_for(distiller.student), batch_size=128, train=True)
if accelerator.state.deepspeed_plugin is not None:  # it cannot see a batch size in a batch sampler
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 128
model, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
keep_tapped(distiller)  # where FSDP has shared out blocks that a loss reads inside of

model.train()
for step, batch in enumerate(loader):
    with accelerator.autocast():
        out = model(batch["image"], batch["label"])
    accelerator.backward(out.loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        accelerator.print(step, {name: round(value.item(), 4) for name, value in out.losses.items()})
    if step == 30:
        break

weights = full_state(distiller.student_state_dict())  # of all processes together, so all of them must call it
if accelerator.is_main_process:
    torch.save(weights, "student.pt")  # the plain timm model's weights
