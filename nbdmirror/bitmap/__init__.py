"""Dirty bitmaps: `dirty` holds the bits, `named` gives them names, `sync_state` has the rules of copying by them, and
`recorder` ties those to a disk's writes.

What outlives the daemon: `image` is the form of the file, `mapped` the file itself, `store` keeps bits and file together, and
`guards`, by the rules of `regions`, make writes and flushes wait for what has to be durable first.
"""
