"""Facts of the custom operators' domain, for reading and writing its nodes; imports no package."""

DOMAIN = "lfdm"
VERSION = 1
#: Opset of the graphs and of the functions in them: 23 has RotaryEmbedding and Attention.
OPSET = 23
#: Epsilon of every norm inside the operators.
EPSILON = 1e-5
