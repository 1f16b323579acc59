# SPDX-License-Identifier: Apache-2.0
"""Models by the names they have on Hugging Face's hub: found in its cache on this machine, fetched if asked for.

The cache is huggingface_hub's own, with its environment variables (HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_WHO = "ctxfast.download_model"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Of formats that are read here; a repository may hold the same weights in five.
_BESIDE_WEIGHTS = (".json", ".txt", ".model", "steady_state.safetensors")
_WEIGHTS = (
    re.compile(r"(.*/)?model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r"(.*/)?pytorch_model(-\d+-of-\d+)?\.bin"),
    re.compile(r"weights\.safetensors"),
    re.compile(r".*\.(hdf5|h5)|.*\.ckpt.*"),
)
# One of them lies beside the weights of every model that can be read.
_FIRST_FILES = ("config.json", "modules.json", "bert_config.json", "options.json")
_OTHER_PROGRAMS = ("onnx/", "openvino/", "coreml/", "tf_model.h5", "flax_model", "rust_model")


def is_name(name: str | os.PathLike[str]) -> bool:
    """Whether this could be the name of a model on the hub: ``model`` or ``owner/model``."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def cached_model(name: str) -> Path | None:
    """The folder of a model that was downloaded before, by any program; None if there is none."""
    if not is_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # Not snapshot_download(local_files_only=True), which wants a repository's every file.
    for file in _FIRST_FILES:
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def download_model(name: str) -> Path:
    """The folder of a model of Hugging Face's hub: what is missing or has changed is fetched into the cache.

    Args:
        name: ``model`` or ``owner/model``.

    Configs, tokenizers and sentence-transformers' files are fetched, and the weights in one format: safetensors, else
    PyTorch's, else HDF5 or TensorFlow's.

    Raises:
        ValueError: no name of a model.
        FileNotFoundError: the hub has no such model, or shows it to nobody without a token.
        ConnectionError: the hub cannot be reached.
    """
    if not is_name(name):
        raise ValueError(f"{_WHO}: name is {os.fspath(name)!r}; expected 'model' or 'owner/model', as on the hub.")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        info = HfApi().model_info(name)
        files = [file.rfilename for file in info.siblings or []]
        return Path(snapshot_download(name, allow_patterns=_wanted(files)))
    except HFValidationError as error:
        raise ValueError(f"{_WHO}: name is {name!r}; expected 'model' or 'owner/model': {_first(error)}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{_WHO}: the hub has no model {name!r}, or it is private or gated: log in with `hf auth login`, or set "
            "HF_TOKEN."
        ) from error
    except Exception as error:
        # Errors of its HTTP client pass through huggingface_hub as they are: requests' are OSErrors, httpx' are not.
        is_of_client = type(error).__module__.startswith("httpx")
        if not is_of_client and not isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, OSError)):
            raise
        raise ConnectionError(f"{_WHO}: {name} cannot be fetched: {_first(error)}") from error


def _wanted(files: list[str]) -> list[str]:
    """Of a repository's files those to fetch."""
    own = [file for file in files if not any(other in file for other in _OTHER_PROGRAMS)]
    weights: list[str] = []
    for pattern in _WEIGHTS:
        weights = weights or [file for file in own if pattern.fullmatch(file)]
    return [file for file in own if file.endswith(_BESIDE_WEIGHTS)] + weights


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
