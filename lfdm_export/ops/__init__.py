"""Custom operators of domain `lfdm`: torch reference and ONNX function, one folder each.

In a graph such a node is a model-local function that ONNX Runtime inlines. It also carries the
attribute `plugin_namespace`, by which TensorRT's parser replaces it with a plugin where one is
registered.
"""
