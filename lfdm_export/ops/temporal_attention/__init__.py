"""TemporalAttention: norm, projections, rotary embedding, biased softmax attention and residual in one operator."""

#: What an operator's name begins with; the number of its chunks follows.
TEMPORAL_PREFIX = "TemporalAttentionIn"


def operator_name(chunks: int) -> str:
    """Name of the operator that works in that many chunks; a function's body has a fixed number of them."""
    return f"{TEMPORAL_PREFIX}{chunks}"
