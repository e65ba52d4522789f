from lfdm_export.serving.models.stream import StreamModel as TritonPythonModel  # noqa: F401
