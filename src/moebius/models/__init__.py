"""Reading models: where the experts of a transformers checkpoint are, and how they lie in memory."""
