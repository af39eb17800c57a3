"""Captioner families, loading, fast BLIP attention and decoding, and the Captioner that turns images into captions."""
