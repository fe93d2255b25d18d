"""Makes the demo's policies: their tokenizers, their supervised training, their evaluation."""
