"""What a learner needs to go on as if it had never stopped, durable before anyone relies on it."""
