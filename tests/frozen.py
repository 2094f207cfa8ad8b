"""The last thing that a server imports which ranks are forked from: searches for garbage leave out all that it made.

A search looks through every object, a million after torch and transformers, and writes to each of them, which in a
forked process copies its memory. In runs of a few steps on tiny models that was half of the time of a rank.
"""

import gc

gc.collect()
gc.freeze()
