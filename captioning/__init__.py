"""infer.py's room: sources as shards, writers of every format, and the output that is assembled."""
