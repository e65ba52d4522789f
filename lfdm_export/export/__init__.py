"""Export: networks to a bundle, and a bundle to plans."""
