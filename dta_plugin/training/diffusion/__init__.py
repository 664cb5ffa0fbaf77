"""RL of diffusion language models, whatever the framework: options, objectives, update, metrics."""
