"""Writers of shard files: `.beton` and tar."""
