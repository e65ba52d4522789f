"""Facts of the custom operators' domain, for whoever reads or writes a node of it; needs nothing to be installed."""

DOMAIN = "lfdm"
VERSION = 1
#: Opset of the graphs and of the functions in them: 23 has RotaryEmbedding and Attention.
OPSET = 23
#: Of every norm inside the operators.
EPSILON = 1e-5
