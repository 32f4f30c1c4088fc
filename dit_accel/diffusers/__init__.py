"""The one place that knows diffusers."""


def install() -> None:
    """Add set_attn_processor and reset_attn_processor where diffusers lacks them."""
