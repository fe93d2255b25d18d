"""What durability costs, and what pages and requests cost the control service."""
