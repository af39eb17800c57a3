"""Long work that survives kills: shards, their queue, progress and journals."""
