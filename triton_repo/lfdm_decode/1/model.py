from lfdm_export.serving.models.decode import DecodeModel as TritonPythonModel  # noqa: F401
