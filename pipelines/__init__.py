"""pipelines: shards in, batches on the device out, every random decision taken from one plan."""
