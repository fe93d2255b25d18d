"""Terminal output: the launcher's progress view, and control's responses as text and tables."""
