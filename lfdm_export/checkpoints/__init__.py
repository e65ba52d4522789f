"""Files of weights that become networks."""
