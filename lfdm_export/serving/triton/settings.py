"""Settings of the served models: chosen once, written into each model's configuration, read back by the models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lfdm_export.batching.order import STEP, find_policy
from lfdm_export.engines.targets import AUTO, check_target_name, device_names
from lfdm_export.errors import InputError
from lfdm_export.protocol.requests import Limits

#: Environment variable that names the bundle if the configuration does not.
BUNDLE_VARIABLE = "LFDM_BUNDLE"
#: Prefix of the limits among a configuration's parameters.
_LIMIT = "limit_"


@dataclass(frozen=True)
class ServingSettings:
    """Settings of all models of a repository.

    Attributes:
        bundle: folder of the bundle, relative to the repository; empty to use LFDM_BUNDLE.
        slots: maximum number of samples that the sampler runs together.
        queue_limit: requests that may wait for a slot; more are refused.
        policy: "step": samples join and leave at each step; or another policy to compare, as MODULE:CLASS; see
            `lfdm_export.batching.order`.
        fixed_batch: run all slots at each step, empty or not, so that a clip's bits do not depend on other clips.
        threads: threads per engine; 0 uses all cores.
        target: what runs the stages, one of `engines.targets`; "auto" for the best that the bundle and machine support.
        device: device of ONNX Runtime: "cpu" or "cuda".
        limits: limits of a request.
        on_device: the model that samples also encodes and decodes, and keeps clips on the device of the target; for
            targets that can.
        self_check: each model uses a target only after a self-check on this machine; not needed if the program that
            starts the server has made it.
    """

    bundle: str = ""
    slots: int = 1
    queue_limit: int = 64
    policy: str = STEP
    fixed_batch: bool = False
    threads: int = 0
    target: str = AUTO
    device: str = "cpu"
    limits: Limits = field(default_factory=Limits)
    on_device: bool = False
    self_check: bool = True

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: a value is out of range.
        """
        for name, least in (("slots", 1), ("queue_limit", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected {least} or more")
        check_target_name(self.target, AUTO)
        if self.device not in device_names():
            raise InputError(f"device is {self.device!r}, expected {' or '.join(device_names())}")
        find_policy(self.policy)

    def to_parameters(self) -> dict[str, str]:
        """The settings as string parameters of a Triton model's configuration."""
        own = {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self) if entry.name != "limits"}
        limits = {_LIMIT + entry.name: _plain(getattr(self.limits, entry.name)) for entry in fields(Limits)}
        return own | limits

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServingSettings:
        """Read the result of `to_parameters`; a missing parameter has its default, unknown ones are ignored.

        Raises:
            InputError: a value cannot be read, or is out of range.
        """
        defaults, limits = cls(), Limits()
        found = {
            entry.name: _read(parameters, entry.name, getattr(defaults, entry.name))
            for entry in fields(cls)
            if entry.name != "limits"
        }
        known = {
            entry.name: _read(parameters, _LIMIT + entry.name, getattr(limits, entry.name)) for entry in fields(limits)
        }
        return cls(**found, limits=Limits(**known))

    def bundle_folder(self, repository: Path) -> Path:
        """The bundle's folder.

        Args:
            repository: the model repository, to which a relative path is relative.

        Raises:
            InputError: neither `bundle` nor the environment names a bundle.
        """
        name = self.bundle or os.environ.get(BUNDLE_VARIABLE, "")
        if not name:
            raise InputError(
                f"no bundle is named: set the environment variable {BUNDLE_VARIABLE} to the folder that lfdm-export "
                "wrote, or the parameter 'bundle' in the model's config.pbtxt"
            )
        return repository / name


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(parameters: Mapping[str, str], name: str, default: Any) -> Any:
    """A parameter, converted to the type of its default."""
    text = parameters.get(name)
    if text is None or isinstance(default, str):
        return default if text is None else text
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = "true or false" if isinstance(default, bool) else "a number"
        raise InputError(f"the parameter {name} in config.pbtxt is {text!r}, expected {kind}") from None
