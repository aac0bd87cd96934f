"""A drive as memory (ZeRO-Infinity): a folder of this process's own on it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from tempfile import TemporaryDirectory
from typing import Any

from xtrain.errors import RequestError

TARGETS = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
"""DeepSpeed's block, and the key below `memory.offload`."""


class Drive:
    """The folders that DeepSpeed swaps to; gone when closed, or when the process ends in good order.

    DeepSpeed empties `nvme_path`/zero_stage_3 at the start: two runs on one path would ruin each other.
    """

    def __init__(self, ds_config: Mapping[str, Any]) -> None:
        self.config: dict[str, Any] = deepcopy(dict(ds_config))
        """The ds_config with the folders in it."""
        self._folders: list[TemporaryDirectory[str]] = []
        for block, key in TARGETS.items():
            target = self.config["zero_optimization"].get(block, {})
            if target.get("device") == "nvme":
                target["nvme_path"] = self._own_folder(target["nvme_path"], f"memory.offload.{key}.path")

    def close(self) -> None:
        for folder in self._folders:
            folder.cleanup()

    def _own_folder(self, path: str, key: str) -> str:
        try:
            folder = TemporaryDirectory(prefix="xtrain-", dir=path, ignore_cleanup_errors=True)
        except OSError as error:
            raise RequestError(
                f"{key}: cannot write to {path}: {error.strerror}; name a folder on the drive"
            ) from error
        self._folders.append(folder)
        return folder.name
