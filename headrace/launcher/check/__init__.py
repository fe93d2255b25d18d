"""`headrace check`: tries a recipe's prompts and reward, and says what the run will need."""
