from lfdm_export.serving.models.preprocess import PreprocessModel as TritonPythonModel  # noqa: F401
