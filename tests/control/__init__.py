"""Control's tests, the page's among them."""
