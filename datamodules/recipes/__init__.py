"""Public data sets turned into shards, one file each."""
