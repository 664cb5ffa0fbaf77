"""What the tests share: token-sequence shapes, tiny models, the dense oracle and the comparison with it."""
