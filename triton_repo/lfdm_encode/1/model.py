from lfdm_export.serving.models.encode import EncodeModel as TritonPythonModel  # noqa: F401
