"""Nothing in these tests may reach for the network, and none gains from threads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before a library that reads it once, at import

import torch  # noqa: E402

torch.set_num_threads(1)  # models this small wait for their threads longer than they compute
