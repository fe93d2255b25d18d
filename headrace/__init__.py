"""One package per process of a run. Services never import each other; they meet in Redis and over HTTP."""
