"""From weight files to networks."""
