"""What is optimised: losses on a subset of tokens (`nat`), and bounds for diffusion language models (`bgpo`)."""
