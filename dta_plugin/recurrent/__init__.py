"""How shared *states* are read: causal convolutions, delta rules and state-space scans over a prefix tree."""
