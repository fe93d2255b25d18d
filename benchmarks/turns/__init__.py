"""What turns and episodes cost: the gateway beside a bare engine, the prefix cache, episodes that wait."""
