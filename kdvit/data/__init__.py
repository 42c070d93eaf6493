"""Images to classify: open a source, augment it replayably, load and mix batches. Knows nothing of distillation."""

from kdvit.data.loading import EpochBatchSampler, ReplayableDataset, make_loader
from kdvit.data.mixing import BatchMixer
from kdvit.data.sources import names, open_data
from kdvit.data.splits import ImageData, ImageSplit, check_labels
from kdvit.data.transforms import FASHION_MNIST_TRANSFORM, TransformSettings

__all__ = [
    "FASHION_MNIST_TRANSFORM",
    "BatchMixer",
    "EpochBatchSampler",
    "ImageData",
    "ImageSplit",
    "ReplayableDataset",
    "TransformSettings",
    "check_labels",
    "make_loader",
    "names",
    "open_data",
]
