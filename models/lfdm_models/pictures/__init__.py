"""Pictures and clips as people have them: which formats are read, within which bounds, which way up, and when.

Training and the toolkit read through this package alone, so that both refuse and accept the same files. It needs NumPy
and Pillow; videos need PyAV.
"""
