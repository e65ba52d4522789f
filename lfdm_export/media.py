"""Former place of clips' readers and writers; imports from here keep working."""

from lfdm_export.pictures.clip_files import save_clip
from lfdm_export.pictures.clips import load_clip

__all__ = ["load_clip", "save_clip"]
