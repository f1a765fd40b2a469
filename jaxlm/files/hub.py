"""Downloads files from the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

HUB = "hf:"
"""A name with this prefix is one of the Hub: `hf:owner/name`."""


def download(name: str, patterns: Sequence[str]) -> Path:
    """Downloads files of a model if needed, and returns their folder.

    Args:
      name: `owner/name`.
      patterns: globs for the names of the files.

    Raises:
      ValueError: without the extra `hub`, without a network, and for unknown names.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{HUB}{name} needs the extra hub: pip install 'jaxlm[hub]'"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=list(patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{HUB}{name} cannot be downloaded ({reason}): is there a network, is the "
            "name right, and do you have access to the model?"
        ) from None
    return Path(folder)
