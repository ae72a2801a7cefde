"""From documents to token shards: what ``shift-data`` does."""
