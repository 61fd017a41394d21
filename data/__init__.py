"""Tokenizers, datasets and their preparation. Each folder in here is a prepared dataset.

Every program imports this package before torch, so it prints the message for a missing torch.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise SystemExit(
        "torch is not installed here. Activate the environment: . .venv/bin/activate\n"
        "(or install the packages of Folio: pip install -e .)"
    ) from None
