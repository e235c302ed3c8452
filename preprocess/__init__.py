"""preprocess: an image folder in, checked shards out; offline, once."""
