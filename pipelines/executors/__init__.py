"""The pipelines: each executes a plan on shards and yields batches."""
