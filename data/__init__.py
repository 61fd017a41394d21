"""Tokenizers, datasets and their preparation. Each folder in here is a prepared dataset.

Every program imports this package first, so it prints the message for a missing package.
"""

try:
    import filelock, huggingface_hub, numpy, regex, requests, safetensors, tiktoken  # noqa: E401, F401
    import tokenizers, torch, tqdm  # noqa: E401, F401
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error.name} is not installed here. Activate the environment: . .venv/bin/activate\n"
        "(or install the packages of Folio: pip install -e .)"
    ) from None
except KeyboardInterrupt:  # Ctrl-C while torch is loaded
    raise SystemExit(130) from None
