"""TensorRT and TensorRT for RTX: plans, and the engines that run them."""
