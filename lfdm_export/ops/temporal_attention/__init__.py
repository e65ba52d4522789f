"""TemporalAttention: norm, projections, rotary embedding, biased softmax attention and residual in one operator."""

#: Prefix of the operators' names; the number of chunks follows.
TEMPORAL_PREFIX = "TemporalAttentionIn"


def operator_name(chunks: int) -> str:
    """Name of the operator with that many chunks; the number is fixed in a function's body."""
    return f"{TEMPORAL_PREFIX}{chunks}"
