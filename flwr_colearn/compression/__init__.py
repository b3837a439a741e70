"""Models travel in fewer bytes: codecs, and what both sides must agree on."""
