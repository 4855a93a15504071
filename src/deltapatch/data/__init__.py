"""Folders, ``.npz``, Parquet and hub sets of labelled images, as batches in a base's own preprocessing."""

from deltapatch.data.batches import Batch, Batches, drawn_views, load_batches
from deltapatch.data.dataset import BadImage, ImageSet, Provenance, TaskData
from deltapatch.data.decode import ImageLimits, decode_image
from deltapatch.data.opening import list_images, open_data, open_images
from deltapatch.data.transforms import ImageTransform, evaluation_transform, training_transform

__all__ = [
    "BadImage",
    "Batch",
    "Batches",
    "ImageLimits",
    "ImageSet",
    "ImageTransform",
    "Provenance",
    "TaskData",
    "decode_image",
    "drawn_views",
    "evaluation_transform",
    "list_images",
    "load_batches",
    "open_data",
    "open_images",
    "training_transform",
]
