"""How the demo's policy was made: its tokenizer, its supervised training, its evaluation."""
