"""Dirty bitmaps: `dirty` holds the bits, `sync_state` the rules of copying by them, `recorder` ties them to a disk's writes."""
