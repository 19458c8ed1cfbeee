"""What a quantized model lost: perplexity, divergence from the original, routing; and what it takes: bits, honestly counted."""
