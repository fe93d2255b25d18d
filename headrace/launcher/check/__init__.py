"""`headrace check`: validates a recipe, tries its prompts and reward, and estimates what the run needs."""
