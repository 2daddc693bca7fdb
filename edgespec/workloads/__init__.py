"""Real uses of the runtime: small programs on the public parts, with no engine of their own."""
