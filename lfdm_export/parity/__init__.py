"""Each representation of the model against the one before."""
