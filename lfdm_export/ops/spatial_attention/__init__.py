"""SpatialAttention: norm, projections, softmax attention over the pixels of a frame, and residual in one operator."""
