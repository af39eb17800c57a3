"""The parts of rewrite.py: rows in and out, prompts, LLM backends, checks of the LLM's output."""
