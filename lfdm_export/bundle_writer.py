"""Former place of `lfdm_export.bundle.writer`; what is imported from here goes on working."""

from lfdm_export.bundle.writer import BundleWriter

__all__ = ["BundleWriter"]
