"""Whatever touches examples: from bytes in a shard to a batch on the device."""
