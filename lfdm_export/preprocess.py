"""Former place of `lfdm_export.pictures.preprocess`; imports from here keep working."""

from lfdm_export.pictures.preprocess import Preprocessing, prepare_image, prepare_images, read_image

__all__ = ["Preprocessing", "prepare_image", "prepare_images", "read_image"]
