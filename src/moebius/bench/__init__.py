"""How fast a packed model runs and what it takes of memory, beside its original, each in a process of its own."""
