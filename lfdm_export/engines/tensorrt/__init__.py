"""TensorRT and TensorRT for RTX: plans, and what runs them."""
