"""Where transformers' Auto classes find the classes of this model: in the package foveate.

Foveate writes this file into the folders that it saves. transformers reads it if a caller passes
`trust_remote_code=True` and has not imported foveate; there is no other code in such a folder.
"""

from typing import Any

try:
    import foveate
except ModuleNotFoundError as error:
    if error.name != "foveate":
        raise
    raise ImportError(
        "this model needs the package foveate, which is not installed: run `pip install .` in a clone of "
        "Foveate's repository"
    ) from None


def __getattr__(name: str) -> Any:
    return getattr(foveate, name)
