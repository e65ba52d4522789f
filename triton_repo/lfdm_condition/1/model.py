from lfdm_export.serving.models.condition import ConditionModel as TritonPythonModel  # noqa: F401
