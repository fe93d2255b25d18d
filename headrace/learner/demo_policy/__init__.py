"""Makes the demo's policy: its tokenizer, its supervised training, its evaluation."""
