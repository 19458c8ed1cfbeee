"""Operations on packed tensors: one folder per operation, with its definition in ``reference.py``."""
