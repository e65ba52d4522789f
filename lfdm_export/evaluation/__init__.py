"""How good the clips of a model are."""
