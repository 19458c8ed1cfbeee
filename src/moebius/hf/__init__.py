"""transformers: ``from_pretrained`` of packed checkpoints, ``save_pretrained`` of packed models, and the way back.

Nothing is imported here: ``import moebius`` looks into this package, and must stay cheap.
"""
