"""Shards in, shards out: source checkpoints, packed checkpoints, and the manifest that says what is in them."""
