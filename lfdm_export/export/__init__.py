"""Networks become a bundle, and a bundle plans."""
