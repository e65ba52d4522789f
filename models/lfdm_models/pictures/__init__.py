"""Reading of common picture and clip files: formats, size limits, orientation and times.

Training and the toolkit read only through this package, so that both accept the same files. It needs NumPy and Pillow;
videos need PyAV.
"""
