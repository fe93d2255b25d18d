"""What is asked of the loop while it runs, and the configuration that counts now."""
