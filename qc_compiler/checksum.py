"""What tells a file that was changed from the one that was written."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def checksum(header: Mapping[str, Any], arrays: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """Returns a SHA-256 of a header that is JSON, and of names, dtypes, shapes and values of arrays, in their order."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in arrays:
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
