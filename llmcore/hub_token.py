"""The Hugging Face Hub's token: sent as it should be, and never shown. A notebook keeps every message it has shown."""

from __future__ import annotations

import re


def hub_token(token: str | None = None) -> str | None:
    """The token that a call to the Hub will send, without the white space around it.

    Args:
        token: None: what `hf auth login` or HF_TOKEN has set up, which the Hub's library finds by itself.

    Returns:
        None if nothing is set up.

    Raises:
        ValueError: for a token that no request can carry; the message does not show it.
    """
    import huggingface_hub  # here, because only what talks to the Hub needs it

    whose = "the argument token" if token is not None else "the token of HF_TOKEN or `hf auth login`"
    try:
        secret = huggingface_hub.get_token() if token is None else token
        secret = secret.strip() if secret is not None else None
    except Exception as error:  # a file that is no text; bytes or a number as the argument
        raise ValueError(f"{whose} cannot be read as text ({type(error).__name__})") from None
    if secret is None:
        return None
    if not isinstance(secret, str) or not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", secret):
        raise ValueError(
            f"{whose} is empty or holds a character that no token has (allowed are letters, digits and ._~+/=-); "
            "copy it again from huggingface.co/settings/tokens"
        )
    return secret


def hub_failure(error: Exception, secret: str | None) -> str:
    """What went wrong, in the library's words, without the token, which it may have put into them."""
    reason = f"{type(error).__name__}: {error}"
    return reason.replace(secret, "[token]") if secret else reason
