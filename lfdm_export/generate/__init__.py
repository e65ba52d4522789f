"""Image and label become a clip."""
