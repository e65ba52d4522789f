from lfdm_export.serving.models.sample import SampleModel as TritonPythonModel  # noqa: F401
