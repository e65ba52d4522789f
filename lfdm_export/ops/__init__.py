"""Custom operators of domain `lfdm`: torch reference and ONNX function, one folder per operator.

In a graph, such a node is a model-local function that ONNX Runtime inlines. Its attribute `plugin_namespace` makes
TensorRT's parser replace it with a plugin where one is registered.
"""
