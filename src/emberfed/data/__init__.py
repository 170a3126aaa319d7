"""Data: loading, one schema, partitions over clients, and tokenised shards."""
