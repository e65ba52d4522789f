"""Make a clip from an image and a label."""
