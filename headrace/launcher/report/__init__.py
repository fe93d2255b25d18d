"""`headrace report`: one HTML file that says how a run went."""
