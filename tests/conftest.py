"""Nothing in these tests may reach for the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before a library that reads it once, at import
