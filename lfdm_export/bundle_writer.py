"""Former place of `lfdm_export.bundle.writer`; imports from here keep working."""

from lfdm_export.bundle.writer import BundleWriter

__all__ = ["BundleWriter"]
