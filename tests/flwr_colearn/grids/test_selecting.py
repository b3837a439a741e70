"""Only the named participants take part."""
