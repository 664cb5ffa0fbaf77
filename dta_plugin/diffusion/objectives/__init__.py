"""Objectives of diffusion language models at constant memory."""
